"""FlexSP's way to place lanes: an integer program, solved by HiGHS.

FlexSP (arXiv 2412.01523) puts sequences of about one length into buckets, and
an integer program chooses how many of each bucket run on groups of which degree
so that the last group is done early. With one variable for each bucket and
group the program has as many equal solutions as groups have orders. Here the
smallest groups, which run most lanes, are counted by *pattern* instead: how
many lanes of each bucket a group runs (Gilmore and Gomory, 1961, of stock to be
cut). What patterns leave of the time is room for lanes of larger groups.
"""

import dataclasses
import itertools
import math
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import scipy.optimize
import scipy.sparse
from jaxtyping import Float64, Int64

from jaxchunk.chunking.balance import Placement, Problem, placement
from jaxchunk.chunking.balance_hybrid import climbed, hybrid_placement

# Buckets of the smallest groups' lanes: the first that gives few patterns.
_BUCKETS = (8, 6, 4, 3, 2)
_MOST_PATTERNS = 300
_MOST_LIMITS = 12
_MOST_TARGETS = 5
# Lanes of the smallest groups that take a smaller part of the step are in no
# program: they fill up what is left in the end.
_SMALL = 1 / 8
_GAP = 0.002

_Chosen = tuple[Int64[np.ndarray, " lanes"], Mapping[int, int]]


@dataclasses.dataclass(frozen=True)
class _Bucket:
  """Lanes that take about as long.

  Attributes:
    lanes: The shortest first.
    seconds: Of the longest at each degree, infinite where one does not fit.
  """

  lanes: tuple[int, ...]
  seconds: tuple[float, ...]


@dataclasses.dataclass(frozen=True)
class _Program:
  """How often which pattern, and how many lanes on larger groups.

  Attributes:
    problem: What is placed.
    target: Seconds that the step may take.
    base: The smallest degree that is used, as its index.
    buckets: Those of lanes that fit on it, and then the others.
    fluid: Device seconds of the lanes in no bucket.
    patterns: Lanes of each bucket that a smallest group runs,
      `[patterns, buckets]`.
    taken: Seconds of each pattern, `[patterns]`.
    counts: `(bucket, degree as its index)` of lanes on larger groups.
  """

  problem: Problem
  target: float
  base: int
  buckets: tuple[_Bucket, ...]
  fluid: float
  patterns: Int64[np.ndarray, "patterns buckets"]
  taken: Float64[np.ndarray, " patterns"]
  counts: tuple[tuple[int, int], ...]


def flexible_placement(
  problem: Problem, *, time_limit: float = 0.7
) -> Placement:
  """Places lanes by integer programs, for ever shorter steps.

  It begins with `hybrid_placement` and tries shorter steps by bisection down to
  the lower bound. A program only counts lanes on groups, in the time of each
  bucket's longest; they are then dealt out, and single lanes moved, as
  `hybrid_placement` does. The shortest step that was found is returned: `way`
  is "flexible" if a program led to it, and else says that hybrid's was not
  beaten, and whether time ran out.

  In the same time a slower process may find less. Where several plan a step,
  one must tell the others, or all take `hybrid_placement`.

  Args:
    problem: What there is to place.
    time_limit: Seconds to begin programs in; each may take a quarter of it.

  Raises:
    ValueError: The time limit is not positive.
  """
  if time_limit <= 0:
    raise ValueError(f"time_limit must be positive, got {time_limit}")
  end = time.monotonic() + time_limit
  first = hybrid_placement(problem)
  best, shortest = None, first.makespan
  low, high, in_time = first.lower_bound, first.makespan, True
  for _ in range(_MOST_TARGETS):
    left = end - time.monotonic()
    in_time = in_time and left > 0
    if left <= 0 or high - low <= _GAP * low:
      break
    target = (low + high) / 2
    chosen, solved = _solved(_program(problem, target), time_limit / 4)
    in_time = in_time and solved
    if chosen is None:
      low = target
      continue
    dealt = climbed(problem, chosen[0], target, chosen[1])
    if dealt.makespan < shortest:
      best, shortest = dealt, dealt.makespan
    if dealt.makespan <= target * (1 + _GAP):
      high = min(target, dealt.makespan)
    else:
      low = target
  if best is not None:
    return placement(problem, best, "flexible")
  why = "hybrid: not beaten" + ("" if in_time else " in time")
  return dataclasses.replace(first, way=why)


def buckets_of(values: Sequence[float], most: int) -> list[tuple[int, int]]:
  """Cuts ascending values into ranges, so that each is near its range's last.

  Dynamic programming over the ranges, as FlexSP: the least sum of what each
  value lacks to the largest of its bucket.

  Args:
    values: Ascending.
    most: Ranges at most.

  Returns:
    `(start, stop)` of each range, in order.
  """
  if not values:
    return []
  v = np.asarray(values, np.float64)
  count = len(v)
  sums = np.concatenate([[0.0], np.cumsum(v)])
  start, stop = np.arange(count + 1)[:, None], np.arange(count + 1)[None, :]
  last = np.concatenate([[0.0], v])[None, :]
  lacks = last * (stop - start) - (sums[None, :] - sums[:, None])
  lacks = np.where(start < stop, lacks, math.inf)
  lacks[0, 0] = 0.0
  best, choices = lacks[0], []
  for _ in range(most - 1):
    longer = best[:, None] + lacks
    np.fill_diagonal(longer, best)
    choices.append(longer.argmin(0))
    best = longer.min(0)
  cuts = [count]
  for choice in reversed(choices):
    cuts.append(int(choice[cuts[-1]]))
  cuts = sorted({0, *cuts})
  return list(itertools.pairwise(cuts))


