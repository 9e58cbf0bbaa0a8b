"""Builders of all pipeline schedules.

Each gives a `Table` for lanes of any number of chunks. Where every lane is one
chunk, an ordinary microbatch, it is the published schedule, tick by tick;
lanes of several chunks run state-aware, by the same rules for what may run
ahead and what may be kept.

Sources: GPipe (arXiv 1811.06965), 1F1B and interleaved (Narayanan et al., arXiv
2104.04473), zero bubble (Qi et al., arXiv 2401.10241), V-Min, V-Half and V-ZB
(Qi et al., arXiv 2405.15362), state-aware 1F1B (ChunkFlow, arXiv 2503.02356),
PipeDream-2BW (arXiv 2006.09503).
"""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Literal

from jaxchunk.sharding.pipeline.scheduling import (
  Rules,
  Ticks,
  batch_ends,
  replay,
  schedule,
)
from jaxchunk.sharding.pipeline.table import Lanes, Op, Placement, Table

Schedule = Literal[
  "gpipe",
  "1f1b",
  "1f1b_aligned",
  "interleaved",
  "zb_h1",
  "zb_v",
  "v_half",
  "v_min",
]

# Anything that says what runs: lanes, their sizes, a number of microbatches.
LanesLike = Lanes | Sequence[int] | int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
  """How the stages of a layout take turns.

  The head is on the last stage, and every device has its matrix, because an
  array has one shape everywhere; `Rules({"vocab": ("stage", "tensor")})` in the
  layout lays embedding and head over all stages instead.

  Attributes:
    schedule: Which table, a name of `BUILDERS`.
    layers: Of each virtual stage; `None` is as even as they can be.

  Raises:
    ValueError: There is no such schedule.
  """

  schedule: Schedule = "1f1b"
  layers: tuple[int, ...] | None = None

  def __post_init__(self) -> None:
    if self.schedule not in BUILDERS:
      raise ValueError(
        f"pipeline.schedule={self.schedule!r} is not one of {list(BUILDERS)}"
      )

  def table(self, devices: int, lanes: "LanesLike") -> Table:
    """The schedule of some lanes on so many stages."""
    return build(self.schedule, devices, lanes)

  def placement(self, devices: int) -> Placement:
    """Where the schedule has its virtual stages."""
    return self.table(devices, devices).placement


def as_lanes(lanes: Lanes | Sequence[int] | int) -> Lanes:
  """Lanes from their sizes, or from a number of microbatches."""
  if isinstance(lanes, Lanes):
    return lanes
  if isinstance(lanes, int):
    return Lanes((1,) * lanes)
  return Lanes(tuple(int(size) for size in lanes))


def gpipe(devices: int, lanes: LanesLike) -> Table:
  """All forward passes, then all backward: every chunk is kept."""
  lanes = as_lanes(lanes)
  placement = Placement.loop(devices)
  rules = Rules(
    lead=[lanes.count] * devices,
    kept=[lanes.count] * devices,
    first=("F_keep", "F_drop", "B", "W"),
  )
  return Table("gpipe", placement, lanes, schedule(placement, lanes, rules))


def one_f_one_b(
  devices: int,
  lanes: LanesLike,
  *,
  aligned: bool = False,
  ahead: int | None = None,
) -> Table:
  """A backward pass as soon as there can be one: P - s chunks are kept.

  Args:
    devices: P.
    lanes: What runs.
    aligned: Forward passes in even ticks and backward ones in odd ticks, so
      that no device waits in a tick for another's longer operation; about
      twice as many chunks are kept.
    ahead: Chunks beyond a lane for each stage that is still to come; by
      default one, and two where lanes have several chunks, which hides what
      stages wait for each other between them.
  """
  lanes = as_lanes(lanes)
  if ahead is None:
    ahead = 1 if max(lanes.sizes) == 1 else 2
  placement = Placement.loop(devices)
  lead = [ahead * (devices - 1 - s) for s in range(devices)]
  if aligned:
    lead = [2 * n + 1 for n in lead]
  rules = Rules(lead=lead, kept=[lanes.count] * devices, parity=aligned)
  name = "1f1b_aligned" if aligned else "1f1b"
  return Table(name, placement, lanes, schedule(placement, lanes, rules))


