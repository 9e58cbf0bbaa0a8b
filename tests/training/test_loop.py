import dataclasses
import gc
import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxchunk.chunking import executor
from jaxchunk.chunking.executor import Sums
from jaxchunk.chunking.plan import chunk_plan
from jaxchunk.training import breakdown, checkpoint, loop, metrics, report
from jaxchunk.training import run as run_lib
from jaxchunk.training.config import ConfigError


def lines_of(workdir):
  """The metrics without what depends on the clock."""
  return [
    {name: value for name, value in line.items() if name not in metrics.CLOCKED}
    for line in metrics.read(workdir)
  ]


def parameters_of(workdir):
  model, _, _ = checkpoint.load_for_inference(workdir)
  return nnx.to_pure_dict(nnx.state(model, nnx.Param))


def assert_same_run(one, other):
  assert lines_of(one) == lines_of(other)
  jax.tree.map(
    np.testing.assert_array_equal, parameters_of(one), parameters_of(other)
  )


def spoil(monkeypatch, is_bad):
  """Makes the loss of some calls of accumulate (from 1) not a number."""
  accumulate, calls = executor.accumulate, []

  def spoilt(*args, **kwargs):
    calls.append(None)
    sums = accumulate(*args, **kwargs)
    return (
      sums._replace(loss=sums.loss * np.nan) if is_bad(len(calls)) else sums
    )

  monkeypatch.setattr(executor, "accumulate", spoilt)
  # The factor above goes to the device without leave.
  monkeypatch.setattr(
    jax, "transfer_guard_host_to_device", jax.transfer_guard_device_to_device
  )


def at_step(monkeypatch, step, action):
  """Does something when a step is about to be dispatched."""
  launch = loop.launch

  def launch_or_act(run, batch):
    if run.step + 1 == step:
      action()
    return launch(run, batch)

  monkeypatch.setattr(loop, "launch", launch_or_act)


def fail():
  raise RuntimeError("out of luck")


@pytest.fixture(autouse=True)
def draw(monkeypatch):
  """Leaves out the pictures, which take longer than the steps."""
  drawn = report.draw
  monkeypatch.setattr(report, "draw", lambda workdir: None)
  return drawn


@pytest.fixture(scope="module")
def whole_run(make_config, tmp_path_factory):
  """A run that was not interrupted."""
  # Other files may have compiled its programs in this process.
  jax.clear_caches()
  folder = tmp_path_factory.mktemp("runs") / "whole"
  loop.train(make_config(), folder)
  return folder


@pytest.fixture
def whole(whole_run, tmp_path):
  """A copy of it, to change at will."""
  return shutil.copytree(whole_run, tmp_path / "whole")


@pytest.mark.parametrize(
  "options",
  [{"spaco_rate": 0.5}, {"kv_memory": "host", "optimizer_memory": "host"}],
  ids=str,
)
def test_other_ways_to_train(config, tmp_path, draw, options):
  for steps in (2, 4):
    config.train = dataclasses.replace(
      config.train, num_steps=steps, warmup_steps=1, chunk_size=32, **options
    )
    loop.train(config, tmp_path)
  lines = list(metrics.read(tmp_path))
  assert [line["step"] for line in lines] == [1, 2, 3, 4]
  assert lines[-1]["bits_per_byte"] < lines[0]["bits_per_byte"]
  assert all(line["skipped"] == 0 for line in lines)
  # What drawn chunks cost only the device knows.
  assert ("mfu" in lines[0]) == ("spaco_rate" not in options)
  assert draw(tmp_path).stat().st_size > 0


