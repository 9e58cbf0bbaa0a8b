import dataclasses
import json

import numpy as np
import pytest

from jaxchunk.data.accounting import Accounting
from jaxchunk.training import metrics, report, schedule


def make_info(**changes):
  lengths = np.asarray([1, 5, 100, 3000, 40000])
  info = report.RunInfo(
    title="a run",
    chunk_size=64,
    lengths=report.document_lengths(lengths, np.asarray([1, -1, -1, 0, 3])),
    accounting=Accounting(
      documents=5,
      read=43106,
      trained=103,
      masked=2,
      excluded={"empty": 1, "held_out": 3000, "too_long": 40000},
    ),
    schedule=schedule.Schedule("a step", [schedule.lane_ops(3, 1)], 0.5),
    memory=report.Memory([1024, 2048], {"by chunks": [1e6, 2e6]}),
  )
  return dataclasses.replace(info, **changes)


@pytest.mark.fast
def test_order_of_chunk_operations():
  assert schedule.lane_ops(3, 1) == [
    ("F_drop", 0),
    ("F_drop", 1),
    ("F_keep", 2),
    ("B", 2),
    ("F_keep", 1),
    ("B", 1),
    ("F_keep", 0),
    ("B", 0),
  ]
  assert schedule.lane_ops(2, 2) == [
    ("F_keep", 0),
    ("F_keep", 1),
    ("B", 1),
    ("B", 0),
  ]
  assert schedule.lane_ops(1, 0) == [("F_drop", 0), ("F_keep", 0), ("B", 0)]


@pytest.mark.fast
@pytest.mark.parametrize("layers", [1, 3])
def test_layer_outer_runs_every_layer_of_every_chunk(layers):
  ops = schedule.layer_outer_ops(4, layers)
  for op in ("F_drop", "F_keep", "B"):
    chunks = [chunk for kind, chunk in ops if kind == op]
    assert sorted(chunks) == sorted(list(range(4)) * layers)


@pytest.mark.fast
def test_an_unknown_operation_is_an_error():
  wrong = schedule.Schedule("a step", [[("W", 0)]], 0.0)
  with pytest.raises(ValueError, match="'W'"):
    schedule.schedule_figure(wrong)


@pytest.mark.fast
def test_prefix_slope_by_hand(config):
  cfg = dataclasses.replace(
    config.model, num_layers=1, d_ff=4, d_model=8, vocab_size=10
  )
  # q, o: 8*16 each; k, v: 8*8 each; MLP: 3*8*4; head: 10*8. Attention: two
  # products of 16 channels with every key, half of the chunk's own on average.
  own = 2 * 128 + 2 * 64 + 96 + 80 + 32 * 32
  assert schedule.prefix_slope(cfg, 64) == pytest.approx(32 * 64 / own)


@pytest.mark.fast
def test_every_document_is_in_one_bin():
  lengths = np.random.default_rng(0).integers(0, 5000, 1000)
  reasons = np.random.default_rng(1).integers(-1, 4, 1000)
  counted = report.document_lengths(lengths, reasons)
  assert sum(map(sum, counted.counts.values())) == 1000


@pytest.mark.fast
@pytest.mark.parametrize("left_out", ["schedule", "memory", None])
def test_info_round_trip(tmp_path, left_out):
  info = make_info(**({left_out: None} if left_out else {}))
  report.write_info(tmp_path, info)
  assert report.read_info(tmp_path) == info


def test_report_is_drawn_from_the_files(tmp_path):
  report.write_info(tmp_path, make_info())
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
  for picture in (path, tmp_path / report.SCHEDULE_NAME):
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_report_of_a_run_without_lines():
  info = make_info(schedule=None, memory=None, accounting=Accounting())
  figure = report.report_figure(info, [])
  assert len(figure.axes) == 5


def test_no_report_without_a_run(tmp_path):
  with pytest.raises(FileNotFoundError, match=r"run\.json"):
    report.draw(tmp_path)
