"""Runs of several real processes: killed, hanging, restarted in other numbers.

Processes are forked from a server that has imported everything; programs come
from jax's cache of compilations.
"""

import dataclasses
import multiprocessing
import re
import runpy
import shutil
import signal
import socket
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxchunk.training import checkpoint, metrics
from jaxchunk.training.config import ConfigError, ProcessesConfig, validate
from jaxchunk.training.distributed import EXIT_CODE, find_cluster, initialize
from jaxchunk.training.watchdog import Peer, judge

SCRIPT = Path(__file__).parents[2] / "scripts" / "train.py"
SAME = ("--config.layout.data=2", "--config.layout.context=2")

# Runs the script with a number of devices, and does something to itself when
# it is about to dispatch a step.
PROLOGUE = """
import atexit, os, runpy, signal, sys, time
log = os.open(log, os.O_WRONLY | os.O_CREAT)
os.dup2(log, 1), os.dup2(log, 2)
flags = os.environ["XLA_FLAGS"]
count = "--xla_force_host_platform_device_count="
os.environ["XLA_FLAGS"] = flags.replace(count + "8", count + str(devices))
import jax
jax.config.update("jax_compilation_cache_dir", programs)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
"""
PROGRAM = """
from jaxchunk.training import loop, report
report.draw = lambda workdir: None
def act(profiler, number):
  if number == step:
    if action == "hang":
      time.sleep(1000)
    os.kill(os.getpid(), getattr(signal, action))
if action:
  # What the loop does between reading a batch and beginning its step.
  loop.Profiler.before = act
sys.argv = arguments
try:
  runpy.run_path(arguments[0], run_name="__main__")
finally:
  # The server's children would not.
  atexit._run_exitfuncs()
"""

# Saves an array of which each process holds a half.
SAVES = """
import numpy as np
from jaxchunk.training import checkpoint, config, distributed
from jaxchunk.training.saver import Saver
values = dict(text[2:].split("=", 1) for text in arguments[1:])
chosen = runpy.run_path(values["config"])["get_config"]()
distributed.initialize(
  values["workdir"],
  chosen,
  coordinator_address=values["coordinator_address"],
  num_processes=int(values["num_processes"]),
  process_id=int(values["process_id"]),
)
mesh = jax.make_mesh((4,), ("x",), (jax.sharding.AxisType.Auto,))
whole = np.arange(64, dtype=np.float32).reshape(8, 8)
tree = {"x": jax.make_array_from_callback(
  whole.shape, jax.NamedSharding(mesh, jax.P("x")), whole.__getitem__
)}
assert not tree["x"].is_fully_addressable
meta = {"config": config.to_json(chosen)}
folder = distributed.Path(values["workdir"])
with (
  checkpoint.open_manager(folder, chosen.checkpoint) as manager,
  Saver(manager) as saver,
):
  saver.begin(1, params=tree, optimizer=tree, meta=meta)
  saver.commit()
  saver.wait()
atexit._run_exitfuncs()
"""


@dataclasses.dataclass
class Outcome:
  """How the processes of a run ended.

  Attributes:
    workdir: Of the run.
    codes: Exit codes; `None` if one had to be killed here.
    logs: What each wrote.
    seconds: From the first action to the last end, or of the whole run.
  """

  workdir: Path
  codes: list
  logs: list
  seconds: float


def free_port():
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    return server.getsockname()[1]


