"""`benchmarks/server_faults.py` with few requests."""

import pathlib
import sys

import pytest

import jaxchunk as jc

sys.path.insert(0, str(pathlib.Path(jc.__file__).parents[1] / "benchmarks"))

import server_faults


def test_a_server_that_is_killed_answers_rightly(monkeypatch):
  monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")
  figures = server_faults.measure(
    requests=150, seed=1, kills=1, clients=4, sequences=2
  )
  assert figures["first_failures"] == []
  assert figures["pages_held"] == figures["running"] == 0
  assert (figures["kills"], figures["exit_code"]) == (1, 0)
  outcomes = figures["outcomes"]
  assert sum(outcomes.values()) == 150
  assert outcomes["answer: right"] > 20 and outcomes["absurd: refused"] > 5
  # The memory of a process of Python and jax.
  assert 100 < figures["resident_mb"] < 4000
  assert figures["resident_mb"] == pytest.approx(
    figures["resident_mb"] - figures["resident_growth_mb"], rel=0.3
  )
