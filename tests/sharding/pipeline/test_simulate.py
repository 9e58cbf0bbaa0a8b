"""Simulated times are those of formulas, of plain sums, and of papers."""

import dataclasses
import itertools
import json

import numpy as np
import pytest

from jaxchunk.sharding.pipeline import slots, tables
from jaxchunk.sharding.pipeline.simulate import (
  Costs,
  event_driven,
  fitted_costs,
  lockstep,
  op_times,
  token_costs,
)
from jaxchunk.sharding.pipeline.table import Lanes, Op
from jaxchunk.sharding.pipeline.timeline import (
  Span,
  Timeline,
  check_timeline,
  read_timeline,
  write_timeline,
)
from jaxchunk.sharding.pipeline.usage import (
  SlotBytes,
  allocated_memory,
  memory,
  messages,
  part_bytes,
  peak_memory,
  peak_slots,
  used_slots,
)

_SIZES = [(2, 4), (4, 4), (4, 9), (8, 16)]
_COSTS = Costs(f=1.0, b=1.5, w=0.5, f_prefix=0.25, b_prefix=0.5)


_TABLES = [
  tables.build(name, 4, lanes)
  for name in tables.BUILDERS
  for lanes in (Lanes((1,) * 6), Lanes((4, 1, 2, 1), 1), Lanes((3, 2), 0))
] + [
  tables.two_bw(3, [6, 6, 6]),
  tables.interleaved(2, 4),
  tables.one_f_one_b(2, 3),
  tables.zb_v(2, 3),
  tables.zb_v(1, 2),
]


def spans_of(timeline, kind):
  return [span for span in timeline.spans if span.kind == kind]


@pytest.mark.parametrize("devices, count", _SIZES)
def test_schedules_take_what_their_formulas_say(devices, count):
  f, b = 1.0, 2.0
  costs = Costs(f=f, b=1.25, w=b - 1.25)
  span = (count + devices - 1) * (f + b)
  for name in ("gpipe", "1f1b", "1f1b_aligned"):
    found = event_driven(tables.build(name, devices, count), costs)
    assert found.makespan == pytest.approx(span)
    assert found.busy == pytest.approx([count * (f + b)] * devices)
    assert found.bubble == pytest.approx((devices - 1) / (count + devices - 1))
  for name in ("gpipe", "1f1b_aligned"):
    found = lockstep(tables.build(name, devices, count), costs)
    assert found.makespan == pytest.approx(span)
  # Neighbours run different operations at a time, so the cheap one waits.
  plain = lockstep(tables.build("1f1b", devices, count), costs)
  assert plain.makespan > span
  zero = tables.build("zb_h1", devices, count)
  for found in (lockstep(zero, Costs()), event_driven(zero, Costs())):
    assert found.makespan == pytest.approx(3 * count + devices - 1)


def test_lockstep_costs_plain_1f1b_an_eighth():
  table = tables.build("1f1b", 8, 16)
  assert lockstep(table, Costs()).bubble == pytest.approx(0.429, abs=5e-4)
  assert event_driven(table, Costs()).bubble == pytest.approx(0.304, abs=5e-4)


def test_chunkflow_example_of_unequal_microbatches():
  table = tables.one_f_one_b(4, 4)
  found = event_driven(table, Costs(chunks=(4, 1, 2, 1)))
  assert found.makespan == 56
  assert found.busy == (24, 24, 24, 24)
  assert found.bubble == pytest.approx(0.571, abs=5e-4)


@pytest.mark.parametrize("table", _TABLES, ids=str)
def test_lockstep_is_the_sum_of_the_slowest(table):
  times = op_times(table, _COSTS)
  slowest = [max(times.of_op(op) for op in row if op) for row in table.ticks]
  found = lockstep(table, _COSTS)
  assert found.makespan == pytest.approx(sum(slowest))
  starts = np.cumsum([0, *slowest[:-1]])
  for (tick, device, op), span in zip(table.ops(), found.spans, strict=True):
    assert span[:4] == (device, *op)
    assert span.start == pytest.approx(starts[tick])
    assert span.stop - span.start == pytest.approx(times.of_op(op))


