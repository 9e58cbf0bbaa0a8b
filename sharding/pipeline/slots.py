"""Where a table's operations put what they leave for later ones.

Everything lives from one operation to another on the same device, so its life
is an interval of ticks, and slots follow by colouring intervals. Keys, values
and their gradients of a lane take as many chunks in a row as the lane has, in
an arena that the lanes and stages of a device share.
"""

import bisect
import dataclasses
import heapq
from collections.abc import Iterable
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Int32

from jaxchunk.sharding.pipeline.table import KINDS, Op, Table

Store = Literal["inbox", "kept", "owed", "state", "cotangent"]
"""What is kept, by device: inputs and cotangents that came from a neighbour
("inbox"), what a backward pass reads ("kept"), what gradients of weights read
besides ("owed", where the table has `W`), the sequence state of a lane on a
stage ("state"), and its cotangent."""

STORES: tuple[Store, ...] = ("inbox", "kept", "owed", "state", "cotangent")


class Life(NamedTuple):
  """From when to when something is needed.

  Attributes:
    start: The first tick.
    stop: The last tick.
    device: Where.
    owner: Its key, `(kind, stage, number)`: F or B for the input of a forward
      pass or the cotangent for a backward pass of an item, "" for what an item
      or a lane leaves.
    size: Slots in a row: chunks of the lane for its state, else 1.
  """

  start: int
  stop: int
  device: int
  owner: tuple[str, int, int]
  size: int


class Times(NamedTuple):
  """Ticks of a table's operations by `(stage, item)`.

  Attributes:
    first: Of the first forward pass.
    last: Of the last one, behind which all is kept.
    back: Of the backward pass.
    end: Of the operation behind which nothing of the item is needed.
  """

  first: dict[tuple[int, int], int]
  last: dict[tuple[int, int], int]
  back: dict[tuple[int, int], int]
  end: dict[tuple[int, int], int]

  @classmethod
  def of(cls, table: Table) -> "Times":
    """Reads a table."""
    times = cls({}, {}, {}, {})
    for tick, _, (kind, stage, item) in table.ops():
      at = (stage, item)
      if kind[0] == "F":
        times.first.setdefault(at, tick)
        times.last[at] = tick
      elif kind == "B":
        times.back[at] = tick
      times.end[at] = tick
    return times


def lives(table: Table) -> dict[Store, list[Life]]:
  """Everything that a table's operations leave for later ones."""
  times = Times.of(table)
  placement, lanes = table.placement, table.lanes
  found: dict[Store, list[Life]] = {store: [] for store in STORES}
  top = placement.stages - 1

  def add(
    store: Store, start: int, stop: int, owner: tuple[str, int, int], size: int
  ) -> None:
    device = placement.device_of[owner[1]]
    found[store].append(Life(start, stop, device, owner, size))

  for at, first in times.first.items():
    stage, item = at
    last, back, end = times.last[at], times.back[at], times.end[at]
    arrives = times.first[stage - 1, item] + 1 if stage else first
    add("inbox", arrives, last, ("F", stage, item), 1)
    # The head runs behind the last forward pass of the last stage.
    owed = times.back[stage + 1, item] if stage < top else last
    add("inbox", owed + 1, back, ("B", stage, item), 1)
    add("kept", last, end, ("", stage, item), 1)
    if table.split:
      add("owed", back, end, ("", stage, item), 1)
  for stage in range(placement.stages):
    for lane, size in enumerate(lanes.sizes):
      head, tail = lanes.starts[lane], lanes.end(lane) - 1
      start, stop = times.first[stage, head], times.back[stage, head]
      add("state", start, stop, ("", stage, lane), size)
      start = times.back[stage, tail]
      add("cotangent", start, stop, ("", stage, lane), size)
  return found


@dataclasses.dataclass(frozen=True)
class Places:
  """Where each owner's slots begin, and how many slots a device needs."""

  start: dict[tuple[str, int, int], int]
  count: int


def place(found: Iterable[Life]) -> Places:
  """Gives slots to lives so that no two on a device share one at a time.

  Of lives of one slot, the fewest that there can be; those of several in a row
  take the lowest gap that holds them.
  """
  by_device: dict[int, list[Life]] = {}
  for life in sorted(found):
    by_device.setdefault(life.device, []).append(life)
  start: dict[tuple[str, int, int], int] = {}
  count = 0
  for mine in by_device.values():
    single = all(life.size == 1 for life in mine)
    give = _give_one if single else _give_row
    count = max(count, give(mine, start))
  return Places(start, count)


