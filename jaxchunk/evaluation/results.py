"""`evaluation.json`: everything that an evaluation found, with a version."""

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxchunk.data.cache import atomic_write
from jaxchunk.evaluation.bits_per_byte import BitsPerByte, Bucket
from jaxchunk.evaluation.scoring import Cell

FILE_NAME = "evaluation.json"
FORMAT = 1
"""Changes whenever a file of before would be read wrongly."""


class ResultsError(ValueError):
  """A file of results cannot be read; names it and the remedy."""


@dataclasses.dataclass(frozen=True)
class Results:
  """What an evaluation found.

  Attributes:
    title: Heads the pictures.
    about: What was evaluated and how: plain JSON values.
    bits_per_byte: Of held-out documents, if they were evaluated.
    cells: Of the synthetic tasks.
  """

  title: str
  about: Mapping[str, Any]
  bits_per_byte: BitsPerByte | None
  cells: list[Cell]


def write(path: Path, results: Results) -> None:
  """Writes a file of results, whole or not at all."""
  values = {"format": FORMAT, **_finite(dataclasses.asdict(results))}
  with atomic_write(path) as file:
    file.write((json.dumps(values, indent=1, allow_nan=False) + "\n").encode())


def read(path: Path) -> Results:
  """Reads a file of results.

  Raises:
    ResultsError: It does not exist, is no file of results, or one of another
      version.
  """
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except OSError as error:
    raise ResultsError(
      f"{path} cannot be read ({error.strerror}); name a folder that "
      "scripts/evaluate.py has written to"
    ) from error
  except ValueError as error:
    raise ResultsError(f"{path} is not JSON ({error})") from error
  if not isinstance(values, dict) or "format" not in values:
    raise ResultsError(
      f"{path} is not a file of results: it has no field 'format'; evaluate "
      "again to replace it"
    )
  if values["format"] != FORMAT:
    raise ResultsError(
      f"{path} has format {values['format']!r} and this version of jaxchunk "
      f"reads format {FORMAT}; evaluate again to replace it"
    )
  try:
    return _decode(values)
  except (KeyError, TypeError, AttributeError) as error:
    raise ResultsError(
      f"{path} is damaged ({type(error).__name__}: {error}); evaluate again to "
      "replace it"
    ) from error


def _decode(values: Mapping[str, Any]) -> Results:
  found = values["bits_per_byte"]
  if found is not None:
    found = BitsPerByte(
      whole=Bucket(**found["whole"]),
      by_length=[Bucket(**bucket) for bucket in found["by_length"]],
      by_position=[Bucket(**bucket) for bucket in found["by_position"]],
      by_both=found["by_both"],
      empty=found["empty"],
    )
  return Results(
    title=values["title"],
    about=values["about"],
    bits_per_byte=found,
    cells=[Cell(**cell) for cell in values["cells"]],
  )


def _finite(value: Any) -> Any:
  """The same with `None` for what is not finite, as JSON has no NaN."""
  if isinstance(value, float) and not math.isfinite(value):
    return None
  if isinstance(value, dict):
    return {name: _finite(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [_finite(item) for item in value]
  return value
