"""Kills, locks, disks that fail, clocks that jump, and errors in time."""

import contextlib
import gc
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk.training import checkpoint, loop, metrics, report
from jaxchunk.training.checkpoint import CheckpointError
from jaxchunk.training.config import CheckpointConfig
from jaxchunk.training.saver import Saver, to_host
from jaxchunk.training.workdir import open_workdir

# Where one write of several fails, Orbax drops the coroutines of the others,
# and Python says so when it collects them.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)


# Trains, and dies where its last argument says: before a step is dispatched,
# or in a save that has written its files and not got its name.
PROGRAM = """
import os, runpy, signal, sys
import jax
import orbax.checkpoint as ocp
from jaxchunk.training import loop, report

config, workdir, place, number = sys.argv[1:]
jax.config.update("jax_compilation_cache_dir", workdir + "-programs")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
report.draw = lambda workdir: None

def die_in_call(owner, name):
  function, calls = getattr(owner, name), []
  def counted(*args, **kwargs):
    calls.append(None)
    if len(calls) == int(number):
      os.kill(os.getpid(), signal.SIGKILL)
    return function(*args, **kwargs)
  setattr(owner, name, counted)

if place == "step":
  die_in_call(loop, "launch")
elif place == "save":
  die_in_call(ocp.PyTreeCheckpointHandler, "finalize")
loop.train(runpy.run_path(config)["get_config"](), workdir)
"""


@pytest.fixture(autouse=True)
def _draw(monkeypatch):
  """Leaves out the pictures, which take longer than the steps."""
  monkeypatch.setattr(report, "draw", lambda workdir: None)
  yield
  gc.collect()


@pytest.fixture
def config(make_config):
  """Ten steps that save every second one, without evaluation."""
  config = make_config()
  config.train.num_steps = 10
  config.train.eval_every = 0
  config.train.log_documents = True
  config.checkpoint.save_every = 2
  return config


def lines_of(folder):
  return [
    {name: value for name, value in line.items() if name not in metrics.CLOCKED}
    for line in metrics.read(folder)
  ]


def documents_of(folder):
  return list(metrics.read(folder, metrics.DOCUMENTS_NAME))


def saved(folder):
  return sorted(p.name for p in (folder / checkpoint.DIRECTORY).iterdir())


def at_step(monkeypatch, step, action):
  """Does something when a step is about to be dispatched."""
  launch = loop.launch

  def launch_or_act(run, batch):
    if run.step + 1 == step:
      action()
    return launch(run, batch)

  monkeypatch.setattr(loop, "launch", launch_or_act)


def run_program(config_file, folder, place, number=0):
  return subprocess.run(
    [sys.executable, "-c", PROGRAM, config_file, folder, place, str(number)],
    # The environment of the tests, or numbers would be rounded otherwise.
    capture_output=True,
    text=True,
    timeout=200,
    check=False,
  )


def test_killed_anywhere_a_run_goes_on_as_if_nothing_had_been(
  config, config_file, tmp_path
):
  whole, killed = tmp_path / "whole", tmp_path / "killed"
  loop.train(config, whole)
  # Two calls for each checkpoint: in that of step 4.
  dead = run_program(config_file, killed, "save", 3)
  assert dead.returncode == -signal.SIGKILL, dead.stderr
  (half,) = (name for name in saved(killed) if not name.isdigit())
  assert half.startswith("4.")
  dead = run_program(config_file, killed, "step", 6)
  assert dead.returncode == -signal.SIGKILL, dead.stderr
  assert run_program(config_file, killed, "nowhere").returncode == 0
  assert [line["step"] for line in lines_of(killed)] == list(range(1, 11))
  assert lines_of(killed) == lines_of(whole)
  assert documents_of(killed) == documents_of(whole)
  first = [d for line in documents_of(killed)[:5] for d in line["documents"]]
  assert len(first) == len(set(first)) > 5
  assert saved(killed) == saved(whole) == ["10", "8"]


