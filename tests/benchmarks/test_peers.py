"""What `benchmarks/peers.py` makes of its runs; nothing is run here."""

import pathlib
import sys

import numpy as np
import pytest

import jaxchunk as jc

sys.path.insert(0, str(pathlib.Path(jc.__file__).parents[1] / "benchmarks"))

import peers_job
import peers_table

_TOKENS = [100, 100, 200]


def _run(contestant, task="speed", result=None, **fields):
  job = peers_job.Job(
    contestant=contestant,
    task=task,
    shape="small",
    dtype="float32",
    length=fields.pop("length", 64),
    chunk_size=16,
    **fields,
  )
  return job, result


def _speed(seconds, peak=1000, loss=2.0):
  return {"seconds": seconds, "peak_bytes": peak, "losses": [3.0, 2.5, loss]}


def test_the_first_step_does_not_count():
  result = _speed([0.001, 2.0, 2.0])
  assert peers_table.tokens_per_second(result, _TOKENS) == 100.0


def test_the_fastest_setting_counts_with_its_own_peak():
  runs = [
    _run("transformers, a", result=_speed([1, 4, 4], 900), threads=1),
    _run("transformers, a", result=_speed([1, 2, 2], 1200), threads=2),
    # Slower the second time, but it shows a smaller peak.
    _run("transformers, a", result=_speed([1, 3, 3], 1100), threads=2, turn=1),
  ]
  row = peers_table.speed_rows(runs, _TOKENS)["transformers, a"]
  assert row["tokens_per_sec"] == 100.0
  assert row["threads"] == 2
  assert row["peak_bytes"] == 1100


def test_losses_are_compared_step_by_step():
  curves = {"x": [3.0, 2.0], "y": [3.0, 2.25], "z": [2.875, 2.0]}
  runs = [
    _run(name, "curve", {"losses": losses}) for name, losses in curves.items()
  ]
  assert peers_table.loss_gap(runs) == (0.25, "y")
  assert peers_table.loss_gap(runs[:1]) is None
  runs.append(_run("w", "curve", {"losses": [3.0, float("nan")]}))
  assert peers_table.loss_gap(runs) == (float("inf"), "w")


def test_a_line_says_where_the_budget_is_met():
  sizes = {1024: 150, 2048: 250, 4096: 450}
  figures = peers_table.longest_fitting(sizes, budget=350)
  assert figures["fits"] == 2048
  assert figures["line"] == pytest.approx(3072)
  assert peers_table.longest_fitting({1024: 400}, 350)["fits"] == 0
  # No growth: no line.
  assert peers_table.longest_fitting({1: 10, 2: 10}, 350)["line"] is None


def test_ratios_are_of_the_best_on_both_sides():
  speed = {
    "jaxchunk, a": {"tokens_per_sec": 90.0},
    "jaxchunk, b": {"tokens_per_sec": 60.0},
    "peer": {"tokens_per_sec": 100.0},
    "slow peer": {"tokens_per_sec": 30.0},
  }
  longest = {"jaxchunk, a": {"line": 8000.0, "fits": 4096}}
  figures = peers_table.ratios(speed, longest)
  assert figures["tokens_per_sec"] == pytest.approx(0.9)
  assert figures["tokens_per_sec_over_each"]["slow peer"] == pytest.approx(3)
  assert "longest_by_line" not in figures


def test_the_table_lists_what_did_not_run_with_the_reason():
  runs = [_run("jaxchunk, a", result=_speed([1, 2, 2]))]
  text = peers_table.table(
    ["jaxchunk, a", "peer", "other"],
    peers_table.speed_rows(runs, _TOKENS),
    {},
    {"peer": "ModuleNotFoundError: no module"},
  )
  lines = text.splitlines()
  assert "100" in lines[1]
  assert lines[2].split(":", 1)[1].strip() == "ModuleNotFoundError: no module"
  assert "no run yet" in lines[3]


def test_documents_come_back_by_step(tmp_path):
  job, _ = _run("peer", "curve")
  steps = [[np.arange(3), np.arange(5)], [np.arange(2)]]
  peers_job.write_documents(tmp_path, job, steps)
  back = peers_job.read_documents(tmp_path, job)
  assert [[d.tolist() for d in step] for step in back] == [
    [d.tolist() for d in step] for step in steps
  ]


def test_parameters_are_counted_as_the_model_has_them():
  import jax
  import peers_jax
  from flax import nnx

  for name, shape in peers_job.SHAPES.items():
    cfg = peers_jax.config_of(shape, "float32")
    model = nnx.eval_shape(
      lambda cfg=cfg: jc.Transformer(cfg, rngs=nnx.Rngs(0))
    )
    count = sum(a.size for a in jax.tree.leaves(model))
    assert shape.parameters == count, name
