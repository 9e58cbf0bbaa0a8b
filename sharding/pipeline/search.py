"""The fastest table for what has to run, of those that fit into memory.

What is tried: every schedule, how many chunks of a lane stay live, how far
forward passes run ahead, and the order of lanes. Sorted orders put lanes of
like length, and so chunks with like prefixes and costs, next to each other,
which lockstep rewards; those with the longest in the middle fill and drain the
pipeline with short ones. `best_split` tries chunk sizes and layers too.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, NamedTuple, get_args

from jaxchunk.sharding.pipeline import tables
from jaxchunk.sharding.pipeline.simulate import (
  Costs,
  chunk_costs,
  event_driven,
  lockstep,
)
from jaxchunk.sharding.pipeline.slots import sizes_of
from jaxchunk.sharding.pipeline.table import Lanes, Table
from jaxchunk.sharding.pipeline.tables import LanesLike, Schedule
from jaxchunk.sharding.pipeline.timeline import Timeline
from jaxchunk.sharding.pipeline.usage import (
  SlotBytes,
  allocated_memory,
  part_bytes,
)

Mode = Literal["lockstep", "event"]

_AHEAD = (1, 2, 3)


class Found(NamedTuple):
  """What a search found.

  Attributes:
    table: Of the lanes in their new order.
    timeline: Of the table.
    order: The lanes of the caller, as they come in the table.
  """

  table: Table
  timeline: Timeline
  order: tuple[int, ...]


class _Candidate(NamedTuple):
  """Something to try."""

  order: tuple[int, ...]
  costs: Costs
  build: Callable[[], Table]


def best_table(
  devices: int,
  lanes: LanesLike,
  costs: Costs,
  *,
  memory_limit: int | None = None,
  slot_bytes: SlotBytes | None = None,
  names: Sequence[Schedule] = tuple(tables.BUILDERS),
  lives: Sequence[int | None] = (None, 2, 1),
  mode: Mode = "lockstep",
) -> Found:
  """The table of the least makespan; of equals, that which keeps least.

  It builds and simulates up to a few hundred tables: seconds for tens of
  devices and chunks.

  Args:
    devices: P.
    lanes: What runs; its own `live` counts for nothing.
    costs: Of its chunks, in the order of these lanes. With `stages`, only
      schedules of so many virtual stages can be tried.
    memory_limit: Bytes that the slots of a device may take, as
      `usage.allocated_memory` counts them.
    slot_bytes: What slots weigh where a device has one virtual stage; of
      several, each has its part (`usage.part_bytes`).
    names: Schedules to try.
    lives: K to try; `None` keeps all chunks, 0 none.
    mode: Whose makespan counts: `lockstep`'s or `event_driven`'s.

  Raises:
    ValueError: Nothing fits, and the least limit that would do is named; or
      arguments contradict each other.
  """
  if memory_limit is not None and slot_bytes is None:
    raise ValueError(
      f"memory_limit={memory_limit} says nothing without slot_bytes"
    )
  lanes = tables.as_lanes(lanes)
  if mode not in get_args(Mode):
    raise ValueError(f"mode={mode!r} is not one of {list(get_args(Mode))}")
  simulate = lockstep if mode == "lockstep" else event_driven
  best: tuple[tuple[float, float], Found] | None = None
  least: tuple[int, Table] | None = None
  for order, permuted, build in _candidates(
    devices, lanes, costs, names, lives
  ):
    table = build()
    if memory_limit is not None and slot_bytes is not None:
      parts = table.placement.parts
      need = allocated_memory(table, part_bytes(slot_bytes, parts))
      if least is None or need < least[0]:
        least = need, table
      if need > memory_limit:
        continue
    timeline = simulate(table, permuted)
    if best is not None and timeline.makespan > best[0][0]:
      continue
    kept = sizes_of(table).kept / table.placement.parts
    key = timeline.makespan, kept
    if best is None or key < best[0]:
      best = key, Found(table, timeline, order)
  if best is not None:
    return best[1]
  if least is None:
    raise ValueError(f"names={list(names)} and lives={list(lives)}: no choice")
  raise TooLittleMemory(
    f"memory_limit={memory_limit} bytes: no table fits; the least limit is "
    f"{least[0]}, for {least[1].name} with live={least[1].lanes.live}",
    least[0],
  )


def _candidates(
  devices: int,
  lanes: Lanes,
  costs: Costs,
  names: Sequence[Schedule],
  lives: Sequence[int | None],
) -> Iterator[_Candidate]:
  """All that is tried, once each."""
  longest = max(lanes.sizes)
  kept = dict.fromkeys(
    None if live is None or live >= longest else live for live in lives
  )
  choices = [choice for name in names for choice in _builders(name)]
  for order in lane_orders(lanes, costs):
    permuted = _permuted(lanes, costs, order)
    for live, choice in itertools.product(kept, choices):
      mine = Lanes(tuple(lanes.sizes[lane] for lane in order), live)
      yield _Candidate(
        order, permuted, functools.partial(choice, devices, mine)
      )


def _builders(name: Schedule) -> list[Callable[[int, LanesLike], Table]]:
  """A schedule with each of the numbers that it takes."""
  if name not in ("1f1b", "1f1b_aligned"):
    return [functools.partial(tables.build, name)]
  aligned = name == "1f1b_aligned"
  return [
    functools.partial(tables.one_f_one_b, aligned=aligned, ahead=ahead)
    for ahead in _AHEAD
  ]


def lane_orders(lanes: Lanes, costs: Costs) -> list[tuple[int, ...]]:
  """Orders worth trying, of which no two run lanes of the same costs.

  As they are, costliest first, costliest last, costliest in the middle, and
  costly and cheap ones in turn.
  """
  chunks = [
    sum(times) for times in zip(*chunk_costs(lanes, costs), strict=True)
  ]
  of_lane = [
    tuple(chunks[start : start + size])
    for start, size in zip(lanes.starts, lanes.sizes, strict=True)
  ]
  count = len(of_lane)
  falling = sorted(range(count), key=lambda lane: (-sum(of_lane[lane]), lane))
  rising = falling[::-1]
  half = count // 2
  turns = [
    lane
    for pair in itertools.zip_longest(falling[: count - half], rising[:half])
    for lane in pair
    if lane is not None
  ]
  orders = [
    list(range(count)),
    falling,
    rising,
    rising[::2] + rising[1::2][::-1],
    turns,
  ]
  # Lanes of the same costs are the same lane to a schedule.
  different = {
    tuple(of_lane[lane] for lane in order): order for order in reversed(orders)
  }
  return [tuple(order) for order in reversed(different.values())]


def _permuted(lanes: Lanes, costs: Costs, order: Sequence[int]) -> Costs:
  """Costs of the chunks of lanes in another order."""
  if costs.chunks is None:
    return costs
  factors = [
    factor
    for lane in order
    for factor in costs.chunks[lanes.starts[lane] : lanes.end(lane)]
  ]
  return dataclasses.replace(costs, chunks=tuple(factors))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChunkSize:
  """What a chunk size makes of a batch.

  Attributes:
    lanes: Chunks of each lane.
    costs: Of a chunk, where stages are even.
    slot_bytes: What slots weigh then; `None` where memory is no matter.
  """

  lanes: Sequence[int]
  costs: Costs
  slot_bytes: SlotBytes | None = None


class Split(NamedTuple):
  """What a search over chunk sizes and stages found.

  Attributes:
    chunk_size: C, of the sizes that were given.
    layers: Of each stage; `None` is as even as they can be.
    found: The table.
  """

  chunk_size: int
  layers: tuple[int, ...] | None
  found: Found


def best_split(
  devices: int,
  sizes: Mapping[int, ChunkSize],
  *,
  layers: int | None = None,
  memory_limit: int | None = None,
  names: Sequence[Schedule] = tuple(tables.BUILDERS),
  lives: Sequence[int | None] = (None, 2, 1),
  mode: Mode = "lockstep",
) -> Split:
  """`best_table` over chunk sizes, and layers over stages.

  Args:
    devices: P.
    sizes: By C, what it makes of the batch; costs in one unit.
    layers: Of the model; `None` leaves stages even. Otherwise the last stage,
      which has the head, is tried with fewer, in schedules of one stage a
      device.
    memory_limit: As in `best_table`.
    names: Schedules to try.
    lives: K to try.
    mode: Whose makespan counts.

  Raises:
    ValueError: Nothing fits; names the least limit that would do.
  """
  best: tuple[float, Split] | None = None
  failed = []
  for size, chunk in sizes.items():
    for split in _splits(devices, layers, chunk.costs, names):
      try:
        found = best_table(
          devices,
          list(chunk.lanes),
          split.costs(chunk.costs),
          memory_limit=memory_limit,
          slot_bytes=split.slot_bytes(chunk.slot_bytes),
          names=split.names,
          lives=lives,
          mode=mode,
        )
      except TooLittleMemory as error:
        failed.append((error.least, size, str(error)))
        continue
      makespan = found.timeline.makespan
      if best is None or makespan < best[0]:
        best = makespan, Split(size, split.layers, found)
  if best is not None:
    return best[1]
  if not failed:
    raise ValueError(f"sizes={list(sizes)} and names={list(names)}: no choice")
  least, size, text = min(failed)
  raise TooLittleMemory(f"{text}, in chunks of {size} tokens", least)


class TooLittleMemory(ValueError):
  """No table fits.

  Attributes:
    least: The least limit in bytes that would do.
  """

  def __init__(self, text: str, least: int):
    super().__init__(text)
    self.least = least


class _Layers(NamedTuple):
  """Layers over stages.

  Attributes:
    layers: Of each stage; `None` is even.
    names: Schedules that can run so.
  """

  layers: tuple[int, ...] | None
  names: tuple[Schedule, ...]

  def costs(self, even: Costs) -> Costs:
    """Costs with a factor for each stage."""
    if self.layers is None:
      return even
    mean = sum(self.layers) / len(self.layers)
    return dataclasses.replace(
      even, stages=tuple(n / mean for n in self.layers)
    )

  def slot_bytes(self, even: SlotBytes | None) -> SlotBytes | None:
    """What slots weigh: all stages have room for the most layers."""
    if even is None or self.layers is None:
      return even
    factor = max(self.layers) * len(self.layers) / sum(self.layers)
    inbox, *others = even
    return SlotBytes(inbox, *(math.ceil(factor * n) for n in others))


def _splits(
  devices: int, layers: int | None, costs: Costs, names: Sequence[Schedule]
) -> Iterator[_Layers]:
  """Even stages, then fewer and fewer layers on the last."""
  yield _Layers(None, tuple(names))
  single = tuple(
    name
    for name in names
    if tables.build(name, devices, devices).placement.parts == 1
  )
  if layers is None or devices == 1 or costs.everywhere or not single:
    return
  for last in range(layers // devices, 0, -1):
    each, more = divmod(layers - last, devices - 1)
    first = [each + (stage < more) for stage in range(devices - 1)]
    if max(first) > 2 * last + 1:
      return
    yield _Layers((*first, last), single)