def test_a_held_folder_names_its_holder_and_is_freed_by_a_kill(tmp_path):
  program = (
    "import sys, time, pathlib\n"
    "from jaxchunk.training.workdir import open_workdir\n"
    "with open_workdir(pathlib.Path(sys.argv[1])):\n"
    "  print('held', flush=True); time.sleep(100)\n"
  )
  with subprocess.Popen(
    [sys.executable, "-c", program, str(tmp_path)],
    stdout=subprocess.PIPE,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
  ) as process:
    assert process.stdout.readline() == b"held\n"
    holder = rf"process {process.pid} on {re.escape(os.uname().nodename)} since"
    with (
      pytest.raises(CheckpointError, match=rf"{holder} \d{{4}}-.*stop it"),
      open_workdir(tmp_path),
    ):
      pass
    process.kill()
  # The same process twice, as in a notebook.
  with (
    open_workdir(tmp_path),
    pytest.raises(CheckpointError, match=f"process {os.getpid()} on"),
    open_workdir(tmp_path),
  ):
    pass
  with open_workdir(tmp_path):
    pass


def test_a_finished_or_failed_run_frees_its_folder(
  config, tmp_path, monkeypatch
):
  def fail():
    raise RuntimeError("out of luck")

  with monkeypatch.context() as patch:
    at_step(patch, 4, fail)
    with pytest.raises(RuntimeError, match="out of luck"):
      loop.train(config, tmp_path)
  with open_workdir(tmp_path):
    # Reading needs no lock.
    _, _, step = checkpoint.load_for_inference(tmp_path)
    assert step == 2
    with pytest.raises(CheckpointError, match="is in use by process"):
      loop.train(config, tmp_path)


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_folder_that_vanishes_stops_the_run(
  config, tmp_path, monkeypatch, how
):
  # No save is under way that might meet it first.
  config.checkpoint.save_every = 5
  folder = tmp_path / "run"

  def vanish():
    if how == "removed":
      shutil.rmtree(folder)
    else:
      folder.rename(tmp_path / "elsewhere")
      if how == "replaced":
        folder.mkdir()

  with monkeypatch.context() as patch:
    at_step(patch, 4, vanish)
    with pytest.raises(CheckpointError, match="removed, moved or replaced"):
      loop.train(config, folder)
  # Nothing is made in its place.
  assert not folder.exists() or not list(folder.iterdir())
  if how == "moved":
    assert loop.train(config, tmp_path / "elsewhere").step == 10


def test_metrics_that_vanish_stop_the_run(config, tmp_path, monkeypatch):
  at_step(
    monkeypatch, 4, lambda: (tmp_path / "run" / metrics.FILE_NAME).unlink()
  )
  with pytest.raises(CheckpointError, match=r"metrics\.jsonl was removed"):
    loop.train(config, tmp_path / "run")


@contextlib.contextmanager
def without_privileges():
  """As a user whom permissions stop, which they do not stop root."""
  user = os.geteuid()
  if user == 0:
    os.seteuid(65534)
  try:
    yield
  finally:
    os.seteuid(user)


def test_a_folder_that_is_read_only(tmp_path):
  tmp_path.chmod(0o555)
  try:
    with (
      without_privileges(),
      pytest.raises(CheckpointError, match=r"cannot write into --workdir=.*"),
      open_workdir(tmp_path),
    ):
      pass
  finally:
    tmp_path.chmod(0o755)
  assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_made(tmp_path):
  (tmp_path / "file").write_text("")
  with (
    pytest.raises(CheckpointError, match=r"cannot write into --workdir"),
    open_workdir(tmp_path / "file" / "run"),
  ):
    pass


@contextlib.contextmanager
def small_files(size):
  """The system refuses to let files grow beyond a size, as a full disk does."""
  before = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_while_metrics_are_written(
  config, tmp_path, monkeypatch
):
  config.checkpoint.save_every = 4
  limit = []

  def fill():
    while saved(tmp_path) != ["4"]:
      time.sleep(0.01)
    size = (tmp_path / metrics.FILE_NAME).stat().st_size
    limit.append(contextlib.ExitStack())
    limit[0].enter_context(small_files(size + 50))

  with monkeypatch.context() as patch:
    at_step(patch, 8, fill)
    try:
      with pytest.raises(CheckpointError, match="Free some space"):
        loop.train(config, tmp_path)
    finally:
      limit[0].close()
  assert saved(tmp_path) == ["4"]
  assert loop.train(config, tmp_path).step == 10
  assert [line["step"] for line in lines_of(tmp_path)] == list(range(1, 11))


