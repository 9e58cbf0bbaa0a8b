"""Tuning: the fastest candidate is chosen, and the table stays readable."""

import importlib.util
import pathlib

import pytest

from jaxchunk.kernels.attention import tables, tuning
from jaxchunk.kernels.attention.block_sizes import BlockSizes, look_up


def no_bar(items, name):
  del name
  return items


@pytest.mark.fast
def test_candidates_are_timed_and_one_is_chosen(monkeypatch):
  groups = [{"q": (16, 32)}, {"kv_bwd": (16,)}]
  monkeypatch.setitem(tuning._CANDIDATES, "xla", groups)
  problem = tuning.Problem("xla", 8, 32, prefix=16, heads=1)
  best, found = tuning.tune(problem, rounds=1, progress=no_bar)
  assert best.q in (16, 32, 512) and best.kv_bwd in (16, 512)
  assert found["q"]["q"] == best.q and found["q"]["candidates"] == "3 of 3"
  assert found["q"]["over_table"] >= 1


@pytest.mark.fast
def test_without_a_candidate_that_runs_it_says_so(monkeypatch):
  monkeypatch.setitem(tuning._CANDIDATES, "pallas_gpu", [{"kv": (64,)}])
  problem = tuning.Problem("pallas_gpu", 64, 128)
  with pytest.raises(RuntimeError, match="no candidate for kv runs here"):
    tuning.tune(problem, rounds=1, progress=no_bar)


@pytest.mark.fast
def test_what_is_written_is_read_again(tmp_path):
  path = tmp_path / "tables.py"
  path.write_text(pathlib.Path(tables.__file__).read_text())
  mine = BlockSizes(q=256, kv=1024, q_bwd=128, kv_bwd=64)
  tuning.write_table("xla", {("cpu", 64): mine}, path)
  spec = importlib.util.spec_from_file_location("written", path)
  written = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(written)
  assert tables.XLA | {("cpu", 64): mine} == written.XLA
  assert (written.GPU, written.TPU) == (tables.GPU, tables.TPU)
  assert look_up(written.XLA, 64, BlockSizes()) == mine
  assert look_up(written.XLA, 7, BlockSizes()) == BlockSizes()
