"""What a run begins with, and which part of it is trained.

A model with adapters trains these alone. The others are not in its
checkpoints: they are read, or drawn, again as they were.
"""

import dataclasses
from typing import Any

import jax
from flax import nnx

from jaxchunk.interop.configs import differing_fields
from jaxchunk.interop.errors import InteropError
from jaxchunk.interop.hugging_face import load_config, load_hf
from jaxchunk.interop.weights import Shardings
from jaxchunk.models.adapters import add_lora, flat_arrays, model_of
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.transformer import Transformer
from jaxchunk.training.config import ConfigError

Params = Any
"""A nested dictionary of arrays."""


def trainable(cfg: ModelConfig) -> type[nnx.Param]:
  """The kind of parameter that is trained."""
  return nnx.Param if cfg.lora is None else nnx.LoRAParam


def abstract_model(cfg: ModelConfig) -> tuple[Any, nnx.State, nnx.State]:
  """A model's structure and the shapes of its parameters; allocates nothing.

  Returns:
    The structure, what is trained, and the rest; `nnx.merge` takes them.
  """
  model = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
  graphdef, params, *rest = nnx.split(model, trainable(cfg), ...)
  return graphdef, params, rest[0]


def parameters(
  cfg: ModelConfig,
  init_from: str | None,
  seed: int,
  shardings: Shardings | None = None,
) -> tuple[Params, Params]:
  """What a new run trains, and the other parameters.

  Args:
    cfg: The model.
    init_from: As `train.init_from`.
    seed: Of what is drawn.
    shardings: Where what is read, or drawn, goes at once, as in `load_hf`.

  Raises:
    ConfigError: The folder cannot be read, or holds another model.
  """
  if init_from is None and cfg.lora is not None:
    # The same bits again under every layout: a base is not saved.
    shardings = None
  model = _base(cfg, init_from, seed, shardings)
  if cfg.lora is not None:
    model = add_lora(model, cfg.lora, seed=seed)
  _, params, *rest = nnx.split(model, trainable(cfg), ...)
  return nnx.to_pure_dict(params), nnx.to_pure_dict(rest[0])


def frozen_parameters(
  cfg: ModelConfig,
  init_from: str | None,
  seed: int,
  shardings: Shardings | None = None,
) -> Params:
  """The parameters that are not trained, for a run that goes on.

  Raises:
    ConfigError: As `parameters`.
  """
  if cfg.lora is None:
    return {}
  if init_from is None:
    shardings = None
  base = _base(cfg, init_from, seed, shardings)
  return nnx.to_pure_dict(nnx.state(base))


def _drawn(
  cfg: ModelConfig, seed: int, shardings: Shardings | None
) -> Transformer:
  """A new model; on many devices none of them holds it whole."""

  def draw() -> Transformer:
    return Transformer(cfg, rngs=nnx.Rngs(seed))

  if shardings is None:
    return draw()
  shapes = jax.eval_shape(draw)
  paths = nnx.to_flat_state(nnx.state(shapes)).paths
  leaves, treedef = jax.tree.flatten(shapes)
  places = [
    shardings("/".join(map(str, path)), leaf.shape)
    for path, leaf in zip(paths, leaves, strict=True)
  ]
  if all(len(place.device_set) == 1 for place in places):
    return draw()
  wanted = jax.tree.unflatten(treedef, places)
  drawn: Transformer = jax.jit(draw, out_shardings=wanted)()
  return drawn


def _base(
  cfg: ModelConfig,
  init_from: str | None,
  seed: int,
  shardings: Shardings | None,
) -> Transformer:
  """The model without adapters."""
  cfg = dataclasses.replace(cfg, lora=None).frozen()
  if init_from is None:
    return _drawn(cfg, seed, shardings)
  try:
    model = load_hf(
      init_from,
      dtype=cfg.dtype,
      param_dtype=cfg.param_dtype,
      context_length=cfg.context_length,
      quantization=cfg.quantization,
      shardings=shardings,
    )
  except InteropError as error:
    raise ConfigError(f"train.init_from={init_from!r}: {error}") from error
  fields = differing_fields(model.cfg, cfg)
  if (cfg.context_length or 0) > (load_config(init_from).context_length or 0):
    # Stretched to a longer context on purpose.
    fields = [f for f in fields if not f.startswith(("rope=", "local_rope="))]
  if fields:
    raise ConfigError(
      f"train.init_from={init_from!r} holds another model than the "
      f"configuration has: {fields}; take model=load_config(path)"
    )
  # How it is used is the configuration's to say.
  return model_of(cfg, flat_arrays(nnx.state(model)))
