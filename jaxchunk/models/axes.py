"""Logical axes of a model's parameters, which `sharding/rules.py` maps."""

from typing import Any

import jax
from flax import nnx

from jaxchunk.models.transformer import Transformer

_MATRICES = {
  "q": ("embed", "heads"),
  "k": ("embed", "kv_heads"),
  "v": ("embed", "kv_heads"),
  "o": ("heads", "embed"),
  "gate": ("embed", "mlp"),
  "up": ("embed", "mlp"),
  "down": ("mlp", "embed"),
}

_EXPERTS = {
  "router": ("embed", None),
  "gate": ("experts", "embed", "mlp"),
  "up": ("experts", "embed", "mlp"),
  "down": ("experts", "mlp", "embed"),
}

Axes = tuple[str | None, ...]

PARAMETER_AXES = (
  "layers",
  "embed",
  "heads",
  "kv_heads",
  "mlp",
  "vocab",
  "rank",
  "experts",
)
"""Those of parameters."""


def parameter_axes(model: Transformer) -> list[Axes]:
  """What each axis of each parameter is.

  Norms are on every device whole: they are small, and used whole.

  Args:
    model: The model, or its abstract copy.

  Returns:
    For every leaf of the model, in order, the logical axis of each of its
    axes.

  Raises:
    NotImplementedError: A matrix is quantized: its codes are in blocks.
  """
  if model.cfg.quantization is not None:
    raise NotImplementedError(
      f"quantization={model.cfg.quantization} with parameters that are split; "
      "use the axes 'data' and 'context', or a model that is not quantized"
    )
  paths = nnx.to_flat_state(nnx.state(model)).paths
  leaves = jax.tree.leaves(model)
  return [_axes(p, a.ndim) for p, a in zip(paths, leaves, strict=True)]


def _axes(path: tuple[Any, ...], ndim: int) -> Axes:
  if path[0] in ("embed", "head"):
    return ("vocab", "embed")
  if "experts" in path:
    return ("layers", *_EXPERTS[path[-1]])
  names = [name for name in path if name in _MATRICES]
  if not names:
    stacked = ("layers",) if path[0] == "blocks" else ()
    return (*stacked, *[None] * (ndim - len(stacked)))
  inputs, outputs = _MATRICES[names[0]]
  return {
    "kernel": ("layers", inputs, outputs),
    "bias": ("layers", outputs),
    "a": ("layers", inputs, "rank"),
    "b": ("layers", "rank", outputs),
    "magnitude": ("layers", outputs),
  }[path[-1]]
