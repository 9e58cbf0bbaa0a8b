"""From rules, or from the order on each device, to ticks.

`schedule` is list scheduling: each device runs the best operation that it may,
and what comes out follows from how far forward passes run ahead, how much may
be kept, and what goes first. `replay` runs orders that are known as early as
their operations can.
"""

import dataclasses
from collections.abc import Sequence

from jaxchunk.sharding.pipeline.table import Kind, Lanes, Op, Placement

Ticks = tuple[tuple[Op | None, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rules:
  """Which operations a device may run, and which it prefers.

  Attributes:
    lead: For each virtual stage how many chunks it may run forward beyond the
      lane whose backward pass is next.
    kept: For each device how many chunks it may keep at once, over its virtual
      stages; raised where nothing could go on.
    split: Whether weights have operations of their own.
    parity: Whether forward passes have even ticks and all else odd ones.
    first: What goes first.
    group: Chunks that pass a virtual stage before a device turns to its next;
      `None` is in the order of chunks.
    batches: Lanes of each batch, where weights change between them: a batch
      waits for the update by the last but one.
  """

  lead: Sequence[int]
  kept: Sequence[int]
  split: bool = False
  parity: bool = False
  first: tuple[Kind, ...] = ("B", "F_keep", "F_drop", "W")
  group: int | None = None
  batches: Sequence[int] = ()


def schedule(placement: Placement, lanes: Lanes, rules: Rules) -> Ticks:
  """Ticks of a legal schedule; without those in which nobody does anything.

  Args:
    placement: Of the virtual stages.
    lanes: What runs.
    rules: What is allowed.
  """
  kept = list(rules.kept)
  while True:
    ticks, stuck = _try(placement, lanes, rules, kept)
    if not stuck:
      return ticks
    # Somebody needs one slot more than the rules give: dependent chunks do.
    kept = [size + 1 for size in kept]


class _Run:
  """Where a schedule under way stands."""

  def __init__(
    self, placement: Placement, lanes: Lanes, rules: Rules, kept: Sequence[int]
  ):
    stages, count = placement.stages, lanes.count
    self.placement, self.lanes, self.rules = placement, lanes, rules
    self.limits = kept
    self.num_f = [0] * stages
    self.num_b = [0] * stages
    self.num_w = [0] * stages
    self.done_f = [[-1] * count for _ in range(stages)]
    self.done_b = [[-1] * count for _ in range(stages)]
    self.again = [[False] * count for _ in range(stages)]
    self.kept = [0] * placement.devices
    ends = [lanes.end(lane) for lane in lanes.lane_of]
    self.ends = [*(ends[i] for i in lanes.backward), count]
    self.rank = [0] * count
    for rank, item in enumerate(lanes.backward):
      self.rank[item] = rank
    # How many chunks may run: those of two batches, at first.
    self.counts = batch_ends(lanes, rules.batches)
    self.released = self.counts[min(1, len(self.counts) - 1)]

  def release(self) -> None:
    """Lets a batch in when the last but one is done everywhere."""
    done = min(self.num_w if self.rules.split else self.num_b)
    finished = sum(end <= done for end in self.counts)
    self.released = self.counts[min(finished + 1, len(self.counts) - 1)]

  def candidates(self, device: int, tick: int) -> list[Op]:
    """What a device may run."""
    ops: list[Op] = []
    for stage in self.placement.stages_of[device]:
      ops += self._forward(device, stage, tick)
      ops += self._backward(device, stage, tick)
      if self.rules.split and self.num_w[stage] < self.num_b[stage]:
        item = self.lanes.backward[self.num_w[stage]]
        ops.append(Op("W", stage, item))
    if self.rules.parity:
      ops = [op for op in ops if (op.kind[0] == "F") == (tick % 2 == 0)]
    return ops

  def _forward(self, device: int, stage: int, tick: int) -> list[Op]:
    item = self.num_f[stage]
    if item == self.released:
      return []
    if stage and not 0 <= self.done_f[stage - 1][item] < tick:
      return []
    if item >= self.ends[self.num_b[stage]] + self.rules.lead[stage]:
      return []
    if not self.lanes.kept[item]:
      return [Op("F_drop", stage, item)]
    if self.kept[device] >= self.limits[device]:
      return []
    return [Op("F_keep", stage, item)]

  def _backward(self, device: int, stage: int, tick: int) -> list[Op]:
    if self.num_b[stage] == self.lanes.count:
      return []
    item = self.lanes.backward[self.num_b[stage]]
    if self.num_f[stage] < self.lanes.end(self.lanes.lane_of[item]):
      return []
    if not self.lanes.kept[item] and not self.again[stage][item]:
      if self.kept[device] >= self.limits[device]:
        return []
      return [Op("F_keep", stage, item)]
    last = stage == self.placement.stages - 1
    if not last and not 0 <= self.done_b[stage + 1][item] < tick:
      return []
    return [Op("B", stage, item)]

  def key(self, op: Op) -> tuple[int, ...]:
    """The least is run."""
    forward = op.kind[0] == "F"
    order = self.rules.first.index(op.kind)
    if op.kind == "F_keep" and not self.lanes.kept[op.item]:
      order = self.rules.first.index("B")
    part = self.placement.part_of[op.stage]
    if self.rules.group is None:
      number = op.item if forward else self.rank[op.item]
      return order, number, -part if forward else part
    turn = op.item // self.rules.group
    return order, turn, part if forward else -part, op.item

  def run(self, op: Op, device: int, tick: int) -> None:
    """Notes that an operation was run."""
    kind, stage, item = op
    if kind == "W":
      self.num_w[stage] += 1
      self.kept[device] -= 1
    elif kind == "B":
      self.done_b[stage][item] = tick
      self.num_b[stage] += 1
      self.kept[device] -= not self.rules.split
    elif item < self.num_f[stage]:
      self.again[stage][item] = True
      self.kept[device] += 1
    else:
      self.done_f[stage][item] = tick
      self.num_f[stage] += 1
      self.kept[device] += kind == "F_keep"


def _try(
  placement: Placement, lanes: Lanes, rules: Rules, kept: Sequence[int]
) -> tuple[Ticks, bool]:
  """The ticks, and whether they end before all is done."""
  state = _Run(placement, lanes, rules, kept)
  again = sum(not k for k in lanes.kept)
  left = placement.stages * (lanes.count * (3 if rules.split else 2) + again)
  ticks: list[tuple[Op | None, ...]] = []
  tick = idle = 0
  while left:
    row: list[Op | None] = []
    for device in range(placement.devices):
      ops = state.candidates(device, tick)
      row.append(min(ops, key=state.key) if ops else None)
    for device, op in enumerate(row):
      if op is not None:
        state.run(op, device, tick)
        left -= 1
    if rules.batches:
      state.release()
    if any(row):
      ticks.append(tuple(row))
      idle = 0
    elif (idle := idle + 1) > 1:
      return tuple(ticks), True
    tick += 1
  return tuple(ticks), False


def replay(
  placement: Placement,
  orders: Sequence[Sequence[Op]],
  *,
  fill: bool = False,
  kept: Sequence[int] | None = None,
) -> Ticks:
  """Runs the operations of each device in their order, as early as they can.

  Args:
    placement: Of the virtual stages.
    orders: Of each device; of lanes of one chunk.
    fill: Adds a `W` for every `B`, where a device would wait.
    kept: With `fill`, how many chunks each device may keep.

  Raises:
    ValueError: No device can go on; names the tick and what each waits for.
  """
  ready: dict[tuple[str, int, int], int] = {}
  places = [0] * placement.devices
  owed: list[list[Op]] = [[] for _ in orders]
  held = [0] * placement.devices
  left = sum(map(len, orders))
  if fill:
    left += sum(op.kind == "B" for order in orders for op in order)
  ticks: list[tuple[Op | None, ...]] = []

  def may(device: int) -> bool:
    if places[device] == len(orders[device]):
      return False
    kind, stage, item = orders[device][places[device]]
    if kind == "F_keep" and fill and kept and held[device] >= kept[device]:
      return False
    before = stage + (1 if kind == "B" else -1)
    if kind == "W" or not 0 <= before < placement.stages:
      return True
    return ready.get((kind[0], before, item), len(ticks)) < len(ticks)

  while left:
    row: list[Op | None] = []
    for device, order in enumerate(orders):
      op = None
      if may(device):
        op = order[places[device]]
      elif owed[device]:
        op = owed[device][0]
      row.append(op)
    if not any(row):
      waiting = [
        f"device {device} for {order[places[device]]}"
        for device, order in enumerate(orders)
        if places[device] < len(order)
      ]
      raise ValueError(
        f"the schedule stops at tick {len(ticks)}: {', '.join(waiting)} "
        "waits; an order must have what it needs before it"
      )
    for device, op in enumerate(row):
      if op is None:
        continue
      left -= 1
      if fill and op.kind == "W":
        owed[device].pop(0)
        held[device] -= 1
        continue
      places[device] += 1
      ready[op.kind[0], op.stage, op.item] = len(ticks)
      if op.kind == "B" and fill:
        owed[device].append(Op("W", op.stage, op.item))
      elif op.kind == "F_keep":
        held[device] += 1
    ticks.append(tuple(row))
  return tuple(ticks)


def batch_ends(lanes: Lanes, batches: Sequence[int]) -> list[int]:
  """Behind the last chunk of each batch; without batches, of all lanes."""
  ends, lane = [], 0
  for size in batches or (len(lanes.sizes),):
    lane += size
    ends.append(lanes.end(lane - 1))
  return ends
