"""jaxchunk beside what people train long documents with today.

  python benchmarks/peers.py [--parts=speed,curve,longest] [--record]
  python benchmarks/peers.py --shapes=1b,8b            (on a GPU)
  python benchmarks/peers.py --shapes=1b,8b --dry_run  (only shows that it runs)

The same Llama with the same initial weights, the same whole documents of the
standard library as bytes, the same AdamW. Contestants: jaxchunk by chunks
(one live chunk, all live, layer-outer); transformers with SDPA and gradient
checkpointing; TRL's SFTTrainer with documents as rows and padding-free;
StreamBP as its authors' package and in code of our own; and the tiling of
ALST (MLP and loss by tiles under checkpointed layers) in code of our own.
Each is a process of its own; they take turns. What cannot run is listed with
the reason.

Parts:
  speed: tokens a second of a training step on a document of `--length`, the
    best of all steps but the first and of all turns; for torch on CPU of the
    best of {1, all} threads, waiting actively or passively. Peak bytes are
    the growth of the resident memory (on a GPU of the allocator's) over the
    model with its optimizer, gradients included; beside them, for jaxchunk,
    what the compiler says.
  curve: losses of 8 steps on short whole documents, in small chunks, so that
    many are split; they must agree.
  longest: which doubling lengths fit into `--budget_mb` above the model with
    its optimizer: as run, and where a straight line through the two longest
    meets the budget; for jaxchunk also by the compiler alone. The C library
    gives freed memory back at once here.

GPU shapes have random weights, bf16, and loss and gradients without an update:
AdamW's moments are kept out of the budget for all alike, which is the device's
memory less the weights and 8 bytes a parameter.

`--cache=FILE` keeps the runs, of one machine and one version of the code; with
`--seconds` the script stops early and goes on when called again. The package
streambp asks for an old transformers: give its environment's interpreter by
`--streambp_python`.

Prints one JSON line, and a table on standard error. `--record` also writes it,
with device and versions, into benchmarks/results/.
"""

import dataclasses
import os
import pathlib
import sys
import tempfile
from typing import Any

import numpy as np
from absl import app, flags
from common import record, report, rounded
from peers_job import SHAPES, Job, Task
from peers_runner import (
  Runner,
  device_memory,
  double_lengths,
  settings,
  stdlib_texts,
)
from peers_table import (
  longest_rows,
  loss_gap,
  ratios,
  speed_rows,
  table,
)

_PARTS = ("speed", "curve", "longest")
_WANTED = flags.DEFINE_list("parts", list(_PARTS), "What to measure.")
_SHAPES = flags.DEFINE_list("shapes", ["small"], "small; 1b and 8b on a GPU.")
_ONLY = flags.DEFINE_list("only", [], "Contestants by part of the name.")
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Turns.", 1)
_STEPS = flags.DEFINE_integer("steps", 3, "Of the speed part.", 2)
_LENGTH = flags.DEFINE_integer(
  "length", 8192, "Tokens of speed's documents.", 1
)
_CHUNK = flags.DEFINE_integer(
  "chunk_size", 1024, "C, and all others' tiles.", 1
)
_BUDGET = flags.DEFINE_integer(
  "budget_mb", 192, "Of the longest part on CPU.", 1
)
_SHORTEST = flags.DEFINE_integer("shortest", 2048, "Of the longest part.", 1)
_LONGEST = flags.DEFINE_integer(
  "longest", 0, "To run; by default 32,768 on CPU and 4M on a GPU.", 0
)
_SEED = flags.DEFINE_integer("seed", 0, "Which documents the curve has.")
_CACHE = flags.DEFINE_string("cache", None, "A file that keeps the runs.")
_SECONDS = flags.DEFINE_float("seconds", float("inf"), "Start no run later.")
_STREAMBP = flags.DEFINE_string(
  "streambp_python", sys.executable, "Interpreter that has streambp."
)
_RECORD = flags.DEFINE_bool("record", False, "Write benchmarks/results/.")
_DRY = flags.DEFINE_bool("dry_run", False, "GPU shapes made tiny, anywhere.")

