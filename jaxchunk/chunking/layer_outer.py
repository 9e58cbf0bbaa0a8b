"""Exact gradient, layer by layer: layer inputs grow, keys and values do not.

Forward, each layer runs over all chunks and stores its input; backward, each
layer writes its keys and values once, then takes the chunks in reverse,
forward again and backward. The input's place takes its cotangent, so a token
costs (L + 1) * D elements and one layer's keys, values and gradients.

Source: StreamBP (arXiv 2506.03077).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray

from jaxchunk.chunking.chunk import Lane, chunk_of
from jaxchunk.chunking.ops import Stage
from jaxchunk.chunking.spans import Span, over_layers, put
from jaxchunk.chunking.trainable import widened
from jaxchunk.kernels.vma import vary_like
from jaxchunk.models.transformer import Block, Transformer

_BACK = ("F_keep", "B")


def schedule(num_chunks: int, num_layers: int) -> list[tuple[str, int]]:
  """The operations on a lane's chunks, as `chunk_outer.schedule` names them.

  Each is one layer of one chunk: forward layer by layer; then layer by layer
  from the last, each once more forward and backward over its chunks in
  reverse.
  """
  forward = [("F_drop", i) for i in range(num_chunks)]
  backward = [(op, i) for i in reversed(range(num_chunks)) for op in _BACK]
  return forward * num_layers + backward * num_layers


def lane_gradient(
  stage: Stage,
  model: Transformer,
  lane: Lane,
  num_chunks: Int[Array, ""],
  totals: tuple[Float[Array, ""], list[Array]],
  rng: PRNGKeyArray | None = None,
) -> tuple[Float[Array, ""], list[Array]]:
  """Adds a lane's loss and gradients to the totals; see `chunk_outer`."""
  cfg = model.cfg
  size = stage.chunk_size
  period = len(model.blocks)
  batch, length = lane.tokens.shape
  # inputs[n] is the input of layer n; inputs[L] the output of the last.
  shape = (cfg.num_layers + 1, batch, length, cfg.d_model)
  inputs = jnp.zeros(shape, cfg.dtype)
  share, scratch = _scratch(stage, batch, length)
  inputs, totals = vary_like((inputs, totals), lane, num_chunks)
  scratch = vary_like(scratch, model, lane, num_chunks)

  def chunk(index: Any) -> Any:
    return chunk_of(model, lane, index, size, rng)

  def embed(i: Any, inputs: Array) -> Array:
    return _store(inputs, 0, i, stage.embed(model, chunk(i)))

  def forward(position: int, index: Any, carry: Any) -> Any:
    inputs, scratch = carry
    block = stage.layer(model, position, index)
    number = index * period + position
    spec, place = stage.states[position], share[position]

    def step(i: Any, read: Any, state: Any) -> Any:
      (x,) = read
      y, state, _ = stage.forward_block(
        block, x, chunk(i), position, 0, spec.save(state, i), number
      )
      return y, state

    order, state = _Order(num_chunks, size), spec.reset(scratch[place])
    inputs, state = _sweep(order, inputs, (number,), number + 1, step, state)
    return inputs, put(scratch, place, state)

  def head(i: Any, read: Any, totals: Any) -> Any:
    (x,), (loss, grads) = read, totals
    part, dx, grads = stage.head_sums(with_head, chunk(i), x, grads)
    return dx, (loss + part.astype(loss.dtype), grads)

  def backward(position: int, index: Any, carry: Any) -> Any:
    block = stage.layer(model, position, index)
    number = index * period + position
    spec, place = stage.states[position], share[position]
    inputs, scratch, (loss, grads) = carry
    # A part is scattered once for all chunks; what is whole adds up in place.
    whole = not stage.shards.gathers

    def write(i: Any, state: Any) -> Any:
      x = _load(inputs, number, i, size)
      return stage.write_block(
        block, x, chunk(i), position, spec.save(state, i)
      )

    def step(i: Any, read: Any, carry: Any) -> Any:
      (x, dy), (state, cotangent, sums, loss) = read, carry
      here = chunk(i)
      _, state, saved = stage.forward_block(
        block, x, here, position, 0, spec.restore(state, i), number
      )
      dx, cotangent, gradients = stage.backward_block(
        block, dy, saved, here, position, 0, state, cotangent, number
      )
      if whole:
        sums = stage.add_layer(sums, position, index, gradients)
      else:
        sums = [a + b for a, b in zip(sums, gradients, strict=True)]
      own = stage.router_loss(saved["router"], number)
      loss = loss if own is None else loss + own
      return dx, (state, cotangent, sums, loss)

    state = spec.reset(scratch[place])
    state = lax.fori_loop(0, num_chunks, write, state)
    cotangent = vary_like(spec.zero_cotangent(state), state)
    order = _Order(num_chunks, size, reverse=True)
    reads = (number, number + 1)
    sums = grads if whole else _layer_sums(stage, block, position, lane)
    inputs, (state, _, sums, loss) = _sweep(
      order, inputs, reads, number, step, (state, cotangent, sums, loss)
    )
    grads = sums if whole else stage.add_layer(grads, position, index, sums)
    return inputs, put(scratch, place, state), (loss, grads)

  def unembed(i: Any, grads: list[Array]) -> list[Array]:
    dx = _load(inputs, 0, i, size)
    return stage.add_embedding(grads, model, chunk(i), dx)

  inputs = lax.fori_loop(0, num_chunks, embed, inputs)
  inputs, scratch = over_layers(Span.of(model), forward, (inputs, scratch))
  last, order = cfg.num_layers, _Order(num_chunks, size)
  loss, grads = totals
  with_head, sums = stage.open_head(model, grads)
  inputs, (loss, sums) = _sweep(
    order, inputs, (last,), last, head, (loss, sums)
  )
  totals = (loss, stage.close_head(grads, sums))
  inputs, _, (loss, grads) = over_layers(
    Span.of(model), backward, (inputs, scratch, totals), reverse=True
  )
  return loss, lax.fori_loop(0, num_chunks, unembed, grads)


