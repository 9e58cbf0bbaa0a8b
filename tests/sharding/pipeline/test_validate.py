"""Illegal tables are refused by name; legal ones run, slot by slot.

`execute` is an oracle of its own: it does what an executor does with the arrays
of `rows_of`, tick by tick, on names instead of arrays, and knows no table.
"""

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchunk.sharding.pipeline import slots, tables
from jaxchunk.sharding.pipeline.slots import (
  STORES,
  Rows,
  Sizes,
  lives,
  places_of,
  rows_of,
)
from jaxchunk.sharding.pipeline.table import Lanes, Op, Placement, Table
from jaxchunk.sharding.pipeline.tables import BUILDERS, build
from jaxchunk.sharding.pipeline.validate import check_places, check_table


class Broken(Exception):
  """What an operation reads is not what it needs."""


class Device:
  """What one device holds, by store and slot.

  Inputs are ("x", stage, item), cotangents ("dy", stage, item). An entry of
  the cotangent's arena is the set of chunks that have added to it, and to
  which chunk of the lane; the next lane clears it.
  """

  def __init__(self, sizes: Sizes):
    self.sizes = sizes
    self.held: dict[str, dict[int, object]] = {store: {} for store in STORES}
    nothing: frozenset = frozenset()
    self.held["cotangent"] = dict.fromkeys(range(sizes.cotangent), nothing)
    self.forwarded: set[tuple[int, int]] = set()
    self.done: set[tuple[int, int]] = set()

  def put(self, store: str, slot: int, value: object) -> None:
    if not 0 <= slot < getattr(self.sizes, store):
      raise Broken(f"{store} slot {slot} of {value}")
    self.held[store][slot] = value

  def want(self, store: str, slot: int, value: object) -> None:
    found = self.held[store].get(slot)
    if found != value:
      raise Broken(f"{store} slot {slot} has {found}, not {value}")

  def forward(self, stage: int, lane: range, row: dict) -> tuple:
    item, at = lane[row["place"]], row["state"]
    self.want("inbox", row["source"], ("x", stage, item))
    for n in range(row["place"]):
      self.want("state", at + n, ("state", stage, lane[n]))
    self.put("state", at + row["place"], ("state", stage, item))
    if (stage, item) in self.forwarded:
      # The state goes back to this chunk: later ones must be done with it.
      for later in lane[row["place"] + 1 :]:
        if (stage, later) not in self.done:
          raise Broken(f"chunk {item} runs again before chunk {later} is done")
    self.forwarded.add((stage, item))
    if row["kept"] != self.sizes.kept:
      self.put("kept", row["kept"], ("kept", stage, item))
    return "x", stage + 1, item

  def backward(self, stage: int, lane: range, row: dict, split: bool) -> tuple:
    index = row["place"]
    item = lane[index]
    self.want("inbox", row["source"], ("dy", stage, item))
    self.want("kept", row["kept"], ("kept", stage, item))
    at = row["cotangent"]
    for n in range(row["fresh"]):
      self.put("cotangent", at + n, frozenset())
    for n in range(index + 1):
      self.want("state", row["state"] + n, ("state", stage, lane[n]))
      added = frozenset((stage, later, n) for later in lane[index + 1 :])
      self.want("cotangent", at + n, added)
      self.put("cotangent", at + n, added | {(stage, item, n)})
    self.done.add((stage, item))
    if split:
      self.put("owed", row["owed"], ("owed", stage, item))
    return "dy", stage - 1, item

  def weights(self, stage: int, item: int, row: dict) -> None:
    self.want("kept", row["kept"], ("kept", stage, item))
    self.want("owed", row["owed"], ("owed", stage, item))


class Weights:
  """Versions of the weights: an operation may see the last two."""

  def __init__(self, lanes: Lanes, batches: tuple[int, ...], each: int):
    sizes = iter(lanes.sizes)
    counts = batches or (len(lanes.sizes),)
    chunks = [sum(next(sizes) for _ in range(n)) for n in counts]
    self.left = [each * n for n in chunks]
    self.batch_of = [batch for batch, n in enumerate(chunks) for _ in range(n)]
    self.version = 0

  def used(self, item: int, ends: bool) -> None:
    batch = self.batch_of[item]
    if max(batch - 1, 0) not in (self.version, self.version - 1):
      raise Broken(f"batch {batch} with the weights of {self.version} updates")
    self.left[batch] -= ends

  def update(self) -> None:
    if self.version == len(self.left) or self.left[self.version]:
      raise Broken(f"update {self.version} before its gradients")
    self.version += 1