def test_a_run_from_start_to_end(config, tmp_path, monkeypatch, draw, capsys):
  monkeypatch.setattr(report, "draw", draw)
  jax.clear_caches()  # Another test may have compiled the same programs.
  result = loop.train(config, tmp_path / "run")
  assert result.step == 8
  assert result.stopped_by is None
  lines = list(metrics.read(tmp_path / "run"))
  assert [line["step"] for line in lines] == list(range(1, 9))
  assert lines[-1]["bits_per_byte"] < lines[0]["bits_per_byte"]
  assert [s["step"] for s in lines if "heldout_bits_per_byte" in s] == [4, 8]
  first, last = (lines[i]["heldout_bits_per_byte"] for i in (3, 7))
  assert result.heldout_bits_per_byte == last < first
  for line in lines:
    assert line["tokens"] > 0
    assert line["tokens_per_sec"] > 0
    assert 0 <= line["padding_fraction"] < 1
    assert line["skipped"] == 0
    assert 0 < line["mfu"] < line["hfu"]
    assert line["imbalance"] >= 1
    parts = ("model_flops", "padding_flops")
    assert line["hardware_flops"] > sum(line[name] for name in parts)
  wall = sum(line["wall_seconds"] for line in lines)
  assert sum(breakdown.breakdown(lines).values()) == pytest.approx(wall)
  assert "lane_program" in str(lines[0]["startup_compiled"])
  # Nothing but the update, the evaluation and what saving uses.
  later = str([line.get("compiled") for line in lines])
  assert "lane_program" not in later
  assert "update" in later
  first_epoch = [line for line in lines if line["epoch"] == 0]
  assert 0 < len(first_epoch) < 8
  later = [s["compiles"] for s in lines if s["step"] > len(first_epoch) + 1]
  assert later == [0] * len(later)
  trained = sum(line["tokens"] for line in lines)
  assert result.accounting.check().trained == trained
  printed = capsys.readouterr().out + loop.describe_result(result)
  assert "Epoch 0: " in printed
  assert f"{trained:,} trained" in printed
  assert str(result.report) in printed
  assert result.report.name == report.HTML_NAME
  names = (report.HTML_NAME, report.FILE_NAME, report.SCHEDULE_NAME)
  for name in (*names, "config.json"):
    assert (tmp_path / "run" / name).exists()


def test_a_crash_and_a_resume_equal_a_whole_run(
  config, tmp_path, monkeypatch, whole
):
  with monkeypatch.context() as patch:
    at_step(patch, 6, fail)
    with pytest.raises(RuntimeError, match="out of luck"):
      loop.train(config, tmp_path / "run")
  # Steps 4 and 5 were written and lost; they are done again from step 3.
  assert [s["step"] for s in lines_of(tmp_path / "run")][-1] >= 4
  assert loop.train(config, tmp_path / "run").step == 8
  assert_same_run(tmp_path / "run", whole)
  lines = list(metrics.read(tmp_path / "run"))
  starts = [s["step"] for s in lines if "startup_seconds" in s]
  assert starts == [1, 4]


def test_dropout_is_keyed_by_the_step(config, tmp_path, monkeypatch):
  keys = []

  def no_gradients(model, examples, options, *, rng):
    keys.append(tuple(np.asarray(jax.random.key_data(rng)).tolist()))
    grads = jax.jit(lambda p: jax.tree.map(jnp.zeros_like, p))(
      nnx.state(model, nnx.Param)
    )
    plan = chunk_plan([len(e) for e in examples], options.chunk_size)
    return Sums(jax.device_put(np.float32(1)), 1.0, grads, plan)

  monkeypatch.setattr(executor, "accumulate", no_gradients)
  config.train.eval_every = 0
  config.model.dropout = 0.2
  with monkeypatch.context() as patch:
    at_step(patch, 6, fail)
    with pytest.raises(RuntimeError, match="out of luck"):
      loop.train(config, tmp_path / "run")
  loop.train(config, tmp_path / "run")
  # Steps 1 to 5, then 4 to 8 from the checkpoint of step 3.
  assert len(set(keys)) == 8
  assert keys[3:5] == keys[5:7]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_the_run_goes_on_from_there(
  config, tmp_path, monkeypatch, whole, number
):
  before = signal.getsignal(number)
  with monkeypatch.context() as patch:
    at_step(patch, 5, lambda: os.kill(os.getpid(), number))
    result = loop.train(config, tmp_path / "run")
  assert (result.step, result.stopped_by) == (5, number.name)
  assert (tmp_path / "run" / "checkpoints" / "5").is_dir()
  assert signal.getsignal(number) is before
  loop.train(config, tmp_path / "run")
  assert_same_run(tmp_path / "run", whole)


# Orbax drops the coroutines of other reads where one fails.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_damaged_checkpoint_costs_steps_not_the_run(config, tmp_path, whole):
  run = shutil.copytree(whole, tmp_path / "run")
  for path in (run / "checkpoints" / "8").rglob("*"):
    if path.is_file():
      path.write_bytes(path.read_bytes()[:10])
  result = loop.train(config, run)
  assert result.step == 8
  assert_same_run(run, whole)
  gc.collect()