class Runner:
  """Starts processes and waits for them; none is left behind."""

  def __init__(self, folder, config_file):
    self.folder, self.config_file = folder, config_file
    self.context = multiprocessing.get_context("forkserver")
    self.context.set_forkserver_preload(["jaxchunk.training.loop"])
    self.processes = []

  def start(
    self,
    workdir,
    count,
    devices,
    flags,
    *,
    act=None,
    told=None,
    first=0,
    port=None,
    program=PROGRAM,
  ):
    """Starts processes.

    Args:
      workdir: Of the run.
      count: How many.
      devices: Of each.
      flags: For all.
      act: `(process, step, action)`.
      told: How many they are told that there are.
      first: Number of the first.
      port: Of process 0.
      program: What they run.
    """
    path = self.folder / f"{workdir.name}.py"
    path.write_text(PROLOGUE + program)
    port, processes = port or free_port(), []
    for number in range(first, first + count):
      arguments = [
        str(SCRIPT),
        f"--config={self.config_file}",
        f"--workdir={workdir}",
        *flags,
      ]
      if (told or count) > 1:
        arguments += [
          f"--coordinator_address=127.0.0.1:{port}",
          f"--num_processes={told or count}",
          f"--process_id={number}",
        ]
      who, step, action = act or (None, None, None)
      names = {
        "arguments": arguments,
        "devices": devices,
        "log": str(self.log(workdir, number)),
        "programs": str(self.folder / f"programs-{devices}"),
        "step": step,
        "action": action if who == number else None,
      }
      process = self.context.Process(
        target=runpy.run_path,
        args=(str(path),),
        kwargs={"init_globals": names},
      )
      process.start()
      processes.append(process)
    self.processes += processes
    return processes

  def log(self, workdir, number):
    return self.folder / f"{workdir.name}-{time.time_ns()}-{number}.log"

  def finish(self, workdir, processes, seconds=150):
    """Waits; those that are stopped are killed when the others have ended."""
    began = time.monotonic()
    while time.monotonic() < began + seconds:
      alive = [p for p in processes if p.exitcode is None]
      if all(stopped(p) for p in alive):
        break
      time.sleep(0.05)
    took = time.monotonic() - began
    codes = [p.exitcode for p in processes]
    self.kill(processes)
    logs = [
      max(self.folder.glob(f"{workdir.name}-*-{n}.log")).read_text()
      for n in range(len(processes))
    ]
    return Outcome(workdir, codes, logs, took)

  def run(self, name, count, devices, *flags, act=None, told=None):
    """Runs processes to their ends."""
    workdir = self.folder / name
    processes = self.start(workdir, count, devices, flags, act=act, told=told)
    return self.finish(workdir, processes)

  def kill(self, processes):
    for process in processes:
      if process.exitcode is None:
        process.kill()
      process.join()


def stopped(process):
  """Whether a signal has stopped it; one that has ended has not."""
  try:
    state = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2]
  except OSError:
    return False
  return state.split()[0] == "T"


@pytest.fixture(scope="module")
def runner(make_config, tmp_path_factory):
  folder = tmp_path_factory.mktemp("processes")
  config = make_config()
  config.train.log_documents = True
  config.checkpoint.save_every = 2
  # One program, for the longest document.
  config.train.chunk_size = 128
  config.processes = ProcessesConfig(
    startup_timeout=60.0, silence_timeout=6.0, stall_timeout=7.0
  )
  path = folder / "config.py"
  path.write_text(
    "from jaxchunk.data.config import DataConfig\n"
    "from jaxchunk.models.config import ModelConfig\n"
    "from jaxchunk.models.rope import Rope\n"
    "from jaxchunk.training.config import *\n"
    "from jaxchunk.training.config import ProcessesConfig\n"
    f"def get_config():\n  return {config!r}\n"
  )
  runner = Runner(folder, path)
  yield runner
  runner.kill(runner.processes)


@pytest.fixture(scope="module")
def whole(runner):
  """Two processes of two devices that nothing happens to."""
  outcome = runner.run("whole", 2, 2, *SAME)
  assert outcome.codes == [0, 0], outcome.logs
  return outcome


@pytest.fixture(scope="module")
def killed(runner, whole):
  """The same, one killed before its sixth step, with that of 4 on disk."""
  return runner.run("killed", 2, 2, *SAME, act=(1, 6, "SIGKILL"))


def lines_of(folder):
  return [
    {name: value for name, value in line.items() if name not in metrics.CLOCKED}
    for line in metrics.read(folder)
  ]


def documents_of(folder):
  return list(metrics.read(folder, metrics.DOCUMENTS_NAME))


def arrays_of(folder):
  model, _, step = checkpoint.load_for_inference(folder)
  return step, jax.tree.map(np.asarray, jax.tree.leaves(model))


def test_a_killed_process_ends_the_others_which_name_it(killed):
  assert killed.codes == [EXIT_CODE, -signal.SIGKILL], killed.logs
  (line,) = re.findall(r"^train.py: .*", killed.logs[0], re.MULTILINE)
  host = re.escape(socket.gethostname())
  assert re.match(rf"train.py: process 1 \({host}, pid \d+\) has given", line)
  assert "no sign of life for 6 s" in line
  assert "start all processes again" in line
  assert killed.seconds < 60


