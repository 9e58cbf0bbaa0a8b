"""Which lengths a model can be evaluated at, and which extrapolate."""

from collections.abc import Sequence

from jaxchunk.models.config import ModelConfig
from jaxchunk.models.rope import YarnScaling


def position_limit(cfg: ModelConfig) -> int | None:
  """Tokens that a model was made for, if it says so.

  That is its `context_length`; without one, what YaRN's numbers name,
  `original_length * factor`. A rotary embedding has no last position, and the
  numbers of the other scalings name none: Llama 3.1 has an original length of
  8,192 and a factor of 8 and is made for 131,072.

  Returns:
    The limit; of several embeddings the least; `None` where none is named.
  """
  if cfg.context_length is not None:
    return cfg.context_length
  ropes = {cfg.rope_of(window) for window in cfg.window_pattern}
  limits = [
    int(rope.scaling.original_length * rope.scaling.factor)
    for rope in ropes
    if isinstance(rope.scaling, YarnScaling)
  ]
  return min(limits, default=None)


def check_lengths(
  lengths: Sequence[int],
  cfg: ModelConfig,
  *,
  trained_length: int | None = None,
  extrapolate: bool = False,
) -> list[int]:
  """Checks lengths to evaluate at.

  Args:
    lengths: In tokens.
    cfg: The model's.
    trained_length: The longest document that it was trained on, if known.
    extrapolate: Allow lengths beyond the model's positions.

  Returns:
    Those that are beyond its positions or beyond what it was trained on.

  Raises:
    ValueError: A length is not positive, or beyond the model's positions and
      `extrapolate` is off.
  """
  limit = position_limit(cfg)
  for length in lengths:
    if length < 1:
      raise ValueError(f"length={length} must be at least 1")
    if limit is not None and length > limit and not extrapolate:
      raise ValueError(
        f"length={length} is beyond the model's {limit} positions (its "
        "context_length, or its rope's original_length times factor); choose "
        "shorter lengths, or allow it with extrapolate (--extrapolate)"
      )
  bounds = [b for b in (limit, trained_length) if b is not None]
  return [n for n in lengths if bounds and n > min(bounds)]