def _program(problem: Problem, target: float) -> _Program:
  """The program of a step of `target` seconds, in as many buckets as it can."""
  seconds = problem.seconds
  unfit = np.isinf(seconds).sum(0)
  base = int(unfit.min())
  small = (unfit == base) & (seconds[base] <= _SMALL * target)
  larger = _bucketed(problem, np.flatnonzero(unfit > base), _BUCKETS[0])
  for most in _BUCKETS:
    buckets = _bucketed(problem, np.flatnonzero(~small & (unfit == base)), most)
    patterns = list(
      itertools.islice(
        _patterns(
          [bucket.seconds[base] for bucket in buckets],
          [len(bucket.lanes) for bucket in buckets],
          target,
        ),
        _MOST_PATTERNS + 1,
      )
    )
    if len(patterns) <= _MOST_PATTERNS:
      break
  times = np.asarray([bucket.seconds[base] for bucket in buckets])
  counted = np.asarray(patterns, np.int64).reshape(len(patterns), len(buckets))
  everything = (*buckets, *larger)
  counts = tuple(
    (n, row)
    for n, bucket in enumerate(everything)
    for row in range(base + 1, len(problem.degrees))
    if bucket.seconds[row] <= target
  )
  return _Program(
    problem=problem,
    target=target,
    base=base,
    buckets=everything,
    fluid=float(seconds[base, small].sum()) * problem.degrees[base],
    patterns=np.pad(counted, ((0, 0), (0, len(larger)))),
    taken=counted @ times,
    counts=counts,
  )


def _bucketed(
  problem: Problem, lanes: Int64[np.ndarray, " some"], most: int
) -> list[_Bucket]:
  """Puts lanes of about one time on the largest groups into buckets."""
  lanes = lanes[np.argsort(problem.seconds[-1, lanes], kind="stable")]
  values = problem.seconds[-1, lanes].tolist()
  return [
    _Bucket(
      tuple(lanes[start:stop].tolist()),
      tuple(problem.seconds[:, lanes[start:stop]].max(1).tolist()),
    )
    for start, stop in buckets_of(values, most)
  ]


def _patterns(
  seconds: Sequence[float], counts: Sequence[int], room: float
) -> Iterator[tuple[int, ...]]:
  """All ways to run lanes of each bucket in some time."""
  if not seconds:
    yield ()
    return
  for number in range(min(counts[0], int(room // seconds[0])), -1, -1):
    left = room - number * seconds[0]
    for rest in _patterns(seconds[1:], counts[1:], left):
      yield number, *rest


def _solved(
  program: _Program, time_limit: float
) -> tuple[_Chosen | None, bool]:
  """Degrees and groups of lanes, if there are; and whether that is settled.

  The variables are how many groups run each pattern, and each of `counts`.
  """
  problem, target = program.problem, program.target
  size = problem.degrees[program.base]
  times = np.asarray([program.buckets[n].seconds[r] for n, r in program.counts])
  degrees = np.asarray([problem.degrees[r] for _, r in program.counts])
  # Everything in steps of the target: near 1.
  taken, areas = program.taken / target, degrees * times / target
  covered = np.zeros((len(program.buckets), len(times)))
  for column, (bucket, _) in enumerate(program.counts):
    covered[bucket, column] = 1
  numbers = [float(len(bucket.lanes)) for bucket in program.buckets]
  groups = problem.devices // size
  rows = [
    np.concatenate([program.patterns.T, covered], 1),
    np.concatenate([np.ones(len(taken)), np.zeros(len(times))])[None],
  ]
  low, high = [*numbers, groups], [*numbers, groups]
  # What patterns leave is room for lanes that are no longer than that.
  distinct = np.unique(times)
  for limit in (0.0, *distinct[:: -(-len(distinct) // _MOST_LIMITS) or 1]):
    fits = (1 - taken) * target >= limit * (1 - 1e-9)
    left = np.where(fits, size * (taken - 1), 0.0)
    rows.append(
      np.concatenate([left, np.where(times >= limit, areas, 0.0)])[None]
    )
    low.append(-math.inf)
    high.append(0.0 if limit else -program.fluid / target)
  found = scipy.optimize.milp(
    np.concatenate([size * taken, areas]),
    integrality=np.ones(len(taken) + len(times)),
    constraints=scipy.optimize.LinearConstraint(
      scipy.sparse.csr_array(np.concatenate(rows)), low, high
    ),
    options={"time_limit": time_limit, "mip_rel_gap": _GAP},
  )
  if found.x is None:
    return None, found.status != 1
  return _chosen(program, np.rint(found.x).astype(int).tolist()), True


def _chosen(program: _Program, numbers: Sequence[int]) -> _Chosen:
  """Lanes for what a program counts: the longest of a bucket on most devices.

  Patterns go to neighbours in the order of their time, so that the devices of a
  larger group have about as much left.
  """
  rows = np.full(program.problem.num_lanes, program.base)
  lanes = [list(bucket.lanes) for bucket in program.buckets]
  on_larger = zip(program.counts, numbers[len(program.taken) :], strict=True)
  for (bucket, row), number in sorted(on_larger, key=lambda n: -n[0][1]):
    for _ in range(number):
      rows[lanes[bucket].pop()] = row
  fixed: dict[int, int] = {}
  group = 0
  for index in np.argsort(program.taken, kind="stable").tolist():
    for _ in range(numbers[index]):
      for bucket, number in enumerate(program.patterns[index].tolist()):
        fixed |= {lanes[bucket].pop(): group for _ in range(number)}
      group += 1
  return rows, fixed