def lane_of(lanes: Lanes, item: int) -> range:
  starts = np.cumsum((0, *lanes.sizes))
  lane = int(np.searchsorted(starts, item, "right")) - 1
  return range(int(starts[lane]), int(starts[lane + 1]))


def row_of(rows: Rows, tick: int, device: int) -> dict:
  return {
    field.name: int(getattr(rows, field.name)[tick, device])
    for field in dataclasses.fields(rows)
    if field.name != "sizes"
  }


def execute(
  rows: Rows,
  placement: Placement,
  lanes: Lanes,
  *,
  everywhere: bool = False,
  batches: tuple[int, ...] = (),
  updates: tuple[int, ...] = (),
) -> None:
  """Runs a table's arrays on names.

  Raises:
    Broken: Something is not where it is read, or not done once.
  """
  count, stages = placement.devices, placement.stages
  split, top = bool((rows.kind == 3).any()), stages - 1
  devices = [Device(rows.sizes) for _ in range(count)]
  done: Counter = Counter()
  weights = Weights(lanes, batches, stages)
  for tick in range(len(rows.kind)):
    now = [row_of(rows, tick, device) for device in range(count)]
    opens = flag_of(now, "opens", placement.device_of[0], everywhere)
    closes = flag_of(now, "closes", placement.device_of[-1], everywhere)
    opens_back = flag_of(now, "opens_back", placement.device_of[0], everywhere)
    if opens is not None:
      if opens["kind"] != 1 or opens["stage"]:
        raise Broken("opens what is no input")
      device = devices[placement.device_of[0]]
      item = opens["open_item"]
      device.put("inbox", opens["open_to"], ("x", 0, item))
      done["opens", item] += 1
      same_item(now, "open_item", item, everywhere)
    messages: list = [None] * count
    for at, (device, row) in enumerate(zip(devices, now, strict=True)):
      kind, stage, item = row["kind"], row["stage"], row["item"]
      if not kind:
        continue
      if placement.device_of[stage] != at:
        raise Broken(f"stage {stage} is not on device {at}")
      if placement.stages_of[at][row["part"]] != stage:
        raise Broken(f"part {row['part']} is not stage {stage}")
      lane = lane_of(lanes, item)
      if lane[row["place"]] != item:
        raise Broken(f"chunk {item} is not {row['index']} of its lane")
      weights.used(item, kind == (3 if split else 2))
      drops = kind == 1 and row["kept"] == rows.sizes.kept
      if drops and done[1, stage, item]:
        raise Broken(f"chunk {item} dropped behind its kept pass")
      done["F drop" if drops else kind, stage, item] += 1
      if kind == 1:
        messages[at] = device.forward(stage, lane, row)
      elif kind == 2:
        messages[at] = device.backward(stage, lane, row, split)
        if stage == 0 and opens_back is row:
          done["opens_back", row["back_item"]] += 1
          same_item(now, "back_item", row["back_item"], everywhere)
      else:
        device.weights(stage, item, row)
    if closes is not None:
      if closes["kind"] != 1 or closes["stage"] != top:
        raise Broken("closes what is no output")
      device = devices[placement.device_of[-1]]
      item = closes["close_item"]
      if item != closes["item"]:
        raise Broken(f"closes {item} behind another chunk")
      same_item(now, "close_item", item, everywhere)
      device.put("inbox", closes["close_to"], ("dy", top, item))
      done["closes", item] += 1
    deliver(devices, now, messages)
    if tick in updates:
      weights.update()
  check_done(done, placement, lanes, split)
  if batches and weights.version != len(batches):
    raise Broken("an update is missing")


def same_item(now: list[dict], name: str, item: int, everywhere: bool) -> None:
  """All devices must know the chunk of what all of them do."""
  if everywhere and any(row[name] != item for row in now):
    raise Broken(f"{name} is not {item} on all devices")


def flag_of(
  now: list[dict], name: str, device: int, everywhere: bool
) -> dict | None:
  """The row of the device that has it to do, if it is to do in this tick."""
  flags = [bool(row[name]) for row in now]
  if not any(flags):
    return None
  wanted = [everywhere or at == device for at in range(len(now))]
  if flags != wanted:
    raise Broken(f"{name} on {flags}")
  return now[device]


