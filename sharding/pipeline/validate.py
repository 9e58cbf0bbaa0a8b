"""Proves that a table can run, before it does."""

import itertools
from collections.abc import Mapping

from jaxchunk.sharding.pipeline.scheduling import batch_ends
from jaxchunk.sharding.pipeline.slots import STORES, Places, Store, lives
from jaxchunk.sharding.pipeline.table import KINDS, Kind, Op, Table


def check_table(table: Table) -> None:
  """Whether every operation has what it needs when its tick comes.

  Raises:
    ValueError: An operation is missing, twice there, on a wrong device, or
      comes before what it needs; names the tick, the stage and the operation.
  """
  done: dict[Op, int] = {}
  first: dict[tuple[int, int], int] = {}
  for tick, row in enumerate(table.ticks):
    if len(row) != table.placement.devices:
      raise ValueError(
        f"tick {tick} has {len(row)} entries for {table.placement.devices} "
        "devices"
      )
    for device, op in enumerate(row):
      if op is not None:
        _check_op(table, done, first, tick, device, op)
    for op in row:
      if op is None:
        continue
      done[op] = tick
      if op.kind[0] == "F":
        first.setdefault((op.stage, op.item), tick)
  _check_complete(table, done)
  _check_hops(table)
  _check_updates(table, done, first)


def _check_op(
  table: Table,
  done: dict[Op, int],
  first: dict[tuple[int, int], int],
  tick: int,
  device: int,
  op: Op,
) -> None:
  placement, lanes = table.placement, table.lanes
  kind, stage, item = op

  def fail(reason: str) -> None:
    raise ValueError(f"tick {tick}, stage {stage}: {op} {reason}")

  if kind not in KINDS:
    fail(f"is none of {list(KINDS)}")
  if not (0 <= stage < placement.stages and 0 <= item < lanes.count):
    fail(
      f"does not exist: there are {placement.stages} stages and "
      f"{lanes.count} chunks"
    )
  if placement.device_of[stage] != device:
    fail(f"is on device {device}, its stage on {placement.device_of[stage]}")
  if op in done:
    fail(f"was run before, at tick {done[op]}")
  needs: list[Op] = []
  index, behind = lanes.index_of[item], item + 1
  more = behind < lanes.count and lanes.index_of[behind] > 0
  if kind[0] == "F" and (stage, item) not in first:
    if stage and (stage - 1, item) not in first:
      fail(f"comes before the chunk's forward pass on stage {stage - 1}")
    if index and (stage, item - 1) not in first:
      fail(f"comes before that of chunk {item - 1} of its lane")
  elif kind == "F_drop":
    fail("comes behind another forward pass")
  elif kind == "F_keep":
    # Run again: later chunks have to be done with the state.
    needs += [Op("B", stage, behind)] if more else []
  elif kind == "B":
    needs += [Op("F_keep", stage, item)]
    needs += [Op("B", stage + 1, item)] if stage + 1 < placement.stages else []
    needs += [Op("B", stage, behind)] if more else []
  else:
    needs += [Op("B", stage, item)]
  for need in needs:
    if need not in done:
      fail(f"comes before {need}: the pipeline would deadlock")


def _check_complete(table: Table, done: dict[Op, int]) -> None:
  kinds: tuple[Kind, ...] = ("F_keep", "B")
  if table.split:
    kinds = ("F_keep", "B", "W")
  for stage in range(table.placement.stages):
    for item in range(table.lanes.count):
      for kind in kinds:
        if (op := Op(kind, stage, item)) not in done:
          raise ValueError(f"stage {stage}: {op} is missing from the table")


def _check_hops(table: Table) -> None:
  placement = table.placement
  for stage in range(placement.stages - 1):
    here, there = placement.device_of[stage : stage + 2]
    apart = (there - here) % placement.devices
    if apart not in (0, 1, placement.devices - 1):
      raise ValueError(
        f"stage {stage} is on device {here} and stage {stage + 1} on {there}: "
        "stages that follow each other must be on one device or on neighbours"
      )


def _check_updates(
  table: Table, done: dict[Op, int], first: dict[tuple[int, int], int]
) -> None:
  """Whether weights change behind their gradients and before their use."""
  batches, updates = table.batches, table.updates
  if len(updates) != len(batches):
    raise ValueError(
      f"{len(updates)} updates for {len(batches)} batches: there must be one "
      "for each"
    )
  if not batches:
    return
  if min(batches) < 1 or sum(batches) != len(table.lanes.sizes):
    raise ValueError(
      f"batches of {', '.join(map(str, batches))} lanes are not all "
      f"{len(table.lanes.sizes)} lanes, at least one each"
    )
  bounds = (-1, *updates, len(table.ticks))
  if any(b <= a for a, b in itertools.pairwise(bounds)):
    raise ValueError(
      f"updates at ticks {', '.join(map(str, updates))} must be in order, each "
      f"at a tick of its own, below {len(table.ticks)}"
    )
  ends = batch_ends(table.lanes, batches)
  last: Kind = "W" if table.split else "B"
  for (kind, stage, item), tick in done.items():
    batch = sum(end <= item for end in ends)
    if kind == last and tick > table.updates[batch]:
      raise ValueError(
        f"tick {tick}, stage {stage}: {kind} of chunk {item} comes behind the "
        f"update of its batch {batch}, at tick {table.updates[batch]}"
      )
    start = first[stage, item]
    if batch > 1 and start <= table.updates[batch - 2]:
      raise ValueError(
        f"tick {start}, stage {stage}: the forward pass of chunk {item} comes "
        f"before the update of batch {batch - 2}, at tick "
        f"{table.updates[batch - 2]}, whose weights batch {batch} takes"
      )


def check_places(table: Table, places: Mapping[Store, Places]) -> None:
  """Whether no slot is overwritten while somebody still needs it.

  Raises:
    ValueError: One is; names the tick, the stage and what is overwritten.
  """
  found = lives(table)
  for store in STORES:
    given = places[store]
    held: dict[tuple[int, int], tuple[int, tuple[str, int, int]]] = {}
    for life in sorted(found[store]):
      at = given.start[life.owner]
      if at < 0 or at + life.size > given.count:
        raise ValueError(
          f"tick {life.start}, stage {life.owner[1]}: {store} slot "
          f"{at} to {at + life.size - 1} of {given.count}"
        )
      for slot in range(at, at + life.size):
        stop, owner = held.get((life.device, slot), (-1, life.owner))
        if stop >= life.start:
          raise ValueError(
            f"tick {life.start}, stage {life.owner[1]}: {store} slot {slot} "
            f"of device {life.device} is overwritten; {owner[0] or 'what'} of "
            f"number {owner[2]} on stage {owner[1]} is needed until tick {stop}"
          )
        held[life.device, slot] = life.stop, life.owner