def test_a_disk_that_fills_up_in_a_save_keeps_the_last_good_one(tmp_path):
  state = {"a": jnp.ones((300, 100)), "b": jnp.ones(3)}
  with (
    checkpoint.open_manager(tmp_path, CheckpointConfig()) as manager,
    Saver(manager) as saver,
  ):
    for step, size in ((1, 2**30), (2, 20_000)):
      saver.begin(step, params=state, optimizer=state, meta={})
      with small_files(size):
        saver.commit()
        if step == 1:
          saver.wait()
          continue
        with pytest.raises(CheckpointError, match=r"untouched. Free some"):
          saver.wait()
  assert "1" in saved(tmp_path)
  assert "2" not in saved(tmp_path)
  with checkpoint.open_manager(tmp_path, CheckpointConfig()) as manager:
    assert manager.all_steps() == [1]
    checkpoint.write(
      manager, 2, arrays={"params": state, "optimizer": state}, meta={}
    )
    assert manager.all_steps() == [1, 2]


def test_a_failed_save_is_told_at_the_next_step(config, tmp_path, monkeypatch):
  write, failed = checkpoint.write, threading.Event()

  def fail(manager, step, **rest):
    if step < 4:
      return write(manager, step, **rest)
    failed.set()
    raise CheckpointError("the disk is gone")

  launched = []
  monkeypatch.setattr(checkpoint, "write", fail)
  launch = loop.launch

  def launch_and_wait(run, batch):
    launched.append(run.step + 1)
    if run.step + 1 == 6:
      # The save of step 4 began when step 5 had been dispatched.
      assert failed.wait(60)
    return launch(run, batch)

  monkeypatch.setattr(loop, "launch", launch_and_wait)
  with pytest.raises(CheckpointError, match="the disk is gone"):
    loop.train(config, tmp_path)
  assert launched in ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5, 6])
  assert saved(tmp_path) == ["2"]


def test_clocks_may_jump(config, tmp_path, monkeypatch):
  real, jump = time.time, [0.0]
  monkeypatch.setattr(time, "time", lambda: real() + jump[0])
  for step, hours in ((3, -1000), (6, 3000), (8, -5000)):
    at_step(
      monkeypatch, step, lambda hours=hours: jump.__setitem__(0, hours * 3600.0)
    )
  loop.train(config, tmp_path)
  lines = list(metrics.read(tmp_path))
  assert all(0 < line["seconds"] < 100 for line in lines)
  assert all(0 <= line["save_stall"] < 100 for line in lines)
  # Files that say they are old and folders from the future.
  for name, when in (("10", 1e6), ("8", 4e9)):
    for path in (tmp_path / checkpoint.DIRECTORY / name).rglob("*"):
      os.utime(path, (when, when))
    os.utime(tmp_path / checkpoint.DIRECTORY / name, (when, when))
  assert checkpoint.load_for_inference(tmp_path)[2] == 10
  config.train.num_steps = 12
  assert loop.train(config, tmp_path).step == 12
  assert saved(tmp_path) == ["10", "12"]


def test_the_line_of_a_step_is_there_before_its_checkpoint(
  config, tmp_path, monkeypatch
):
  write, seen = checkpoint.write, {}

  def look(manager, step, **rest):
    seen[step] = [line["step"] for line in metrics.read(tmp_path)][-1]
    write(manager, step, **rest)

  monkeypatch.setattr(checkpoint, "write", look)
  loop.train(config, tmp_path)
  assert sorted(seen) == [2, 4, 6, 8, 10]
  assert all(last >= step for step, last in seen.items())


def test_a_snapshot_is_of_its_step_whatever_is_donated_after():
  step = jax.jit(
    lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0
  )
  tree = {"a": jnp.zeros((1000, 100)), "b": jnp.zeros((), jnp.int32)}
  for number in range(5):
    copies = to_host(tree)
    tree = step(tree)
    for leaf in jax.tree.leaves(copies):
      np.testing.assert_array_equal(leaf, number)
      assert leaf.sharding.memory_kind == "pinned_host"


def test_checksums_on_the_host_are_those_of_the_devices():
  mesh = jax.make_mesh((4, 2), ("x", "y"), (jax.sharding.AxisType.Auto,) * 2)
  rng = np.random.default_rng(0)
  arrays = {
    dtype: jnp.asarray(rng.normal(size=(8, 6)) * 9, dtype)
    for dtype in ("float32", "bfloat16", "int8", "bool")
  }
  arrays["scalar"] = jnp.asarray(7)
  expected = jax.device_get(checkpoint.checksums(arrays))
  for spec in (jax.P(), jax.P("x"), jax.P("x", "y"), jax.P(None, "y")):
    for name, x in arrays.items():
      split = jax.NamedSharding(mesh, spec if x.ndim else jax.P())
      copies = to_host(jax.device_put(x, split))
      assert checkpoint.host_checksum(copies) == expected[name]
