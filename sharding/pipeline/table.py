"""What a pipeline schedule is: an operation of each device at each tick.

A model is cut into virtual stages, one after the other, and a placement puts
each on a device. The unit of work is a chunk; the chunks of a lane (one
sequence, or a pack of short ones) depend on each other through the sequence
state: a stage runs them forward in order and backward in reverse. An ordinary
microbatch is a lane of one chunk.

`tables.py` builds the published schedules, `validate.py` proves a table legal,
slots follow from it in `slots.py`, and the executor, the simulator and the
pictures read nothing else.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Literal, NamedTuple

Kind = Literal["F_keep", "F_drop", "B", "W"]
"""`F_keep` runs a chunk forward and keeps what the backward reads, `F_drop`
keeps only its input and the sequence state, so that `F_keep` comes once more
before its `B`. `B` gives the cotangent of the input, and of the weights too
unless the table has `W`."""

KINDS: tuple[Kind, ...] = ("F_keep", "F_drop", "B", "W")


class Op(NamedTuple):
  """One operation.

  Attributes:
    kind: What is done.
    stage: On which virtual stage.
    item: To which chunk, counted over all lanes.
  """

  kind: Kind
  stage: int
  item: int

  def __str__(self) -> str:
    return f"{self.kind} of chunk {self.item} on stage {self.stage}"


@dataclasses.dataclass(frozen=True)
class Placement:
  """Which device has which virtual stage; neighbours are on neighbours.

  Attributes:
    devices: P, how many devices.
    device_of: The device of each virtual stage.
  """

  devices: int
  device_of: tuple[int, ...]

  @classmethod
  def loop(cls, devices: int, parts: int = 1) -> "Placement":
    """Around the devices `parts` times (interleaved)."""
    return cls(devices, tuple(range(devices)) * parts)

  @classmethod
  def vee(cls, devices: int) -> "Placement":
    """Down the devices and up again: the first has the last stage too."""
    down = tuple(range(devices))
    return cls(devices, down + down[::-1])

  @property
  def stages(self) -> int:
    """Number of virtual stages."""
    return len(self.device_of)

  @property
  def parts(self) -> int:
    """Virtual stages of a device."""
    return self.stages // self.devices

  @functools.cached_property
  def part_of(self) -> tuple[int, ...]:
    """Which of its device's virtual stages each is."""
    return tuple(
      self.device_of[:stage].count(device)
      for stage, device in enumerate(self.device_of)
    )

  @functools.cached_property
  def stages_of(self) -> tuple[tuple[int, ...], ...]:
    """The virtual stages of each device."""
    return tuple(
      tuple(s for s, d in enumerate(self.device_of) if d == device)
      for device in range(self.devices)
    )


@dataclasses.dataclass(frozen=True)
class Lanes:
  """Chunks of a batch, lane by lane.

  Attributes:
    sizes: Chunks of each lane.
    live: K, how many last chunks of a lane keep what the backward reads; the
      others run forward twice. `None` is all.

  Raises:
    ValueError: There are no lanes, or one has no chunk.
  """

  sizes: tuple[int, ...]
  live: int | None = None

  def __post_init__(self) -> None:
    if not self.sizes or min(self.sizes) < 1:
      raise ValueError(
        f"lanes={list(self.sizes)} must be lanes of at least one chunk each"
      )
    if self.live is not None and self.live < 0:
      raise ValueError(f"live={self.live} must be 0 or more, or None for all")

  @functools.cached_property
  def count(self) -> int:
    """Number of chunks."""
    return sum(self.sizes)

  @functools.cached_property
  def starts(self) -> tuple[int, ...]:
    """The first chunk of each lane."""
    starts, at = [], 0
    for size in self.sizes:
      starts.append(at)
      at += size
    return tuple(starts)

  @functools.cached_property
  def lane_of(self) -> tuple[int, ...]:
    """The lane of each chunk."""
    return tuple(n for n, size in enumerate(self.sizes) for _ in range(size))

  @functools.cached_property
  def index_of(self) -> tuple[int, ...]:
    """Where each chunk is in its lane."""
    return tuple(n for size in self.sizes for n in range(size))

  @functools.cached_property
  def kept(self) -> tuple[bool, ...]:
    """Whether the first forward pass of each chunk keeps."""
    live = max(self.sizes) if self.live is None else self.live
    return tuple(n >= size - live for size in self.sizes for n in range(size))

  @functools.cached_property
  def backward(self) -> tuple[int, ...]:
    """All chunks in the order of their backward passes on a stage."""
    return tuple(
      start + n
      for start, size in zip(self.starts, self.sizes, strict=True)
      for n in reversed(range(size))
    )

  def end(self, lane: int) -> int:
    """Behind the last chunk of a lane."""
    return self.starts[lane] + self.sizes[lane]


@dataclasses.dataclass(frozen=True)
class Table:
  """A schedule.

  Attributes:
    name: What it is called.
    placement: Of the virtual stages.
    lanes: What runs.
    ticks: For each tick the operation of each device, or `None`.
    batches: Lanes of each batch, where there are several between two flushes.
    updates: For each batch the tick at whose end its gradients are complete
      and the weights change.
  """

  name: str
  placement: Placement
  lanes: Lanes
  ticks: tuple[tuple[Op | None, ...], ...]
  batches: tuple[int, ...] = ()
  updates: tuple[int, ...] = ()

  @functools.cached_property
  def split(self) -> bool:
    """Whether gradients of weights are operations of their own."""
    return any(op.kind == "W" for _, _, op in self.ops())

  def ops(self) -> Iterator[tuple[int, int, Op]]:
    """All operations as `(tick, device, op)`, in order."""
    for tick, row in enumerate(self.ticks):
      for device, op in enumerate(row):
        if op is not None:
          yield tick, device, op

  def orders(self) -> list[list[Op]]:
    """The operations of each device, in order."""
    orders: list[list[Op]] = [[] for _ in range(self.placement.devices)]
    for _, device, op in self.ops():
      orders[device].append(op)
    return orders

  def __str__(self) -> str:
    sizes = self.lanes.sizes
    what = f"{len(sizes)} microbatches"
    if max(sizes) > 1:
      more = ", ..." if len(sizes) > 8 else ""
      what = f"lanes of {', '.join(map(str, sizes[:8]))}{more} chunks"
    return (
      f"{self.name}: {self.placement.stages} stages on "
      f"{self.placement.devices} devices, {what}, {len(self.ticks)} ticks"
    )