def _give_one(
  lives: Iterable[Life], start: dict[tuple[str, int, int], int]
) -> int:
  """Of lives of one slot, by their start; how many slots they take."""
  free: list[int] = []
  ends: list[tuple[int, int]] = []
  count = 0
  for life in lives:
    while ends and ends[0][0] < life.start:
      heapq.heappush(free, heapq.heappop(ends)[1])
    if not free:
      heapq.heappush(free, count)
      count += 1
    at = heapq.heappop(free)
    start[life.owner] = at
    heapq.heappush(ends, (life.stop, at))
  return count


def _give_row(
  lives: Iterable[Life], start: dict[tuple[str, int, int], int]
) -> int:
  """Of lives of slots in a row."""
  taken: list[tuple[int, int]] = []
  ends: list[tuple[int, int, int]] = []
  count = 0
  for life in lives:
    while ends and ends[0][0] < life.start:
      _, at, size = heapq.heappop(ends)
      taken.remove((at, size))
    at = 0
    for other, size in taken:
      if other - at >= life.size:
        break
      at = other + size
    bisect.insort(taken, (at, life.size))
    heapq.heappush(ends, (life.stop, at, life.size))
    start[life.owner] = at
    count = max(count, at + life.size)
  return count


class Sizes(NamedTuple):
  """How many slots each device has of each kind, in the order of `STORES`.

  A program is compiled for its sizes; `merged` with those of other batches it
  serves them all.
  """

  inbox: int
  kept: int
  owed: int
  state: int
  cotangent: int

  def merged(self, other: "Sizes") -> "Sizes":
    """The larger of each."""
    return Sizes(*map(max, self, other))


@dataclasses.dataclass(frozen=True)
class Rows:
  """A table as the executor reads it: `[T,P]` of each tick and device.

  Slots that do not matter are the one behind the last, which is never read.

  Attributes:
    kind: 0 for nothing, else 1 for a forward pass, 2 for `B`, 3 for `W`.
    stage: The virtual stage.
    part: Which of its device's virtual stages that is.
    item: The chunk.
    place: Of the chunk in its lane.
    source: In the inbox, the input of `F` or the cotangent of `B`.
    kept: Of what the backward pass reads; of `F_drop` the one behind the last.
    owed: Of what `W` reads.
    state: Where the lane's chunks begin in the arena of the state.
    cotangent: Where they begin in that of its cotangent.
    fresh: For the first `B` of a lane how many chunks there, which hold what
      another lane left; else 0.
    from_above: In the inbox, where what the device before sends goes at the
      end of the tick.
    from_below: Where what the device behind sends goes.
    from_self: Where what the device itself found goes.
    opens: Whether the input of the first stage is made here before the tick.
    open_item: Of which chunk.
    open_to: In the inbox, where it goes.
    closes: Whether the loss is computed here, behind the last stage.
    close_item: Of which chunk.
    close_to: In the inbox, where the cotangent of the last stage goes.
    opens_back: Whether the gradient of the embedding is computed here.
    back_item: Of which chunk.
    sizes: Slots of a device.
  """

  kind: Int32[np.ndarray, "T P"]
  stage: Int32[np.ndarray, "T P"]
  part: Int32[np.ndarray, "T P"]
  item: Int32[np.ndarray, "T P"]
  place: Int32[np.ndarray, "T P"]
  source: Int32[np.ndarray, "T P"]
  kept: Int32[np.ndarray, "T P"]
  owed: Int32[np.ndarray, "T P"]
  state: Int32[np.ndarray, "T P"]
  cotangent: Int32[np.ndarray, "T P"]
  fresh: Int32[np.ndarray, "T P"]
  from_above: Int32[np.ndarray, "T P"]
  from_below: Int32[np.ndarray, "T P"]
  from_self: Int32[np.ndarray, "T P"]
  opens: Bool[np.ndarray, "T P"]
  open_item: Int32[np.ndarray, "T P"]
  open_to: Int32[np.ndarray, "T P"]
  closes: Bool[np.ndarray, "T P"]
  close_item: Int32[np.ndarray, "T P"]
  close_to: Int32[np.ndarray, "T P"]
  opens_back: Bool[np.ndarray, "T P"]
  back_item: Int32[np.ndarray, "T P"]
  sizes: Sizes


def places_of(table: Table) -> dict[Store, Places]:
  """The slots of everything that a table leaves."""
  return {store: place(found) for store, found in lives(table).items()}


def sizes_of(table: Table) -> Sizes:
  """How many slots a device needs."""
  places = places_of(table)
  return Sizes(*(places[store].count for store in STORES))


