"""Keys, values and their gradients in host memory, a chunk at a time on device.

The prefix of a long sequence need not lie in device memory: a chunk attends to
one earlier chunk after the other, and what belongs to the next one is copied
while this one is worked on. Device memory then does not grow with the length
of the sequence; the copies of a chunk are hidden where its arithmetic, which
grows with the square of the chunk, takes longer than they do.

J = capacity / C chunks. Host arrays are `[L*J,B,K,C,H]`: a copy is whole
entries of the first axis, which is what a TPU's copies to and from the host
can do.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxchunk.kernels.attention.api import merge
from jaxchunk.kernels.attention.backends import passes
from jaxchunk.kernels.attention.mask import AttentionMask
from jaxchunk.kernels.state import Arrays, ChunkPlace, KVPrefix
from jaxchunk.kernels.vma import vary_like

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVHost(KVPrefix):
  """`KVPrefix`, or with a window `KVWindow`, whose arrays are in host memory.

  Host memory per token and layer is `2 * K * H` elements of `dtype` and as
  many of `grad_dtype` in training, of window layers too. What earlier chunks
  cannot show a chunk (another segment, outside the window) is not copied.

  Attributes:
    window: Number of keys that a token sees, itself included; `None` is all.
  """

  window: int | None = None

  def init(self, layers: int, batch: int, capacity: int) -> Arrays:
    """See `SequenceState`; nothing is read before it is written."""
    chunks = capacity // self.chunk_size
    heads, size = self.num_kv_heads, (self.chunk_size, self.head_dim)
    shape = (layers * chunks, batch, heads, *size)
    return _on_host(shape, self.dtype), _on_host(shape, self.dtype)

  def write(
    self, state: Arrays, layer: Any, place: ChunkPlace, k: Array, v: Array
  ) -> Arrays:
    """See `SequenceState`."""
    row = self._row(layer, place, place.index)
    return tuple(
      _store(host, new.astype(host.dtype), row)
      for host, new in zip(state, (k, v), strict=True)
    )

  def attend(
    self, state: Arrays, layer: Any, place: ChunkPlace, q: Array
  ) -> tuple[Array, Arrays]:
    """See `SequenceState`; the residual is the log-sum-exp."""
    forward = passes(self.implementation).forward
    wide = jnp.promote_types(q.dtype, jnp.float32)
    first = self.first_chunk(place)

    def fetch(j: Any) -> tuple[Array, ...]:
      row = self._row(layer, place, jnp.minimum(j, place.index))
      return tuple(_load(host, row) for host in state)

    def step(j: Any, carry: Any) -> Any:
      (o, lse), (k, v) = carry
      behind = fetch(j + 1)
      mask = self.mask_of(place, j)
      part = forward(q, k[None], v[None], mask, layer=0, **self.options)
      return merge(o, lse, part[0].astype(wide), part[1]), behind

    start = jnp.zeros(q.shape, wide), jnp.full(q.shape[:-1], -jnp.inf, wide)
    carry = vary_like((start, fetch(first)), q, state, place, layer)
    (o, lse), _ = lax.fori_loop(first, place.index + 1, step, carry)
    return o.astype(q.dtype), lse

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
    """See `SequenceState`.

    The cotangent is `(dk, dv, reached)`: host arrays, and for each of their
    entries whether a later chunk has added to it, `[L*J]`; one that has not
    been reached holds anything and counts as zero.
    """
    backward = passes(self.implementation).backward
    wide = jnp.promote_types(q.dtype, jnp.float32)
    dk_host, dv_host, reached = cotangent

    first = self.first_chunk(place)

    def fetch(j: Any) -> tuple[Array, ...]:
      row = self._row(layer, place, jnp.minimum(j, place.index))
      return tuple(_load(host, row) for host in state)

    def attend_part(
      j: Any, dq: Array, sums: tuple[Array, Array], kv: tuple[Array, ...]
    ) -> tuple[Array, list[Array]]:
      k, v = kv
      row = self._row(layer, place, j)
      # What is there already is added behind the kernel, not in it: so it can
      # be on its way while the kernel runs.
      old = (jnp.where(reached[row], _load(g, row), 0) for g in sums)
      zero = vary_like(jnp.zeros((1, *k.shape), self.grad_dtype), dq)
      dq_j, *new = backward(
        *(q, k[None], v[None], self.mask_of(place, j), o, residual, do),
        *(zero, zero),
        dkv_start=0,
        layer=0,
        **self.options,
      )
      grads = [a + b[0] for a, b in zip(old, new, strict=True)]
      return dq + dq_j.astype(wide), grads

    def step(j: Any, carry: Any) -> Any:
      dq, sums, kv = carry
      behind = fetch(j + 1)
      dq, grads = attend_part(j, dq, sums, kv)
      row = self._row(layer, place, j)
      dk, dv = (_store(a, g, row) for a, g in zip(sums, grads, strict=True))
      return dq, (dk, dv), behind

    carry = (jnp.zeros(q.shape, wide), (dk_host, dv_host), fetch(first))
    carry = vary_like(carry, q, state, cotangent, place, layer, do)
    dq, sums, kv = lax.fori_loop(first, place.index, step, carry)
    # Every later chunk has been differentiated: the chunk's own part is whole,
    # and nobody asks for it again.
    dq, (dk, dv) = attend_part(place.index, dq, sums, kv)
    rows = jnp.arange(len(reached))
    here = rows >= self._row(layer, place, first)
    here &= rows < self._row(layer, place, place.index)
    grads = dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype)
    return grads, (*sums, reached | here)

  def mask_of(self, place: ChunkPlace, j: Any) -> AttentionMask:
    """What a chunk's queries see of chunk j's keys."""
    size = self.chunk_size
    keys = lax.dynamic_slice_in_dim(place.lane_segment_ids, j * size, size, 1)
    mask = AttentionMask.causal(place.start - j * size)
    mask &= AttentionMask.segments(place.segment_ids, keys)
    if self.window is not None:
      mask &= AttentionMask.window(self.window)
    return mask

  def first_chunk(self, place: ChunkPlace) -> Int[Array, ""]:
    """The first chunk with keys that a chunk's queries may see."""
    ids, lane = place.segment_ids, place.lane_segment_ids
    top = jnp.iinfo(ids.dtype).max
    oldest = jnp.where(ids > 0, ids, top).min(1, keepdims=True)
    # Where a row sees nothing no id matches, and its own chunk will do.
    start = jnp.where(
      (oldest < top)[:, 0], jnp.argmax(lane == oldest, 1), place.start
    ).min()
    if self.window is not None:
      start = jnp.maximum(start, place.start - self.window + 1)
    return jnp.minimum(start // self.chunk_size, place.index).astype(jnp.int32)

  def zero_cotangent(self, state: Arrays) -> Arrays:
    """See `SequenceState`; no entry has been reached."""
    dk, dv = (_on_host(host.shape, self.grad_dtype) for host in state)
    return dk, dv, jnp.zeros(len(state[0]), bool)

  def weigh_cotangent(
    self, state: Arrays, cotangent: Arrays, place: ChunkPlace, factor: float
  ) -> Arrays:
    """Not written yet.

    Raises:
      NotImplementedError: Always.
    """
    raise NotImplementedError(
      "keys and values in host memory do not go with chunks drawn at random; "
      "KVPrefix and KVWindow can do that"
    )

  def skip_cotangent(
    self, state: Arrays, cotangent: Arrays, place: ChunkPlace
  ) -> Arrays:
    """See `SequenceState`; nothing moves, because all chunks have rows."""
    return cotangent

  def _row(self, layer: Any, place: ChunkPlace, j: Any) -> Any:
    return layer * (place.lane_segment_ids.shape[1] // self.chunk_size) + j


def _on_host(shape: tuple[int, ...], dtype: Any) -> Array:
  """An array in host memory that never was on the device; holds anything.

  XLA allocates it and does not fill it: a broadcast of a scalar that is in
  host memory already.
  """
  scalar = jax.device_put(jnp.zeros((), dtype), _HOST)
  return lax.broadcast(scalar, shape)


def _load(host: Float[Array, "J B K C H"], row: Any) -> Array:
  at = [jnp.asarray(n, jnp.int32) for n in (row, 0, 0, 0, 0)]
  part = lax.dynamic_slice(host, at, (1, *host.shape[1:]))
  return jax.device_put(part, _DEVICE)[0]


def _store(host: Float[Array, "J B K C H"], new: Array, row: Any) -> Array:
  at = [jnp.asarray(n, jnp.int32) for n in (row, 0, 0, 0, 0)]
  part = jax.device_put(new[None].astype(host.dtype), _HOST)
  return lax.dynamic_update_slice(host, part, at)
