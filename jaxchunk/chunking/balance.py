"""Which devices run which lane, so that all are done at about the same time.

The P devices of a step are one axis. In a *turn* all of them run one program
of one degree d: devices [k * d, (k + 1) * d) are group k and share one lane,
every d-th token on each. Groups share no collective, so a turn has no barrier:
a group starts as soon as its last device is free, and a step takes as long as
the device that has most.

Three ways, each a pure function of the plan and the cost model:

- `static_placement`: one degree for all lanes, as meshes of a fixed shape do;
- `balance_hybrid.hybrid_placement`: ByteScale's Hybrid Data Parallelism (arXiv
  2502.21231), each lane on the fewest devices that hold it, and the longest on
  more while that helps;
- `balance_program.flexible_placement`: FlexSP's integer program (arXiv
  2412.01523).
"""

import dataclasses
import functools
import heapq
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float64, Int64

from jaxchunk.chunking.balance_cost import CostModel, Work, lane_works
from jaxchunk.chunking.lanes import capacity_chunks
from jaxchunk.chunking.plan import ChunkPlan


@dataclasses.dataclass(frozen=True)
class Turn:
  """What the groups run at one time.

  Attributes:
    degree: Devices of a group.
    lanes: The lane of each group, or `None`.
  """

  degree: int
  lanes: tuple[int | None, ...]


@dataclasses.dataclass(frozen=True)
class Placement:
  """Where and when lanes run.

  Attributes:
    turns: In order; every lane is in one of them.
    makespan: Seconds until the last device is done.
    lower_bound: No placement takes less, see `least_makespan`.
    way: What found it.
  """

  turns: tuple[Turn, ...]
  makespan: float
  lower_bound: float
  way: str


@dataclasses.dataclass(frozen=True)
class Span:
  """A lane on devices [first, first + degree), and when."""

  lane: int
  first: int
  degree: int
  start: float
  stop: float


@dataclasses.dataclass(frozen=True)
class Problem:
  """Lanes to place; made by `placement_problem`.

  Attributes:
    devices: P.
    degrees: Devices that a group may have, ascending powers of two.
    seconds: Of each lane at each degree, `[degrees, lanes]` float64; infinite
      where the lane does not fit into the devices' memory.
  """

  devices: int
  degrees: tuple[int, ...]
  seconds: Float64[np.ndarray, "degrees lanes"]

  @property
  def num_lanes(self) -> int:
    """How many there are to place."""
    return self.seconds.shape[1]

  @functools.cached_property
  def costs(self) -> list[list[float]]:
    """`seconds` as lists, which loops read faster."""
    return self.seconds.tolist()

  @functools.cached_property
  def longest_first(self) -> Int64[np.ndarray, "degrees lanes"]:
    """The lanes by falling time, for each degree."""
    return np.argsort(-self.seconds, axis=1, kind="stable")

  @functools.cached_property
  def lower_bound(self) -> float:
    """`least_makespan`."""
    return least_makespan(self)


def placement_problem(
  plan: ChunkPlan,
  model: CostModel,
  *,
  devices: int,
  tokens_per_device: int,
  windows: Sequence[int | None] = (None,),
) -> Problem:
  """What each lane of a plan takes on groups of each size.

  Args:
    plan: From `chunk_plan`.
    model: What time is needed; also says which degrees there are.
    devices: P.
    tokens_per_device: Keys and values, with their gradients, that a device has
      room for. A lane needs its capacity in tokens (`lanes.capacity_chunks`),
      divided by the devices that share it.
    windows: As in `lane_works`.

  Raises:
    ValueError: An argument is not positive, or a lane fits on no degree; names
      what would hold it.
  """
  for name, value in (
    ("devices", devices),
    ("tokens_per_device", tokens_per_device),
  ):
    if value < 1:
      raise ValueError(f"{name} must be at least 1, got {value}")
  degrees = tuple(
    d
    for d in model.degrees
    if d & (d - 1) == 0 and devices % d == 0 and plan.chunk_size % d == 0
  )
  works = lane_works(plan, windows)
  seconds = np.full((len(degrees), len(works)), math.inf)
  for lane, work in enumerate(works):
    room = capacity_chunks(work.chunks) * plan.chunk_size
    for row, degree in enumerate(degrees):
      if room <= tokens_per_device * degree:
        seconds[row, lane] = model.seconds(work, degree)
    if math.isinf(seconds[-1, lane]):
      raise ValueError(_no_room(plan, work, degrees, tokens_per_device))
  return Problem(devices, degrees, seconds)


