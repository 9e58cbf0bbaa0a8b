import json
import math

import jax
import jax.numpy as jnp
import pytest

from jaxchunk.training import metrics
from jaxchunk.training.metrics import CompileCounter, MetricsWriter

pytestmark = pytest.mark.fast


def write(folder, last_step, steps):
  with MetricsWriter(folder, last_step=last_step) as writer:
    for step in steps:
      writer.write({"step": step, "loss": float(step)})


def steps_of(folder):
  return [line["step"] for line in metrics.read(folder)]


def test_lines_are_appended_and_flushed(tmp_path):
  with MetricsWriter(tmp_path, last_step=0) as writer:
    writer.write({"step": 1, "loss": 2.5, "epoch": 0})
    line = (tmp_path / metrics.FILE_NAME).read_text()
    assert json.loads(line) == {"step": 1, "loss": 2.5, "epoch": 0}


def test_resuming_drops_the_steps_that_come_again(tmp_path):
  write(tmp_path, 0, range(1, 8))
  write(tmp_path, 5, range(6, 10))
  assert steps_of(tmp_path) == list(range(1, 10))


def test_a_torn_line_is_dropped(tmp_path):
  write(tmp_path, 0, [1, 2])
  with (tmp_path / metrics.FILE_NAME).open("a") as file:
    file.write('{"step": 3, "lo')
  write(tmp_path, 2, [3])
  assert steps_of(tmp_path) == [1, 2, 3]


def test_what_is_not_finite_is_null(tmp_path):
  with MetricsWriter(tmp_path, last_step=0) as writer:
    writer.write({"step": 1, "loss": math.nan, "grad_norm": math.inf})
  line = next(metrics.read(tmp_path))
  assert line == {"step": 1, "loss": None, "grad_norm": None}


def test_tensorboard_events_are_written(tmp_path):
  write(tmp_path, 0, [1])
  (events,) = (tmp_path / "tensorboard").iterdir()
  assert b"loss" in events.read_bytes()


def test_compilations_are_events_in_tensorboard(tmp_path):
  with MetricsWriter(tmp_path, last_step=0) as writer:
    writer.write({"step": 1, "mfu": 0.5, "compiled": [["jit(f)", 1.234]]})
  (events,) = (tmp_path / "tensorboard").iterdir()
  assert b"jit(f): 1.23 s" in events.read_bytes()
  assert b"mfu" in events.read_bytes()


def test_compilations_are_counted():
  with CompileCounter() as counter:
    program = jax.jit(lambda x: x * 3 + 1)
    x = jnp.arange(17.0)
    counter.take()
    program(x).block_until_ready()
    assert counter.take() == 1
    program(x).block_until_ready()
    assert counter.take() == 0
  jax.jit(lambda x: x * 5)(x).block_until_ready()
  assert counter.take() == 0


def test_compilations_are_named_in_the_metrics_of_a_step():
  def triple(x):
    return x * 3 + 2

  x = jnp.arange(18.0)
  with CompileCounter() as counter:
    values = {}
    counter.add_to(values)
    assert values == {"compiles": 0, "compile_seconds": 0}
    jax.jit(triple)(x).block_until_ready()
    counter.add_to(values)
    ((name, seconds),) = values["compiled"]
    assert "triple" in name
    assert values["compiles"] == 1
    assert 0 < values["compile_seconds"] == seconds
    jax.jit(lambda x: x * 7)(x).block_until_ready()
    counter.add_to(values, timed=False)
  assert values["compiles"] == len(values["compiled"]) == 2
  assert values["compile_seconds"] == seconds
