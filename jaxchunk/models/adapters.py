"""Models with adapters from models without, and back."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from jaxchunk.models.lora import LINEARS, LoRA, column_norms
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
    # Of the new model only this is computed.
    fresh = Transformer(cfg, rngs=nnx.Rngs(seed))
    return flat_arrays(nnx.state(fresh, nnx.LoRAParam))

  old, new = flat_arrays(nnx.state(model)), adapters()
  for path in new:
    if path[-1] == "magnitude":
      kernel = old[(*path[:-2], "kernel")]
      norms = jax.vmap(column_norms)(kernel.astype(new[path].dtype))
      new[path] = norms
  return model_of(cfg, old | new)


def merge_lora(model: Transformer) -> Transformer:
  """The model without adapters that computes the same.

  Args:
    model: With adapters, or without, which is returned as it is.

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
  for position, block in enumerate(model.blocks):
    for name in LINEARS:
      linear = getattr(block, name)
      if linear.adapter is not None:
        merge = jax.jit(jax.vmap(lambda adapter, k: adapter.merged(k)))
        path = ("blocks", position, name, "kernel")
        arrays[path] = merge(linear.adapter, linear.kernel[...])
  return model_of(cfg, arrays)


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
