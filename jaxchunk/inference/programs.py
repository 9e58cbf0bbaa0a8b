"""Compiled steps, in two forms: one program, or one for any layer.

On an accelerator a step is one program that loops over the stacked layers. On
CPU a layer that is cut out of a stack is copied, which doubles the memory that
a step of few tokens reads, and products of few tokens are faster with turned
matrices; there a step is a program for what comes before the
layers, one that is called for each layer with its own arrays, and one for what
comes behind. Neither takes longer to compile for more layers.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxchunk.inference.draw import Drawn
from jaxchunk.inference.placement import Placement
from jaxchunk.inference.step import (
  Draws,
  Extras,
  State,
  StepShape,
  begin,
  draw_sizes,
  find_draws,
  run_draws,
  run_layer,
  run_step,
)
from jaxchunk.kv.paged import PagedState
from jaxchunk.models.adapter_set import AdapterSet
from jaxchunk.models.lora import LINEARS
from jaxchunk.models.quantized import QuantizedKernel
from jaxchunk.models.transformer import Block, Transformer, layer_of
from jaxchunk.models.turned import TurnedKernel

# A state, the packed numbers, how many draws there are, and extras.
Run = Callable[[State, Any, int, Extras], tuple[State, Drawn | None]]

# Draws for which the head's matrix is better on the left; see models.turned.
_FEW = 16


def whole_step(
  model: Transformer,
  adapters: AdapterSet | None,
  state: State,
  extras: Extras,
  *,
  shape: StepShape,
  states: tuple[PagedState, ...],
  place: Placement,
) -> Run:
  """A step as one program.

  Args:
    model: The model, placed.
    adapters: That requests may name, placed.
    state: Of the shapes that it will have.
    extras: Likewise.
    shape: Of the step.
    states: What layers do with pages.
    place: Where all this is.

  Returns:
    The compiled step; it takes the state over.
  """
  local = functools.partial(
    run_step, shape=shape, states=states, vocab=place.vocab
  )
  step = place.on_devices(local, model, adapters, state)
  # Flattening the model anew in each call takes long.
  arrays, rebuild = _flattened((model, adapters))

  def flat(arrays: Any, state: Any, packed: Any, extras: Any) -> Any:
    return step(*rebuild(arrays), state, packed, extras)

  packed = jax.ShapeDtypeStruct((shape.packing.size,), jnp.int32)
  program = jax.jit(flat, donate_argnums=(1,))
  compiled = program.lower(arrays, state, packed, extras).compile()

  def run(
    state: State, packed: Any, number: int, extras: Extras
  ) -> tuple[State, Drawn | None]:
    packed = jax.device_put(packed, place.everywhere)
    state, drawn = compiled(arrays, state, packed, extras)
    return state, drawn if number else None

  return run


@dataclasses.dataclass(frozen=True)
class Layer:
  """One layer's arrays, its own.

  Attributes:
    position: In the window pattern.
    index: Among the layers of that position, on the device.
    arrays: Of the layer and its adapters.
  """

  position: int
  index: Array
  arrays: tuple[Any, ...]


class LayeredSteps:
  """Steps whose layers are called one by one.

  Args:
    model: The model; its layers are copied.
    adapters: That requests may name.
    states: What layers do with pages.
  """

  def __init__(
    self,
    model: Transformer,
    adapters: AdapterSet | None,
    states: tuple[PagedState, ...],
  ):
    self._states = states
    self._owners = None if adapters is None else adapters.owners
    # What is not a layer; flattening modules anew in each call takes long.
    self._ends, self._model_of = _flattened(without_layers(model))
    self._layers: list[Layer] = []
    self._draws: dict[int, Any] = {}
    self._layer_of = []
    period = len(states)
    for number in range(model.cfg.num_layers):
      position, index = number % period, number // period
      block = turn(layer_of(model.blocks[position], index))
      factors = None if adapters is None else adapters.layer(position, index)
      arrays, rebuild = _flattened((block, factors))
      if number < period:
        self._layer_of.append(rebuild)
      place = jax.device_put(jnp.int32(index), next(iter(arrays[0].devices())))
      self._layers.append(Layer(position, place, arrays))

  def compile(self, state: State, extras: Extras, *, shape: StepShape) -> Run:
    """The programs of a shape; see `whole_step`."""
    packed = jax.ShapeDtypeStruct((shape.packing.size,), jnp.int32)

    @jax.jit
    def first(ends: Any, last: Array, packed: Array) -> Any:
      return begin(self._model_of(ends), last, packed, shape=shape)

    def middle(
      position: int, arrays: Any, owners: Any, tokens: Any, pages: Any, at: Any
    ) -> Any:
      block, factors = self._layer_of[position](arrays)
      return run_layer(
        block, factors, owners, tokens, pages, at, self._states[position]
      )

    @jax.jit
    def last(x: Array, packed: Any, extras: Any) -> Any:
      return find_draws(x, packed, extras, shape=shape)

    tokens = jax.eval_shape(first, self._ends, state.tokens, packed)
    begins = first.lower(self._ends, state.tokens, packed).compile()
    layers = []
    for position, pages in enumerate(state.pages):
      program = jax.jit(
        functools.partial(middle, position), donate_argnums=(3,)
      )
      layer = self._layers[position]
      lowered = program.lower(
        layer.arrays, self._owners, tokens, pages, layer.index
      )
      layers.append(lowered.compile())
    ends = last.lower(tokens.x, packed, extras).compile()
    draws = jax.eval_shape(last, tokens.x, packed, extras)
    self._compile_draws(draws, state)

    def run(
      state: State, packed: Any, number: int, extras: Extras
    ) -> tuple[State, Drawn | None]:
      packed = jax.device_put(packed, self._layers[0].index.sharding)
      tokens = begins(self._ends, state.tokens, packed)
      pages = list(state.pages)
      for layer in self._layers:
        x, pages[layer.position] = layers[layer.position](
          layer.arrays, self._owners, tokens, pages[layer.position], layer.index
        )
        tokens = dataclasses.replace(tokens, x=x)
      state = dataclasses.replace(state, pages=tuple(pages))
      if not number:
        return state, None
      draws = ends(tokens.x, packed, extras)
      size = next(size for size in self._draws if size >= number)
      last, counts, drawn = self._draws[size](
        self._ends, draws, state.tokens, state.counts
      )
      return dataclasses.replace(state, tokens=last, counts=counts), drawn

    return run

  def _compile_draws(self, draws: Draws, state: State) -> None:
    """The programs of draws, which are those of all shapes."""
    if self._draws:
      return

    def run(ends: Any, draws: Any, last: Any, counts: Any, *, size: int) -> Any:
      return run_draws(
        self._model_of(ends),
        draws,
        last,
        counts,
        size=size,
        turned=size <= _FEW,
      )

    program = jax.jit(run, static_argnames=("size",), donate_argnums=(2, 3))
    for size in draw_sizes(len(draws.slots)):
      lowered = program.lower(
        self._ends, draws, state.tokens, state.counts, size=size
      )
      self._draws[size] = lowered.compile()


def without_layers(model: Transformer) -> Transformer:
  """The embedding, the last norm and the head, which share its arrays."""
  rest: Transformer = nnx.merge(*nnx.split(model))
  rest.blocks = nnx.List([])
  return rest


def turn(block: Block) -> Block:
  """A layer that shares the arrays of another, its matrices turned.

  Quantized ones stay, and so do experts.
  """
  turned: Block = nnx.merge(*nnx.split(block))
  for name in LINEARS:
    linear = getattr(turned, name, None)
    if linear is not None and not isinstance(linear.kernel, QuantizedKernel):
      linear.kernel = TurnedKernel(linear.kernel[...])
  return turned


def _flattened(tree: Any) -> tuple[tuple[Array, ...], Callable[[Any], Any]]:
  """A pytree's arrays, and what makes it of them again."""
  leaves, structure = jax.tree.flatten(tree)
  return tuple(leaves), functools.partial(jax.tree.unflatten, structure)