def rows_of(
  table: Table, *, everywhere: bool = False, sizes: Sizes | None = None
) -> Rows:
  """A table with its slots, as arrays.

  Args:
    table: A legal table.
    everywhere: Whether the first and last steps, embedding and loss, are work
      of all devices, each with its part of the vocabulary, or of the one that
      has the first or last stage.
    sizes: Slots of a device, at least those of the table.

  Raises:
    ValueError: `sizes` is too small.
  """
  places = places_of(table)
  own = Sizes(*(places[store].count for store in STORES))
  if sizes is None:
    sizes = own
  elif sizes.merged(own) != sizes:
    raise ValueError(f"the table needs {own}, and there are {sizes}")
  return _Writer(table, places, sizes, everywhere).rows()


class _Writer:
  """Fills the arrays of `Rows`."""

  def __init__(
    self,
    table: Table,
    places: dict[Store, Places],
    sizes: Sizes,
    everywhere: bool,
  ):
    self.table, self.sizes, self.everywhere = table, sizes, everywhere
    self.at = {store: places[store].start for store in STORES}
    self.times = Times.of(table)
    ticks, devices = len(table.ticks), table.placement.devices
    spare = {
      "source": sizes.inbox,
      "kept": sizes.kept,
      "owed": sizes.owed,
      "from_above": sizes.inbox,
      "from_below": sizes.inbox,
      "from_self": sizes.inbox,
      "open_to": sizes.inbox,
      "close_to": sizes.inbox,
    }
    names = [f.name for f in dataclasses.fields(Rows) if f.name != "sizes"]
    # Lists, because writing single elements of arrays is slow.
    self.lists = {
      name: [[spare.get(name, 0)] * devices for _ in range(ticks)]
      for name in names
    }

  def rows(self) -> Rows:
    for tick, device, op in self.table.ops():
      self._write(tick, device, op)
    flags = ("opens", "closes", "opens_back")
    arrays = {
      name: np.asarray(rows, np.bool_ if name in flags else np.int32)
      for name, rows in self.lists.items()
    }
    return Rows(**arrays, sizes=self.sizes)

  def _write(self, tick: int, device: int, op: Op) -> None:
    placement, lanes = self.table.placement, self.table.lanes
    kind, stage, item = op
    lane, key = lanes.lane_of[item], ("", stage, item)
    state = ("", stage, lane)
    forward = kind[0] == "F"
    values = {
      "kind": 1 if forward else KINDS.index(kind),
      "stage": stage,
      "part": placement.part_of[stage],
      "item": item,
      "place": lanes.index_of[item],
      "state": self.at["state"][state],
      "cotangent": self.at["cotangent"][state],
    }
    if kind == "B" and item == lanes.end(lane) - 1:
      values["fresh"] = lanes.sizes[lane]
    if kind != "W":
      source = ("F" if forward else "B", stage, item)
      values["source"] = self.at["inbox"][source]
    if kind != "F_drop":
      values["kept"] = self.at["kept"][key]
    if self.table.split and not forward:
      values["owed"] = self.at["owed"][key]
    for name, value in values.items():
      self.lists[name][tick][device] = value
    if forward:
      self._forward(tick, device, stage, item)
    elif kind == "B":
      if stage:
        self._send(tick, device, ("B", stage - 1, item))
      else:
        self._flag("opens_back", "back_item", tick, device, item)

  def _forward(self, tick: int, device: int, stage: int, item: int) -> None:
    first = self.times.first[stage, item] == tick
    last = self.times.last[stage, item] == tick
    top = self.table.placement.stages - 1
    if stage == 0 and first:
      self._flag("opens", "open_item", tick, device, item)
      to = self.at["inbox"]["F", stage, item]
      self.lists["open_to"][tick][device] = to
    if stage < top and first:
      self._send(tick, device, ("F", stage + 1, item))
    if stage == top and last:
      self._flag("closes", "close_item", tick, device, item)
      to = self.at["inbox"]["B", stage, item]
      self.lists["close_to"][tick][device] = to

  def _send(self, tick: int, device: int, owner: tuple[str, int, int]) -> None:
    placement = self.table.placement
    there, slot = placement.device_of[owner[1]], self.at["inbox"][owner]
    if there == device:
      name = "from_self"
    elif there == (device + 1) % placement.devices and owner[0] == "F":
      name = "from_above"
    elif there == (device - 1) % placement.devices:
      name = "from_below"
    else:
      name = "from_above"
    self.lists[name][tick][there] = slot

  def _flag(
    self, name: str, of: str, tick: int, device: int, item: int
  ) -> None:
    devices = self.table.placement.devices
    for where in range(devices) if self.everywhere else (device,):
      self.lists[name][tick][where] = 1
      self.lists[of][tick][where] = item
