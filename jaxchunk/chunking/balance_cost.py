"""How long a lane takes on a group of devices, fitted from timings.

A chunk of C tokens whose queries see `pairs` keys takes, on d devices that
share it,

    chunk + (token * C + pair * pairs) / d + exchange[d] * C   seconds,

where pairs is about C * prefix for a chunk of a long sequence, and the last
term is what a group of d devices tells each other. FlexSP (arXiv 2412.01523)
fits such a model of whole sequences.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import numpy as np
import scipy.optimize

from jaxchunk.chunking.cost import visible_pairs
from jaxchunk.chunking.plan import ChunkPlan


@dataclasses.dataclass(frozen=True)
class Work:
  """What there is to do in some chunks that run one after another.

  Attributes:
    chunks: How many.
    tokens: C of each, padding included: it is computed like the rest.
    pairs: Of a query and a key that it sees, in the mean over the layers.
  """

  chunks: int
  tokens: int
  pairs: float


@dataclasses.dataclass(frozen=True)
class Timing:
  """Work that was timed on a group of `degree` devices."""

  work: Work
  degree: int
  seconds: float


@dataclasses.dataclass(frozen=True)
class CostModel:
  """Seconds of a lane on a group; other units do if only ratios matter.

  Attributes:
    chunk: Of every chunk, whatever it holds.
    token: Of a token, on one device.
    pair: Of a visible pair, on one device.
    exchange: `(degree, seconds of a token)` of what a group of that many
      devices tells each other; no other degree above 1 is used, so that four
      entries are a handful of compiled programs.
  """

  chunk: float
  token: float
  pair: float
  exchange: tuple[tuple[int, float], ...] = ()

  @property
  def degrees(self) -> tuple[int, ...]:
    """Devices of a group for which a time is known, ascending."""
    return 1, *sorted(degree for degree, _ in self.exchange)

  def seconds(self, work: Work, degree: int) -> float:
    """How long a group of `degree` devices takes.

    Raises:
      ValueError: The degree is not known; names those that are.
    """
    if degree not in self.degrees:
      raise ValueError(
        f"degree={degree} has no entry in exchange; known are {self.degrees}: "
        "time some lanes on that many devices, and fit_cost"
      )
    shared = self.token * work.tokens + self.pair * work.pairs
    exchanged = dict(self.exchange).get(degree, 0.0) * work.tokens
    return self.chunk * work.chunks + shared / degree + exchanged


def lane_works(
  plan: ChunkPlan, windows: Sequence[int | None] = (None,)
) -> tuple[Work, ...]:
  """The work of each lane of a plan.

  Args:
    plan: From `chunk_plan`.
    windows: The attention window of each layer, or of each of a period that
      repeats; `None` sees all. Pairs are the mean over them.
  """
  works = []
  for lane in plan.lanes:
    pairs = sum(
      visible_pairs(0, plan.lengths[sequence], window)
      for sequence, _ in lane.sequences
      for window in windows
    )
    tokens = lane.num_chunks * plan.chunk_size
    works.append(Work(lane.num_chunks, tokens, pairs / len(windows)))
  return tuple(works)


def fit_cost(timings: Iterable[Timing]) -> CostModel:
  """Fits the coefficients to timings, by nonnegative least squares.

  Errors are relative: a chunk that is off by a tenth counts as much as a long
  lane that is. Timings on one device with one chunk size cannot tell `chunk`
  from `token`: take two sizes.

  Args:
    timings: Of works that differ in tokens and in pairs, at least as many as
      there are coefficients: 3, and one for each degree above 1.

  Raises:
    ValueError: There are too few timings, or one is not positive.
  """
  timings = list(timings)
  degrees = sorted({t.degree for t in timings} - {1})
  if len(timings) < 3 + len(degrees):
    raise ValueError(
      f"timings has {len(timings)} entries for {3 + len(degrees)} coefficients "
      f"(degrees above 1: {degrees}); time more lanes"
    )
  for index, timing in enumerate(timings):
    if timing.seconds <= 0 or timing.degree < 1:
      raise ValueError(
        f"timings[{index}] has seconds={timing.seconds} and "
        f"degree={timing.degree}; both must be positive"
      )
  rows = np.asarray(
    [
      [
        t.work.chunks,
        t.work.tokens / t.degree,
        t.work.pairs / t.degree,
        *(t.work.tokens * (t.degree == degree) for degree in degrees),
      ]
      for t in timings
    ],
    np.float64,
  )
  rows /= np.asarray([[t.seconds] for t in timings])
  # Columns of one size, since a chunk is millions of pairs.
  scale = np.maximum(np.linalg.norm(rows, axis=0, keepdims=True), 1e-300)
  found, _ = scipy.optimize.nnls(rows / scale, np.ones(len(timings)))
  chunk, token, pair, *exchange = (found / scale[0]).tolist()
  return CostModel(
    chunk, token, pair, tuple(zip(degrees, exchange, strict=True))
  )
