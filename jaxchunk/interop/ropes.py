"""Rotary embeddings as `config.json` has them, in its old and its new form.

Old: `rope_theta` beside `rope_scaling`. New (transformers 5): all of it in
`rope_parameters`, for each type of layer where these differ. Both are read;
the old form is written, because every version understands it.

Source: `modeling_rope_utils.py` of transformers 5.
"""

import math
from collections.abc import Mapping
from typing import Any

from jaxchunk.interop.errors import InteropError
from jaxchunk.models.rope import (
  DynamicNtkScaling,
  LinearScaling,
  Llama3Scaling,
  LongRopeScaling,
  Rope,
  Scaling,
  YarnScaling,
)

Json = Mapping[str, Any]

_NAMES: dict[type, str] = {
  type(None): "default",
  LinearScaling: "linear",
  DynamicNtkScaling: "dynamic",
  YarnScaling: "yarn",
  Llama3Scaling: "llama3",
  LongRopeScaling: "longrope",
}
KINDS = tuple(_NAMES.values())
"""The `rope_type`s that are known."""


def rope_kind(rope: Rope) -> str:
  """Its `rope_type`.

  Raises:
    InteropError: It has none.
  """
  kind = _NAMES.get(type(rope.scaling))
  if kind is None:
    raise InteropError(f"rope scaling {rope.scaling} has no name there")
  return kind


def read_rope(
  fields: Json, layer_type: str, context_length: int | None = None
) -> Rope:
  """The rotary embedding of the layers of a type.

  Args:
    fields: Of `config.json`.
    layer_type: "full_attention" or "sliding_attention".
    context_length: Of the longest sequence to come; by default
      `max_position_embeddings`.

  Returns:
    The embedding.

  Raises:
    InteropError: The kind is not known, or a number is missing or impossible.
  """
  params = dict(fields.get("rope_parameters") or {})
  if isinstance(params.get(layer_type), Mapping):
    params = dict(params[layer_type])
  params |= fields.get("rope_scaling") or {}
  theta = params.get("rope_theta", fields.get("rope_theta"))
  if theta is None:
    raise InteropError("config.json lacks 'rope_theta'")
  fraction = params.get(
    "partial_rotary_factor", fields.get("partial_rotary_factor")
  )
  kind = params.get("rope_type") or params.get("type") or "default"
  if kind == "su" or (kind == "yarn" and "long_factor" in params):
    kind = "longrope"  # as the first Phi 3 were published
  try:
    scaling = _scaling(kind, params, fields, context_length)
    return Rope(
      theta=float(theta),
      scaling=scaling,
      fraction=1.0 if fraction is None else float(fraction),
    )
  except KeyError as error:
    raise InteropError(
      f"the rotary embedding {kind!r} of config.json lacks {error}"
    ) from None
  except (TypeError, ValueError) as error:
    if isinstance(error, InteropError):
      raise
    raise InteropError(f"config.json: {error}") from error


def _scaling(
  kind: str, params: Json, fields: Json, context_length: int | None
) -> Scaling | None:
  if kind == "default":
    return None
  if kind == "linear":
    return LinearScaling(factor=float(params["factor"]))
  longest: int = fields["max_position_embeddings"]
  # Beside the other sizes it counts more than inside, as there.
  original: int = fields.get(
    "original_max_position_embeddings",
    params.get("original_max_position_embeddings", longest),
  )
  match kind:
    case "dynamic":
      return DynamicNtkScaling(
        factor=float(params["factor"]),
        original_length=longest,
        length=context_length or longest,
      )
    case "llama3":
      return Llama3Scaling(
        factor=float(params["factor"]),
        low_freq_factor=float(params["low_freq_factor"]),
        high_freq_factor=float(params["high_freq_factor"]),
        original_length=params["original_max_position_embeddings"],
      )
    case "yarn":
      factor = params.get("factor") or longest / original
      return YarnScaling(
        factor=float(factor),
        original_length=original,
        beta_fast=float(params.get("beta_fast") or 32),
        beta_slow=float(params.get("beta_slow") or 1),
        attention_factor=_yarn_attention(params, float(factor)),
        truncate=bool(params.get("truncate", True)),
      )
    case "longrope":
      factor = params.get("factor") or longest / original
      attention = params.get("attention_factor")
      if attention is None:
        grown = math.log(factor) / math.log(original) if factor > 1 else 0
        attention = math.sqrt(1 + grown)
      return LongRopeScaling(
        short_factors=tuple(map(float, params["short_factor"])),
        long_factors=tuple(map(float, params["long_factor"])),
        original_length=original,
        length=context_length or longest,
        attention_factor=float(attention),
      )
  raise InteropError(
    f"config.json has the rotary embedding {kind!r}; jaxchunk knows "
    f"{list(KINDS)}"
  )


def _yarn_attention(params: Json, factor: float) -> float | None:
  """Explicit, or by DeepSeek's two scales, or YaRN's own (`None`)."""
  if params.get("attention_factor") is not None:
    return float(params["attention_factor"])
  scale, of_all = params.get("mscale"), params.get("mscale_all_dim")
  if not scale or not of_all:
    return None
  grown, grown_of_all = (
    0.1 * float(s) * math.log(factor) + 1 for s in (scale, of_all)
  )
  return grown / grown_of_all if factor > 1 else 1.0


def rope_fields(rope: Rope) -> dict[str, Any]:
  """The fields of `config.json` beside `rope_theta` that mean an embedding.

  Raises:
    InteropError: It has no name there.
  """
  fields: dict[str, Any] = {}
  if rope.fraction != 1:
    fields["partial_rotary_factor"] = rope.fraction
  params: dict[str, Any] = {"rope_type": rope_kind(rope)}
  match rope.scaling:
    case None:
      return fields
    case LinearScaling(factor=factor) | DynamicNtkScaling(factor=factor):
      params["factor"] = factor
    case Llama3Scaling() as scaling:
      params |= {
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_length,
      }
    case YarnScaling() as scaling:
      params |= {
        "factor": scaling.factor,
        "original_max_position_embeddings": scaling.original_length,
        "beta_fast": scaling.beta_fast,
        "beta_slow": scaling.beta_slow,
        "truncate": scaling.truncate,
      }
      if scaling.attention_factor is not None:
        params["attention_factor"] = scaling.attention_factor
    case LongRopeScaling() as scaling:
      # Phi 3 looks for the length beside the other sizes, others inside.
      length = {"original_max_position_embeddings": scaling.original_length}
      fields |= length
      params |= length | {
        "short_factor": list(scaling.short_factors),
        "long_factor": list(scaling.long_factors),
        "attention_factor": scaling.attention_factor,
      }
  return fields | {"rope_scaling": params}