@pytest.mark.parametrize("table", _TABLES, ids=str)
def test_events_begin_when_the_last_of_their_needs_is_there(table):
  send = 0.125
  found = event_driven(table, _COSTS, send=send)
  check_timeline(table, found)
  device_of, top = table.placement.device_of, table.placement.stages - 1
  first = {}
  for span in found.spans:
    first.setdefault((span.kind[0], span.stage, span.item), span)
  before = {}
  for spans in found.orders():
    assert spans[0].start >= 0
    before |= dict(itertools.pairwise(reversed(spans)))
  for span in found.spans:
    needs = [before[span].stop] if span in before else [0.0]
    other = span.stage + (1 if span.kind == "B" else -1)
    if span.kind != "W" and 0 <= other <= top:
      input_ = first[span.kind[0], other, span.item]
      needs.append(input_.stop + send * (device_of[other] != span.device))
    assert span.start == max(needs)
  assert (
    event_driven(table, _COSTS).makespan
    <= lockstep(table, _COSTS).makespan + 1e-9
  )


def test_a_message_takes_its_time():
  found = event_driven(tables.gpipe(5, 1), Costs(), send=0.5)
  assert found.makespan == pytest.approx(5 * 3 + 2 * 4 * 0.5)
  # Both parts of the last device: nothing is sent between them.
  found = event_driven(tables.zb_v(2, 1), Costs(), send=0.5)
  last = next(s for s in found.spans if s[1:4] == ("F_keep", 2, 0))
  assert last.start == pytest.approx(0.5 + 0.5 + 0.5)


def test_costs_of_tokens_grow_with_the_prefix():
  costs = token_costs(8, token=(1, 2, 3), pair=(0.5, 0.25))
  table = tables.gpipe(1, Lanes((3, 1)))
  times = op_times(table, costs)
  for item, prefix in enumerate((0, 8, 16, 0)):
    assert times.of_op(Op("F_keep", 0, item)) == 8 * 1 + 8 * prefix * 0.5
    back = 8 * 2 + 8 * prefix * 0.25
    assert times.of_op(Op("B", 0, item)) == back + 8 * 3
  split = op_times(tables.zb_h1(1, Lanes((3, 1))), costs)
  assert split.of_op(Op("B", 0, 2)) == 8 * 2 + 8 * 16 * 0.25
  assert split.of_op(Op("W", 0, 2)) == 8 * 3


def test_factors_of_stages():
  table = tables.gpipe(3, 2)
  # The slowest stage sets the pace; the others' time comes once.
  found = event_driven(table, Costs(stages=(1, 2, 0.5)))
  assert found.makespan == pytest.approx((1 + 2 + 0.5) * 3 + 2 * 3)
  # Without factors a device's work is the same however it is cut.
  for name in tables.BUILDERS:
    busy = lockstep(tables.build(name, 4, 8), Costs()).busy
    assert busy == pytest.approx([24] * 4)
  with pytest.raises(ValueError, match="3 factors for 8 stages"):
    lockstep(tables.zb_v(4, 4), Costs(stages=(1, 1, 1)))
  with pytest.raises(ValueError, match="3 factors for 4 chunks"):
    lockstep(tables.zb_v(4, 4), Costs(chunks=(1, 1, 1)))
  with pytest.raises(ValueError, match=r"stages=.* 0 or more"):
    Costs(stages=(1, -1))