def interleaved(devices: int, lanes: LanesLike, *, parts: int = 2) -> Table:
  """1F1B with several virtual stages a device: 1/parts of its bubble."""
  lanes = as_lanes(lanes)
  placement = Placement.loop(devices, parts)
  if _single(lanes):
    orders = [
      _interleaved_order(device, devices, parts, lanes.count)
      for device in range(devices)
    ]
    return Table("interleaved", placement, lanes, replay(placement, orders))
  kept = [2 * (devices - d) - 1 + (parts - 1) * devices for d in range(devices)]
  rules = Rules(lead=[lanes.count] * placement.stages, kept=kept, group=devices)
  ticks = schedule(placement, lanes, rules)
  return Table("interleaved", placement, lanes, ticks)


def zb_h1(devices: int, lanes: LanesLike) -> Table:
  """1F1B whose gradients of weights fill the bubble: a third of it is left."""
  lanes = as_lanes(lanes)
  placement = Placement.loop(devices)
  if _single(lanes):
    orders = [_zb_h1_order(s, devices, lanes.count) for s in range(devices)]
    return Table("zb_h1", placement, lanes, replay(placement, orders))
  rules = Rules(
    lead=[devices - 1 - s for s in range(devices)],
    kept=[max(devices, _most_kept(lanes))] * devices,
    split=True,
  )
  return Table("zb_h1", placement, lanes, schedule(placement, lanes, rules))


def zb_v(devices: int, lanes: LanesLike) -> Table:
  """A V of two virtual stages: no bubble but the way to the last device."""
  return _vee("zb_v", devices, lanes, 4, 2, kept=2 * devices)


def v_half(devices: int, lanes: LanesLike) -> Table:
  """A V that keeps half of what 1F1B keeps, with half of its bubble."""
  return _vee("v_half", devices, lanes, 2, 1, kept=devices + 2)


