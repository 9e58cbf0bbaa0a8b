"""What a layer remembers of the chunks before: the sequence-state protocol.

The chunk executor runs chunks of a sequence forward in order and backward in
reverse, some of them forward twice. Between chunks a layer's memory is its
sequence state: the keys and values of the prefix, or a window, or anything
that can be written, read, and differentiated. The executor knows only this
protocol.

A state is two things: a frozen description (which implements the protocol)
and its arrays, a pytree that the executor carries through its loops, with the
layers stacked in front so that updates happen in place.
"""

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxchunk.kernels.attention import tables
from jaxchunk.kernels.attention.backends import passes
from jaxchunk.kernels.attention.block_sizes import BlockSizes, look_up
from jaxchunk.kernels.attention.mask import AttentionMask

# Arrays of a state, or of its cotangent.
Arrays = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ChunkPlace:
  """Where a chunk lies in its lane.

  Attributes:
    index: Number of the chunk; may be traced.
    start: Tokens of the lane before it; may be traced.
    segment_ids: Of the chunk, `[B,C]`; 0 is padding.
    lane_segment_ids: Of the whole lane, `[B,S]`.
    cotangent_start: Where the chunk's own part of the cotangent begins, if
      that is not at `start`: in an arena (`KVArena`).
  """

  index: Int[Array, ""]
  start: Int[Array, ""]
  segment_ids: Int[Array, "B C"]
  lane_segment_ids: Int[Array, "B S"]
  cotangent_start: Int[Array, ""] | None = None


