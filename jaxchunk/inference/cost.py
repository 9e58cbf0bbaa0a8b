"""What a step takes, as a scheduler or a simulation asks for it."""

import bisect
import dataclasses
from collections.abc import Iterable
from typing import Protocol

from jaxchunk.inference.sequence import Work


class Cost(Protocol):
  """Seconds of steps."""

  def seconds(self, tokens: int, keys: float) -> float:
    """Of a step.

    Args:
      tokens: That run.
      keys: That their queries read, all together.
    """


@dataclasses.dataclass(frozen=True, kw_only=True)
class LinearCost:
  """Seconds as a sum.

  Attributes:
    step: Of any step: the model's weights are read once.
    token: Of each token, beside.
    key: Of each key that a query reads.
  """

  step: float
  token: float
  key: float

  def seconds(self, tokens: int, keys: float) -> float:
    """See `Cost`."""
    return self.step + self.token * tokens + self.key * keys


@dataclasses.dataclass(frozen=True)
class MeasuredCost:
  """Seconds as programs took them.

  Attributes:
    shapes: Tokens that programs are compiled for, ascending.
    steps: Seconds of each, without keys.
    key: Seconds of each key that a query reads.
  """

  shapes: tuple[int, ...]
  steps: tuple[float, ...]
  key: float

  def seconds(self, tokens: int, keys: float) -> float:
    """See `Cost`."""
    at = bisect.bisect_left(self.shapes, tokens)
    return self.steps[at] + self.key * keys


def keys_read(start: int, count: int) -> float:
  """Keys that `count` queries behind `start` tokens read, all together."""
  return count * (start + (count + 1) / 2)


def keys_of(works: Iterable[Work]) -> float:
  """Keys that the queries of a step read."""
  return sum(keys_read(work.start, work.count) for work in works)