def deliver(devices: list[Device], now: list[dict], messages: list) -> None:
  """What the devices around sent, at the end of a tick."""
  count = len(devices)
  for at, (device, row) in enumerate(zip(devices, now, strict=True)):
    sources = {"above": at - 1, "below": at + 1, "self": at}
    for name, sender in sources.items():
      slot = row[f"from_{name}"]
      if slot == device.sizes.inbox:
        continue
      message = messages[sender % count]
      if message is None:
        raise Broken(f"from_{name} of nothing")
      device.put("inbox", slot, message)


def check_done(
  done: Counter, placement: Placement, lanes: Lanes, split: bool
) -> None:
  for item in range(lanes.count):
    for name in ("opens", "closes", "opens_back"):
      if done[name, item] != 1:
        raise Broken(f"{name} of {item}: {done[name, item]} times")
    for stage in range(placement.stages):
      for kind in (1, 2, 3) if split else (1, 2):
        if done[kind, stage, item] != 1:
          raise Broken(f"{kind} of {item} on {stage}")
      if done["F drop", stage, item] > 1:
        raise Broken(f"{item} dropped again on {stage}")


def run(table: Table, *, everywhere: bool = False) -> None:
  rows = rows_of(table, everywhere=everywhere)
  execute(
    rows,
    table.placement,
    table.lanes,
    everywhere=everywhere,
    batches=table.batches,
    updates=table.updates,
  )


LANES = (
  Lanes((1,) * 3),
  Lanes((1,) * 8),
  Lanes((4, 1, 2, 1)),
  Lanes((4, 1, 2, 1), 1),
  Lanes((2, 5, 1, 1, 3), 2),
  Lanes((3, 6), 0),
)


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("devices", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("name", list(BUILDERS))
def test_every_table_runs(name, devices, everywhere):
  for lanes in LANES:
    run(build(name, devices, lanes), everywhere=everywhere)


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("devices", [1, 2, 3, 4])
def test_tables_with_other_options_run(devices, everywhere):
  for lanes in LANES:
    run(tables.interleaved(devices, lanes, parts=3), everywhere=everywhere)
    run(tables.one_f_one_b(devices, lanes, ahead=3), everywhere=everywhere)
    run(tables.two_bw(devices, [lanes] * 4), everywhere=everywhere)
    run(tables.two_bw(devices, [2, lanes.sizes, 1]), everywhere=everywhere)


@st.composite
def drawn_tables(draw, most=8):
  sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=most))
  live = draw(st.sampled_from([None, 0, 1, 2, 3]))
  devices = draw(st.integers(1, most))
  name = draw(st.sampled_from([*BUILDERS, "two_bw"]))
  lanes = Lanes(tuple(sizes), live)
  if name == "two_bw":
    return tables.two_bw(devices, [lanes] * draw(st.integers(1, 4)))
  return build(name, devices, lanes)


@settings(deadline=None, max_examples=100, derandomize=True)
@given(drawn_tables(), st.booleans())
def test_any_table_runs(table, everywhere):
  run(table, everywhere=everywhere)


def test_more_slots_than_a_table_needs():
  table = build("zb_h1", 3, Lanes((2, 3, 1), 1))
  own = slots.sizes_of(table)
  sizes = own.merged(Sizes(7, 9, 5, 11, 6))
  assert sizes == Sizes(7, 9, 5, 11, 6)
  rows = rows_of(table, sizes=sizes)
  assert rows.sizes == sizes
  execute(rows, table.placement, table.lanes)
  with pytest.raises(ValueError, match="the table needs"):
    rows_of(table, sizes=own._replace(kept=own.kept - 1))


def read_entries(rows: Rows) -> dict[str, np.ndarray]:
  """Of each field the entries that say where something is read or written."""
  some, forward, weights = rows.kind > 0, rows.kind == 1, rows.kind == 3
  passes, split = some & ~weights, bool(weights.any())
  spare = rows.sizes.inbox
  return {
    "source": passes,
    "open_item": rows.opens,
    "open_to": rows.opens,
    "close_item": rows.closes,
    "back_item": rows.opens_back,
    "item": passes,
    "place": passes,
    "kept": some,
    "owed": some & ~forward & split,
    "state": passes,
    "cotangent": passes & ~forward,
    "from_above": rows.from_above != spare,
    "from_below": rows.from_below != spare,
    "from_self": rows.from_self != spare,
    "close_to": rows.closes,
    "opens": rows.opens,
    "closes": rows.closes,
    "opens_back": rows.opens_back,
  }


