"""What a save every ten steps costs the training, and the host's memory.

  python benchmarks/save_stall.py [--steps=40] [--state_mb=300]

Trains the same model three times: without saving, with the library's saver,
and with Orbax's default, `manager.save` called in the loop when the step is
done. `stall` is what the loop, or an update, waited because of a save, as a
share of a step's median time; `slowdown` is how much longer all steps took
together than without saving, in which a thread that takes the processor from
the training shows too.

`memory` is the growth of the resident memory during one save of random
numbers, the copies included, over their bytes.
"""

import pathlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp
from absl import app, flags
from common import report, rounded

from jaxchunk.data.config import DataConfig
from jaxchunk.models.config import ModelConfig
from jaxchunk.training import checkpoint, loop, metrics
from jaxchunk.training import report as pictures
from jaxchunk.training.config import CheckpointConfig, Config, TrainConfig
from jaxchunk.training.initial import abstract_model
from jaxchunk.training.saver import Saver

_STEPS = flags.DEFINE_integer("steps", 40, "Of each run.")
_STATE = flags.DEFINE_integer("state_mb", 300, "For the memory.")

_EVERY = 10
_ARRAYS = 12
_PAGE = 4096


class OrbaxSaver(Saver):
  """Orbax as its guide shows it, with the interface of ours."""

  def __init__(self, manager: ocp.CheckpointManager):
    super().__init__(manager)
    self._default = ocp.CheckpointManager(manager.directory / "default")

  def begin(self, step: int, *, params: Any, optimizer: Any, meta: Any) -> None:
    """Saves when the step is done; only what follows is counted."""
    jax.block_until_ready((params, optimizer))
    start = time.perf_counter()
    self._default.save(
      step,
      args=ocp.args.Composite(
        params=ocp.args.StandardSave(params),
        optimizer=ocp.args.StandardSave(optimizer),
        meta=ocp.args.JsonSave(meta),
      ),
    )
    self._stall += time.perf_counter() - start

  def wait(self) -> None:
    """Waits for all that was begun."""
    self._default.wait_until_finished()


def make_config(folder: pathlib.Path, save_every: int) -> Config:
  """Eight million parameters; some steps of a second on two cores."""
  return Config(
    model=ModelConfig(
      vocab_size=4096,
      d_model=320,
      num_layers=5,
      num_heads=5,
      num_kv_heads=5,
      head_dim=64,
      d_ff=896,
      tie_embeddings=True,
    ),
    data=DataConfig(
      source="stdlib",
      tokenizer="byte",
      batch_tokens=1024,
      max_document_tokens=1024,
      heldout_fraction=0.0,
      cache_dir=str(folder / "cache"),
    ),
    train=TrainConfig(
      num_steps=_STEPS.value, chunk_size=512, warmup_steps=2, eval_every=0
    ),
    checkpoint=CheckpointConfig(save_every=save_every),
  )


def train(folder: pathlib.Path, name: str, save_every: int) -> dict[str, float]:
  """One run; seconds of a step, and the stall."""
  loop.train(make_config(folder, save_every), folder / name)
  # The first steps still fill caches.
  lines = list(metrics.read(folder / name))[_EVERY // 2 :]
  seconds = [line["seconds"] for line in lines]
  saves = sum(line["step"] % save_every == 0 for line in lines)
  stall = sum(line["save_stall"] for line in lines)
  return {
    "step_seconds": statistics.median(seconds),
    "all_seconds": sum(seconds),
    "stall_seconds_of_a_save": stall / max(saves, 1),
    "stall": stall / max(saves, 1) / statistics.median(seconds),
  }


def resident_bytes() -> int:
  """Of this process, now."""
  fields = pathlib.Path("/proc/self/statm").read_text().split()
  return int(fields[1]) * _PAGE


def growth(run: Callable[[], Any]) -> int:
  """How much more memory was resident while something ran, at most."""
  before = peak = resident_bytes()
  done = threading.Event()

  def watch() -> None:
    nonlocal peak
    while not done.wait(0.002):
      peak = max(peak, resident_bytes())

  watcher = threading.Thread(target=watch)
  watcher.start()
  try:
    run()
  finally:
    done.set()
    watcher.join()
  return peak - before


def memory(folder: pathlib.Path) -> dict[str, float]:
  """Growth over the state's bytes, of both savers."""
  rows = _STATE.value * 1_000_000 // 4 // _ARRAYS // 1024
  keys = jax.random.split(jax.random.key(0), _ARRAYS)
  state = {
    str(i): jax.random.normal(k, (rows, 1024)) for i, k in enumerate(keys)
  }
  size = sum(x.nbytes for x in jax.tree.leaves(state))
  small = {"0": jax.random.normal(keys[0], (8, 8))}
  figures = {}
  for name, kind in (("jaxchunk", Saver), ("orbax", OrbaxSaver)):
    workdir = folder / f"memory_{name}"
    with (
      checkpoint.open_manager(workdir, CheckpointConfig()) as manager,
      kind(manager) as saver,
    ):

      def save(step: int, tree: Any, saver: Saver = saver) -> None:
        saver.begin(step, params=tree, optimizer=small, meta={"a": 1})
        saver.commit()
        saver.wait()

      # The first one starts threads and imports.
      save(1, small)
      figures[name] = growth(lambda save=save: save(2, state)) / size
  return figures


def main(argv: list[str]) -> None:
  """Prints one line of JSON."""
  del argv
  pictures.draw = lambda workdir: workdir
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    held = memory(folder)
    train(folder, "warm_up", _STEPS.value + 1)
    without = train(folder, "without", _STEPS.value + 1)
    ours = train(folder, "ours", _EVERY)
    loop.Saver = OrbaxSaver
    orbax = train(folder, "orbax", _EVERY)
    for run in (ours, orbax):
      run["slowdown"] = run["all_seconds"] / without["all_seconds"] - 1
    parameters = 3 * 4 * count(make_config(folder, 1))
    report(
      "save_stall",
      every=_EVERY,
      steps=_STEPS.value,
      state_mb=parameters / 1e6,
      without=rounded(without),
      jaxchunk=rounded(ours),
      orbax=rounded(orbax),
      memory=rounded(held),
      memory_state_mb=_STATE.value,
    )


def count(config: Config) -> int:
  """Parameters of the model."""
  _, shapes, _ = abstract_model(config.model)
  return sum(x.size for x in jax.tree.leaves(shapes))


if __name__ == "__main__":
  app.run(main)