_PACKAGE = "StreamBP, streambp package"
_PEERS = [
  "transformers, checkpointing",
  "TRL SFTTrainer, rows",
  "TRL SFTTrainer, padding-free",
  _PACKAGE,
  "StreamBP-style (own code)",
  "ALST-style (own code)",
]
_CPU = [
  "jaxchunk, one live chunk",
  "jaxchunk, all chunks live",
  "jaxchunk, layer-outer",
  *_PEERS,
]
_GPU = [
  "jaxchunk pallas_gpu, one live chunk",
  "jaxchunk pallas_gpu, layer-outer",
  "jaxchunk xla, one live chunk",
  *_PEERS,
]

# Steps and documents a step of the curve, and its chunk: documents have 1 to
# 4 chunks.
_CURVE_STEPS, _CURVE_DOCUMENTS, _CURVE_LENGTH, _CURVE_CHUNK = 8, 2, 1024, 256
# Losses in fp32 differ by rounding. AdamW divides gradients by their own size,
# so those that are rounding alone (0 in exact arithmetic) move weights by the
# whole learning rate, and curves drift apart: in nats, 5e-6 were seen after
# four steps, and this leaves room for more steps and other documents.
_TOLERANCE = 1e-3
# Compiling goes on to this length.
_MOST = 1 << 22