def test_the_head_is_on_one_device_or_on_all():
  table, base = tables.gpipe(4, 6), Costs()
  plain = lockstep(table, base)
  own = dataclasses.replace(base, head=2.0)
  found = lockstep(table, own)
  assert found.makespan == pytest.approx(plain.makespan + 6 * 2.0)
  assert found.busy == pytest.approx([18, 18, 18, 18 + 12])
  assert {span.device for span in spans_of(found, "head")} == {3}
  shared = dataclasses.replace(own, everywhere=True)
  found = lockstep(table, shared)
  assert found.makespan == pytest.approx(plain.makespan + 6 * 2.0 / 4)
  assert found.busy == pytest.approx([18 + 3] * 4)
  # All begin together, also where nothing else holds them together.
  for each in (found, event_driven(table, shared)):
    heads = spans_of(each, "head")
    assert len(heads) == 6 * 4
    assert len({(span.item, span.start) for span in heads}) == 6
  # It comes behind the last forward pass, and once.
  dropped = tables.gpipe(2, Lanes((3,), 1))
  found = event_driven(dropped, own)
  heads = {span.item: span for span in spans_of(found, "head")}
  assert len(spans_of(found, "head")) == 3
  for span in found.spans:
    if span.kind == "F_keep" and span.stage == 1:
      assert heads[span.item].start == span.stop


def test_the_embedding_is_looked_up_and_has_a_gradient():
  table = tables.gpipe(2, Lanes((3,), 0))
  found = lockstep(table, Costs(embed=0.5))
  embeds = spans_of(found, "embed")
  assert {span.device for span in embeds} == {0} and len(embeds) == 6
  # The second forward pass of a chunk needs no second look-up.
  places = {(s.kind, s.item): s for s in found.spans if s.stage == 0}
  for item in range(3):
    stops = [span.stop for span in embeds if span.item == item]
    assert stops[0] == places["F_drop", item].start
    assert stops[1] == places["B", item].stop + 0.5
  plain = lockstep(table, Costs())
  assert sum(found.busy) == pytest.approx(sum(plain.busy) + 6 * 0.5)
  shared = lockstep(table, Costs(embed=0.5, everywhere=True))
  assert len(spans_of(shared, "embed")) == 12
  assert shared.busy == pytest.approx([n + 6 * 0.25 for n in plain.busy])


def test_a_repeated_pass_takes_time_but_is_no_work():
  table = tables.gpipe(2, Lanes((4,), 1))
  found = event_driven(table, Costs())
  assert found.busy == pytest.approx([4 * 3] * 2)
  again = [span for span in found.spans if found.repeats(span)]
  assert {span[1:4] for span in again} == {
    ("F_keep", stage, item) for stage in range(2) for item in range(3)
  }
  everything = event_driven(tables.gpipe(2, 4), Costs())
  assert found.makespan > everything.makespan


@pytest.mark.parametrize("table", _TABLES, ids=str)
def test_memory_is_the_sum_of_lives(table):
  weights = SlotBytes(3, 50, 7, 11, 2)
  found = slots.lives(table)
  want = np.zeros((len(table.ticks), table.placement.devices), int)
  for store, weight in zip(slots.STORES, weights, strict=True):
    for life in found[store]:
      want[life.start : life.stop + 1, life.device] += weight * life.size
  for timeline in (lockstep(table, _COSTS), event_driven(table, _COSTS)):
    kept = memory(table, timeline, weights)
    np.testing.assert_array_equal(kept.bytes, want)
    assert (np.diff(kept.times, axis=0) >= 0).all()
    starts = {(s.device, *s[1:4]): s.start for s in timeline.spans}
    for tick, device, op in table.ops():
      assert kept.times[tick, device] == starts[device, *op]
  np.testing.assert_array_equal(peak_memory(table, weights), want.max(axis=0))
  assert allocated_memory(table, weights) >= want.max()
  sizes, peaks = slots.sizes_of(table), peak_slots(table)
  for store, size in zip(slots.STORES, sizes, strict=True):
    assert peaks[store].max() <= size
  # Lives of one slot take the fewest slots that there can be.
  assert peaks["kept"].max() == sizes.kept


def test_published_peaks():
  peaks = peak_slots(tables.one_f_one_b(8, 16))["kept"]
  assert peaks.tolist() == [8, 7, 6, 5, 4, 3, 2, 1]
  assert peak_slots(tables.gpipe(8, 16))["kept"].tolist() == [16] * 8
  used = used_slots(tables.gpipe(2, Lanes((3,), 1)))
  assert used["kept"].max() == 1 and used["state"].max() == 3