@pytest.mark.parametrize("name", ["1f1b", "zb_v", "interleaved"])
def test_the_oracle_sees_what_another_lane_left(name):
  """Where a lane comes to rows that one before it had."""
  table = build(name, 3, (3, 2, 2))
  rows = rows_of(table)
  used: set[tuple[int, int]] = set()
  found = 0
  for tick, device in np.argwhere(rows.fresh):
    fresh, size = rows.fresh.copy(), int(rows.fresh[tick, device])
    at = int(rows.cotangent[tick, device])
    fresh[tick, device] = 0
    without = dataclasses.replace(rows, fresh=fresh)
    if used & {(device, at + n) for n in range(size)}:
      found += 1
      with pytest.raises(Broken):
        execute(without, table.placement, table.lanes)
    used |= {(device, at + n) for n in range(size)}
  assert found


@pytest.mark.parametrize("name", ["1f1b", "zb_v", "interleaved"])
def test_the_oracle_sees_every_changed_entry(name):
  table = build(name, 3, (3, 2, 2))
  rows = rows_of(table)
  for field, entries in read_entries(rows).items():
    for tick, device in np.argwhere(entries):
      array = getattr(rows, field).copy()
      array[tick, device] ^= 1
      changed = dataclasses.replace(rows, **{field: array})
      try:
        execute(changed, table.placement, table.lanes)
      except (Broken, IndexError, KeyError):
        continue
      raise AssertionError(f"{field} of tick {tick} on {device}")


def changed(table: Table, change: dict[tuple[int, int], Op | None]) -> Table:
  """A table with other operations at some `(tick, device)`."""
  ticks = [list(row) for row in table.ticks]
  for (tick, device), op in change.items():
    ticks[tick][device] = op
  return dataclasses.replace(table, ticks=tuple(map(tuple, ticks)))


def tick_of(table: Table, wanted: Op) -> int:
  return next(tick for tick, _, op in table.ops() if op == wanted)


def swapped(table: Table, one: Op, other: Op) -> Table:
  device = table.placement.device_of[one.stage]
  ticks = tick_of(table, one), tick_of(table, other)
  return changed(table, {(ticks[0], device): other, (ticks[1], device): one})


