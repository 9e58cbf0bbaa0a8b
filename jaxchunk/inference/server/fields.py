"""JSON bodies, and their fields one by one, checked."""

import difflib
import json
import math
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

from jaxchunk.inference.server.errors import ApiError, invalid

# How deeply lists and objects may lie in each other.
_DEPTH = 64
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
_KINDS = {
  dict: "an object",
  list: "an array",
  str: "a string",
  bool: "a boolean",
  int: "an integer",
  float: "a number",
  type(None): "null",
}


def read_object(body: bytes) -> dict[str, Any]:
  """The JSON object that a body holds.

  Raises:
    ApiError: It holds none, or one that JSON or UTF-8 does not allow.
  """
  try:
    text = body.decode("utf-8")
  except UnicodeDecodeError as error:
    raise invalid(
      f"the body is not UTF-8: byte {error.start} is {body[error.start]:#04x}"
    ) from None
  try:
    value = json.loads(text, parse_constant=_refuse_constant)
    _check(value, surrogates=_SURROGATE.search(body) is not None)
  except ApiError:
    raise
  except RecursionError:
    raise _too_deep() from None
  except ValueError as error:
    raise invalid(f"the body is not JSON: {error}") from None
  if not isinstance(value, dict):
    raise invalid(f"the body is {kind_of(value)}, not an object")
  return value


def _refuse_constant(name: str) -> None:
  raise invalid(f"the body is not JSON: it has {name}, which JSON does not")


def _too_deep() -> ApiError:
  return invalid(f"the body is nested more than {_DEPTH} deep")


def _check(value: Any, *, surrogates: bool) -> None:
  """Whether a value is nested too deeply or has half a character."""
  level = [value]
  for _ in range(_DEPTH):
    if surrogates and not all(map(_is_whole, _strings(level))):
      raise invalid(
        "the body has half of a surrogate pair (\\ud800 to \\udfff), which is "
        "no character"
      )
    level = [
      inner
      for outer in level
      if isinstance(outer, dict | list)
      for inner in (outer.values() if isinstance(outer, dict) else outer)
    ]
    if not level:
      return
  raise _too_deep()


def _strings(values: list[Any]) -> Iterator[str]:
  for value in values:
    if isinstance(value, str):
      yield value
    elif isinstance(value, dict):
      yield from value


def _is_whole(text: str) -> bool:
  try:
    text.encode()
  except UnicodeEncodeError:
    return False
  return True


def kind_of(value: Any) -> str:
  """What JSON calls a value."""
  return _KINDS[type(value)]


class Fields:
  """Fields of an object. One that is absent or null has its default.

  Args:
    values: The object.
    where: What stands before the names of its fields in messages.
  """

  def __init__(self, values: Mapping[str, Any], where: str = ""):
    self.values, self._where = values, where

  def name(self, field: str) -> str:
    """As messages have it."""
    return self._where + field

  def check_names(
    self, known: Collection[str], refused: Mapping[str, str] | None = None
  ) -> None:
    """Refuses fields that are not known.

    Args:
      known: Those that are.
      refused: Why others are not, by name; null is taken all the same.
    """
    for field, value in self.values.items():
      if field in known:
        continue
      if field in (refused or {}):
        if value is not None:
          raise invalid((refused or {})[field], self.name(field))
        continue
      near = difflib.get_close_matches(field, known, n=1)
      hint = f"; do you mean {near[0]!r}?" if near else ""
      raise invalid(
        f"there is no field {self.name(field[:80])!r}{hint}",
        self.name(field[:80]),
        "unknown_field",
      )

  def get(self, field: str) -> Any:
    """Whatever it is."""
    return self.values.get(field)

  def _typed(self, field: str, kind: Any, what: str) -> Any:
    value = self.get(field)
    if value is None:
      return None
    if not isinstance(value, kind) or (
      isinstance(value, bool) and kind is not bool
    ):
      raise invalid(
        f"{self.name(field)} is {kind_of(value)}, not {what}", self.name(field)
      )
    return value

  def text(self, field: str) -> str | None:
    """A string."""
    value: str | None = self._typed(field, str, "a string")
    return value

  def boolean(self, field: str, default: bool = False) -> bool:
    """True or false."""
    value = self._typed(field, bool, "a boolean")
    return default if value is None else bool(value)

  def integer(
    self, field: str, low: int | None = None, high: int | None = None
  ) -> int | None:
    """An integer from `low` to `high`."""
    value: int | None = self._typed(field, int, "an integer")
    if value is not None and not (
      (low is None or low <= value) and (high is None or value <= high)
    ):
      limits = f"at least {low}" if high is None else f"from {low} to {high}"
      raise invalid(
        f"{self.name(field)}={_short(value)} must be {limits}", self.name(field)
      )
    return value

  def number(self, field: str) -> float | None:
    """A number that is finite."""
    value: float | None = self._typed(field, int | float, "a number")
    if value is None:
      return None
    # 1e999 is infinite; an integer may be larger than any float.
    if isinstance(value, int) and abs(value) > 2**63:
      value = math.inf
    if not math.isfinite(value):
      raise invalid(
        f"{self.name(field)} is larger than any number", self.name(field)
      )
    return value

  def object(self, field: str) -> "Fields | None":
    """An object."""
    value = self._typed(field, dict, "an object")
    return None if value is None else Fields(value, f"{self._where}{field}.")

  def array(self, field: str) -> list[Any] | None:
    """An array of whatever."""
    value: list[Any] | None = self._typed(field, list, "an array")
    return value

  def integers(self, field: str) -> tuple[int, ...]:
    """An array of integers."""
    value = self.array(field) or []
    if not all(is_integer(item) for item in value):
      raise invalid(
        f"{self.name(field)} must be an array of integers", self.name(field)
      )
    return tuple(value)


def is_integer(value: Any) -> bool:
  """Whether it is one; true and false are none."""
  return isinstance(value, int) and not isinstance(value, bool)


def _short(value: int) -> str:
  # Very long ones cannot be written at all.
  return str(value) if abs(value) < 10**30 else "a number of many digits"
