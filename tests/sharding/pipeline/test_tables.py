"""Every builder's table is legal, and as long and wide as published."""

import dataclasses
import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchunk.chunking import chunk_outer
from jaxchunk.sharding.pipeline import tables
from jaxchunk.sharding.pipeline.slots import places_of, sizes_of
from jaxchunk.sharding.pipeline.table import Lanes, Table
from jaxchunk.sharding.pipeline.tables import BUILDERS, build
from jaxchunk.sharding.pipeline.validate import check_places, check_table

DEVICES = (1, 2, 3, 4, 5, 6, 8)


def grid(*, least: int = 1) -> list[tuple[int, int]]:
  """Devices p and microbatches m >= least * p."""
  return [
    (p, m)
    for p in DEVICES
    for m in sorted({1, 2, p - 1, p, p + 1, 2 * p, 2 * p + 1, 3 * p, 4 * p})
    if m >= max(1, least * p)
  ]


def peaks(table: Table) -> list[int]:
  """The most chunks that each device keeps, counted tick by tick."""
  kept = [0] * table.placement.devices
  most = list(kept)
  last = "W" if table.split else "B"
  for _, device, op in table.ops():
    kept[device] += op.kind == "F_keep"
    most[device] = max(most[device], kept[device])
    kept[device] -= op.kind == last
  assert not any(kept)
  return most


@pytest.mark.parametrize(("p", "m"), grid())
def test_gpipe(p, m):
  table = build("gpipe", p, m)
  assert len(table.ticks) == 2 * (m + p - 1)
  assert peaks(table) == [m] * p


@pytest.mark.parametrize(("p", "m"), grid())
def test_1f1b(p, m):
  table = build("1f1b", p, m)
  assert len(table.ticks) == 2 * (m + p - 1)
  assert peaks(table) == [min(m, p - s) for s in range(p)]
  assert sizes_of(table).kept == min(m, p)


@pytest.mark.parametrize(("p", "m"), grid())
def test_aligned_1f1b_has_ticks_of_one_kind(p, m):
  table = build("1f1b_aligned", p, m)
  assert len(table.ticks) == 2 * (m + p - 1)
  assert peaks(table) == [min(m, 2 * (p - s) - 1) for s in range(p)]
  for row in table.ticks:
    assert len({op.kind for op in row if op is not None}) == 1


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("p", DEVICES)
@pytest.mark.parametrize("rounds", [1, 2, 4])
def test_interleaved(p, rounds, parts):
  m = rounds * p
  table = tables.interleaved(p, m, parts=parts)
  assert len(table.ticks) == 2 * (parts * m + p - 1)
  # Megatron's warm-up, and the chunk behind it.
  warm = [2 * (p - d - 1) + (parts - 1) * p for d in range(p)]
  assert peaks(table) == [min(parts * m, n + 1) for n in warm]


@pytest.mark.parametrize(("p", "m"), grid())
def test_zb_h1(p, m):
  table = build("zb_h1", p, m)
  # Fewer chunks than devices have too few `W` for the bubble.
  assert len(table.ticks) == max(3 * m + p - 1, 2 * (m + p) - 1)
  assert peaks(table) == [min(m, p)] * p


@pytest.mark.parametrize(("p", "m"), grid(least=1))
def test_zb_v(p, m):
  table = build("zb_v", p, m)
  assert len(table.ticks) == 6 * m + p - 1
  if p > 1:
    assert peaks(table) == [2 * p] * p


# Ticks are half ones: half as many layers as in a table of one stage a device.
# 1F1B's bubble is 6(p - 1) of them, and it keeps 2p half chunks.


@pytest.mark.parametrize(("p", "m"), grid(least=1))
def test_v_half(p, m):
  table = build("v_half", p, m)
  bubble = len(table.ticks) - 6 * m
  # Half of 1F1B's; the block of an odd p is three ticks shorter.
  assert bubble == (0 if p == 1 else 3 * (p - 1) - 2 * (p % 2))
  if p > 1:
    assert max(peaks(table)) == p + 2


