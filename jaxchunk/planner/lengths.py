"""Lengths of the sequences to train on, as a histogram."""

import csv
import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

# Lengths drawn where there are more sequences than this.
_MOST_DRAWN = 100_000


@dataclasses.dataclass(frozen=True)
class Lengths:
  """How many sequences there are of each length.

  Attributes:
    counts: `(tokens, sequences)`, the shortest first.
  """

  counts: tuple[tuple[int, int], ...]

  @property
  def longest(self) -> int:
    """Tokens of the longest."""
    return self.counts[-1][0]

  @property
  def sequences(self) -> int:
    """How many there are."""
    return sum(count for _, count in self.counts)

  @property
  def tokens(self) -> int:
    """In all of them."""
    return sum(tokens * count for tokens, count in self.counts)

  def batches(self, budget: int, most: int) -> list[list[int]]:
    """Global batches in a shuffled order, as a run would take them.

    A pure function. Of many batches some are taken, evenly; of very many
    sequences 100,000 are drawn.

    Args:
      budget: Tokens of a batch; a longer sequence is a batch of its own.
      most: Batches to return at most.

    Returns:
      The lengths in each batch.
    """
    found: list[list[int]] = []
    left = 0
    for tokens in self._shuffled():
      if not found or left < tokens:
        found.append([])
        left = budget
      found[-1].append(tokens)
      left -= tokens
    if len(found) > 1 and left > budget // 2:
      del found[-1]  # The rest, which is not half full.
    places = np.linspace(0, len(found) - 1, min(most, len(found)))
    return [found[int(place)] for place in places]

  def _shuffled(self) -> list[int]:
    random = np.random.default_rng(0)
    tokens, counts = np.asarray(self.counts, np.int64).T
    if self.sequences > _MOST_DRAWN:
      share = counts / counts.sum()
      drawn = random.choice(tokens, _MOST_DRAWN, p=share)
    else:
      drawn = random.permutation(np.repeat(tokens, counts))
    return [int(n) for n in drawn]


def lengths_of(values: Iterable[int] | Mapping[int, int]) -> Lengths:
  """A histogram of lengths, or of counts by length.

  Raises:
    ValueError: There are none, or one is not positive.
  """
  counts = {int(n): int(c) for n, c in Counter(values).items()}
  for tokens, count in counts.items():
    if tokens < 1 or count < 1:
      raise ValueError(
        f"lengths: {count} sequences of {tokens} tokens; both must be positive"
      )
  if not counts:
    raise ValueError("lengths: there are none; give at least one, '4096:1'")
  return Lengths(tuple(sorted(counts.items())))


def read_lengths(text: str) -> Lengths:
  """Lengths from a flag: "2000:500,131072:1", or a file of them.

  Args:
    text: `tokens:sequences` pairs with commas between, or the path of a file:
      `.json` with a list of lengths or an object of counts by length, or
      lines of `tokens` or `tokens,sequences`, with or without a heading.

  Raises:
    ValueError: It is neither, or a number is none.
  """
  path = Path(text).expanduser()
  try:
    if path.is_file():
      return lengths_of(_in_file(path))
    pairs = [part.split(":") for part in text.split(",") if part.strip()]
    return lengths_of(_summed(pairs))
  except (ValueError, TypeError) as error:
    raise ValueError(
      f"lengths={text!r} cannot be read ({error}); write tokens:sequences, "
      "'2000:500,131072:1', or name a .json or .csv file of lengths"
    ) from error


def _in_file(path: Path) -> Any:
  if path.suffix != ".json":
    with path.open(newline="", encoding="utf-8") as file:
      rows = [row for row in csv.reader(file) if row]
    if rows and not rows[0][0].strip().isdecimal():
      del rows[0]
    return _summed(rows)
  values = json.loads(path.read_text(encoding="utf-8"))
  if isinstance(values, dict):
    return _summed(list(values.items()))
  return [int(n) for n in values]


def _summed(pairs: Iterable[Any]) -> Counter[int]:
  found: Counter[int] = Counter()
  for tokens, *count in pairs:
    if len(count) > 1:
      raise ValueError(f"{len(count) + 1} numbers in place of one or two")
    found[int(tokens)] += int(count[0]) if count else 1
  return found
