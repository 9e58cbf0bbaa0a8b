"""Attention windows as `config.json` has them: by rule or layer by layer."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from jaxchunk.interop.errors import InteropError

Json = Mapping[str, Any]
Windows = Sequence[int | None]

# "none": there are none. "every": `sliding_window` in every layer.
# "switched": the same, if `use_sliding_window`. "upper":
# from `max_window_layers` on, if `use_sliding_window`. "periodic": every
# `sliding_window_pattern`-th layer is a full one.
WindowRule = Literal["none", "every", "switched", "upper", "periodic"]

_TYPES = ("full_attention", "sliding_attention")


def read_windows(rule: WindowRule, fields: Json, num_layers: int) -> Windows:
  """The window of each layer; `None` is full attention.

  Args:
    rule: Of the architecture, for where `layer_types` do not say it.
    fields: Of `config.json`, defaults filled in.
    num_layers: L.

  Raises:
    InteropError: A type of layer is not known.
  """
  window = fields.get("sliding_window")
  if rule == "none" or (
    rule in ("switched", "upper") and not fields.get("use_sliding_window")
  ):
    return [None] * num_layers
  if rule in ("every", "switched"):
    return [window] * num_layers
  types = fields.get("layer_types")
  if types is None and rule == "upper":
    first = fields["max_window_layers"]
    types = [_TYPES[layer >= first] for layer in range(num_layers)]
  elif types is None:
    period = fields.get("_sliding_window_pattern")
    period = period or fields["sliding_window_pattern"]
    types = [_TYPES[(n + 1) % period > 0] for n in range(num_layers)]
  if len(types) != num_layers:
    raise InteropError(
      f"config.json has {len(types)} layer_types for num_hidden_layers="
      f"{num_layers}"
    )
  if unknown := sorted(set(types) - set(_TYPES)):
    raise InteropError(
      f"config.json has layer_types {unknown}; jaxchunk knows {list(_TYPES)}"
    )
  return [window if kind == _TYPES[1] else None for kind in types]


def window_fields(rule: WindowRule, windows: Windows) -> dict[str, Any]:
  """The fields of `config.json` that mean these windows.

  Raises:
    InteropError: There are windows of several sizes.
  """
  sizes = sorted({w for w in windows if w is not None})
  if len(sizes) > 1:
    raise InteropError(f"windows of several sizes: {sizes}")
  if rule == "none":
    return {}
  if rule == "every":
    return {"sliding_window": windows[0]}
  if rule == "switched":
    window = windows[0]
    return {"sliding_window": window, "use_sliding_window": window is not None}
  fields = {
    "sliding_window": sizes[0] if sizes else None,
    "layer_types": [_TYPES[w is not None] for w in windows],
  }
  if rule == "upper":
    full = [layer for layer, w in enumerate(windows) if w is None]
    fields["use_sliding_window"] = bool(sizes)
    fields["max_window_layers"] = full[-1] + 1 if full else 0
  return fields


def shortest_pattern(windows: Windows) -> tuple[int | None, ...]:
  """The shortest pattern whose repetition gives the windows."""
  periods = range(1, len(windows) + 1)
  period = next(
    p
    for p in periods
    if all(w == windows[n % p] for n, w in enumerate(windows))
  )
  return tuple(windows[:period])