def documents(job: Job) -> list[list[np.ndarray]]:
  """Whole documents of each step, of `job.length` targets at most.

  Those of speed are the longest of the corpus that have no more tokens than
  that, the curve's are drawn. The one of "longest" has exactly that many, and
  is made of several where there is none so long.
  """
  texts = stdlib_texts()
  if job.task == "longest":
    return [[np.resize(np.concatenate(texts), job.length + 1)]]
  whole = [t for t in texts if 2 <= len(t) <= job.length + 1]
  if job.task == "speed":
    whole.sort(key=len)
    return [[document] for document in whole[-_STEPS.value :]]
  whole = [t for t in whole if len(t) > job.length // 8]
  drawn = np.random.default_rng(_SEED.value).permutation(len(whole))
  picked = [whole[n] for n in drawn[: _CURVE_STEPS * _CURVE_DOCUMENTS]]
  return [picked[n::_CURVE_STEPS] for n in range(_CURVE_STEPS)]


def base_job(shape: str, contestant: str, task: Task, length: int) -> Job:
  """A job with what depends on the shape alone."""
  small = shape == "small"
  curve = task == "curve"
  return Job(
    contestant=contestant,
    task=task,
    shape=shape,
    dtype="float32" if small else "bfloat16",
    length=length,
    chunk_size=_CURVE_CHUNK if curve else _CHUNK.value,
    update=small,
    steps=_STEPS.value if task == "speed" else 0,
    seed=_SEED.value if curve else 0,
  )


def run_speed(runner: Runner, shape: str, names: list[str]) -> list[int]:
  """All settings in the first turn, then the best of each contestant.

  Returns:
    Targets of each step.
  """
  length = _LENGTH.value
  base = base_job(shape, names[0], "speed", length)
  tokens = [sum(len(d) - 1 for d in docs) for docs in runner.documents(base)]
  for turn in range(_ROUNDS.value):
    best = speed_rows(runner.runs.values(), tokens)
    for name in names:
      for job in settings(base_job(shape, name, "speed", length)):
        row = best.get(name)
        setting = row and (row["threads"], row["policy"])
        if turn and (job.threads, job.policy) != setting:
          continue
        result = runner(dataclasses.replace(job, turn=turn))
        if result and "skipped" in result:
          break
  return tokens


def run_curve(runner: Runner, shape: str, names: list[str]) -> None:
  """Once each."""
  for name in names:
    runner(base_job(shape, name, "curve", _CURVE_LENGTH))


def run_longest(
  runner: Runner, shape: str, names: list[str], budget: int
) -> None:
  """Doubling lengths, each contestant until it does not fit.

  On a GPU jaxchunk's programs are only compiled: the allocator then takes what
  the compiler says.
  """
  on_cpu = shape == "small" or _DRY.value
  most_run = _LONGEST.value or (32_768 if on_cpu else _MOST)
  for name in names:
    ours = name.startswith("jaxchunk")
    for task, most in (("longest", most_run), ("compile", _MOST)):
      # On a GPU the compiler's account is all that counts.
      if ours and task == "longest" and not on_cpu:
        continue
      if task == "compile" and not ours:
        continue
      job = base_job(shape, name, task, _SHORTEST.value)
      double_lengths(runner, job, most, budget)


def budget_of(shape: str) -> int:
  """Bytes that gradients and activations may take."""
  if shape == "small" or _DRY.value:
    return _BUDGET.value * 1_000_000
  return device_memory() - (2 + 8) * SHAPES[shape].parameters


def measure(runner: Runner, shape: str, names: list[str]) -> dict[str, Any]:
  """All parts for a shape, and the table."""
  runner.runs = {}
  tokens: list[int] = []
  budget = budget_of(shape)
  if "curve" in _WANTED.value and shape == "small":
    run_curve(runner, shape, names)
  if "speed" in _WANTED.value:
    tokens = run_speed(runner, shape, names)
  if "longest" in _WANTED.value:
    run_longest(runner, shape, names, budget)
  runs = list(runner.runs.values())
  skipped = {
    job.contestant: result["skipped"]
    for job, result in runs
    if "skipped" in result
  }
  speed = speed_rows(runs, tokens)
  longest = longest_rows(runs, budget)
  gap = loss_gap(runs)
  print(
    f"\n{shape}: {SHAPES[shape].parameters:,} parameters; speed on documents "
    f"of {tokens} tokens; budget {budget / 1e6:,.0f} MB\n"
    + table(names, speed, longest, skipped),
    file=sys.stderr,
  )
  if gap:
    print(f"largest difference of losses: {gap}", file=sys.stderr, flush=True)
  devices = {result["device"] for _, result in runs if "device" in result}
  return {
    "devices": sorted(devices),
    "tokens_of_steps": tokens,
    "budget_bytes": budget,
    "speed": speed,
    "longest": longest,
    "ratios": ratios(speed, longest),
    "loss_gap": gap and {"nats": gap[0], "of": gap[1], "most": _TOLERANCE},
    "losses": {
      job.contestant: result["losses"]
      for job, result in runs
      if job.task == "curve" and "losses" in result
    },
    "libraries": {
      job.contestant: result["library"]
      for job, result in runs
      if "library" in result
    },
    "skipped": skipped,
  }


def chosen(names: list[str]) -> list[str]:
  """Those asked for."""
  only = _ONLY.value
  return [n for n in names if not only or any(part in n for part in only)]


def check_flags() -> None:
  """Before anything runs.

  Raises:
    app.UsageError: Names the flag, its value and what it may be.
  """
  public = [name for name in SHAPES if not name.startswith("dry")]
  for flag, known in ((_WANTED, _PARTS), (_SHAPES, public)):
    if unknown := sorted(set(flag.value) - set(known)):
      raise app.UsageError(
        f"--{flag.name} has {unknown}; it may have {list(known)}"
      )
  if not chosen(_CPU + _GPU):
    raise app.UsageError(
      f"--only={_ONLY.value} fits none of {sorted({*_CPU, *_GPU})}"
    )


def main(_: list[str]) -> None:
  """Runs the contestants turn by turn and reports."""
  check_flags()
  # The contestants' processes need the memory.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  # By default jax leaves a quarter of a GPU alone; torch does not.
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
  import jax

  gpu = jax.default_backend() == "gpu"
  figures: dict[str, Any] = {}
  with tempfile.TemporaryDirectory() as folder:
    runner = Runner(
      pathlib.Path(folder),
      documents,
      cache=_CACHE.value,
      seconds=_SECONDS.value,
      pythons={_PACKAGE: _STREAMBP.value},
    )
    for shape in _SHAPES.value:
      if shape == "small":
        figures[shape] = measure(runner, shape, chosen(_CPU))
      elif gpu and not _DRY.value:
        figures[shape] = measure(runner, shape, chosen(_GPU))
      elif _DRY.value:
        figures[shape] = measure(runner, f"dry {shape}", chosen(_GPU))
      else:
        figures[shape] = {"not_measured": "there is no GPU"}
        print(f"\n{shape}: not measured: there is no GPU", file=sys.stderr)
  figures = rounded(figures, 6) | {"complete": not runner.stopped}
  goals = figures.get("small", {})
  gap = goals.get("loss_gap")
  over = goals.get("ratios", {})
  report(
    "peers",
    **figures,
    ok=bool(
      gap
      and gap["nats"] <= _TOLERANCE
      and over.get("tokens_per_sec", 0) >= 1
      and over.get("longest_by_line", 0) >= 2
    ),
  )
  if _RECORD.value:
    device = jax.devices()[0].device_kind
    packages = ("jax", "torch", "transformers", "trl")
    record("peers", figures, device, packages)


if __name__ == "__main__":
  app.run(main)