@pytest.mark.parametrize("count", [2, 1, 4])
def test_other_process_counts_go_on_bitwise(runner, whole, killed, count):
  name = f"again-{count}"
  shutil.copytree(killed.workdir, runner.folder / name)
  again = runner.run(name, count, 4 // count, *SAME)
  assert again.codes == [0] * count, again.logs
  # That of step 4 may have been on its way when the process died.
  assert re.search("Resuming after step [24]", again.logs[0])
  assert lines_of(again.workdir) == lines_of(whole.workdir)
  assert documents_of(again.workdir) == documents_of(whole.workdir)
  step, arrays = arrays_of(again.workdir)
  expected, truth = arrays_of(whole.workdir)
  assert step == expected == 8
  for one, other in zip(arrays, truth, strict=True):
    np.testing.assert_array_equal(one, other)


def test_another_layout_goes_on_within_rounding(runner, whole, killed):
  shutil.copytree(killed.workdir, runner.folder / "other")
  other = runner.run("other", 2, 1, "--config.layout.data=2")
  assert other.codes == [0, 0], other.logs
  one, two = lines_of(other.workdir), lines_of(whole.workdir)
  losses = [[line["loss"] for line in lines] for lines in (one, two)]
  np.testing.assert_allclose(*losses, rtol=1e-6)
  documents = documents_of(other.workdir)
  assert documents == documents_of(whole.workdir)
  first = [
    d for line in documents if line["epoch"] == 0 for d in line["documents"]
  ]
  assert len(first) == len(set(first)) > 20


def test_a_signal_to_one_stops_all_after_the_same_step(runner, whole):
  stopped = runner.run("stopped", 2, 2, *SAME, act=(1, 3, "SIGTERM"))
  assert stopped.codes == [0, 0], stopped.logs
  assert "SIGTERM: 4 steps" in stopped.logs[0]
  assert lines_of(stopped.workdir) == lines_of(whole.workdir)[:4]
  assert (stopped.workdir / "checkpoints" / "4").is_dir()


def test_hangs_and_absences_end_in_the_name_of_a_process(runner, whole):
  """All at once: most of the time they wait."""
  absent = "--config.processes.startup_timeout=3"
  cases = {
    "frozen": dict(act=(1, 3, "SIGSTOP")),
    "hangs": dict(act=(1, 3, "hang")),
    "leaderless": dict(act=(0, 3, "SIGKILL")),
    "absent": dict(count=1, told=2, flags=[absent]),
  }
  started = {}
  for name, case in cases.items():
    count, flags = case.pop("count", 2), case.pop("flags", SAME)
    workdir = runner.folder / name
    processes = runner.start(workdir, count, 2, flags, **case)
    started[name] = workdir, processes
  ended = {name: runner.finish(*one) for name, one in started.items()}
  assert ended["frozen"].codes == [EXIT_CODE, None], ended["frozen"].logs
  assert re.search(
    r"train.py: process 1 \(.*\) has given no sign of life for 6 s",
    ended["frozen"].logs[0],
  )
  assert ended["hangs"].codes == [EXIT_CODE, EXIT_CODE], ended["hangs"].logs
  for log in ended["hangs"].logs:
    assert re.search(
      r"train.py: process 1 \(.*\) hangs: it lives, and has been at step 2",
      log,
    )
  # jax ends it in the same moment, so there are two codes.
  assert ended["leaderless"].codes[1] in (EXIT_CODE, -signal.SIGABRT)
  assert re.search(
    r"train.py: process 0 \(.*\) died", ended["leaderless"].logs[1]
  )
  assert ended["absent"].codes == [EXIT_CODE]
  assert re.search(
    r"process 0: of 2 processes \[1\] did not come within 3 s",
    ended["absent"].logs[0],
  )


def test_each_process_saves_what_it_holds(runner, make_config):
  workdir = runner.folder / "saves"
  processes = runner.start(workdir, 2, 2, [], program=SAVES)
  outcome = runner.finish(workdir, processes)
  assert outcome.codes == [0, 0], outcome.logs
  files = workdir / checkpoint.DIRECTORY / "1" / "params"
  writers = sorted(path.name for path in files.glob("ocdbt.process_*"))
  assert writers == ["ocdbt.process_0", "ocdbt.process_1"]
  # Here, in one process, along the other axis and on twice the devices.
  mesh = jax.make_mesh((8,), ("y",), (jax.sharding.AxisType.Auto,))
  split = jax.NamedSharding(mesh, jax.P(None, "y"))
  target = {"x": jax.ShapeDtypeStruct((8, 8), np.float32, sharding=split)}
  config = make_config()
  with checkpoint.open_manager(workdir, config.checkpoint) as manager:
    restored = checkpoint.restore(
      manager, config, params=target, optimizer=target
    )
  expected = np.arange(64, dtype=np.float32).reshape(8, 8)
  np.testing.assert_array_equal(restored.params["x"], expected)
  assert restored.params["x"].sharding == split


def test_processes_that_differ_are_named(runner, whole):
  workdir = runner.folder / "differ"
  port, started = free_port(), []
  for number in range(2):
    flags = [*SAME, f"--config.train.seed={number}"]
    started += runner.start(
      workdir, 1, 2, flags, told=2, first=number, port=port
    )
  outcome = runner.finish(workdir, started)
  assert outcome.codes == [1, 1] or EXIT_CODE in outcome.codes
  assert re.search(
    r"process 1 \(.*\) has train.seed=1, process 0 \(.*\) has 0",
    outcome.logs[0] + outcome.logs[1],
  )


@pytest.mark.fast
def test_who_holds_up_the_others():
  options = ProcessesConfig()

  def peer(step, *, heard=100.0, moved=100.0, ended=False):
    return Peer({"host": "h", "pid": 7}, step, ended, heard, moved)

  def verdict(now, *peers):
    return judge(dict(enumerate(peers)), now, options)

  # All equally far, whatever the step takes.
  assert verdict(129, peer(5), peer(5)) is None
  assert verdict(129, peer(6, heard=120.0), peer(5)) is None
  assert "process 1 (h, pid 7) has given" in verdict(
    131, peer(5, heard=120), peer(5)
  )
  # Behind for long, while another was ahead for long.
  near = {"heard": 150.0}
  assert verdict(151, peer(6, moved=110.0, **near), peer(5, **near)) is None
  late = verdict(161, peer(6, moved=110.0, heard=160.0), peer(5, heard=160.0))
  assert "process 1 (h, pid 7) hangs: it lives, and has been at step 5" in late
  # Compiling takes longer, and who has ended waits for nobody.
  first = peer(1, moved=110.0, heard=400.0), peer(0, heard=400.0)
  assert verdict(400, *first) is None
  assert "at step 0" in verdict(411, *first)
  assert verdict(900, peer(9, ended=True), peer(8, heard=900.0)) is None


@pytest.mark.fast
def test_clusters_are_known_by_their_variables():
  slurm = {
    "SLURM_JOB_ID": "1",
    "SLURM_STEP_NODELIST": "a,b",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
  }
  cpu = {"JAX_PLATFORMS": "cpu"}
  assert find_cluster(slurm) == "Slurm"
  assert find_cluster(slurm | {"SLURM_NTASKS": "1"}) is None
  assert find_cluster({"OMPI_COMM_WORLD_SIZE": "4"}) == "Open MPI"
  pod = cpu | {"KUBERNETES_SERVICE_HOST": "10.0.0.1"}
  assert find_cluster(pod) is None
  assert find_cluster(pod | {"JOB_COMPLETION_INDEX": "0"}) == "Kubernetes"
  pod = {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_SKIP_MDS_QUERY": "1"}
  assert find_cluster(pod) == "Cloud TPU"
  assert find_cluster(pod | cpu) is None
  assert find_cluster(pod | {"TPU_WORKER_HOSTNAMES": "localhost"}) is None
  assert find_cluster(cpu) is None


@pytest.mark.fast
def test_what_is_missing_is_named(config, tmp_path, monkeypatch):
  for name in ("JAX_COORDINATOR_ADDRESS", "OMPI_COMM_WORLD_SIZE"):
    monkeypatch.delenv(name, raising=False)
  initialize(tmp_path, config)
  with pytest.raises(ConfigError, match=r"--num_processes, --process_id must"):
    initialize(tmp_path, config, coordinator_address="127.0.0.1:1")
  config.processes.stall_timeout = 10.0
  with pytest.raises(ConfigError, match=r"stall_timeout=10 is less than .*=30"):
    validate(config)
