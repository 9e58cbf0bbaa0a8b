"""B and W apart: a backward pass without, and with only, gradients of matrices.

`backward_layers` goes back through a stage for the cotangent of its input. Of
every product with a matrix it leaves the cotangent ("owed"); with what was kept
of the chunk, `weight_layers` makes the gradients of matrices from them later.
Vectors (norms, biases) are cheap, and done at once.

Source: Qi et al., Zero bubble pipeline parallelism (arXiv 2401.10241).
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxchunk.chunking.chunk import Chunk
from jaxchunk.chunking.ops import Slots, Stage, States
from jaxchunk.chunking.slots import load, store
from jaxchunk.chunking.spans import Span, over_layers, put
from jaxchunk.chunking.trainable import Subset, widened
from jaxchunk.kernels.vma import vary_like, zeros_like_type
from jaxchunk.models.tape import Tape
from jaxchunk.models.transformer import Block, Transformer

# For each position of the window pattern, the cotangents of its products.
Owed = tuple[dict[str, Array], ...]


def init_owed(
  stage: Stage, model: Transformer, chunk: Chunk, slots: Slots, count: int
) -> Owed:
  """Empty slots for what `count` chunks owe: `[count, layers, ...]` each."""
  owed = []
  for position, saved in enumerate(slots):
    kinds = _products_of(stage, model, chunk, position, saved)
    leading = (count, stage.layers_of(model, position))
    make = functools.partial(zeros_like_type, leading=leading)
    owed.append(jax.tree.map(make, kinds))
  return tuple(owed)


def backward_layers(
  stage: Stage,
  model: Transformer,
  span: Span,
  chunk: Chunk,
  dx: Float[Array, "B C D"],
  states: States,
  cotangents: States,
  slots: Slots,
  slot: Any,
  grads: list[Array],
  owed: Owed,
  owed_slot: Any,
) -> tuple[Float[Array, "B C D"], States, list[Array], Owed]:
  """`Stage.backward_layers` that puts off the gradients of matrices.

  Args:
    stage: What runs.
    model: The parameters.
    span: Which layers.
    chunk: The chunk.
    dx: Cotangent of the last layer's output.
    states: Sequence states.
    cotangents: Of the states, from later chunks.
    slots: What was kept.
    slot: Which slot is this chunk's.
    grads: Accumulators in the order of `trainable`.
    owed: What chunks owe.
    owed_slot: Which slot is this chunk's.

  Returns:
    The cotangent of the first layer's input, those of the states, the
    accumulators with the gradients of vectors added, and what is owed.
  """

  def layer(position: int, index: Any, carry: Any) -> Any:
    dx, cotangents, grads, owed = carry
    block = stage.layer(model, position, span.first + index)
    saved = jax.tree.map(lambda a: load(a, slot, index), slots[position])
    taps = jax.tree.map(
      lambda a: jnp.zeros_like(load(a, owed_slot, index)), owed[position]
    )
    vectors = stage.trainable.vectors(position)
    dx, cotangent, gradients, new = stage.backward_parts(
      *(vectors, block, dx, saved, taps, chunk, position),
      *(index, states[position], cotangents[position]),
      span.layer(position, index),
    )
    cotangents = put(cotangents, position, cotangent)
    grads = _add(stage, grads, position, span.first + index, vectors, gradients)
    mine = jax.tree.map(
      lambda a, ct: store(a, ct.astype(a.dtype), owed_slot, index),
      owed[position],
      new,
    )
    return dx, cotangents, grads, put(owed, position, mine)

  dx, grads = vary_like((dx, grads), chunk, dx)
  cotangents = vary_like(cotangents, model, chunk, dx)
  carry = (dx, cotangents, grads, owed)
  return over_layers(span, layer, carry, reverse=True)


def weight_layers(
  stage: Stage,
  model: Transformer,
  span: Span,
  chunk: Chunk,
  slots: Slots,
  slot: Any,
  grads: list[Array],
  owed: Owed,
  owed_slot: Any,
) -> list[Array]:
  """W: adds the gradients of matrices; arguments as `backward_layers`."""

  def layer(position: int, index: Any, grads: list[Array]) -> list[Array]:
    block = stage.layer(model, position, span.first + index)
    saved = jax.tree.map(lambda a: load(a, slot, index), slots[position])
    debts = jax.tree.map(lambda a: load(a, owed_slot, index), owed[position])
    matrices = stage.trainable.matrices(position)
    weights, rebuild = matrices.split(block)
    number = span.layer(position, index)

    def products(weights: list[Array]) -> dict[str, Array]:
      found = _products(rebuild(weights), saved, chunk, number)
      return {name: found[name] for name in debts}

    vjp = jax.vjp(products, [widened(w) for w in weights])[1]
    (gradients,) = vjp(debts)
    at = span.first + index
    return _add(stage, grads, position, at, matrices, gradients)

  return over_layers(span, layer, grads)


def _add(
  stage: Stage,
  grads: list[Array],
  position: int,
  index: Any,
  subset: Subset,
  gradients: Sequence[Array],
) -> list[Array]:
  """Adds the gradients of some of a layer's parameters."""
  new = iter(gradients)
  chosen = stage.trainable.block(position).chosen
  placed = [
    next(new) if mine else None
    for mine, trained in zip(subset.chosen, chosen, strict=True)
    if trained
  ]
  return stage.add_layer(grads, position, index, placed)


def _products_of(
  stage: Stage,
  model: Transformer,
  chunk: Chunk,
  position: int,
  slots: dict[str, Any],
) -> dict[str, jax.ShapeDtypeStruct]:
  """The products of a layer in whose matrices there is something to learn."""

  def run(slots: Any) -> dict[str, Array]:
    saved = jax.tree.map(lambda a: load(a, 0, 0), slots)
    block = stage.layer(model, position, 0)
    return _products(block, saved, chunk, 0)

  kinds = jax.eval_shape(run, slots)
  learnt = stage.trainable.products(position)
  return {name: kind for name, kind in kinds.items() if name in learnt}


def _products(
  block: Block, saved: dict[str, Any], chunk: Chunk, number: Any
) -> dict[str, Array]:
  """All products of a layer, as functions of its matrices alone."""
  tape = Tape(saved["tape"], detached=True)
  keys = chunk.dropout and chunk.dropout.layer(number)
  block.pre(saved["x"], chunk.ropes, tape)
  block.post(saved["x"], saved["o"], tape, keys, chunk.valid)
  return tape.outputs