def v_min(devices: int, lanes: LanesLike) -> Table:
  """A V that keeps a third of what 1F1B keeps, with 2/3 of its bubble."""
  kept = -(-2 * devices // 3) + 2
  return _vee("v_min", devices, lanes, 1, 1, kept=kept)


def two_bw(devices: int, batches: Sequence[LanesLike]) -> Table:
  """PipeDream-2BW: 1F1B from batch to batch without a flush between them.

  The gradient of a batch is that of the weights one update before: those of
  batch t are made by batches up to t - 2.

  Args:
    devices: P.
    batches: What runs between two updates, batch by batch.

  Raises:
    ValueError: The batches do not keep the same number of chunks alive.
  """
  each = [as_lanes(lanes) for lanes in batches]
  if len({one.live for one in each}) != 1:
    raise ValueError(
      f"live={[one.live for one in each]} must be the same for all batches, of "
      "which there must be one at least"
    )
  lanes = Lanes(tuple(size for one in each for size in one.sizes), each[0].live)
  sizes = tuple(len(one.sizes) for one in each)
  placement = Placement.loop(devices)
  rules = Rules(
    lead=[devices - 1 - s for s in range(devices)],
    kept=[lanes.count] * devices,
    batches=sizes,
  )
  ticks = schedule(placement, lanes, rules)
  updates = _update_ticks(ticks, batch_ends(lanes, sizes), devices)
  return Table("two_bw", placement, lanes, ticks, sizes, updates)


BUILDERS: dict[Schedule, Callable[[int, LanesLike], Table]] = {
  "gpipe": gpipe,
  "1f1b": one_f_one_b,
  "1f1b_aligned": lambda p, lanes: one_f_one_b(p, lanes, aligned=True),
  "interleaved": interleaved,
  "zb_h1": zb_h1,
  "zb_v": zb_v,
  "v_half": v_half,
  "v_min": v_min,
}
"""Every synchronous schedule, as a function of the devices and lanes."""


def build(name: Schedule, devices: int, lanes: LanesLike) -> Table:
  """A schedule by its name.

  Raises:
    ValueError: The name or a number is none.
  """
  if name not in BUILDERS:
    raise ValueError(f"schedule={name!r} is not one of {list(BUILDERS)}")
  if devices < 1:
    raise ValueError(f"devices={devices} must be at least 1")
  return BUILDERS[name](devices, lanes)


def _single(lanes: Lanes) -> bool:
  """Whether all lanes are ordinary microbatches."""
  return max(lanes.sizes) == 1 and all(lanes.kept)


def _most_kept(lanes: Lanes) -> int:
  live = max(lanes.sizes) if lanes.live is None else lanes.live
  return max(1, min(live, max(lanes.sizes)))


def _interleaved_order(
  device: int, devices: int, parts: int, count: int
) -> list[Op]:
  """In turns of `devices` chunks through one part of the device.

  Of a last turn with fewer chunks those that are missing are left out.
  """
  full = -(-count // devices) * devices

  def op(number: int, kind: Literal["F_keep", "B"]) -> Op:
    part = number % (devices * parts) // devices
    if kind == "B":
      part = parts - 1 - part
    item = number // (devices * parts) * devices + number % devices
    return Op(kind, part * devices + device, item)

  total = full * parts
  warm = min(total, 2 * (devices - device - 1) + (parts - 1) * devices)
  order = [op(n, "F_keep") for n in range(warm)]
  for n in range(total - warm):
    order += [op(warm + n, "F_keep"), op(n, "B")]
  order += [op(n, "B") for n in range(total - warm, total)]
  return [op for op in order if op.item < count]


def _zb_h1_order(stage: int, devices: int, count: int) -> list[Op]:
  """Stage s puts off its `W` by s chunks, so that all keep P."""
  warm = min(count, devices - stage)
  order = [Op("F_keep", stage, n) for n in range(warm)]
  for n in range(count):
    order.append(Op("B", stage, n))
    if n >= stage:
      order.append(Op("W", stage, n - stage))
    if warm + n < count:
      order.append(Op("F_keep", stage, warm + n))
  return order + [
    Op("W", stage, n) for n in range(max(count - stage, 0), count)
  ]


def _vee(
  name: str, devices: int, lanes: LanesLike, down: int, up: int, *, kept: int
) -> Table:
  """Chunks one after the other every six ticks, then as early as they can.

  Args:
    name: Of the schedule.
    devices: P.
    lanes: What runs.
    down: Ticks from a stage to the next on the way to the last device.
    up: On the way back.
    kept: Chunks of a virtual stage that a device may keep.
  """
  lanes = as_lanes(lanes)
  placement = Placement.vee(devices)
  if not _single(lanes):
    rules = Rules(
      lead=[lanes.count] * placement.stages,
      kept=[max(kept, _most_kept(lanes))] * devices,
      split=True,
    )
    return Table(name, placement, lanes, schedule(placement, lanes, rules))
  starts = _building_block(devices, down, up)
  orders = []
  for device, (f0, f1, b1, b0) in enumerate(starts):
    last = placement.stages - 1 - device
    timed = [
      (start + 6 * n, op)
      for n in range(lanes.count)
      for start, op in (
        (f0, Op("F_keep", device, n)),
        (f1, Op("F_keep", last, n)),
        (b1, Op("B", last, n)),
        (b0, Op("B", device, n)),
      )
    ]
    orders.append([op for _, op in sorted(timed)])
  # What the block itself keeps is a bound for V-Min, one above for some P.
  limits = [max(kept, 4) if down > 1 else kept + 1] * devices
  ticks = replay(placement, orders, fill=True, kept=limits)
  return Table(name, placement, lanes, ticks)


def _building_block(
  devices: int, down: int, up: int
) -> list[tuple[int, int, int, int]]:
  """When each device starts `F` and `B` of its two parts for the first chunk.

  So that they can be repeated every six ticks: no two of a device fall on the
  same tick of six. The least waiting at the three turns is taken.
  """
  found = []
  for waits in itertools.product(range(6), repeat=3):
    turn_f = down * (devices - 1) + 1 + waits[0]
    turn_l = turn_f + up * (devices - 1) + 1 + waits[1]
    turn_b = turn_l + down * (devices - 1) + 1 + waits[2]
    starts = []
    for device in range(devices):
      rest = up * (devices - 1 - device)
      ahead = down * device
      starts.append((ahead, turn_f + rest, turn_l + ahead, turn_b + rest))
    if all(len({start % 6 for start in four}) == 4 for four in starts):
      found.append(((sum(waits), waits[0], waits[2]), starts))
  return min(found)[1]


def _update_ticks(
  ticks: Ticks, ends: Sequence[int], devices: int
) -> tuple[int, ...]:
  """The tick in which the last backward pass of each batch is."""
  left = [(b - a) * devices for a, b in itertools.pairwise([0, *ends])]
  last = [0] * len(ends)
  for tick, row in enumerate(ticks):
    for op in row:
      if op is not None and op.kind == "B":
        batch = sum(end <= op.item for end in ends)
        left[batch] -= 1
        last[batch] = tick
  assert not any(left)
  return tuple(last)