def refuses(table: Table, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    check_table(table)
  with pytest.raises((Broken, KeyError)):
    run(table)


def test_a_backward_pass_before_its_forward_pass():
  table = build("1f1b", 2, 4)
  # The last stage runs F0 B0 F1 B1 ...; B0 has no other need than F0.
  refuses(
    swapped(table, Op("F_keep", 1, 0), Op("B", 1, 0)),
    "^tick 1, stage 1: B of chunk 0 on stage 1 comes before F_keep of chunk 0 "
    "on stage 1: the pipeline would deadlock$",
  )


def test_a_forward_pass_before_that_of_the_stage_before():
  table = changed(build("1f1b", 2, 2), {(0, 1): Op("F_keep", 1, 0)})
  refuses(
    table,
    "^tick 0, stage 1: F_keep of chunk 0 on stage 1 comes before the chunk's "
    "forward pass on stage 0$",
  )


def test_a_message_does_not_arrive_in_its_own_tick():
  table = build("gpipe", 2, 1)
  op = Op("F_keep", 1, 0)
  refuses(
    changed(table, {(0, 1): op, (1, 1): None}), "^tick 0, stage 1: F_keep of"
  )


def test_a_backward_pass_before_that_of_the_stage_behind():
  table = build("gpipe", 2, 2)
  first, second = Op("B", 0, 0), Op("F_keep", 0, 1)
  refuses(
    swapped(table, first, second),
    "^tick 1, stage 0: B of chunk 0 on stage 0 comes before B of chunk 0 on "
    "stage 1",
  )


def test_chunks_of_a_lane_out_of_order():
  table = build("gpipe", 1, (3, 1))
  refuses(
    swapped(table, Op("F_keep", 0, 0), Op("F_keep", 0, 1)),
    "^tick 0, stage 0: F_keep of chunk 1 on stage 0 comes before that of chunk "
    "0 of its lane$",
  )
  refuses(
    swapped(table, Op("B", 0, 2), Op("B", 0, 1)),
    "^tick 4, stage 0: B of chunk 1 on stage 0 comes before B of chunk 2 on "
    "stage 0",
  )


def test_lanes_do_not_wait_for_each_other():
  table = build("gpipe", 1, (1, 1))
  other = swapped(table, Op("F_keep", 0, 0), Op("F_keep", 0, 1))
  check_table(other)
  run(other)


def test_a_chunk_that_was_dropped_and_not_run_again():
  table = build("1f1b", 1, Lanes((2,), 1))
  again = Op("F_keep", 0, 0)
  refuses(
    changed(table, {(tick_of(table, again), 0): None}),
    "^tick 4, stage 0: B of chunk 0 on stage 0 comes before F_keep of chunk 0",
  )


def test_a_chunk_run_again_while_a_later_one_needs_the_state():
  table = build("1f1b", 1, Lanes((2,), 1))
  refuses(
    swapped(table, Op("F_keep", 0, 0), Op("B", 0, 1)),
    "^tick 2, stage 0: F_keep of chunk 0 on stage 0 comes before B of chunk 1 "
    "on stage 0",
  )


def test_a_chunk_dropped_behind_its_kept_pass():
  table = build("1f1b", 1, Lanes((1,), 0))
  refuses(
    swapped(table, Op("F_drop", 0, 0), Op("F_keep", 0, 0)),
    "^tick 1, stage 0: F_drop of chunk 0 on stage 0 comes behind another",
  )


def test_a_gradient_of_weights_before_its_backward_pass():
  table = build("zb_h1", 2, 3)
  refuses(
    swapped(table, Op("B", 0, 1), Op("W", 0, 1)),
    "^tick [0-9]+, stage 0: W of chunk 1 on stage 0 comes before B of chunk 1",
  )


@pytest.mark.parametrize("name", list(BUILDERS))
def test_an_operation_that_is_missing_twice_there_or_elsewhere(name):
  table = build(name, 2, Lanes((2, 1, 3), 1))
  for tick, device, op in table.ops():
    gone = changed(table, {(tick, device): None})
    with pytest.raises(ValueError, match=r"stage \d+: \w+ of chunk \d+"):
      check_table(gone)
    twice = [op if at == device else None for at in range(2)]
    longer = dataclasses.replace(table, ticks=(*table.ticks, tuple(twice)))
    with pytest.raises(
      ValueError,
      match=f"^tick {len(table.ticks)}, stage {op.stage}: {op} was run before, "
      f"at tick {tick}$",
    ):
      check_table(longer)
    moved = (*table.ticks[:tick], tuple(twice[::-1]), *table.ticks[tick + 1 :])
    with pytest.raises(
      ValueError,
      match=f"^tick {tick}, stage {op.stage}: {op} is on device {1 - device}, "
      f"its stage on {device}$",
    ):
      check_table(dataclasses.replace(table, ticks=moved))


def test_what_does_not_exist():
  table = build("1f1b", 2, 1)
  end = len(table.ticks)
  for op, message in (
    (Op("F_keep", 2, 0), "does not exist: there are 2 stages and 1 chunks"),
    (Op("F_keep", 0, 1), "does not exist: there are 2 stages and 1 chunks"),
    (Op("B", -1, 0), "does not exist"),
    (Op("G", 0, 0), "is none of"),
  ):
    longer = dataclasses.replace(table, ticks=(*table.ticks, (op, None)))
    with pytest.raises(
      ValueError, match=f"^tick {end}, stage {op.stage}: {op} {message}"
    ):
      check_table(longer)
  short = dataclasses.replace(table, ticks=(*table.ticks, (None,)))
  with pytest.raises(ValueError, match=f"tick {end} has 1 entries for 2"):
    check_table(short)


def test_stages_that_follow_each_other_are_on_neighbours():
  placement = Placement(4, (0, 2, 1, 3))
  ticks = tables.replay(
    placement,
    [
      [Op(kind, stage, 0) for kind in ("F_keep", "B")] for stage in (0, 2, 1, 3)
    ],
  )
  table = Table("far", placement, Lanes((1,)), ticks)
  with pytest.raises(
    ValueError, match="stage 0 is on device 0 and stage 1 on 2: stages that"
  ):
    check_table(table)


def two_bw() -> Table:
  return tables.two_bw(2, [2, 2, 2])


def test_an_update_before_its_gradients():
  table = two_bw()
  first = table.updates[0]
  early = dataclasses.replace(table, updates=(first - 1, *table.updates[1:]))
  refuses(
    early,
    f"^tick {first}, stage 0: B of chunk 1 comes behind the update of its "
    f"batch 0, at tick {first - 1}$",
  )


def test_an_update_behind_the_use_of_its_weights():
  table = two_bw()
  start = tick_of(table, Op("F_keep", 0, 4))
  late = dataclasses.replace(table, updates=(start, *table.updates[1:]))
  refuses(
    late,
    f"^tick {start}, stage 0: the forward pass of chunk 4 comes before the "
    f"update of batch 0, at tick {start}",
  )


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"updates": (5,)}, "1 updates for 3 batches"),
    ({"updates": (5, 20, 19)}, "must be in order"),
    ({"updates": (9, 9, 13)}, "must be in order"),
    ({"updates": (5, 9, 99)}, "must be in order"),
    ({"batches": ()}, "3 updates for 0 batches"),
    ({"batches": (2, 2, 1)}, "batches of 2, 2, 1 lanes"),
    ({"batches": (2, 4, 0)}, "batches of 2, 4, 0 lanes"),
  ],
)
def test_updates_that_are_no_updates(fields, message):
  with pytest.raises(ValueError, match=message):
    check_table(dataclasses.replace(two_bw(), **fields))