class SequenceState(Protocol):
  """A layer's memory of earlier chunks, forward and backward.

  For each chunk the executor calls `write` then `attend`; in the backward
  pass, last chunk first, `attend_bwd`. Before a chunk runs forward for the
  first time it calls `save`; before it runs forward again, `restore`.
  """

  def init(self, layers: int, batch: int, capacity: int) -> Arrays:
    """Arrays of an empty state for lanes of up to `capacity` tokens."""

  def write(
    self,
    state: Arrays,
    layer: Any,
    place: ChunkPlace,
    k: Float[Array, "B K C H"],
    v: Float[Array, "B K C H"],
  ) -> Arrays:
    """The state with a chunk's keys and values of one layer added."""

  def attend(
    self,
    state: Arrays,
    layer: Any,
    place: ChunkPlace,
    q: Float[Array, "B K G C H"],
  ) -> tuple[Float[Array, "B K G C H"], Arrays]:
    """Reads the state, after `write`: the output, and what backward needs."""

  def attend_bwd(
    self,
    state: Arrays,
    cotangent: Arrays,
    layer: Any,
    place: ChunkPlace,
    q: Float[Array, "B K G C H"],
    k: Float[Array, "B K C H"],
    v: Float[Array, "B K C H"],
    o: Float[Array, "B K G C H"],
    residual: Arrays,
    do: Float[Array, "B K G C H"],
  ) -> tuple[tuple[Array, Array, Array], Arrays]:
    """The adjoint of `write` then `attend` for one chunk.

    Args:
      state: Arrays in which every chunk up to this one has been written.
      cotangent: Of the state after this chunk, from the chunks behind it.
      layer: Which layer; may be traced.
      place: Where the chunk lies.
      q: Queries.
      k: Keys as written.
      v: Values as written.
      o: Output of `attend`.
      residual: The second result of `attend`.
      do: Cotangent of o.

    Returns:
      `(dq, dk, dv)` in the dtypes of q, k and v, and the cotangent of the
      state before this chunk, updated in place.
    """

  def reset(self, state: Arrays) -> Arrays:
    """An empty state in the arrays of a used one."""

  def save(self, state: Arrays, index: Any) -> Arrays:
    """Remembers the state before chunk `index`."""

  def restore(self, state: Arrays, index: Any) -> Arrays:
    """Goes back to the state before chunk `index`."""

  def zero_cotangent(self, state: Arrays) -> Arrays:
    """Arrays for the cotangent, zero."""

  def weigh_cotangent(
    self, state: Arrays, cotangent: Arrays, place: ChunkPlace, factor: float
  ) -> Arrays:
    """Before `attend_bwd` of a chunk drawn at random: its own part weighed.

    What is owed to the chunk's own keys and values is multiplied by `factor`;
    what is owed to those before it is not. With `skip_cotangent`, which the
    chunks that were not drawn run instead of `attend_bwd`, the mean over
    draws with probability `1 / factor` must be what `attend_bwd` gives
    without either. A state that cannot tell the two parts apart multiplies
    all of it, and skips to zero.

    Args:
      state: As `attend_bwd`, with all layers.
      cotangent: Of the state after the chunk, all layers.
      place: Where the chunk lies.
      factor: One over the probability.

    Returns:
      The cotangent, updated in place.
    """

  def skip_cotangent(
    self, state: Arrays, cotangent: Arrays, place: ChunkPlace
  ) -> Arrays:
    """Of the state before a chunk that is not differentiated, all layers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVPrefix:
  """Keys and values of the whole prefix: full causal attention.

  Memory per token and layer: `2 * K * H` elements of `dtype`, and as many of
  `grad_dtype` in training. A snapshot is a length, so `save` and `restore`
  have nothing to do: what lies behind a chunk is hidden by the causal mask.

  Attributes:
    num_kv_heads: K.
    head_dim: H.
    chunk_size: C.
    scale: Factor on the scores.
    softcap: Cap on the scores.
    dtype: Of keys and values.
    grad_dtype: Of their gradients; bf16 here loses accuracy with every chunk
      that is added.
    implementation: Of attention, a name in `kernels/attention/backends.py`.
    blocks: Block sizes of "xla"; `None` for the defaults.
  """

  num_kv_heads: int
  head_dim: int
  chunk_size: int
  scale: float
  softcap: float | None = None
  dtype: str = "float32"
  grad_dtype: str = "float32"
  implementation: str = "xla"
  blocks: BlockSizes | None = None

  def init(self, layers: int, batch: int, capacity: int) -> Arrays:
    """See `SequenceState`."""
    shape = (layers, batch, self.num_kv_heads, capacity, self.head_dim)
    return jnp.zeros(shape, self.dtype), jnp.zeros(shape, self.dtype)

  def write(
    self, state: Arrays, layer: Any, place: ChunkPlace, k: Array, v: Array
  ) -> Arrays:
    """See `SequenceState`."""
    at = _at(layer, place.start)
    return tuple(
      lax.dynamic_update_slice(cache, new[None].astype(cache.dtype), at)
      for cache, new in zip(state, (k, v), strict=True)
    )

  def mask(self, place: ChunkPlace) -> AttentionMask:
    """What a chunk's queries see."""
    segments = (place.segment_ids, place.lane_segment_ids)
    return AttentionMask.causal(place.start) & AttentionMask.segments(*segments)

  def attend(
    self, state: Arrays, layer: Any, place: ChunkPlace, q: Array
  ) -> tuple[Array, Arrays]:
    """See `SequenceState`; the residual is the log-sum-exp."""
    k, v = state
    forward = passes(self.implementation).forward
    return forward(q, k, v, self.mask(place), layer=layer, **self.options)

  @property
  def options(self) -> dict[str, Any]:
    """What both passes of attention take."""
    options: dict[str, Any] = {"scale": self.scale, "softcap": self.softcap}
    if self.blocks is not None:
      options["blocks"] = self.blocks
    return options

  def backward_options(self, place: ChunkPlace) -> dict[str, Any]:
    """What the backward pass takes."""
    options = self.options
    if place.cotangent_start is not None and self.implementation != "xla":
      # Chunks lie anywhere: no block of keys is to reach into two.
      options["dkv_multiple"] = self.chunk_size
    return options

  def attend_bwd(
    self,
    state: Arrays,
    cotangent: Arrays,
    layer: Any,
    place: ChunkPlace,
    q: Array,
    k: Array,
    v: Array,
    o: Array,
    residual: Arrays,
    do: Array,
  ) -> tuple[tuple[Array, Array, Array], Arrays]:
    """See `SequenceState`."""
    first = self.first_cotangent(state, cotangent, place)
    (k_cache, v_cache), (dk_cache, dv_cache) = state, cotangent
    dq, dk_cache, dv_cache = passes(self.implementation).backward(
      q,
      k_cache,
      v_cache,
      self.mask(place),
      o,
      residual,
      do,
      dk_cache,
      dv_cache,
      dkv_start=first,
      layer=layer,
      **self.backward_options(place),
    )
    # Every later chunk has been differentiated: this chunk's part is whole.
    at = _at(layer, place.start - first)
    size = (1, *k.shape)
    cotangent = (dk_cache, dv_cache)
    dk, dv = (lax.dynamic_slice(g, at, size)[0] for g in cotangent)
    cotangent = self.pass_chunk(state, cotangent, layer)
    return (dq, dk.astype(k.dtype), dv.astype(v.dtype)), cotangent

  def first_cotangent(
    self, state: Arrays, cotangent: Arrays, place: ChunkPlace
  ) -> Any:
    """The key at row 0 of the cotangent."""
    del state, cotangent, place
    return 0

  def pass_chunk(self, state: Arrays, cotangent: Arrays, layer: Any) -> Arrays:
    """Makes ready for the chunk before; nothing to do."""
    del state, layer
    return cotangent

  def reset(self, state: Arrays) -> Arrays:
    """See `SequenceState`; what is left over is hidden by the causal mask."""
    return state

  def save(self, state: Arrays, index: Any) -> Arrays:
    """See `SequenceState`."""
    del index
    return state

  def restore(self, state: Arrays, index: Any) -> Arrays:
    """See `SequenceState`."""
    del index
    return state

  def zero_cotangent(self, state: Arrays) -> Arrays:
    """See `SequenceState`."""
    return self.init_cotangent(state[0].shape[0], *state[0].shape[1:4:2])

  def init_cotangent(self, layers: int, batch: int, capacity: int) -> Arrays:
    """Zeros for the gradients of keys and values of `capacity` tokens."""
    shape = (layers, batch, self.num_kv_heads, capacity, self.head_dim)
    return tuple(jnp.zeros(shape, self.grad_dtype) for _ in range(2))

  def weigh_cotangent(
    self, state: Arrays, cotangent: Arrays, place: ChunkPlace, factor: float
  ) -> Arrays:
    """See `SequenceState`; the chunk's own part is its rows."""
    at = _at(0, place.start - self.first_cotangent(state, cotangent, place))

    def weigh(g: Array) -> Array:
      size = (*g.shape[:3], self.chunk_size, g.shape[4])
      own = lax.dynamic_slice(g, at, size)
      return lax.dynamic_update_slice(g, own * jnp.asarray(factor, g.dtype), at)

    return tuple(weigh(g) for g in cotangent)

  def skip_cotangent(
    self, state: Arrays, cotangent: Arrays, place: ChunkPlace
  ) -> Arrays:
    """See `SequenceState`; the chunk's rows are not read again."""
    del place

    def skip(layer: Any, cotangent: Arrays) -> Arrays:
      return self.pass_chunk(state, cotangent, layer)

    return lax.fori_loop(0, state[0].shape[0], skip, cotangent)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVWindow(KVPrefix):
  """Sliding-window attention: each token sees the last `window` tokens.

  Keys and values are kept for the whole lane, because chunks are run forward
  again from them, but their gradients only for a window and a chunk: the
  rows move back by a chunk after each chunk's backward. (With "xla"; the
  Pallas kernels want rows aligned to their blocks, and get the whole lane.)

  Attributes:
    window: Number of keys that a token sees, itself included.
  """

  window: int

  def mask(self, place: ChunkPlace) -> AttentionMask:
    """What a chunk's queries see."""
    return super().mask(place) & AttentionMask.window(self.window)

  def zero_cotangent(self, state: Arrays) -> Arrays:
    """See `SequenceState`."""
    if self.implementation != "xla":
      return super().zero_cotangent(state)
    layers, batch, heads, capacity, width = state[0].shape
    # A block of keys may start two blocks before the window (one for the
    # window's first key, one for the last, overlapping block) and end one
    # block behind the chunk.
    block = self.key_block(capacity)
    rows = min(self.chunk_size + self.window + 3 * block, capacity)
    shape = (layers, batch, heads, rows, width)
    return tuple(jnp.zeros(shape, self.grad_dtype) for _ in state)

  def key_block(self, capacity: int) -> int:
    """Keys that the backward pass of "xla" takes at a time."""
    default = look_up(tables.XLA, self.head_dim, BlockSizes())
    return min((self.blocks or default).kv_bwd, capacity)

  def first_cotangent(
    self, state: Arrays, cotangent: Arrays, place: ChunkPlace
  ) -> Any:
    """The key at row 0 of the cotangent; negative near the lane's start."""
    capacity, rows = state[0].shape[3], cotangent[0].shape[3]
    if rows == capacity:
      return 0
    block = self.key_block(capacity)
    return place.start + self.chunk_size + block - rows

  def pass_chunk(self, state: Arrays, cotangent: Arrays, layer: Any) -> Arrays:
    """Moves the rows back by one chunk."""
    capacity, rows = state[0].shape[3], cotangent[0].shape[3]
    if rows == capacity:
      return cotangent

    def move(g: Array) -> Array:
      one = lax.dynamic_index_in_dim(g, layer, keepdims=True)
      pad = ((0, 0), (0, 0), (0, 0), (self.chunk_size, 0), (0, 0))
      one = jnp.pad(one, pad)[:, :, :, :rows]
      return lax.dynamic_update_slice(g, one, _at(layer, 0))

    return tuple(move(g) for g in cotangent)


def _at(layer: Any, start: Any) -> tuple[Array, ...]:
  return tuple(jnp.asarray(n, jnp.int32) for n in (layer, 0, 0, start, 0))
