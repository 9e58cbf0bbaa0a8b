"""The page of a run: where the seconds went, and that it needs nothing else."""

import dataclasses
import html.parser
import json
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from jaxchunk.data.accounting import Accounting
from jaxchunk.training import html_report, schedule
from jaxchunk.training.breakdown import breakdown, compile_events
from jaxchunk.training.info import Memory, RunInfo, document_lengths

LINE = {
  "step": 2,
  "bits_per_byte": 3.5,
  "tokens_per_sec": 100.0,
  "padding_fraction": 0.1,
  "seconds": 10.0,
  "input_wait": 1.0,
  "compiles": 1,
  "compile_seconds": 2.0,
  "compiled": [["jit(update)", 2.0]],
  "model_flops": 60,
  "hardware_flops": 100,
  "padding_flops": 10,
  "imbalance": 1.25,
  "lane_imbalance": 1.0,
  "mfu": 0.3,
  "hfu": 0.5,
  "wall_seconds": 13.0,
  "eval_seconds": 2.0,
}
FIRST = {
  **LINE,
  "step": 1,
  "startup_seconds": 4.0,
  "warmup_seconds": 6.0,
  "startup_compiled": [["jit(lane_program)", 5.0]],
  "wall_seconds": 23.0,
  "peak_flops": 2e12,
  "peak_source": "a machine",
}
OLD = {
  "step": 1,
  "bits_per_byte": 3.0,
  "tokens_per_sec": 90.0,
  "padding_fraction": 0.2,
  "seconds": 5.0,
  "input_wait": 0.5,
  "compiles": 3,
}
EMPTY = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta"}


class Checker(html.parser.HTMLParser):
  """Collects what a page refers to and notes tags that do not match."""

  def __init__(self):
    super().__init__()
    self.open, self.links, self.ids, self.tags = [], [], [], []

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    if tag not in EMPTY:
      self.open.append(tag)
    for name, value in attrs:
      if name in ("src", "href", "xlink:href", "data", "action"):
        self.links.append(value)
      if name == "id":
        self.ids.append(value)

  def handle_startendtag(self, tag, attrs):
    self.handle_starttag(tag, attrs)
    if tag not in EMPTY:
      self.open.pop()

  def handle_endtag(self, tag):
    assert self.open.pop() == tag


def make_info(**changes):
  lengths = np.asarray([1, 5, 100, 3000])
  info = RunInfo(
    title="a run",
    chunk_size=64,
    lengths=document_lengths(lengths, np.asarray([1, -1, -1, 0])),
    accounting=Accounting(
      documents=4,
      read=3106,
      trained=103,
      masked=2,
      excluded={"empty": 1, "held_out": 3000},
    ),
    schedule=schedule.Schedule(
      "a step", [[("F_keep", 0), ("B", 0)]], [[(1.0, 2.0)]], [1.0]
    ),
    memory=Memory([1024, 2048], {"by chunks": [1e6, 2e6]}),
  )
  return dataclasses.replace(info, **changes)


def checked(info, lines, config=None):
  """The page; fails where it is no page or needs another file."""
  text = html_report.page(info, lines, config=config)
  checker = Checker()
  checker.feed(text)
  checker.close()
  assert not checker.open
  assert "script" not in checker.tags
  assert len(checker.ids) == len(set(checker.ids))
  for link in checker.links:
    assert link.startswith(("#", "data:"))
  assert not re.search(r"url\((?!#)|@import", text)
  targets = set(re.findall(r'href="#([^"]*)"|url\(#([^)]*)\)', text))
  assert {a or b for a, b in targets} <= set(checker.ids)
  for picture in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
    ElementTree.fromstring(picture)
  return text


@pytest.mark.fast
def test_seconds_by_hand():
  parts = breakdown([FIRST, LINE])
  # Of 20 seconds 6 were waits; of 14, 60% was useful.
  assert parts == pytest.approx(
    {
      "useful compute": 8.4,
      "recomputation": 4.2,
      "padding": 1.4,
      "input wait": 2.0,
      "compile in steps": 4.0,
      "evaluation": 4.0,
      "start and warm-up": 10.0,
      "other": 2.0,
    }
  )
  assert sum(parts.values()) == pytest.approx(13 + 23)