@st.composite
def mutated_tables(draw):
  """A few operations change their ticks; devices may wait before."""
  table = draw(drawn_tables(most=4))
  ticks = [list(row) for row in table.ticks]
  last, devices = len(ticks) - 1, table.placement.devices
  for at in draw(st.lists(st.integers(0, last), max_size=2)):
    ticks.insert(at, [None] * devices)
  for _ in range(draw(st.integers(1, 3))):
    device = draw(st.integers(0, devices - 1))
    one = draw(st.integers(0, last))
    other = min(last, one + draw(st.integers(1, 3)))
    here, there = ticks[one], ticks[other]
    here[device], there[device] = there[device], here[device]
  updates = table.updates
  if updates:
    ends = tables.batch_ends(table.lanes, table.batches)
    shift = st.sampled_from([0, 0, 0, 1, -1])
    updates = tables._update_ticks(tuple(map(tuple, ticks)), ends, devices)
    updates = tuple(tick + draw(shift) for tick in updates)
  return dataclasses.replace(
    table, ticks=tuple(map(tuple, ticks)), updates=updates
  )


def legal(check, *args) -> bool:
  try:
    check(*args)
  except (ValueError, Broken, KeyError, IndexError):
    return False
  return True


@settings(deadline=None, max_examples=400, derandomize=True)
@given(mutated_tables())
def test_what_is_refused_is_what_does_not_run(table):
  assert legal(check_table, table) == legal(run, table)


@pytest.mark.parametrize("store", STORES)
def test_a_slot_that_is_still_needed(store):
  table = build("zb_v", 3, (1, 3, 2, 1, 1))
  places = places_of(table)
  found = sorted(lives(table)[store])
  one, other = next(
    (a, b)
    for a in found
    for b in found
    if a.device == b.device and a.start < b.start <= a.stop
  )
  at = places[store].start[one.owner]
  start = places[store].start | {other.owner: at}
  count = places[store].count + 3
  wrong = places | {
    store: dataclasses.replace(places[store], start=start, count=count)
  }
  with pytest.raises(
    ValueError,
    match=rf"^tick {other.start}, stage {other.owner[1]}: {store} slot {at} of "
    rf"device {one.device} is overwritten; .* of number {one.owner[2]} on "
    rf"stage {one.owner[1]} is needed until tick {one.stop}$",
  ):
    check_places(table, wrong)
  outside = start | {other.owner: count}
  wrong = places | {store: dataclasses.replace(places[store], start=outside)}
  with pytest.raises(
    ValueError, match=f"^tick {other.start}, stage .* {store}"
  ):
    check_places(table, wrong)


@settings(deadline=None, max_examples=200, derandomize=True)
@given(st.data())
def test_places_that_are_accepted_run(data):
  """Lives of one slot also the other way round: what is refused does not."""
  table = data.draw(drawn_tables(most=4))
  places = places_of(table)
  store = data.draw(st.sampled_from([s for s in STORES if lives(table)[s]]))
  life = data.draw(st.sampled_from(sorted(lives(table)[store])))
  at = data.draw(st.integers(0, places[store].count - life.size))
  start = places[store].start | {life.owner: at}
  places = places | {store: dataclasses.replace(places[store], start=start)}
  sizes = Sizes(*(places[store].count for store in STORES))

  def runs():
    rows = slots._Writer(table, places, sizes, False).rows()
    execute(
      rows,
      table.placement,
      table.lanes,
      batches=table.batches,
      updates=table.updates,
    )

  accepted = legal(check_places, table, places)
  if store in ("state", "cotangent"):
    assert not accepted or legal(runs)
  else:
    assert accepted == legal(runs)
