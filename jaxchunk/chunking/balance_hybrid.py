"""Hybrid Data Parallelism: each lane on as few devices as serve the step.

ByteScale (arXiv 2502.21231): data and context parallelism are one axis, and a
sequence takes the fewest of its devices that hold it.
"""

import math
from collections.abc import Iterator, Mapping

import numpy as np
from jaxtyping import Int64

from jaxchunk.chunking.balance import (
  Dealt,
  Placement,
  Problem,
  deal,
  placement,
)

# Climbing from every start shortened one of 20 batches of 512 sequences on 64
# devices by 2%, the others by less, and took ten times as long.
_MOST_LIMITS = 64
_MOST_CLIMBED = 8
_MOST_STEPS = 100
_MOST_MOVED = 12
# Near enough to the lower bound to stop.
_NEAR = 1.005


def hybrid_placement(problem: Problem) -> Placement:
  """Each lane on as few devices as hold it; the longest on more if that helps.

  Fewest devices exchange least and leave most groups, so that is where it
  starts (ByteScale's Hybrid Data Parallelism). But a step then takes at least
  as long as the longest lane, so lanes longer than a limit take the least
  degree that keeps it, for ever lower limits. From the best of these, and of
  one degree for all, it goes on in steps: of the lanes on a device that is done
  last, one takes the next higher or lower degree, while that lowers the
  makespan, or leaves fewer devices that are done last.
  """
  return placement(problem, _hybrid(problem), "hybrid")


def _hybrid(problem: Problem) -> Dealt:
  starts = [_within(problem, limit) for limit in _limits(problem)]
  starts += [
    np.full(problem.num_lanes, row)
    for row in range(len(problem.degrees))
    if np.isfinite(problem.seconds[row]).all()
  ]
  starts.sort(key=lambda rows: deal(problem, rows).makespan)
  enough = problem.lower_bound * _NEAR
  ends = [climbed(problem, r, enough) for r in starts[:_MOST_CLIMBED]]
  return min(ends, key=lambda end: end.makespan)


def climbed(
  problem: Problem,
  rows: Int64[np.ndarray, " lanes"],
  enough: float,
  fixed: Mapping[int, int] | None = None,
) -> Dealt:
  """Takes the best neighbour until none is better, or the makespan is enough.

  A neighbour has one lane of a device that is done last at the next degree up
  or down; a lane that moves is not fixed any more.
  """
  fixed = dict(fixed or {})
  now = deal(problem, rows, fixed)
  for _ in range(_MOST_STEPS):
    if now.makespan <= enough:
      break
    tried = []
    for lane, row in _moves(problem, rows, now):
      changed = rows.copy()
      changed[lane] = row
      others = {n: group for n, group in fixed.items() if n != lane}
      tried.append((deal(problem, changed, others), changed, others))
    best = min(tried, key=lambda result: result[0].last, default=None)
    if best is None or best[0].last >= now.last:
      break
    now, rows, fixed = best
  return now


def _moves(
  problem: Problem, rows: Int64[np.ndarray, " lanes"], dealt: Dealt
) -> Iterator[tuple[int, int]]:
  """The longest lanes of a device that is done last, with a next degree."""
  last = int(dealt.loads.argmax())
  degrees = np.asarray(problem.degrees)[rows]
  lanes = np.flatnonzero(dealt.groups == last // degrees)
  longest = np.argsort(-problem.seconds[rows[lanes], lanes], kind="stable")
  for lane in lanes[longest[:_MOST_MOVED]].tolist():
    for row in (int(rows[lane]) + 1, int(rows[lane]) - 1):
      if 0 <= row < len(problem.degrees) and math.isfinite(
        problem.seconds[row, lane]
      ):
        yield lane, row


def _within(problem: Problem, limit: float) -> Int64[np.ndarray, " lanes"]:
  """The least degree of each lane that takes at most `limit` seconds.

  The fastest where none does. As indices in `problem.degrees`.
  """
  meets = problem.seconds <= limit
  fastest = problem.seconds.argmin(0)
  return np.where(meets.any(0), meets.argmax(0), fastest).astype(np.int64)


def _limits(problem: Problem) -> list[float]:
  """Limits to try, falling: times of lanes at degrees that are not too high."""
  times = np.unique(problem.seconds[np.isfinite(problem.seconds)])[::-1]
  useful = times[times >= problem.lower_bound / 200].tolist()
  return useful[:: max(1, -(-len(useful) // _MOST_LIMITS))]
