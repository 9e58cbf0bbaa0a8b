"""Kills a training run again and again, and compares it with a whole one.

  python benchmarks/recovery.py [--kills=200] [--inside_saves=20] [--seed=0]

Processes that train a tiny model are ended by SIGKILL at seeded moments: after
a number of steps and a further delay, or inside a save, which is seen by the
temporary folder of the checkpoint and looked at again when the process is
dead. After the last kill the run is finished. Every number in `metrics.jsonl`
that is not a time must equal that of a run that was never interrupted, bit by
bit, and so must the ids of the documents of every step, each exactly once an
epoch.

A process is forked from a server that has imported everything and has not
used a device; programs come from jax's cache of compilations.
"""

import contextlib
import json
import multiprocessing
import os
import pathlib
import random
import signal
import tempfile
import time
from collections import Counter
from typing import Any

import jax
from absl import app, flags
from common import report, rounded

from jaxchunk.data.config import DataConfig
from jaxchunk.models.config import ModelConfig
from jaxchunk.training import loop, metrics
from jaxchunk.training import report as pictures
from jaxchunk.training.checkpoint import DIRECTORY
from jaxchunk.training.config import CheckpointConfig, Config, TrainConfig

_KILLS = flags.DEFINE_integer("kills", 200, "How often.")
_INSIDE = flags.DEFINE_integer("inside_saves", 20, "Of these, inside a save.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments and the documents.")

_DOCUMENTS = 60
_SAVE_EVERY = 3


def make_config(folder: pathlib.Path, steps: int) -> Config:
  """A tiny model with dropout, a few documents to a step."""
  return Config(
    model=ModelConfig(
      vocab_size=259,
      d_model=16,
      num_layers=1,
      num_heads=2,
      num_kv_heads=1,
      head_dim=8,
      d_ff=16,
      dropout=0.1,
      tie_embeddings=True,
    ),
    data=DataConfig(
      source=str(folder / "texts"),
      tokenizer="byte",
      batch_tokens=600,
      heldout_fraction=0.1,
      cache_dir=str(folder / "cache"),
    ),
    train=TrainConfig(
      num_steps=steps,
      chunk_size=256,
      warmup_steps=2,
      eval_every=0,
      log_documents=True,
    ),
    checkpoint=CheckpointConfig(save_every=_SAVE_EVERY, keep_last=2),
  )


def write_texts(folder: pathlib.Path, seed: int) -> None:
  """Documents of up to 240 bytes."""
  draw = random.Random(seed)
  (folder / "texts").mkdir()
  for number in range(_DOCUMENTS):
    words = [draw.choice(["chunk", "of", "a", "text"]) for _ in range(50)]
    text = " ".join(words[: draw.randint(1, 50)])
    (folder / "texts" / f"{number:03}.txt").write_text(f"{number} {text}")


def train(folder: pathlib.Path, name: str, steps: int) -> None:
  """What a process does: trains, or goes on, quietly."""
  with (folder / f"{name}.log").open("a") as log:
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
  jax.config.update("jax_compilation_cache_dir", str(folder / "programs"))
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  # A picture takes longer than the steps and says nothing here.
  pictures.draw = lambda workdir: workdir
  loop.train(make_config(folder, steps), folder / name)


