"""Kills processes of a run at random moments, and goes on with other counts.

  python benchmarks/multi_process.py [--trials=20] [--processes=1,2,4]

Four devices train a tiny model over `data=2, context=2`, in one, two or four
processes. In each trial one of them is killed by SIGKILL, or stopped by
SIGSTOP, at a seeded moment; the others must end by themselves within a minute
and name it. The next trial goes on from the last checkpoint with another number
of processes. At the end every number in `metrics.jsonl` that is not a time must
equal that of a run which was never interrupted, bit by bit, and so must the
documents of every step, each exactly once an epoch.

A process is forked from a server that has imported everything and has not used
a device; programs come from jax's cache of compilations.
"""

import dataclasses
import multiprocessing
import os
import pathlib
import random
import re
import signal
import socket
import tempfile
import time
from typing import Any

import jax
import recovery
from absl import app, flags
from common import report, rounded

from jaxchunk.training import distributed, loop, metrics
from jaxchunk.training import report as pictures
from jaxchunk.training.checkpoint import CheckpointError

_TRIALS = flags.DEFINE_integer("trials", 20, "How often.")
_PROCESSES = flags.DEFINE_list("processes", ["1", "2", "4"], "Numbers to draw.")
_TIMEOUT = flags.DEFINE_float("silence_timeout", 8.0, "As the field, seconds.")

_DEVICES = 4
_LIMIT = 60.0


@dataclasses.dataclass(frozen=True)
class Trial:
  """What one kill did.

  Attributes:
    processes: How many there were.
    signal: What one of them got.
    victim: Which one.
    step: The last on disk then.
    seconds: Until all others had ended.
    named: Whether each of those said which process it was.
    codes: How those ended.
  """

  processes: int
  signal: str
  victim: int
  step: int
  seconds: float
  named: bool
  codes: list[int | None]


def member(
  folder: pathlib.Path, name: str, steps: int, timeout: float, **who: Any
) -> None:
  """What a process does: joins, trains or goes on, quietly."""
  count, number = who["num_processes"], who["process_id"]
  log = os.open(folder / f"{name}.{number}.log", os.O_WRONLY | os.O_CREAT)
  os.ftruncate(log, 0)
  os.dup2(log, 1)
  os.dup2(log, 2)
  os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={_DEVICES // count}"
  )
  programs = str(folder / f"programs-{_DEVICES // count}")
  jax.config.update("jax_compilation_cache_dir", programs)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  pictures.draw = lambda workdir: workdir
  config = recovery.make_config(folder, steps)
  config.layout.data = config.layout.context = 2
  config.processes.silence_timeout = timeout
  config.processes.stall_timeout = timeout + 2
  try:
    if count > 1:
      distributed.initialize(folder / name, config, **who)
    loop.train(config, folder / name)
  except (distributed.ProcessError, CheckpointError) as error:
    distributed.fail(error)
  jax.distributed.shutdown()


def begin(
  context: Any, folder: pathlib.Path, name: str, steps: int, count: int
) -> list[Any]:
  """The processes of a run, just started."""
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    port = server.getsockname()[1]
  processes = []
  for number in range(count):
    who = {
      "coordinator_address": f"127.0.0.1:{port}",
      "num_processes": count,
      "process_id": number,
    }
    arguments = (folder, name, steps, _TIMEOUT.value)
    processes.append(
      context.Process(target=member, args=arguments, kwargs=who, daemon=True)
    )
    processes[-1].start()
  return processes


def interrupt(
  context: Any, folder: pathlib.Path, steps: int, draw: random.Random
) -> Trial:
  """Starts processes and kills or stops one of them; waits for the others."""
  count = int(draw.choice(_PROCESSES.value))
  how = "SIGSTOP" if count > 1 and draw.random() < 0.3 else "SIGKILL"
  processes = begin(context, folder, "killed", steps, count)
  recovery.wait_for_steps(processes[0], folder / "killed", draw.randint(0, 8))
  processes[0].join(draw.uniform(0, 0.3))
  victim = draw.randrange(count)
  step = recovery.last_step(folder / "killed")
  if processes[victim].exitcode is not None:
    raise RuntimeError(f"a process ended by itself: {tail(folder, victim)}")
  os.kill(processes[victim].pid, getattr(signal, how))
  began = time.monotonic()
  others = [p for n, p in enumerate(processes) if n != victim]
  for process in others:
    process.join(max(0.0, began + _LIMIT - time.monotonic()))
  seconds = time.monotonic() - began
  codes = [process.exitcode for process in others]
  for process in processes:
    process.kill()
    process.join()
  named = [
    re.search(rf": process {victim} \(", tail(folder, n)) is not None
    for n in range(count)
    if n != victim
  ]
  return Trial(count, how, victim, step, seconds, all(named), codes)


def tail(folder: pathlib.Path, number: int) -> str:
  """The end of a process's log."""
  return (folder / f"killed.{number}.log").read_text(errors="replace")[-20_000:]


def run_whole(
  context: Any, folder: pathlib.Path, name: str, steps: int, count: int
) -> None:
  """Processes that are left to end."""
  processes = begin(context, folder, name, steps, count)
  for process in processes:
    process.join(600)
  codes = [process.exitcode for process in processes]
  for process in processes:
    process.kill()
  if any(codes):
    raise RuntimeError((folder / f"{name}.0.log").read_text()[-2000:])


def table(trials: list[Trial]) -> str:
  """One line for each trial."""
  lines = ["processes  signal   victim  step  ended after  named  codes"]
  lines += [
    f"{t.processes:9}  {t.signal}  {t.victim:6}  {t.step:4}  "
    f"{t.seconds:9.1f} s  {'yes' if t.named else 'NO':5}  {t.codes}"
    for t in trials
  ]
  return "\n".join(lines)


def main(argv: list[str]) -> None:
  """Runs both and prints the comparison."""
  del argv
  steps = max(30, 12 * _TRIALS.value)
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["jaxchunk.training.loop"])
  draw = random.Random(flags.FLAGS.seed)
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    recovery.write_texts(folder, flags.FLAGS.seed)
    trials = []
    for _ in range(_TRIALS.value):
      trials.append(interrupt(context, folder, steps, draw))
      print(table(trials[-1:]).splitlines()[1], flush=True)
    run_whole(context, folder, "killed", steps, 2)
    run_whole(context, folder, "whole", steps, 2)
    killed = recovery.bits_of(folder / "killed")
    whole = recovery.bits_of(folder / "whole")
    documents = {
      run: list(metrics.read(folder / run, metrics.DOCUMENTS_NAME))
      for run in ("killed", "whole")
    }
  print(table(trials))
  several = [t for t in trials if t.processes > 1]
  report(
    "multi_process",
    trials=len(trials),
    killed=sum(t.signal == "SIGKILL" for t in trials),
    stopped=sum(t.signal == "SIGSTOP" for t in trials),
    slowest_end=rounded(max(t.seconds for t in several), 3),
    silence_timeout=_TIMEOUT.value,
    all_ended=all(None not in t.codes for t in several),
    all_named=all(t.named for t in several),
    steps=steps,
    steps_that_differ=sum(a != b for a, b in zip(killed, whole, strict=False))
    + abs(len(killed) - len(whole)),
    documents_equal=documents["killed"] == documents["whole"],
    each_once_an_epoch=recovery.epochs_repeat_nothing(documents["killed"]),
    epochs=documents["whole"][-1]["epoch"] + 1,
  )
  if killed != whole or documents["killed"] != documents["whole"]:
    raise SystemExit(1)


if __name__ == "__main__":
  app.run(main)