def _no_room(
  plan: ChunkPlan, work: Work, degrees: Sequence[int], tokens_per_device: int
) -> str:
  """What is wrong with a lane that fits nowhere, and what would do."""
  size, most = plan.chunk_size, degrees[-1]
  room = capacity_chunks(work.chunks) * size
  needed = 1 << (-(-room // tokens_per_device) - 1).bit_length()
  held = tokens_per_device * most // size
  message = (
    f"a lane of {work.tokens:,} tokens takes room for {room:,}, and on the "
    f"largest group of {tuple(degrees)} devices "
    f"tokens_per_device={tokens_per_device:,} is room for "
    f"{tokens_per_device * most:,}. The nearest that works: "
    f"tokens_per_device={-(-room // most):,}"
  )
  if needed <= size:
    message += f", or groups of {needed} devices"
  if held:
    longest = (1 << (held.bit_length() - 1)) * size
    message += f", or sequences of at most {longest:,} tokens"
  return message


def longest_processing_time(
  costs: Sequence[int] | Sequence[float], groups: int
) -> list[list[int]]:
  """Deals lanes out by longest processing time (Graham, 1969).

  Args:
    costs: Of each lane.
    groups: How many get some.

  Returns:
    The lanes of each group, the costliest first: what the costliest group has
    is at most 4/3 of the least that is possible.
  """
  dealt: list[list[int]] = [[] for _ in range(groups)]
  order = sorted(range(len(costs)), key=lambda n: -costs[n])
  for lane, group in _dealt(order, costs, [0.0] * groups):
    dealt[group].append(lane)
  return dealt


def _dealt(
  order: Sequence[int],
  costs: Sequence[int] | Sequence[float],
  loads: list[float],
) -> list[tuple[int, int]]:
  """Gives each lane in turn to the group with the least load, which grows."""
  heap = [(load, group) for group, load in enumerate(loads)]
  heapq.heapify(heap)
  result = []
  for lane in order:
    load, group = heap[0]
    loads[group] = load + costs[lane]
    heapq.heapreplace(heap, (loads[group], group))
    result.append((lane, group))
  return result


def least_makespan(problem: Problem) -> float:
  """A lower bound on the makespan of any placement.

  In a step of M seconds a lane may only run at degrees that take at most M. If
  each takes the cheapest of those, in devices times seconds, the sum must be at
  most P * M. This is the least such M: at least the mean load, and at least the
  longest lane at its fastest (Turek et al., SPAA 1992, of parallel tasks).
  """
  if not problem.num_lanes:
    return 0.0
  seconds = problem.seconds
  area = seconds * np.asarray(problem.degrees)[:, None]
  low = float(seconds.min(0).max())
  steps = np.unique(seconds[np.isfinite(seconds) & (seconds >= low)])

  def mean_load(limit: float) -> float:
    cheapest = np.where(seconds <= limit, area, math.inf).min(0)
    return float(cheapest.sum()) / problem.devices

  first, last = 0, len(steps)
  while first < last:
    middle = (first + last) // 2
    if mean_load(steps[middle]) <= steps[middle]:
      last = middle
    else:
      first = middle + 1
  # Between two steps no further degree is allowed and the load stays the same.
  if first == 0:
    return low
  below = mean_load(steps[first - 1])
  return below if first == len(steps) else min(below, float(steps[first]))


def spans(problem: Problem, turns: Sequence[Turn]) -> list[Span]:
  """When each lane runs, in the order of the turns."""
  free = np.zeros(problem.devices)
  result = []
  for turn in turns:
    row = problem.degrees.index(turn.degree)
    for group, lane in enumerate(turn.lanes):
      if lane is None:
        continue
      first = group * turn.degree
      start = float(free[first : first + turn.degree].max())
      stop = start + float(problem.seconds[row, lane])
      free[first : first + turn.degree] = stop
      result.append(Span(lane, first, turn.degree, start, stop))
  return result


@dataclasses.dataclass(frozen=True)
class Dealt:
  """Lanes on groups, as degrees and `fixed` groups were chosen.

  Attributes:
    groups: Of each lane, `[lanes]`.
    queues: For each degree, as its index, the lanes in the order of dealing.
    loads: Seconds until each device is done, `[devices]`.
  """

  groups: Int64[np.ndarray, " lanes"]
  queues: list[list[int]]
  loads: Float64[np.ndarray, " devices"]

  @property
  def makespan(self) -> float:
    """Seconds until the last device is done."""
    return float(self.loads.max())

  @property
  def last(self) -> tuple[float, int]:
    """When the last devices are done and how many are: less is better."""
    return self.makespan, int((self.loads >= self.makespan * (1 - 1e-9)).sum())


def deal(
  problem: Problem,
  rows: Int64[np.ndarray, " lanes"],
  fixed: Mapping[int, int] | None = None,
) -> Dealt:
  """Deals lanes out whose degrees are chosen, the largest degree first.

  Then the devices of a group are always free at the same time, and smaller
  lanes fill up what larger ones left uneven: none waits for another. Within a
  degree the longest goes first, to the group with the least load.

  Args:
    problem: What there is to place.
    rows: The degree of each lane, as its index in `problem.degrees`.
    fixed: Groups of some lanes; the others find the room that these leave.
  """
  fixed = fixed or {}
  loads, reserved = np.zeros((2, problem.devices))
  for lane, group in fixed.items():
    degree = problem.degrees[rows[lane]]
    where = slice(group * degree, (group + 1) * degree)
    reserved[where] += problem.costs[rows[lane]][lane]
  groups = np.zeros(problem.num_lanes, np.int64)
  queues: list[list[int]] = [
    order[rows[order] == row].tolist()
    for row, order in enumerate(problem.longest_first)
  ]
  for row in reversed(range(len(queues))):
    if not queues[row]:
      continue
    degree, costs = problem.degrees[row], problem.costs[row]
    free = [n for n in queues[row] if n not in fixed]
    given = [(n, fixed[n]) for n in queues[row] if n in fixed]
    # Devices of a group have run the same so far.
    planned = loads[::degree].tolist()
    if fixed:
      planned = (loads + reserved).reshape(-1, degree).max(1).tolist()
    given += _dealt(free, costs, planned)
    done = loads[::degree].tolist()
    for lane, group in given:
      groups[lane] = group
      done[group] += costs[lane]
      if lane in fixed:
        reserved[group * degree : (group + 1) * degree] -= costs[lane]
    loads = np.repeat(done, degree)
  return Dealt(groups, queues, loads)


def placement(problem: Problem, dealt: Dealt, way: str) -> Placement:
  """Turns that run lanes as dealt; as few as the fullest group has lanes."""
  turns: list[Turn] = []
  for row in reversed(range(len(problem.degrees))):
    degree = problem.degrees[row]
    queues: list[list[int]] = [[] for _ in range(problem.devices // degree)]
    for lane in dealt.queues[row]:
      queues[dealt.groups[lane]].append(lane)
    turns += [
      Turn(degree, tuple(q[n] if n < len(q) else None for q in queues))
      for n in range(max(map(len, queues)))
    ]
  return Placement(tuple(turns), dealt.makespan, problem.lower_bound, way)


def static_placement(problem: Problem, degree: int | None = None) -> Placement:
  """One degree for all lanes, dealt out by longest processing time.

  Args:
    problem: What there is to place.
    degree: By default the least that holds the longest lane.

  Raises:
    ValueError: A lane does not fit on that degree, or it is not among those
      of the problem.
  """
  fits = np.isfinite(problem.seconds).all(1)
  possible = [d for d, fit in zip(problem.degrees, fits, strict=True) if fit]
  if degree is None:
    degree = possible[0]
  if degree not in possible:
    raise ValueError(
      f"degree={degree} does not hold every lane; {possible} do, of the "
      f"problem's {problem.degrees}"
    )
  rows = np.full(problem.num_lanes, problem.degrees.index(degree))
  return placement(problem, deal(problem, rows), "static")