def test_parts_of_slots():
  assert part_bytes(SlotBytes(5, 5, 4, 3, 2), 2) == SlotBytes(5, 3, 2, 2, 1)


@pytest.mark.parametrize("table", _TABLES, ids=str)
def test_messages_are_those_that_the_executor_reads(table):
  rows, found = slots.rows_of(table), messages(table)
  above = (rows.from_above != rows.sizes.inbox).sum(axis=0)
  below = (rows.from_below != rows.sizes.inbox).sum(axis=0)
  np.testing.assert_array_equal(found.down, np.roll(above, -1))
  np.testing.assert_array_equal(found.up, np.roll(below, 1))
  devices = table.placement.devices
  sent = len(table.ticks) if devices > 1 else 0
  assert found.sent.tolist() == [sent] * devices
  np.testing.assert_array_equal(messages(table, 10).up, 10 * found.up)


def test_messages_by_hand():
  found = messages(tables.gpipe(3, 5))
  assert found.down.tolist() == [5, 5, 0]
  assert found.up.tolist() == [0, 5, 5]
  pair = messages(tables.one_f_one_b(2, 5))
  assert (pair.down.tolist(), pair.up.tolist()) == ([5, 0], [0, 5])
  alone = messages(tables.gpipe(1, 5), 100)
  assert alone.sent.tolist() == alone.up.tolist() == [0]


def test_a_timeline_is_written_and_read(tmp_path):
  table = tables.zb_v(2, 3)
  found = lockstep(table, Costs(head=0.5))
  moved = [s._replace(start=s.start + 7, stop=s.stop + 7) for s in found.spans]
  write_timeline(Timeline(2, tuple(moved[::-1])), tmp_path / "spans.json")
  again = read_timeline(tmp_path / "spans.json", 2)
  assert sorted(again.spans) == sorted(found.spans)
  check_timeline(table, again)
  assert fitted_costs(table, again) == Costs(head=0.5)


@pytest.mark.parametrize(
  "text, message",
  [
    ("{", "not JSON"),
    ("[]", "not JSON of the form"),
    ('{"spans": []}', "no spans"),
    ('{"spans": [[0, "B", 0, 0, 1]]}', "span 0 is .*, not .device, kind"),
    ('{"spans": [[0, "X", 0, 0, 1, 2]]}', "kind 'X', not one of"),
    ('{"spans": [[2, "B", 0, 0, 1, 2]]}', "device 2 of 2"),
    ('{"spans": [[0, "B", 0, 0, 2, 1]]}', "starts at 2.0 and stops at 1.0"),
    ('{"spans": [[0, "B", 0, 0, 2, NaN]]}', "stops at nan"),
  ],
)
def test_a_file_that_is_no_timeline_is_refused(text, message, tmp_path):
  (tmp_path / "spans.json").write_text(text)
  with pytest.raises(ValueError, match=message):
    read_timeline(tmp_path / "spans.json", 2)


def test_a_timeline_of_another_table_is_refused():
  table = tables.one_f_one_b(2, 3)
  found = lockstep(table, Costs())
  with pytest.raises(ValueError, match="operation 2 of device 0 is B"):
    check_timeline(tables.gpipe(2, 3), found)
  with pytest.raises(ValueError, match="6 operations of device 0"):
    check_timeline(tables.one_f_one_b(2, 4), found)
  with pytest.raises(ValueError, match="2 devices and the table 4"):
    memory(tables.one_f_one_b(4, 3), found, SlotBytes())
  wild = Timeline(2, (*found.spans, Span(1, "head", 1, 9, 0.0, 1.0)))
  with pytest.raises(ValueError, match="chunk 9 on stage 1"):
    check_timeline(table, wild)


def test_what_is_written_is_the_documented_form(tmp_path):
  write_timeline(Timeline(1, (Span(0, "B", 0, 2, 0.5, 1.0),)), tmp_path / "x")
  assert json.loads((tmp_path / "x").read_text()) == {
    "spans": [[0, "B", 0, 2, 0.5, 1.0]]
  }