def _layer_sums(
  stage: Stage, block: Block, position: int, lane: Lane
) -> list[Array]:
  """Room for the gradients of one layer."""
  weights, _ = stage.trainable.block(position).split(block)
  zeros = [jnp.zeros_like(widened(w)) for w in weights]
  return [vary_like(z, w, lane) for z, w in zip(zeros, weights, strict=True)]


def _scratch(
  stage: Stage, batch: int, length: int
) -> tuple[list[int], tuple[Any, ...]]:
  """Room for one layer's state: once for all kinds of the same shapes.

  Returns:
    For each position of the window pattern its place in the second result,
    and the empty states.
  """
  shapes: list[Any] = []
  states: list[Any] = []
  share = []
  for spec in stage.states:
    state = spec.init(1, batch, length)
    shape = jax.tree.map(jnp.shape, state)
    if shape not in shapes:
      shapes.append(shape)
      states.append(state)
    share.append(shapes.index(shape))
  return share, tuple(states)


class _Order(NamedTuple):
  """All chunks of a lane, first to last or last to first."""

  count: Any
  size: int
  reverse: bool = False

  def chunk(self, step: Any) -> Any:
    return self.count - 1 - step if self.reverse else step


def _sweep(
  order: _Order,
  inputs: Float[Array, "L B S D"],
  reads: tuple[Any, ...],
  write: Any,
  step: Callable[[Any, Any, Any], Any],
  carry: Any,
) -> tuple[Array, Any]:
  """Reads a chunk of some layers' inputs and writes one, for every chunk.

  What a step reads is loaded at the end of the step before, after its write:
  with both in one step the compiler lets late readers reach into the buffer,
  and copies the whole of it to keep their view.

  Args:
    order: In which order.
    inputs: The buffer.
    reads: Layers to read.
    write: Layer to write.
    step: From chunk number, what was read, and carry, to what is written and
      the carry.
    carry: For the first step.

  Returns:
    The buffer and the last carry.
  """

  def load(inputs: Array, i: Any) -> tuple[Array, ...]:
    # Behind the last step i is out of range; what is loaded is not used.
    i = jnp.clip(i, 0, order.count - 1)
    return tuple(_load(inputs, layer, i, order.size) for layer in reads)

  def body(n: Any, carried: Any) -> Any:
    inputs, read, carry = carried
    new, carry = step(order.chunk(n), read, carry)
    inputs = _store(inputs, write, order.chunk(n), new)
    return inputs, load(inputs, order.chunk(n + 1)), carry

  start = (inputs, load(inputs, order.chunk(0)), carry)
  inputs, _, carry = lax.fori_loop(0, order.count, body, start)
  return inputs, carry


def _load(inputs: Array, layer: Any, index: Any, size: int) -> Array:
  _, batch, _, width = inputs.shape
  at = [jnp.asarray(n, jnp.int32) for n in (layer, 0, index * size, 0)]
  return lax.dynamic_slice(inputs, at, (1, batch, size, width))[0]


def _store(inputs: Array, layer: Any, index: Any, x: Array) -> Array:
  size = x.shape[1]
  at = [jnp.asarray(n, jnp.int32) for n in (layer, 0, index * size, 0)]
  return lax.dynamic_update_slice(inputs, x[None].astype(inputs.dtype), at)
