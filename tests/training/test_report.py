import dataclasses
import json

import numpy as np
import pytest

from jaxchunk.chunking import chunk_outer, cost
from jaxchunk.chunking.plan import chunk_plan
from jaxchunk.data.accounting import Accounting
from jaxchunk.training import metrics, report, schedule
from jaxchunk.training.info import (
  Memory,
  RunInfo,
  document_lengths,
  read_info,
  write_info,
)


def make_info(**changes):
  lengths = np.asarray([1, 5, 100, 3000, 40000])
  info = RunInfo(
    title="a run",
    chunk_size=64,
    lengths=document_lengths(lengths, np.asarray([1, -1, -1, 0, 3])),
    accounting=Accounting(
      documents=5,
      read=43106,
      trained=103,
      masked=2,
      excluded={"empty": 1, "held_out": 3000, "too_long": 40000},
    ),
    schedule=schedule.Schedule(
      "a step", [chunk_outer.schedule(3, 1)], [[(1.0, 2.0)] * 3], [1.0]
    ),
    memory=Memory([1024, 2048], {"by chunks": [1e6, 2e6]}),
  )
  return dataclasses.replace(info, **changes)


@pytest.mark.fast
def test_an_unknown_operation_is_an_error():
  wrong = schedule.Schedule("a step", [[("W", 0)]], [[(1, 1)]], [1])
  with pytest.raises(ValueError, match="'W'"):
    schedule.schedule_figure(wrong)


@pytest.mark.fast
@pytest.mark.parametrize("strategy", ["chunk_outer", "layer_outer"])
def test_schedule_costs_what_the_step_costs(config, strategy):
  cfg = dataclasses.replace(config.model, num_layers=3)
  plan = chunk_plan([150, 20], 64)
  how = {"live_chunks": 1, "strategy": strategy}
  picture = schedule.of_plan("a step", plan, cfg=cfg, **how)
  drawn = sum(
    share * costs[chunk][op == "B"]
    for lane, costs, share in zip(
      picture.lanes, picture.costs, picture.shares, strict=True
    )
    for op, chunk in lane
  )
  whole = cost.plan_cost(cfg, plan, **how)
  unit = 64 * cost.layer_flops_per_token(cfg) + cost.attention_flops(cfg, 0, 64)
  # Layer-outer's picture leaves out what it writes once more.
  extra = {"chunk_outer": 0.0, "layer_outer": 0.1}[strategy]
  assert drawn == pytest.approx(whole.hardware / unit, rel=extra or 1e-9)


@pytest.mark.fast
def test_every_document_is_in_one_bin():
  lengths = np.random.default_rng(0).integers(0, 5000, 1000)
  reasons = np.random.default_rng(1).integers(-1, 4, 1000)
  counted = document_lengths(lengths, reasons)
  assert sum(map(sum, counted.counts.values())) == 1000


@pytest.mark.fast
@pytest.mark.parametrize("left_out", ["schedule", "memory", None])
def test_info_round_trip(tmp_path, left_out):
  info = make_info(**({left_out: None} if left_out else {}))
  write_info(tmp_path, info)
  assert read_info(tmp_path) == info


def test_report_is_drawn_from_the_files(tmp_path):
  write_info(tmp_path, make_info())
  lines = [
    {
      "step": step,
      "bits_per_byte": None if step == 2 else 4 / step,
      "padding_fraction": 0.1,
      "tokens_per_sec": 100.0,
      "compiles": int(step == 1),
      **({"heldout_bits_per_byte": 2.0} if step == 3 else {}),
    }
    for step in range(1, 5)
  ]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (tmp_path / metrics.FILE_NAME).write_text(text)
  path = report.draw(tmp_path)
  assert path.read_text().startswith("<!DOCTYPE html>")
  for name in (report.FILE_NAME, report.SCHEDULE_NAME):
    assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_report_of_a_run_without_lines():
  info = make_info(schedule=None, memory=None, accounting=Accounting())
  figure = report.report_figure(info, [])
  # All panels but memory and schedule.
  assert len(figure.axes) == 9


@pytest.mark.fast
def test_a_schedule_of_an_older_version_is_left_out(tmp_path):
  write_info(tmp_path, make_info())
  path = tmp_path / "run.json"
  values = json.loads(path.read_text())
  values["schedule"] = {"title": "a step", "lanes": [[["B", 0]]], "slope": 0.5}
  path.write_text(json.dumps(values))
  assert read_info(tmp_path) == make_info(schedule=None)


def test_no_report_without_a_run(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"run\.json"):
    report.draw(tmp_path)
