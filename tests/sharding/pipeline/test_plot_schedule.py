"""Pictures of schedules show every operation; what is refused is named."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.collections import PolyCollection

import jaxchunk as jc
from jaxchunk.sharding.pipeline import reading, tables
from jaxchunk.sharding.pipeline.picture import draw_timeline
from jaxchunk.sharding.pipeline.simulate import Costs, event_driven, lockstep
from jaxchunk.sharding.pipeline.table import Lanes
from jaxchunk.sharding.pipeline.timeline import write_timeline
from jaxchunk.sharding.pipeline.usage import SlotBytes

_ROOT = Path(jc.__file__).parents[1]


def boxes(axes):
  return [c for c in axes.collections if isinstance(c, PolyCollection)]


def run(*arguments):
  return subprocess.run(
    [sys.executable, "scripts/plot_schedule.py", *arguments],
    cwd=_ROOT,
    env=os.environ | {"PYTHONPATH": str(_ROOT)},
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_every_operation_has_a_box_and_a_number(suffix, tmp_path):
  table = tables.zb_v(4, 4)
  timeline = lockstep(table, Costs())
  path = tmp_path / f"schedule.{suffix}"
  figure = draw_timeline(table, timeline, path=path)
  gantt, kept = figure.axes
  shapes, edges = boxes(gantt)
  ops = list(table.ops())
  assert len(shapes.get_paths()) == len(gantt.texts) == len(ops)
  # Half of the operations are on the second part of their device.
  assert len(edges.get_paths()) == len(ops) / 2
  assert [text.get_text() for text in gantt.texts] == [
    str(op.item) for _, _, op in ops
  ]
  assert len(kept.lines) == 4
  assert max(line.get_ydata().max() for line in kept.lines) == 8
  # 12 of work, and three steps of half a pass to the last device.
  assert gantt.get_title(loc="left") == "simulated: 13.5, bubble 11.1%"
  assert path.stat().st_size > 1000


def test_colours_tell_kinds_and_lanes_apart():
  table = tables.one_f_one_b(2, Lanes((3, 2), 1))
  timeline = event_driven(table, Costs(head=1))
  figure = draw_timeline(table, timeline)
  (shapes,) = boxes(figure.axes[0])
  lane_of = table.lanes.lane_of
  colours = {}
  for span, colour in zip(timeline.spans, shapes.get_facecolor(), strict=True):
    kind = span.kind, timeline.repeats(span), lane_of[span.item]
    colours.setdefault(kind, set()).add(tuple(colour))
  assert all(len(found) == 1 for found in colours.values())
  assert len(set().union(*colours.values())) == len(colours) == 5 * 2
  (legend,) = figure.legends
  assert [text.get_text() for text in legend.get_texts()] == [
    "forward, kept",
    "forward, dropped",
    "forward again",
    "backward",
    "head and loss",
  ]
  texts = {text.get_text() for text in figure.axes[0].texts}
  assert texts == {"0.0", "0.1", "0.2", "1.0", "1.1"}


def test_measured_is_drawn_on_the_same_scale():
  table = tables.one_f_one_b(4, 6)
  slow, fast = lockstep(table, Costs()), event_driven(table, Costs())
  weights = SlotBytes(kept=2**20)
  figure = draw_timeline(
    table, fast, measured=slow, slot_bytes=weights, unit="s"
  )
  above, below, kept = figure.axes
  limits = {axes.get_xlim() for axes in figure.axes}
  assert limits == {(0, slow.makespan)}
  assert above.get_title(loc="left").startswith("simulated: 27 s")
  assert below.get_title(loc="left").startswith("measured: ")
  assert kept.get_ylabel() == "MiB kept"
  assert max(line.get_ydata().max() for line in kept.lines) == 4


def test_boxes_too_small_for_numbers_have_none():
  table = tables.one_f_one_b(4, 300)
  timeline = lockstep(table, Costs())
  figure = draw_timeline(table, timeline)
  assert not figure.axes[0].texts


def test_the_script_draws_and_says_what(tmp_path):
  out = tmp_path / "out.svg"
  table = tables.build("1f1b", 4, Lanes((4, 1, 2, 1), 1))
  costs = Costs(f=2, b=2, w=2)
  write_timeline(event_driven(table, costs), tmp_path / "spans.json")
  done = run(
    "--schedule=1f1b",
    "--lanes=4,1,2,1",
    "--live=1",
    "--mode=event",
    f"--measured={tmp_path / 'spans.json'}",
    f"--out={out}",
  )
  assert done.returncode == 0, done.stderr
  # Of the measured times, so the simulation has the measured makespan.
  makespan = event_driven(table, costs).makespan
  assert done.stdout.startswith(
    f"1f1b: {len(table.ticks)} ticks, makespan {makespan:g}, bubble "
  )
  assert "peak slots inbox " in done.stdout
  assert out.read_text().startswith("<?xml")


def test_the_script_refuses_in_one_line(tmp_path):
  done = run("--lanes=4,x", f"--out={tmp_path / 'a.png'}")
  assert done.returncode == 1
  assert done.stderr == (
    "plot_schedule.py: --lanes=4,x: give a number of microbatches as in 8, or "
    "the chunks of each lane as in 4,1,2,1\n"
  )
  assert not list(tmp_path.iterdir())


def test_lanes_of_the_flag():
  assert reading.read_lanes("3", None) == Lanes((1, 1, 1))
  assert reading.read_lanes("3,", 2) == Lanes((3,), 2)
  assert reading.read_lanes("4,1", 0) == Lanes((4, 1), 0)


def test_two_bw_has_its_batches():
  table = reading.read_table("two_bw", 2, Lanes((1, 1)), 3)
  assert table.batches == (2, 2, 2)


def test_costs_of_the_flag():
  table = tables.gpipe(2, 2)
  assert reading.read_costs("1,2.5,0", table, None) == Costs(b=2.5, w=0)
  assert reading.read_costs(None, table, None) == Costs()
  measured = lockstep(table, Costs(f=3, b=5, w=1))
  fitted = reading.read_costs(None, table, measured)
  assert fitted == Costs(f=3, b=6, w=0)


@pytest.mark.parametrize(
  "call, message",
  [
    (lambda: reading.read_lanes("0", None), "--lanes=0: .* at least 1"),
    (lambda: reading.read_lanes("", None), "--lanes=: give"),
    (lambda: reading.read_lanes("2", -1), "--live=-1: give 0 or more"),
    (
      lambda: reading.read_table("x", 2, Lanes((1,)), 1),
      "--schedule=x: give one of gpipe, .*two_bw",
    ),
    (
      lambda: reading.read_table("gpipe", 0, Lanes((1,)), 1),
      "--devices=0: give at least 1",
    ),
    (
      lambda: reading.read_table("two_bw", 2, Lanes((1,)), 0),
      "--batches=0: give at least 1",
    ),
    (
      lambda: reading.read_costs("1,2", tables.gpipe(1, 1), None),
      "--costs=1,2: give three times",
    ),
    (
      lambda: reading.read_costs("1,2,-1", tables.gpipe(1, 1), None),
      "--costs=1,2,-1: give three times",
    ),
    (lambda: reading.picture_path("x.gif"), "--out=x.gif: end it in .png"),
    (lambda: reading.picture_path("/no/x.png"), "there is no folder /no;"),
    (
      lambda: reading.read_measured("/no", tables.gpipe(1, 1)),
      "--measured=/no: No such file .* name a file",
    ),
  ],
)
def test_flags_that_are_refused(call, message):
  with pytest.raises(ValueError, match=message):
    call()


def test_a_file_of_another_table_is_refused(tmp_path):
  path = tmp_path / "spans.json"
  write_timeline(lockstep(tables.gpipe(2, 3), Costs()), path)
  with pytest.raises(ValueError, match=r"--measured=.*; give the --schedule"):
    reading.read_measured(str(path), tables.one_f_one_b(2, 3))