def last_lines(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """The newest metrics on disk; not all, which would keep a core busy."""
  try:
    with (workdir / metrics.FILE_NAME).open("rb") as file:
      file.seek(0, os.SEEK_END)
      file.seek(max(file.tell() - 4000, 0))
      lines = file.read().split(b"\n")
  except FileNotFoundError:
    return []
  found = []
  for line in lines:
    with contextlib.suppress(ValueError):
      found.append(json.loads(line))
  return found


def last_step(workdir: pathlib.Path) -> int:
  """Of the metrics that are on disk."""
  return max((line["step"] for line in last_lines(workdir)), default=0)


def step_seconds(workdir: pathlib.Path) -> float:
  """Of a quick step, so that the moments spread over all parts of one."""
  seconds = [line["seconds"] for line in last_lines(workdir)]
  # The first steps of a process are slow.
  return min(seconds, default=0.0)


def unfinished(workdir: pathlib.Path, since: float) -> bool:
  """Whether a checkpoint that was begun since a time is being written.

  An older temporary folder is left from an earlier kill.
  """
  with contextlib.suppress(FileNotFoundError):
    for path in (workdir / DIRECTORY).iterdir():
      if not path.name.isdigit() and path.stat().st_mtime >= since:
        return True
  return False


def wait_for_steps(process: Any, workdir: pathlib.Path, more: int) -> bool:
  """Waits for so many lines written by this process; `False` if it ends.

  Its own: the file is replaced when the run goes on.
  """
  path = workdir / metrics.FILE_NAME
  before = path.stat().st_ino if path.exists() else None
  while process.is_alive():
    if path.exists() and path.stat().st_ino != before:
      break
    time.sleep(0.005)
  goal = last_step(workdir) + more
  while process.is_alive() and last_step(workdir) < goal:
    time.sleep(0.005)
  return bool(process.is_alive())


def kill_once(
  process: Any, workdir: pathlib.Path, draw: random.Random, *, inside: bool
) -> str:
  """Kills a process that has just begun; says where it was."""
  began = time.time()
  if draw.random() < 0.1 and not inside:
    # While it starts and restores.
    process.join(draw.uniform(0, 2))
  else:
    wait_for_steps(process, workdir, draw.randint(0, 3 * _SAVE_EVERY))
    if inside:
      while process.is_alive() and not unfinished(workdir, began):
        pass
      time.sleep(draw.uniform(0, 0.01))
    else:
      process.join(draw.uniform(0, 2) * step_seconds(workdir))
  if not process.is_alive():
    return "ended"
  os.kill(process.pid, signal.SIGKILL)
  process.join()
  if process.exitcode != -signal.SIGKILL:
    return "ended"
  return "inside a save" if unfinished(workdir, began) else "elsewhere"


def kill_all(
  context: Any, folder: pathlib.Path, steps: int, draw: random.Random
) -> tuple[Counter[str], int]:
  """All kills, then the rest of the run; where they hit, and misses."""
  kills = [True] * _INSIDE.value + [False] * (_KILLS.value - _INSIDE.value)
  draw.shuffle(kills)
  hit: Counter[str] = Counter()
  missed = 0
  start = time.perf_counter()
  while kills:
    process = context.Process(target=train, args=(folder, "killed", steps))
    process.start()
    where = kill_once(process, folder / "killed", draw, inside=kills[-1])
    if where == "ended":
      raise RuntimeError(
        f"a process ended with {process.exitcode} before it was killed: "
        f"{(folder / 'killed.log').read_text()[-2000:]}"
      )
    hit[where] += 1
    if kills[-1] and where != "inside a save":
      # It was over before the signal came; another one is tried.
      missed += 1
    else:
      kills.pop()
      if len(kills) % 10 == 0:
        print(
          f"{len(kills)} to go, step {last_step(folder / 'killed')}, "
          f"{time.perf_counter() - start:.0f} s",
          flush=True,
        )
  run_whole(context, folder, "killed", steps)
  return hit, missed


def run_whole(
  context: Any, folder: pathlib.Path, name: str, steps: int
) -> None:
  """A process that is left to end."""
  process = context.Process(target=train, args=(folder, name, steps))
  process.start()
  process.join()
  if process.exitcode != 0:
    raise RuntimeError((folder / f"{name}.log").read_text()[-2000:])


def bits_of(workdir: pathlib.Path) -> list[dict[str, str]]:
  """The metrics but for times; floats as their bits."""
  return [
    {
      name: value.hex() if isinstance(value, float) else str(value)
      for name, value in line.items()
      if name not in metrics.CLOCKED
    }
    for line in metrics.read(workdir)
  ]


def epochs_repeat_nothing(lines: list[dict[str, Any]]) -> bool:
  """Whether every whole epoch has the same documents, each once."""
  epochs: dict[int, list[int]] = {}
  for line in lines:
    epochs.setdefault(line["epoch"], []).extend(line["documents"])
  last = epochs.pop(max(epochs))
  first = sorted(epochs[0])
  return (
    all(sorted(ids) == first for ids in epochs.values())
    and len(set(first)) == len(first)
    and len(set(last)) == len(last)
  )


def main(argv: list[str]) -> None:
  """Runs both and prints the comparison."""
  del argv
  # Enough for the longest that each kill may let through.
  steps = max(30, _KILLS.value * 4 * _SAVE_EVERY)
  context = multiprocessing.get_context("forkserver")
  context.set_forkserver_preload(["jaxchunk.training.loop"])
  start = time.perf_counter()
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    write_texts(folder, _SEED.value)
    draw = random.Random(_SEED.value)
    hit, missed = kill_all(context, folder, steps, draw)
    killed_seconds = time.perf_counter() - start
    run_whole(context, folder, "whole", steps)
    killed, whole = bits_of(folder / "killed"), bits_of(folder / "whole")
    documents = {
      run: list(metrics.read(folder / run, metrics.DOCUMENTS_NAME))
      for run in ("killed", "whole")
    }
    different = sum(a != b for a, b in zip(killed, whole, strict=False))
    report(
      "recovery",
      kills=sum(hit.values()),
      inside_a_save=hit["inside a save"],
      not_inside_as_meant=missed,
      steps=steps,
      each_step_once=[int(line["step"]) for line in killed]
      == list(range(1, steps + 1)),
      steps_that_differ=different + abs(len(killed) - len(whole)),
      numbers_compared=sum(map(len, whole)),
      documents_equal=documents["killed"] == documents["whole"],
      documents_trained=sum(len(d["documents"]) for d in documents["whole"]),
      each_once_an_epoch=epochs_repeat_nothing(documents["killed"]),
      epochs=documents["whole"][-1]["epoch"] + 1,
      seconds=rounded(killed_seconds, 3),
    )
    assert_equal = different == 0 and documents["killed"] == documents["whole"]
    if not assert_equal:
      print(json.dumps(first_difference(killed, whole)))
      raise SystemExit(1)


def first_difference(
  one: list[dict[str, str]], other: list[dict[str, str]]
) -> list[dict[str, str]]:
  """The first pair of lines that differ."""
  return next(([a, b] for a, b in zip(one, other, strict=False) if a != b), [])


if __name__ == "__main__":
  app.run(main)
