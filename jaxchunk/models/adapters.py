"""Models with adapters and quantized matrices from models without, and back."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, DTypeLike, Float

from jaxchunk.models.lora import LINEARS, Adapter, LoRA, column_norms
from jaxchunk.models.quantized import (
  Matrix,
  Quantization,
  Quantized,
  quantized,
  widened,
)
from jaxchunk.models.transformer import Transformer

Flat = dict[tuple[Any, ...], Array]


def add_lora(model: Transformer, lora: LoRA, *, seed: int = 0) -> Transformer:
  """The model with new adapters, which change nothing yet.

  Args:
    model: The model; its arrays are shared, not copied.
    lora: Where adapters go, and of which kind.
    seed: Of `a`, uniform within `in ** -0.5`; `b` is 0.

  Returns:
    The model. Give `trainable=nnx.LoRAParam` to train the adapters alone.

  Raises:
    ValueError: It has adapters already.
  """
  if model.cfg.lora is not None:
    raise ValueError(
      f"the model has adapters already ({model.cfg.lora}); merge_lora first"
    )
  cfg = dataclasses.replace(model.cfg, lora=lora).frozen()

  @jax.jit
  def adapters() -> Flat:
    # Of the new model only what is returned is computed.
    fresh = Transformer(cfg, rngs=nnx.Rngs(seed))
    arrays = flat_arrays(nnx.state(fresh, nnx.LoRAParam))
    return {p: a for p, a in arrays.items() if p[-1] != "magnitude"}

  old, new = flat_arrays(nnx.state(model)), adapters()
  if lora.dora:
    matrices = matrices_of(model)
    dtype = jnp.promote_types(cfg.param_dtype, jnp.float32)
    for path in [p for p in new if p[-1] == "a"]:
      matrix = matrices[(*path[:-2], "kernel")]
      new[(*path[:-1], "magnitude")] = _norms(matrix, dtype)
  return model_of(cfg, old | new)


@functools.partial(jax.jit, static_argnames=("dtype",))
def _norms(kernels: Matrix, dtype: DTypeLike) -> Float[Array, "L O"]:
  """A layer at a time: in fp32 a stack would take twice its own memory."""
  return lax.map(lambda kernel: column_norms(widened(kernel, dtype)), kernels)


def merge_lora(model: Transformer) -> Transformer:
  """The model without adapters that computes the same.

  Args:
    model: With adapters, or without, which is returned as it is. `save_hf`
      merges while it writes and needs no second copy of the matrices.

  Returns:
    The model, its matrices in `param_dtype`. Quantized ones are widened, those
    too that had no adapter.
  """
  if model.cfg.lora is None:
    return model
  dtype = jnp.dtype(model.cfg.param_dtype)
  cfg = dataclasses.replace(model.cfg, lora=None, quantization=None).frozen()
  arrays = flat_arrays(nnx.state(model, nnx.Param))
  arrays = {p: array for p, array in arrays.items() if "adapter" not in p}
  adapters = adapters_of(model)
  for path, matrix in matrices_of(model).items():
    arrays[path] = _merged(adapters.get(path), matrix, dtype)
  return model_of(cfg, arrays)


def quantize_model(
  model: Transformer, quantization: Quantization
) -> Transformer:
  """The model with the matrices of its layers in four or eight bits.

  Args:
    model: The model; what is not quantized is shared, not copied. `load_hf`
      quantizes while it reads, and never holds all of the model.
    quantization: How to hold them.

  Returns:
    The model, with the adapters that it has.

  Raises:
    ValueError: It is quantized already, or a block does not divide a matrix.
  """
  if model.cfg.quantization is not None:
    raise ValueError(f"the model is quantized: {model.cfg.quantization}")
  cfg = dataclasses.replace(model.cfg, quantization=quantization).frozen()
  arrays = flat_arrays(nnx.state(model))
  for path, matrix in matrices_of(model).items():
    arrays |= quantized_arrays(path, _quantized(matrix, quantization))
    del arrays[path]
  return model_of(cfg, arrays)


@functools.partial(jax.jit, static_argnames=("quantization",))
def _quantized(kernels: Array, quantization: Quantization) -> Quantized:
  return lax.map(lambda kernel: quantized(kernel, quantization), kernels)


def quantized_arrays(path: tuple[Any, ...], matrix: Quantized) -> Flat:
  """The arrays of a quantized matrix by their own paths."""
  return {
    (*path, "codes"): matrix.codes,
    (*path, "scales"): matrix.scales,
  }


def _linears(model: Transformer) -> tuple[str, ...]:
  """Of `LINEARS` those that there are: experts may be in place of the MLP."""
  return LINEARS if model.cfg.mlp_width else LINEARS[:4]


def matrices_of(model: Transformer) -> dict[tuple[Any, ...], Matrix]:
  """The stacked matrices of the layers by path, as they are held."""
  return {
    ("blocks", position, name, "kernel"): getattr(block, name).matrix
    for position, block in enumerate(model.blocks)
    for name in _linears(model)
  }


def adapters_of(model: Transformer) -> dict[tuple[Any, ...], Adapter]:
  """The adapters of a model by the path of the matrices beside them."""
  return {
    ("blocks", position, name, "kernel"): adapter
    for position, block in enumerate(model.blocks)
    for name in _linears(model)
    if (adapter := getattr(block, name).adapter) is not None
  }


@functools.partial(jax.jit, static_argnames=("dtype",))
def _merged(
  adapters: Adapter | None, kernels: Matrix, dtype: DTypeLike
) -> Float[Array, "L I O"]:
  return lax.map(
    lambda pair: merged(pair[0], pair[1], dtype), (adapters, kernels)
  )


def merged(
  adapter: Adapter | None, kernel: Matrix, dtype: DTypeLike
) -> Float[Array, "in out"]:
  """The matrix of one layer as an array, its adapter merged in."""
  if adapter is None:
    return widened(kernel, dtype)
  return adapter.merged(kernel, dtype)


def flat_arrays(state: nnx.State) -> Flat:
  """The arrays of a state by path."""
  return {
    path: jnp.asarray(variable.get_value())
    for path, variable in nnx.to_flat_state(state)
  }


def model_of(cfg: Any, arrays: Flat) -> Transformer:
  """The model of a frozen configuration with such arrays.

  Raises:
    KeyError: One is missing.
  """
  model = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
  graphdef, state = nnx.split(model)
  leaves = [
    (path, variable.replace(arrays[path]))
    for path, variable in nnx.to_flat_state(state)
  ]
  flat = nnx.FlatState(leaves, sort=False)
  return nnx.merge(graphdef, nnx.from_flat_state(flat))
