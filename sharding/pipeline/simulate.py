"""How long a table takes, when each device works and when it waits.

`lockstep` is what the executor does: a tick lasts as long as its slowest
operation. `event_driven` is what devices would do that only wait for what they
need, the model of most papers. What a table keeps and sends is in `usage.py`.
"""

import dataclasses
import math
from collections.abc import Sequence

from jaxchunk.sharding.pipeline.slots import Times
from jaxchunk.sharding.pipeline.table import Kind, Lanes, Op, Table
from jaxchunk.sharding.pipeline.timeline import Span, Timeline


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
  """What a chunk costs on the stages of one device, whatever the schedule.

  A forward pass of chunk i, which is number n of its lane, takes
  `chunks[i] * (f + f_prefix * n)` on all virtual stages of a device together,
  and one of virtual stage s takes `stages[s]` of that. Times are in any unit.

  Attributes:
    f: Of a forward pass.
    b: Of a backward pass for the gradient of the input.
    w: Of the gradient of the weights; `B` does it too in a table without `W`.
    f_prefix: Of the forward pass besides, for each chunk before it in the lane:
      attention to their keys.
    b_prefix: The same of the backward pass. Attention has no weights.
    chunks: A factor of each chunk; `None` is 1.
    stages: A factor of each virtual stage; `None` is 1 / parts, where a device
      has so many.
    head: Of the head, its loss and their gradients, for each chunk, when the
      last virtual stage has its (last) forward pass.
    embed: Of a look-up in the embedding, and as long again of its gradient.
    everywhere: Whether these two are split over all devices (vocabulary-
      parallel): each has 1/P of them, at the same time.

  Raises:
    ValueError: A time or factor is negative or not finite.
  """

  f: float = 1.0
  b: float = 1.0
  w: float = 1.0
  f_prefix: float = 0.0
  b_prefix: float = 0.0
  chunks: tuple[float, ...] | None = None
  stages: tuple[float, ...] | None = None
  head: float = 0.0
  embed: float = 0.0
  everywhere: bool = False

  def __post_init__(self) -> None:
    for field in dataclasses.fields(self):
      value = getattr(self, field.name)
      several = value if isinstance(value, tuple) else (value or 0.0,)
      if not all(math.isfinite(one) and one >= 0 for one in several):
        raise ValueError(f"{field.name}={value} must be finite and 0 or more")


def token_costs(
  chunk: int, token: Sequence[float], pair: Sequence[float]
) -> Costs:
  """Costs of chunks of one size, of a model whose costs are linear.

  Set what else there is with `dataclasses.replace`.

  Args:
    chunk: C, tokens of a chunk.
    token: Time of a token on a device: forward, backward for the input, and
      for the weights. Attention within the chunk is here.
    pair: Of a token of the chunk with one of its prefix: forward and backward.
  """
  f, b, w = (chunk * time for time in token)
  f_prefix, b_prefix = (chunk * chunk * time for time in pair)
  return Costs(f=f, b=b, w=w, f_prefix=f_prefix, b_prefix=b_prefix)


@dataclasses.dataclass(frozen=True)
class OpTimes:
  """How long each operation of one table takes.

  Attributes:
    chunks: By kind, of each chunk.
    stages: A factor of each virtual stage.
  """

  chunks: dict[Kind, list[float]]
  stages: tuple[float, ...]

  def of_op(self, op: Op) -> float:
    """How long an operation takes, without embedding and head."""
    return self.stages[op.stage] * self.chunks[op.kind][op.item]


def op_times(table: Table, costs: Costs) -> OpTimes:
  """What operations of a table take.

  Raises:
    ValueError: There are not as many factors as chunks or virtual stages.
  """
  placement, lanes = table.placement, table.lanes
  stages = costs.stages
  if stages is None:
    stages = (1 / placement.parts,) * placement.stages
  if len(stages) != placement.stages:
    raise ValueError(
      f"costs.stages has {len(stages)} factors for {placement.stages} stages"
    )
  f, b, w = chunk_costs(lanes, costs)
  if not table.split:
    b = [x + y for x, y in zip(b, w, strict=True)]
  return OpTimes({"F_keep": f, "F_drop": f, "B": b, "W": w}, stages)


def chunk_costs(
  lanes: Lanes, costs: Costs
) -> tuple[list[float], list[float], list[float]]:
  """Of each chunk on one device: forward, backward for the input, weights.

  Raises:
    ValueError: There are not as many factors as chunks.
  """
  factors = costs.chunks
  if factors is None:
    factors = (1.0,) * lanes.count
  if len(factors) != lanes.count:
    raise ValueError(
      f"costs.chunks has {len(factors)} factors for {lanes.count} chunks"
    )
  both = list(zip(factors, lanes.index_of, strict=True))
  return (
    [x * (costs.f + costs.f_prefix * n) for x, n in both],
    [x * (costs.b + costs.b_prefix * n) for x, n in both],
    [x * costs.w for x in factors],
  )


