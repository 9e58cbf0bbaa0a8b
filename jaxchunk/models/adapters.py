"""Models with adapters from models without, and back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float

from jaxchunk.models.lora import LINEARS, Adapter, LoRA, column_norms
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
    for path in [p for p in new if p[-1] == "a"]:
      kernel = old[(*path[:-2], "kernel")]
      new[(*path[:-1], "magnitude")] = _norms(kernel)
  return model_of(cfg, old | new)


@jax.jit
def _norms(kernels: Float[Array, "L I O"]) -> Float[Array, "L O"]:
  """A layer at a time: in fp32 a stack would take twice its own memory."""
  dtype = jnp.promote_types(kernels.dtype, jnp.float32)
  return lax.map(lambda kernel: column_norms(kernel.astype(dtype)), kernels)


def merge_lora(model: Transformer) -> Transformer:
  """The model without adapters that computes the same.

  Args:
    model: With adapters, or without, which is returned as it is. `save_hf`
      merges while it writes and needs no second copy of the matrices.

  Returns:
    The model; its matrices have the dtype that they had.
  """
  if model.cfg.lora is None:
    return model
  cfg = dataclasses.replace(model.cfg, lora=None).frozen()
  arrays = {
    path: array
    for path, array in flat_arrays(nnx.state(model)).items()
    if "adapter" not in path
  }
  for path, adapter in adapters_of(model).items():
    arrays[path] = _merged(adapter, arrays[path])
  return model_of(cfg, arrays)


def adapters_of(model: Transformer) -> dict[tuple[Any, ...], Adapter]:
  """The adapters of a model by the path of the matrices beside them."""
  return {
    ("blocks", position, name, "kernel"): adapter
    for position, block in enumerate(model.blocks)
    for name in LINEARS
    if (adapter := getattr(block, name).adapter) is not None
  }


@jax.jit
def _merged(
  adapters: Adapter, kernels: Float[Array, "L I O"]
) -> Float[Array, "L I O"]:
  return lax.map(lambda pair: pair[0].merged(pair[1]), (adapters, kernels))


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
