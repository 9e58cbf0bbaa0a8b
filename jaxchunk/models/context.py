"""Models for longer contexts from models for shorter ones."""

import dataclasses
import typing
from typing import Literal

from jaxchunk.models.config import ModelConfig
from jaxchunk.models.rope import LinearScaling, Rope, YarnScaling

Method = Literal["yarn", "linear", "theta"]


def extend_context(
  cfg: ModelConfig, length: int, *, method: Method = "yarn"
) -> ModelConfig:
  """The same model, its rotary embedding stretched to a longer context.

  Layers with a window keep theirs: they see no further than before. The
  parameters stay as they are; train on sequences of the new length.

  Args:
    cfg: The model; its `context_length` is what it was made for.
    length: The new context length, in tokens.
    method: "yarn" divides the low frequencies (arXiv 2309.00071), "linear"
      all of them (arXiv 2306.15595), "theta" raises the base so far that the
      lowest frequency is divided, and keeps a scaling that there is ("adjusted
      base frequency", arXiv 2309.16039). transformers knows all three.

  Returns:
    A configuration that may still be changed.

  Raises:
    ValueError: The old length is not known or no shorter, or the embedding is
      scaled already in another way.
  """
  if method not in typing.get_args(Method):
    raise ValueError(
      f"method={method!r} is not one of {list(typing.get_args(Method))}"
    )
  old = cfg.context_length
  if old is None:
    raise ValueError(
      "cfg.context_length is None: set it to the length, in tokens, that the "
      "model was trained for"
    )
  if length <= old:
    raise ValueError(
      f"length={length} is no longer than cfg.context_length={old}; nothing "
      "is to be done"
    )
  rope = _stretched(cfg, length / old, method)
  local = cfg.local_rope
  if local is None and any(window is not None for window in cfg.window_pattern):
    local = cfg.rope
  return dataclasses.replace(
    cfg, rope=rope, local_rope=local, context_length=length
  )


def _stretched(cfg: ModelConfig, factor: float, method: Method) -> Rope:
  rope, old = cfg.rope, cfg.context_length
  assert old is not None
  if method == "theta":
    width = rope.width(cfg.head_width)
    theta = rope.theta * factor ** (width / (width - 2))
    return dataclasses.replace(rope, theta=theta)
  scaling = rope.scaling
  if isinstance(scaling, YarnScaling) and method == "yarn":
    # Stretched once more, from the length of the first training.
    scaling = dataclasses.replace(scaling, factor=scaling.factor * factor)
  elif isinstance(scaling, LinearScaling) and method == "linear":
    scaling = LinearScaling(factor=scaling.factor * factor)
  elif scaling is not None:
    raise ValueError(
      f"the embedding is scaled already, by {scaling}; method='theta' keeps "
      "that and raises the base"
    )
  elif method == "yarn":
    scaling = YarnScaling(factor=factor, original_length=old)
  else:
    scaling = LinearScaling(factor=factor)
  return dataclasses.replace(rope, scaling=scaling)