def lockstep(table: Table, costs: Costs) -> Timeline:
  """Ticks one after the other, each as long as its slowest device.

  Raises:
    ValueError: `costs` are not those of the table's chunks and stages.
  """
  return _run(table, costs, send=0.0, together=True)


def event_driven(table: Table, costs: Costs, *, send: float = 0.0) -> Timeline:
  """Each device runs its operations in order, as early as it can.

  One starts when its device is free and what it needs has come: a forward pass
  waits for the stage before, a backward pass for that behind. Only where all
  devices share embedding or head do they wait for each other.

  Args:
    table: A legal table.
    costs: Of its operations.
    send: From the end of an operation until a neighbour has what it made.

  Raises:
    ValueError: `costs` are not those of the table's chunks and stages.
  """
  return _run(table, costs, send=send, together=False)


class _Clock:
  """When each device is free, and what was done."""

  def __init__(self, devices: int):
    self.free = [0.0] * devices
    self.spans: list[Span] = []

  def meet(self) -> None:
    """All wait for the last."""
    self.free = [max(self.free)] * len(self.free)

  def run(
    self, device: int, kind: str, op: Op, time: float, ready: float = 0.0
  ) -> float:
    """Does something as early as it can be; when it ends."""
    start = max(self.free[device], ready)
    stop = self.free[device] = start + time
    self.spans.append(Span(device, kind, op.stage, op.item, start, stop))
    return stop

  def extra(
    self, device: int, kind: str, op: Op, time: float, *, everywhere: bool
  ) -> None:
    """Does a first or last step, on one device or on all."""
    if not time:
      return
    if not everywhere:
      self.run(device, kind, op, time)
      return
    self.meet()
    for each in range(len(self.free)):
      self.run(each, kind, op, time / len(self.free))


def _run(
  table: Table, costs: Costs, *, send: float, together: bool
) -> Timeline:
  """Tick by tick, which is an order in which nothing comes too early.

  Args:
    table: A legal table.
    costs: Of its operations.
    send: Time of a message.
    together: Whether all wait for each other before each tick.
  """
  times, passes = op_times(table, costs), Times.of(table)
  placement, top = table.placement, table.placement.stages - 1
  clock = _Clock(placement.devices)
  done: dict[tuple[str, int, int], float] = {}
  for tick, row in enumerate(table.ticks):
    if together:
      clock.meet()
    opens, closes = [], []
    for device, op in enumerate(row):
      if op is None or op.kind == "W":
        continue
      at = op.stage, op.item
      forward = op.kind != "B"
      if forward and op.stage == 0 and passes.first[at] == tick:
        opens.append((device, op))
      if forward and op.stage == top and passes.last[at] == tick:
        closes.append((device, "head", op, costs.head))
      if not forward and op.stage == 0:
        closes.append((device, "embed", op, costs.embed))
    for device, op in opens:
      time = costs.embed
      clock.extra(device, "embed", op, time, everywhere=costs.everywhere)
    for device, op in enumerate(row):
      if op is None:
        continue
      ready = _ready(op, device, done, placement.device_of, send)
      stop = clock.run(device, op.kind, op, times.of_op(op), ready)
      # Of two forward passes the first is the one that is sent on.
      done.setdefault((op.kind[0], op.stage, op.item), stop)
    for device, kind, op, time in closes:
      clock.extra(device, kind, op, time, everywhere=costs.everywhere)
  return Timeline(placement.devices, tuple(clock.spans))


def _ready(
  op: Op,
  device: int,
  done: dict[tuple[str, int, int], float],
  device_of: Sequence[int],
  send: float,
) -> float:
  """When what an operation needs from another stage is on its device."""
  before = op.stage + (1 if op.kind == "B" else -1)
  if op.kind == "W" or not 0 <= before < len(device_of):
    return 0.0
  away = device_of[before] != device
  return done[op.kind[0], before, op.item] + send * away


def fitted_costs(table: Table, timeline: Timeline) -> Costs:
  """Costs that are the same for all chunks, from a measured timeline.

  Each is the mean over its operations, so that a simulation with them says what
  the schedule alone explains of what was measured.

  Args:
    table: The table that ran.
    timeline: What was measured.
  """
  sums: dict[str, list[float]] = {}
  for span in timeline.spans:
    kind = "F" if span.kind[0] == "F" else span.kind
    sums.setdefault(kind, []).append(span.stop - span.start)
  parts, items = table.placement.parts, table.lanes.count

  def mean(kind: str) -> float:
    times = sums.get(kind, [0.0])
    return parts * sum(times) / len(times)

  return Costs(
    f=mean("F"),
    b=mean("B"),
    w=mean("W"),
    head=sum(sums.get("head", ())) / items,
    embed=sum(sums.get("embed", ())) / items / 2,
  )
