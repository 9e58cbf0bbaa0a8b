"""What a table keeps on each device, and what devices send each other."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from jaxchunk.sharding.pipeline.slots import STORES, Store, lives, sizes_of
from jaxchunk.sharding.pipeline.table import Table
from jaxchunk.sharding.pipeline.timeline import Timeline, check_timeline


class SlotBytes(NamedTuple):
  """Bytes of a slot of each store, in the order of `STORES`.

  Attributes:
    inbox: An activation or a cotangent of a chunk, as it is sent.
    kept: What the backward pass of a chunk reads on a virtual stage.
    owed: What its gradients of weights read besides.
    state: The sequence state of one chunk on a virtual stage.
    cotangent: The same of its cotangent.
  """

  inbox: int = 0
  kept: int = 0
  owed: int = 0
  state: int = 0
  cotangent: int = 0


def part_bytes(slot_bytes: SlotBytes, parts: int) -> SlotBytes:
  """What slots weigh where a device's stage is cut into several.

  An activation is as large between smaller stages, so the inbox stays.
  """
  rest = (-(-size // parts) for size in slot_bytes[1:])
  return SlotBytes(slot_bytes.inbox, *rest)


class Memory(NamedTuple):
  """What each device keeps.

  Attributes:
    times: When each tick begins on each device.
    bytes: What is kept from then on.
  """

  times: Float[np.ndarray, "T P"]
  bytes: Int[np.ndarray, "T P"]


class Messages(NamedTuple):
  """Bytes that each device sends in a table.

  Attributes:
    down: That somebody needs, to the next device.
    up: To the one before.
    sent: In each of the two directions: executors send one message both ways
      in every tick, whether anybody needs it or not.
  """

  down: Int[np.ndarray, " P"]
  up: Int[np.ndarray, " P"]
  sent: Int[np.ndarray, " P"]


def used_slots(table: Table) -> dict[Store, Int[np.ndarray, "T P"]]:
  """How many slots of each store are in use, by tick and device."""
  ticks, devices = len(table.ticks), table.placement.devices
  used: dict[Store, Int[np.ndarray, "T P"]] = {}
  for store, found in lives(table).items():
    change = np.zeros((ticks + 1, devices), np.int64)
    if found:
      rows = [(life.start, life.stop, life.device, life.size) for life in found]
      start, stop, device, size = np.asarray(rows).T
      np.add.at(change, (start, device), size)
      np.subtract.at(change, (stop + 1, device), size)
    used[store] = np.cumsum(change, axis=0)[:-1]
  return used


def peak_slots(table: Table) -> dict[Store, Int[np.ndarray, " P"]]:
  """The most slots of each store that each device uses at once."""
  return {store: used.max(axis=0) for store, used in used_slots(table).items()}


def memory(table: Table, timeline: Timeline, slot_bytes: SlotBytes) -> Memory:
  """What each device keeps, and from when on.

  What changes from tick to tick is the table's; the timeline says when ticks
  are. One in which a device does nothing begins when its last operation ends.

  Args:
    table: A legal table.
    timeline: Simulated or measured, of this table.
    slot_bytes: What slots weigh.

  Raises:
    ValueError: The timeline is not of this table.
  """
  check_timeline(table, timeline)
  times = np.zeros((len(table.ticks), table.placement.devices))
  for device, spans in enumerate(timeline.orders()):
    now, left = 0.0, iter(spans)
    for tick, row in enumerate(table.ticks):
      if row[device] is None:
        times[tick, device] = now
      else:
        span = next(left)
        times[tick, device], now = span.start, span.stop
  return Memory(times, _used_bytes(table, slot_bytes))


def peak_memory(table: Table, slot_bytes: SlotBytes) -> Int[np.ndarray, " P"]:
  """The most bytes that slots in use on each device have at once."""
  return _used_bytes(table, slot_bytes).max(axis=0)


def allocated_memory(table: Table, slot_bytes: SlotBytes) -> int:
  """Bytes of all slots of a device, which an executor has from start to end.

  Devices have the same number of slots, so this is at least the largest of
  `peak_memory`. The spare slots, which are written and never read, are not
  counted.
  """
  both = zip(sizes_of(table), slot_bytes, strict=True)
  return sum(count * size for count, size in both)


def _used_bytes(table: Table, slot_bytes: SlotBytes) -> Int[np.ndarray, "T P"]:
  used = used_slots(table)
  total = np.zeros((len(table.ticks), table.placement.devices), np.int64)
  for store, size in zip(STORES, slot_bytes, strict=True):
    total += size * used[store]
  return total


def messages(table: Table, size: int = 1) -> Messages:
  """Bytes that each device sends.

  Args:
    table: A legal table.
    size: Bytes of an activation of a chunk, or of its cotangent; 1 gives
      numbers of messages.
  """
  placement = table.placement
  devices, top = placement.devices, placement.stages - 1
  down, up = [0] * devices, [0] * devices
  seen = set()
  for _, device, (kind, stage, item) in table.ops():
    to = stage + (1 if kind[0] == "F" else -1)
    if kind == "W" or not 0 <= to <= top or (kind[0], stage, item) in seen:
      continue
    # A chunk is sent on once, even if it runs forward twice.
    seen.add((kind[0], stage, item))
    there = placement.device_of[to]
    if there == device:
      continue
    # Of two devices each is before and behind the other.
    follows = there == (device + 1) % devices
    precedes = there == (device - 1) % devices
    if follows and (kind[0] == "F" or not precedes):
      down[device] += size
    else:
      up[device] += size
  sent = size * len(table.ticks) if devices > 1 else 0
  return Messages(np.array(down), np.array(up), np.full(devices, sent))
