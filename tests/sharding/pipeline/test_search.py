"""The search finds what is at least as fast as all that is tried, and fits."""

import dataclasses
import re

import pytest

from jaxchunk.sharding.pipeline import tables
from jaxchunk.sharding.pipeline.search import (
  ChunkSize,
  TooLittleMemory,
  best_split,
  best_table,
  lane_orders,
)
from jaxchunk.sharding.pipeline.simulate import (
  Costs,
  event_driven,
  lockstep,
  token_costs,
)
from jaxchunk.sharding.pipeline.table import Lanes
from jaxchunk.sharding.pipeline.usage import (
  SlotBytes,
  allocated_memory,
  part_bytes,
)
from jaxchunk.sharding.pipeline.validate import check_table

_BYTES = SlotBytes(1, 10, 2, 3, 3)


@pytest.mark.parametrize("live, paper, best", [(1, 52, 44), (2, 46, 42)])
def test_chunkflow_example(live, paper, best):
  # Lengths 4, 1, 2, 1 by chunks of 2; repeated passes count as time.
  found = best_table(
    4,
    (2, 1, 1),
    Costs(f=2, b=2, w=2),
    names=["1f1b"],
    lives=[live],
    mode="event",
  )
  check_table(found.table)
  assert found.timeline.makespan == best <= paper
  assert found.timeline.busy == (24, 24, 24, 24)
  # Schedules that split backward passes do better still.
  every = best_table(4, (2, 1, 1), Costs(f=2, b=2, w=2), lives=[live])
  assert every.timeline.makespan < best


@pytest.mark.parametrize("mode", ["lockstep", "event"])
def test_nothing_that_is_tried_is_faster(mode):
  simulate = lockstep if mode == "lockstep" else event_driven
  costs = Costs(f_prefix=0.3, b_prefix=0.6)
  sizes = (3, 1, 4, 1)
  found = best_table(4, sizes, costs, lives=[None, 1], mode=mode)
  check_table(found.table)
  assert found.timeline == simulate(found.table, costs)
  for name in tables.BUILDERS:
    for live in (None, 1):
      for order in (sizes, sorted(sizes), sorted(sizes)[::-1]):
        table = tables.build(name, 4, Lanes(tuple(order), live))
        assert found.timeline.makespan <= simulate(table, costs).makespan


def test_factors_move_with_their_lanes():
  lanes, factors = Lanes((1, 2, 1, 1)), (1.0, 3.0, 3.0, 7.0, 0.5)
  costs = Costs(chunks=factors)
  found = best_table(3, lanes, costs, names=["1f1b"], lives=[None])
  assert sorted(found.order) == [0, 1, 2, 3]
  assert found.order != (0, 1, 2, 3)
  assert found.table.lanes.sizes == tuple(lanes.sizes[n] for n in found.order)
  moved = []
  for lane in found.order:
    moved += factors[lanes.starts[lane] : lanes.end(lane)]
  again = lockstep(found.table, Costs(chunks=tuple(moved)))
  assert found.timeline == again


def test_orders_are_different_and_whole():
  orders = lane_orders(Lanes((1, 4, 2, 3, 5)), Costs())
  assert orders[0] == (0, 1, 2, 3, 4)
  assert (4, 1, 3, 2, 0) in orders and (0, 2, 3, 1, 4) in orders
  assert (0, 3, 4, 1, 2) in orders, "the longest in the middle"
  assert len(set(orders)) == len(orders) == 5
  assert all(sorted(order) == list(range(5)) for order in orders)
  # Microbatches are all the same, unless their costs are not.
  assert lane_orders(Lanes((1,) * 4), Costs()) == [(0, 1, 2, 3)]
  assert len(lane_orders(Lanes((1,) * 4), Costs(chunks=(1, 4, 2, 3)))) > 1


def test_memory_is_kept_to_and_costs_time():
  costs, lanes = Costs(f_prefix=0.1, b_prefix=0.2), (6, 2, 1, 1)
  free = best_table(4, lanes, costs)

  def need(found):
    parts = found.table.placement.parts
    return allocated_memory(found.table, part_bytes(_BYTES, parts))

  tight = best_table(
    4, lanes, costs, memory_limit=need(free) - 1, slot_bytes=_BYTES
  )
  assert need(tight) < need(free)
  assert tight.timeline.makespan >= free.timeline.makespan
  same = best_table(4, lanes, costs, memory_limit=need(free), slot_bytes=_BYTES)
  assert same.timeline.makespan == free.timeline.makespan


def test_the_least_limit_is_named_and_works():
  def search(limit):
    return best_table(
      4, (6, 2, 1, 1), Costs(), memory_limit=limit, slot_bytes=_BYTES
    )

  with pytest.raises(ValueError, match="memory_limit=5 bytes") as error:
    search(5)
  least = int(re.search(r"least limit is (\d+)", str(error.value))[1])
  assert least > 5
  check_table(search(least).table)
  with pytest.raises(ValueError, match="no table fits"):
    search(least - 1)


def test_arguments_that_contradict_each_other():
  with pytest.raises(ValueError, match="nothing without slot_bytes"):
    best_table(2, 4, Costs(), memory_limit=5)
  with pytest.raises(ValueError, match="no choice"):
    best_table(2, 4, Costs(), names=[])
  with pytest.raises(ValueError, match="mode='time' is not one of"):
    best_table(2, 4, Costs(), mode="time")


def sizes_of_chunks(head=0.0):
  """A lane of 16k tokens and four of 4k, in chunks of 2k and 4k."""
  found = {}
  for size in (2048, 4096):
    lanes = [16384 // size, *[4096 // size] * 4]
    costs = token_costs(size, (1e-3, 1e-3, 1e-3), (1e-7, 2.5e-7))
    costs = dataclasses.replace(costs, head=head * size)
    weight = SlotBytes(size, 10 * size, 10 * size, size, 2 * size)
    found[size] = ChunkSize(lanes=lanes, costs=costs, slot_bytes=weight)
  return found


def test_the_chunk_size_follows_from_the_memory():
  sizes = sizes_of_chunks()
  free = best_split(4, sizes)
  need = allocated_memory(free.found.table, sizes[free.chunk_size].slot_bytes)
  tight = best_split(4, sizes, memory_limit=need // 2)
  assert tight.found.timeline.makespan > free.found.timeline.makespan
  parts = tight.found.table.placement.parts
  weight = part_bytes(sizes[tight.chunk_size].slot_bytes, parts)
  assert allocated_memory(tight.found.table, weight) <= need // 2
  with pytest.raises(TooLittleMemory, match=r"least limit is \d+.* chunks of"):
    best_split(4, sizes, memory_limit=100)
  try:
    best_split(4, sizes, memory_limit=100)
  except TooLittleMemory as error:
    best_split(4, sizes, memory_limit=error.least)


def test_the_stage_with_the_head_gets_fewer_layers():
  names = ("1f1b", "1f1b_aligned")
  sizes = sizes_of_chunks(head=2e-3)
  even = best_split(4, sizes, names=names)
  split = best_split(4, sizes, layers=32, names=names)
  assert split.layers is not None and sum(split.layers) == 32
  assert split.layers[-1] < split.layers[0]
  assert split.found.timeline.makespan < even.found.timeline.makespan
  assert best_split(4, sizes_of_chunks(), layers=32, names=names).layers is None