@pytest.mark.parametrize(("p", "m"), grid(least=1))
def test_v_min(p, m):
  table = build("v_min", p, m)
  bubble = len(table.ticks) - 6 * m
  # Two thirds of 1F1B's, one more or less: a multiple of three has to wait at
  # the turns so that no two operations fall on one tick.
  assert bubble == (0 if p == 1 else 4 * (p - 1) + (-1 if p % 3 else 1))
  if p > 1:
    assert max(peaks(table)) == -(-2 * p // 3) + 2


@pytest.mark.parametrize("p", range(1, 33))
def test_the_block_of_v_half(p):
  """The published starts but for `B` of the last part, a tick later.

  The published block waits as long, at another turn: it gives a table of the
  same ticks and slots. With one device it is one tick longer.
  """
  d = 0 if p % 2 else 3
  published = [
    (2 * i, 3 * p - i - 2, 3 * p + d + 2 * i - 1, 6 * p + d - i - 2)
    for i in range(p)
  ]
  if p == 1:
    assert tables._building_block(1, 2, 1) == [(0, 1, 2, 3)]
    return
  assert tables._building_block(p, 2, 1) == [
    (f0, f1, b1 + 1, b0) for f0, f1, b1, b0 in published
  ]


@pytest.mark.parametrize("p", DEVICES)
def test_the_published_block_is_as_good(p, monkeypatch):
  ours = build("v_half", p, 3 * p)
  d = 0 if p % 2 else 3
  block = [
    (2 * i, 3 * p - i - 2, 3 * p + d + 2 * i - 1, 6 * p + d - i - 2)
    for i in range(p)
  ]
  monkeypatch.setattr(tables, "_building_block", lambda *_: block)
  theirs = build("v_half", p, 3 * p)
  assert len(ours.ticks) == len(theirs.ticks)
  assert peaks(ours) == peaks(theirs)
  assert sizes_of(ours) == sizes_of(theirs)


@pytest.mark.parametrize("p", DEVICES)
@pytest.mark.parametrize("down", [1, 2, 4])
def test_a_block_repeats_every_six_ticks(p, down):
  up = max(1, down // 2)
  for four in tables._building_block(p, down, up):
    assert list(four) == sorted(four)
    assert len({start % 6 for start in four}) == 4


@st.composite
def drawn_lanes(draw):
  sizes = draw(st.lists(st.integers(1, 6), min_size=1, max_size=8))
  return Lanes(tuple(sizes), draw(st.sampled_from([None, 0, 1, 2, 3, 9])))


@settings(deadline=None, max_examples=150, derandomize=True)
@given(st.sampled_from(list(BUILDERS)), st.integers(1, 8), drawn_lanes())
def test_every_builder_is_legal(name, devices, lanes):
  table = build(name, devices, lanes)
  check_table(table)
  check_places(table, places_of(table))
  # As many as there must be: first passes, and those of chunks not kept.
  again = sum(not kept for kept in lanes.kept)
  forward = sum(op.kind[0] == "F" for _, _, op in table.ops())
  assert forward == table.placement.stages * (lanes.count + again)


@pytest.mark.parametrize("name", list(BUILDERS))
@pytest.mark.parametrize(("p", "m"), grid())
def test_microbatches_of_any_number_are_legal(name, p, m):
  table = build(name, p, m)
  check_table(table)
  check_places(table, places_of(table))


@pytest.mark.parametrize("chunks", range(1, 9))
@pytest.mark.parametrize("live", [0, 1, 2, 3, 8, 9])
def test_one_device_runs_the_schedule_of_chunk_outer(chunks, live):
  table = build("1f1b", 1, Lanes((chunks,), live))
  ran = [(op.kind, op.item) for _, _, op in table.ops()]
  assert ran == chunk_outer.schedule(chunks, live)


@pytest.mark.parametrize("sizes", [(3, 1, 4), (1, 1, 5, 2)])
@pytest.mark.parametrize("live", [0, 1, 2])
def test_one_device_runs_lane_after_lane(sizes, live):
  lanes = Lanes(sizes, live)
  table = build("1f1b", 1, lanes)
  ran = [(op.kind, op.item) for _, _, op in table.ops()]
  assert ran == [
    (kind, start + chunk)
    for start, size in zip(lanes.starts, sizes, strict=True)
    for kind, chunk in chunk_outer.schedule(size, live)
  ]


@pytest.mark.parametrize("batches", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("p", DEVICES)
def test_two_bw_stalls_only_where_batches_are_small(p, batches):
  """From p - 1 microbatches on it never does.

  With fewer, two batches do not fill the way to the last stage and back, and
  every second batch waits for the rest of it.
  """
  for m in range(1, 2 * p + 2):
    table = tables.two_bw(p, [m] * batches)
    check_table(table)
    check_places(table, places_of(table))
    count = batches * m
    stall = 2 * max(0, p - 1 - m) * ((batches - 1) // 2)
    assert len(table.ticks) == 2 * (count + p - 1) + stall
    if not stall:
      assert peaks(table) == peaks(build("1f1b", p, count))
    assert len(table.updates) == batches
    assert all(a < b for a, b in itertools.pairwise(table.updates))
    assert table.updates[-1] == len(table.ticks) - 1


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.integers(1, 6), st.lists(drawn_lanes(), min_size=1, max_size=4))
def test_two_bw_is_legal(p, batches):
  # All batches keep alike.
  batches = [dataclasses.replace(one, live=batches[0].live) for one in batches]
  table = tables.two_bw(p, batches)
  check_table(table)
  check_places(table, places_of(table))


def test_what_is_no_schedule_is_refused():
  with pytest.raises(ValueError, match="schedule='dapple' is not one of"):
    build("dapple", 2, 2)
  with pytest.raises(ValueError, match="devices=0 must be at least 1"):
    build("gpipe", 0, 2)
  with pytest.raises(ValueError, match="at least one chunk each"):
    build("gpipe", 2, 0)
  with pytest.raises(ValueError, match=r"lanes=\[2, 0\]"):
    build("1f1b", 2, [2, 0])
  with pytest.raises(ValueError, match="live=-1"):
    Lanes((1,), -1)
  with pytest.raises(ValueError, match=r"live=\[1, None\] must be the same"):
    tables.two_bw(2, [Lanes((2,), 1), Lanes((2,))])
  with pytest.raises(ValueError, match="there must be one at least"):
    tables.two_bw(2, [])