@pytest.mark.fast
@pytest.mark.parametrize("wall", [13.5, 12.0])
def test_save_stall_may_lie_in_the_steps_seconds_or_behind_them(wall):
  # Behind them the wall time is that much longer.
  line = {**LINE, "save_stall": 1.5, "wall_seconds": wall}
  parts = breakdown([line])
  assert parts["save stall"] == 1.5
  assert sum(parts.values()) == pytest.approx(wall)


@pytest.mark.fast
def test_lines_of_an_older_version_are_compute_that_is_not_divided():
  assert breakdown([OLD]) == {"undivided compute": 4.5, "input wait": 0.5}
  mixed = breakdown([OLD, LINE])
  compute = 15 - 1.5 - 2
  assert mixed["undivided compute"] == pytest.approx(compute / 3)
  assert mixed["useful compute"] == pytest.approx(compute * 2 / 3 * 0.6)


@pytest.mark.fast
def test_lines_may_lack_anything():
  broken = {"step": 3, "seconds": None, "mfu": math.nan, "save_stall": "?"}
  assert breakdown([broken]) == {}
  assert breakdown([]) == {}
  assert breakdown([broken, LINE]) == breakdown([LINE])


@pytest.mark.fast
def test_compile_events_know_whether_they_were_expected():
  events = list(compile_events([FIRST, {"step": 5, "compiled": [["f"], 3]}]))
  assert [(e.step, e.name, e.expected) for e in events] == [
    (1, "jit(lane_program)", True),
    (1, "jit(update)", False),
  ]


@pytest.mark.fast
@pytest.mark.parametrize(
  ("seconds", "text"),
  [(0.0, "0 s"), (4.321, "4.32 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations(seconds, text):
  assert html_report.duration(seconds) == text


def test_a_page_is_complete_and_needs_no_other_file():
  config = {"class": "Config", "train": {"class": "T", "chunk_size": 64}}
  lines = [{**FIRST, "save_stall": 0.5}, LINE, {**LINE, "step": 3}]
  text = checked(make_info(), lines, config)
  assert text.count("<svg") == 10
  for part in ("input wait", "save stall", "compile in steps", "evaluation"):
    assert f"</i>{part}</td>" in text
  assert "<td>jit(update)</td><td>2.00</td>" in text
  assert "<td>train.chunk_size</td><td>64</td>" in text
  assert "2 TFLOP/s (a machine)" in text
  assert "not recorded" not in text
  assert "30.0%" in text
  assert "prefers-color-scheme: dark" in text


def test_text_is_escaped():
  evil = "<script>alert('&')</script> $x_$"
  line = {**FIRST, "compiled": [[evil, 1.0]], "peak_source": evil}
  memory = Memory([1024, 2048], {"<b>way</b>": [1e6, 2e6]})
  info = make_info(title=evil, memory=memory)
  text = checked(info, [line], {"<i>": evil})
  assert "<script" not in text
  assert "<b>" not in text


@pytest.mark.parametrize(
  "lines",
  [
    [],
    [OLD],
    [OLD, {**LINE, "step": 2}],
    [{"step": 1, "loss": None, "seconds": None, "mfu": None}],
    [json.loads('{"step": 1, "mfu": NaN, "seconds": NaN, "compiles": NaN}')],
  ],
  ids=["none", "old", "mixed", "null", "nan"],
)
def test_a_page_of_whatever_there_is(lines):
  info = make_info(schedule=None, memory=None, accounting=Accounting())
  text = checked(info, lines)
  assert text.count("<svg") == 8
  assert "not recorded" in text


@pytest.mark.fast
def test_a_resumed_run_says_so():
  text = html_report.page(make_info(), [FIRST, {**FIRST, "step": 2}], config={})
  assert "2 starts of the run" in text
