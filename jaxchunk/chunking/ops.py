"""Stage operations on chunks: F_drop, F_keep and B as pure functions.

A stage is a run of layers. `F_drop` takes a chunk through it and keeps only
the sequence state; `F_keep` also keeps, by name, what the backward needs in a
slot; `B` takes the cotangent of the stage's output back through the slot,
adding into the cotangent of the sequence state and into the gradients, both
in place.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxchunk.chunking.chunk import Chunk
from jaxchunk.chunking.memory import MemorySpace
from jaxchunk.chunking.scores import weighted_sum
from jaxchunk.chunking.shards import Shards
from jaxchunk.chunking.slots import load, store
from jaxchunk.chunking.spans import Span, over_layers, put
from jaxchunk.chunking.trainable import Subset, Trainable, widened
from jaxchunk.kernels.cross_entropy.api import (
  linear_cross_entropy_with_grad,
)
from jaxchunk.kernels.state import (
  ChunkPlace,
  KVPrefix,
  KVWindow,
  SequenceState,
)
from jaxchunk.kernels.state_host import KVHost
from jaxchunk.kernels.vma import vary_like, varying_axes, zeros_like_type
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.moe import RouterWeights
from jaxchunk.models.tape import Tape
from jaxchunk.models.transformer import Block, Transformer
from jaxchunk.sharding.rules import AXES

# What a slot holds of each layer: "all" the products that the backward reads,
# or only the layer's input and attention's output ("inputs"), from which the
# others are computed again.
Keep = Literal["all", "inputs"]

# One entry per position of the window pattern.
States = tuple[Any, ...]
Slots = tuple[dict[str, Any], ...]


def state_of(
  cfg: ModelConfig,
  window: int | None,
  chunk_size: int,
  grad_dtype: str | None = None,
  implementation: str = "xla",
  kv_memory: MemorySpace = "device",
) -> SequenceState:
  """The sequence state of a layer with this attention window."""
  wide = jnp.promote_types(cfg.dtype, jnp.float32).name
  options: dict[str, Any] = {
    "num_kv_heads": cfg.kv_heads,
    "head_dim": cfg.head_width,
    "chunk_size": chunk_size,
    "scale": cfg.score_scale,
    "softcap": cfg.attention_softcap,
    "dtype": cfg.dtype,
    "grad_dtype": grad_dtype or wide,
    "implementation": implementation,
  }
  if kv_memory == "host":
    return KVHost(window=window, **options)
  if window is None:
    return KVPrefix(**options)
  return KVWindow(window=window, **options)


@dataclasses.dataclass(frozen=True)
class Stage:
  """What the operations need to know before the program runs.

  Attributes:
    chunk_size: C.
    states: The sequence state of each position of the window pattern.
    trainable: Which parameters get gradients.
    keep: What a slot holds.
    shards: How the parameters are split over devices.
    router: What routers' sums count for in the loss; `None` is nothing.
    layers: Of each position of the window pattern, how many there is room for
      in states and slots; `None` is as many as the model has.
  """

  chunk_size: int
  states: tuple[SequenceState, ...]
  trainable: Trainable
  keep: Keep = "all"
  shards: Shards = dataclasses.field(default_factory=Shards)
  router: RouterWeights | None = None
  layers: tuple[int, ...] | None = None

  def layers_of(self, model: Transformer, position: int) -> int:
    """Layers at a position of the window pattern, in states and slots."""
    if self.layers is not None:
      return self.layers[position]
    return model.cfg.layers_of(position)

  def layer(self, model: Transformer, position: int, index: Any) -> Block:
    """Layer `index` (may be traced) at a position of the window pattern."""
    return self.shards.layer(model, position, index)

  def embed(self, model: Transformer, chunk: Chunk) -> Float[Array, "B C D"]:
    """The input of the first layer."""
    return self.shards.embed(model, self.trainable, chunk.tokens)

  def add_layer(
    self,
    grads: list[Array],
    position: int,
    index: Any,
    gradients: Sequence[Array | None],
  ) -> list[Array]:
    """Adds the gradients of a layer, of which others may have parts."""
    parts = self.shards.scatter_layer(self.trainable, position, gradients)
    return self.trainable.add_layer(grads, position, index, parts)

  def add_embedding(
    self,
    grads: list[Array],
    model: Transformer,
    chunk: Chunk,
    dx: Float[Array, "B C D"],
  ) -> list[Array]:
    """Adds the gradient of `embed`."""
    if not self.trainable.chosen[self.trainable.embed_leaf]:
      return grads
    rows, dx = self.shards.embedding_rows(
      model, self.trainable, chunk.tokens, dx
    )
    return self.trainable.add_embedding(grads, model, rows, dx)

  def forward_block(
    self,
    block: Block,
    x: Float[Array, "B C D"],
    chunk: Chunk,
    position: int,
    layer: Any,
    state: Any,
    number: Any,
  ) -> tuple[Array, Any, dict[str, Any]]:
    """One layer of F: its output, the state, and what a slot keeps.

    Args:
      block: The layer.
      x: Its input.
      chunk: The chunk.
      position: Of the layer in the window pattern.
      layer: Of the layer in the arrays of `state`.
      state: Arrays of the sequence state at this position of the pattern.
      number: Of the layer in the model, for dropout.

    Returns:
      `(y, state, saved)`.
    """
    spec = self.states[position]
    tape = Tape()
    q, k, v = block.pre(x, chunk.ropes, tape)
    state = spec.write(state, layer, chunk.place, k, v)
    o, residual = spec.attend(state, layer, chunk.place, q)
    keys = chunk.dropout and chunk.dropout.layer(number)
    y = block.post(x, o, tape, keys, chunk.valid)
    products = tape.saved if self.keep == "all" else {}
    saved = {"x": x, "o": o, "residual": residual, "tape": products}
    return y, state, saved | {"router": tape.router}

  def write_block(
    self,
    block: Block,
    x: Float[Array, "B C D"],
    chunk: Chunk,
    position: int,
    state: Any,
  ) -> Any:
    """Only what a layer does to the sequence state, in its first layer."""
    _, k, v = block.pre(x, chunk.ropes, Tape())
    return self.states[position].write(state, 0, chunk.place, k, v)

  def backward_block(
    self,
    block: Block,
    dy: Float[Array, "B C D"],
    saved: dict[str, Any],
    chunk: Chunk,
    position: int,
    layer: Any,
    state: Any,
    cotangent: Any,
    number: Any,
  ) -> tuple[Array, Any, list[Array]]:
    """One layer of B: `(dx, cotangent, gradients)`; see `forward_block`."""
    return self.backward_parts(
      self.trainable.block(position),
      *(block, dy, saved, {}, chunk, position),
      *(layer, state, cotangent, number),
    )[:3]

  def backward_parts(
    self,
    subset: Subset,
    block: Block,
    dy: Float[Array, "B C D"],
    saved: dict[str, Any],
    taps: dict[str, Array],
    chunk: Chunk,
    position: int,
    layer: Any,
    state: Any,
    cotangent: Any,
    number: Any,
  ) -> tuple[Array, Any, list[Array], dict[str, Array]]:
    """`backward_block` for some of the parameters.

    Args:
      subset: Of the layer, which parameters.
      block: The layer.
      dy: Cotangent of its output.
      saved: What `forward_block` kept.
      taps: Zeros like the products of the layer whose cotangents are wanted.
      chunk: As `forward_block`, like what follows.
      position: Of the layer in the window pattern.
      layer: Of the layer in the arrays of the state.
      state: Of the sequence.
      cotangent: Of the state.
      number: Of the layer in the model.

    Returns:
      `(dx, cotangent, gradients, cotangents of the taps)`.
    """
    x, o = saved["x"], saved["o"]
    keys = chunk.dropout and chunk.dropout.layer(number)
    weights, rebuild = subset.split(block)
    weights = [widened(w) for w in weights]

    def pre(weights: list[Array], taps: Any, x: Array) -> tuple[Array, ...]:
      tape = Tape(saved["tape"], taps=taps)
      return rebuild(weights).pre(x, chunk.ropes, tape)

    def post(
      weights: list[Array], taps: Any, x: Array, o: Array
    ) -> tuple[Array, Any]:
      tape = Tape(saved["tape"], taps=taps)
      y = rebuild(weights).post(x, o, tape, keys, chunk.valid)
      return y, self.router_loss(tape.router, number)

    (_, own), post_vjp = jax.vjp(post, weights, taps, x, o)
    one = vary_like(jax.tree.map(jnp.ones_like, own), own)
    d_post, post_taps, dx_post, do = post_vjp((dy, one))
    (q, k, v), pre_vjp = jax.vjp(pre, weights, taps, x)
    d_qkv, cotangent = self.states[position].attend_bwd(
      state,
      cotangent,
      layer,
      chunk.place,
      q,
      k,
      v,
      o,
      saved["residual"],
      do,
    )
    d_pre, pre_taps, dx_pre = pre_vjp(d_qkv)
    gradients = [a + b for a, b in zip(d_post, d_pre, strict=True)]
    # Each product is in one of the two; its tap in the other owes nothing.
    owed = jax.tree.map(jnp.add, post_taps, pre_taps)
    return dx_post + dx_pre, cotangent, gradients, owed

  def router_loss(self, said: Any, number: Any) -> Float[Array, ""] | None:
    """What a layer's router adds to the loss; `None` is nothing.

    Args:
      said: `saved["router"]` of `forward_block`.
      number: Of the layer in the model.
    """
    if self.router is None:
      return None
    balance = lax.dynamic_index_in_dim(self.router.balance, number, 0, False)
    return self.router._replace(balance=balance).loss(said)

  def add_router_losses(self, loss: Array, slots: Slots, slot: Any) -> Array:
    """The loss, with what the routers of all layers add for a slot's chunk."""
    if self.router is None:
      return loss
    for position, saved in enumerate(slots):
      said = jax.tree.map(
        lambda a: lax.dynamic_index_in_dim(a, slot, 0, False), saved["router"]
      )
      balance = self.router.balance[position :: len(slots)]
      loss += self.router._replace(balance=balance).loss(said)
    return loss

  def init_states(
    self, model: Transformer, batch: int, capacity: int
  ) -> States:
    """Empty sequence states for every layer."""
    return tuple(
      spec.init(self.layers_of(model, position), batch, capacity)
      for position, spec in enumerate(self.states)
    )

  def zero_cotangents(self, states: States) -> States:
    """Zero cotangents of the states."""
    return tuple(
      spec.zero_cotangent(state)
      for spec, state in zip(self.states, states, strict=True)
    )

  def save(self, states: States, index: Any) -> States:
    """Remembers the states before chunk `index`."""
    return tuple(
      spec.save(state, index)
      for spec, state in zip(self.states, states, strict=True)
    )

  def restore(self, states: States, index: Any) -> States:
    """Goes back to the states before chunk `index`."""
    return tuple(
      spec.restore(state, index)
      for spec, state in zip(self.states, states, strict=True)
    )

  def weigh_cotangents(
    self, states: States, cotangents: States, place: ChunkPlace, factor: float
  ) -> States:
    """What is owed to a chunk's own part of the states, times `factor`."""
    return tuple(
      spec.weigh_cotangent(state, cotangent, place, factor)
      for spec, state, cotangent in zip(
        self.states, states, cotangents, strict=True
      )
    )

  def skip_cotangents(
    self, states: States, cotangents: States, place: ChunkPlace
  ) -> States:
    """Of the states before a chunk that is not differentiated."""
    return tuple(
      spec.skip_cotangent(state, cotangent, place)
      for spec, state, cotangent in zip(
        self.states, states, cotangents, strict=True
      )
    )

  def init_slots(self, model: Transformer, chunk: Chunk, count: int) -> Slots:
    """Empty slots for `count` chunks: `[count, layers, ...]` each array."""
    cfg = model.cfg
    x = jnp.zeros((*chunk.tokens.shape, cfg.d_model), cfg.dtype)
    x = vary_like(x, chunk)
    slots = []
    for position in range(len(model.blocks)):
      leading = (count, self.layers_of(model, position))

      def one_layer(x: Array, position: int = position) -> dict[str, Any]:
        capacity = chunk.place.lane_segment_ids.shape[1]
        state = self.states[position].init(1, x.shape[0], capacity)
        state = vary_like(state, model, chunk)
        block = self.layer(model, position, 0)
        return self.forward_block(block, x, chunk, position, 0, state, 0)[2]

      saved = jax.eval_shape(one_layer, x)
      slots.append(
        jax.tree.map(functools.partial(zeros_like_type, leading=leading), saved)
      )
    return tuple(slots)

  def forward(
    self,
    model: Transformer,
    chunk: Chunk,
    states: States,
    slots: Slots | None = None,
    slot: Any = 0,
  ) -> tuple[Float[Array, "B C D"], States, Slots | None]:
    """F_keep into a slot, or F_drop without slots.

    Args:
      model: The parameters.
      chunk: The chunk.
      states: Sequence states; those of chunks before it are there.
      slots: What is kept of live chunks, or `None` to keep nothing.
      slot: Where to keep this one; may be traced.

    Returns:
      The last layer's output (before the final norm), the states and slots.
    """
    x = vary_like(self.embed(model, chunk), chunk)
    span = Span.of(model)
    return self.forward_layers(model, span, chunk, x, states, slots, slot)

  def forward_layers(
    self,
    model: Transformer,
    span: Span,
    chunk: Chunk,
    x: Float[Array, "B C D"],
    states: States,
    slots: Slots | None = None,
    slot: Any = 0,
  ) -> tuple[Float[Array, "B C D"], States, Slots | None]:
    """`forward` through some of the layers, from the first one's input x.

    The first layer of the span is the first one of the states and slots.
    """

    def layer(position: int, index: Any, carry: Any) -> Any:
      x, states, slots = carry
      block = self.layer(model, position, span.first + index)
      number = span.layer(position, index)
      x, state, saved = self.forward_block(
        block, x, chunk, position, index, states[position], number
      )
      states = put(states, position, state)
      if slots is not None:
        kept = jax.tree.map(
          lambda a, new: store(a, new, slot, index), slots[position], saved
        )
        slots = put(slots, position, kept)
      return x, states, slots

    states = vary_like(states, model, chunk)
    return over_layers(span, layer, (x, states, slots))

  def backward(
    self,
    model: Transformer,
    chunk: Chunk,
    dx: Float[Array, "B C D"],
    states: States,
    cotangents: States,
    slots: Slots,
    slot: Any,
    grads: list[Array],
  ) -> tuple[States, list[Array]]:
    """B: from the cotangent of `forward`'s output to those of everything.

    Args:
      model: The parameters.
      chunk: The chunk.
      dx: Cotangent of the last layer's output.
      states: Sequence states.
      cotangents: Of the states, from later chunks.
      slots: What was kept.
      slot: Which slot is this chunk's.
      grads: Accumulators in the order of `trainable`.

    Returns:
      The cotangents and accumulators, with this chunk's parts added.
    """
    span = Span.of(model)
    dx, cotangents, grads = self.backward_layers(
      model, span, chunk, dx, states, cotangents, slots, slot, grads
    )
    return cotangents, self.add_embedding(grads, model, chunk, dx)

  def backward_layers(
    self,
    model: Transformer,
    span: Span,
    chunk: Chunk,
    dx: Float[Array, "B C D"],
    states: States,
    cotangents: States,
    slots: Slots,
    slot: Any,
    grads: list[Array],
  ) -> tuple[Float[Array, "B C D"], States, list[Array]]:
    """`backward` through the layers of `forward_layers`.

    Returns:
      The cotangent of the first layer's input, then as `backward`.
    """

    def layer(position: int, index: Any, carry: Any) -> Any:
      dx, cotangents, grads = carry
      block = self.layer(model, position, span.first + index)
      saved = jax.tree.map(lambda a: load(a, slot, index), slots[position])
      dx, cotangent, gradients = self.backward_block(
        block,
        dx,
        saved,
        chunk,
        position,
        index,
        states[position],
        cotangents[position],
        span.layer(position, index),
      )
      cotangents = put(cotangents, position, cotangent)
      grads = self.add_layer(grads, position, span.first + index, gradients)
      return dx, cotangents, grads

    dx, grads = vary_like((dx, grads), chunk, dx)
    cotangents = vary_like(cotangents, model, chunk, dx)
    carry = (dx, cotangents, grads)
    return over_layers(span, layer, carry, reverse=True)

  def head_gradient(
    self,
    model: Transformer,
    chunk: Chunk,
    x: Float[Array, "B C D"],
    grads: list[Array],
  ) -> tuple[Array, Array, list[Array]]:
    """Loss of a chunk and its gradient, in one pass over the vocabulary.

    The same as `open_head`, `head_sums` and `close_head`.

    Args:
      model: The parameters.
      chunk: The chunk; its weights are the cotangents of the tokens' nll.
      x: Output of the last layer.
      grads: Accumulators in the order of `trainable`.

    Returns:
      `(sum(weights * nll), dx, grads)`.
    """
    whole, sums = self.open_head(model, grads)
    loss, dx, sums = self.head_sums(whole, chunk, x, sums)
    return loss, dx, self.close_head(grads, sums)

  def open_head(
    self, model: Transformer, grads: list[Array]
  ) -> tuple[Transformer, list[Array]]:
    """The model with its head whole, and accumulators with room for that."""
    whole = self.shards.with_head(model, self.trainable)
    accumulator = self.trainable.unembed_accumulator(grads)
    if accumulator is None or not self.shards.gathers:
      return whole, grads
    room = jnp.zeros(whole.unembed.shape, accumulator.dtype)
    room = vary_like(room, accumulator)
    return whole, self.trainable.set_unembed(grads, room)

  def close_head(self, grads: list[Array], sums: list[Array]) -> list[Array]:
    """The accumulators, with what `head_sums` added up behind `open_head`."""
    old = self.trainable.unembed_accumulator(grads)
    new = self.trainable.unembed_accumulator(sums)
    if old is None or new is None or not self.shards.gathers:
      return sums
    part = self.shards.scatter_head(self.trainable, new)
    return self.trainable.set_unembed(sums, old + part)

  def head_sums(
    self,
    model: Transformer,
    chunk: Chunk,
    x: Float[Array, "B C D"],
    grads: list[Array],
  ) -> tuple[Array, Array, list[Array]]:
    """`head_gradient` between `open_head` and `close_head`."""

    def norm(weights: list[Array], x: Array) -> Array:
      return rebuild(weights)(x)

    weights, rebuild = self.trainable.final_norm().split(model.final_norm)
    weights = [widened(w) for w in weights]
    h, norm_vjp = jax.vjp(norm, weights, x)
    accumulator = self.trainable.unembed_accumulator(grads)
    split = varying_axes(model.unembed) - varying_axes(h)
    axes = tuple(axis for axis in AXES if axis in split)
    nll, _, dh, accumulator = linear_cross_entropy_with_grad(
      h,
      model.unembed,
      chunk.targets,
      chunk.weights,
      softcap=model.cfg.logit_softcap,
      dw_init=accumulator,
      axis=axes or None,
    )
    d_norm, dx = norm_vjp(dh)
    grads = self.trainable.set_unembed(grads, accumulator)
    grads = self.trainable.add_final_norm(grads, d_norm)
    return weighted_sum(chunk.weights, nll), dx, grads