def test_a_finished_run_is_left_as_it_is(config, whole):
  before = (whole / metrics.FILE_NAME).read_bytes()
  result = loop.train(config, whole)
  assert result.step == 8
  assert result.heldout_bits_per_byte is not None
  assert (whole / metrics.FILE_NAME).read_bytes() == before


def test_the_data_may_end_first(config, tmp_path):
  config.data.num_epochs = 1
  config.train.num_steps = 100
  result = loop.train(config, tmp_path / "run")
  assert 1 < result.step < 100
  assert (tmp_path / "run" / "checkpoints" / str(result.step)).is_dir()


def test_some_steps_that_are_not_finite_are_skipped(
  config, tmp_path, monkeypatch
):
  spoil(monkeypatch, lambda call: call in (3, 4))
  config.train.max_skipped_steps = 3
  loop.train(config, tmp_path / "run")
  lines = list(metrics.read(tmp_path / "run"))
  assert [line["skipped"] for line in lines] == [0, 0, 1, 2, 2, 2, 2, 2]
  assert [s["step"] for s in lines if s["loss"] is None] == [3, 4]
  # The schedule waits for the steps that were skipped.
  assert lines[2]["learning_rate"] == lines[4]["learning_rate"]


def test_too_many_steps_that_are_not_finite_stop_the_run(
  config, tmp_path, monkeypatch
):
  spoil(monkeypatch, lambda call: call >= 4)
  config.train.max_skipped_steps = 3
  with pytest.raises(loop.NonFiniteError, match="3 steps in a row, up to step"):
    loop.train(config, tmp_path / "run")
  lines = list(metrics.read(tmp_path / "run"))
  assert lines[-1]["step"] == 6
  assert lines[-1]["skipped_in_a_row"] == 3
  folder = tmp_path / "run" / "checkpoints"
  assert "3" in [path.name for path in folder.iterdir()]


def test_the_vocabulary_must_hold_the_tokenizer(config, tmp_path):
  config.model.vocab_size = 200
  with pytest.raises(ConfigError, match=r"vocab_size=200 is less than the 259"):
    loop.train(config, tmp_path / "run")


@pytest.mark.parametrize("implementation", ["pallas_tpu", "pallas_gpu"])
def test_kernels_for_another_device(config, tmp_path, implementation):
  config.train.implementation = implementation
  with pytest.raises(ConfigError, match=f"implementation='{implementation}'"):
    loop.train(config, tmp_path / "run")


def test_kernels_reach_training_and_evaluation(config, tmp_path, monkeypatch):
  config.train.implementation = "pallas_gpu"
  config.train.num_steps = config.train.eval_every = 2
  monkeypatch.setattr(run_lib, "check_kernels", lambda *_: None)
  state_of, asked = executor.state_of, []

  def spied(cfg, window, chunk_size, grad_dtype, implementation, *rest):
    asked.append((implementation, *rest))
    return state_of(cfg, window, chunk_size, grad_dtype, "xla", *rest)

  monkeypatch.setattr(executor, "state_of", spied)
  loop.train(config, tmp_path / "run")
  assert set(asked) == {("pallas_gpu", "device")} and len(asked) >= 2


def test_data_that_cannot_be_opened(config, tmp_path):
  config.data.source = str(tmp_path / "nowhere")
  with pytest.raises(ConfigError, match="nowhere"):
    loop.train(config, tmp_path / "run")


def test_a_cursor_of_other_data(config, tmp_path, whole):
  config.data.seed = 5
  config.train.num_steps = 9
  with pytest.raises(checkpoint.CheckpointError, match="seed was 0 and is 5"):
    loop.train(config, whole)


def test_a_trace_of_some_steps(config, tmp_path):
  config.train.num_steps = 3
  config.train.eval_every = 0
  loop.train(config, tmp_path / "run", profile_steps=(2, 2))
  traces = list((tmp_path / "run" / "profile").rglob("*.xplane.pb"))
  assert len(traces) == 1


def test_the_configuration_is_kept_readable(config, whole):
  stored = json.loads((whole / "config.json").read_text())
  assert stored["train"]["num_steps"] == 8
