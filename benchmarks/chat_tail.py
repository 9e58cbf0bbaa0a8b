"""jaxchunk beside TRL on conversations as long as chats are.

  python benchmarks/chat_tail.py [--ways=full,lora] [--record]
  python benchmarks/chat_tail.py --shapes=1b,8b            (on a GPU)
  python benchmarks/chat_tail.py --shapes=1b,8b --dry_run  (shows that it runs)

Of the lengths 99% are log-normal (sigma 1) below `--bound`; the others are
spread evenly, by their logarithm, from there to `--longest`. By default 512 and
8,192 tokens for CPUs, 4,096 and 131,072 on a GPU. Each of `--steps` steps has
`--conversations` of them, whose contents are pieces of the standard library as
bytes. All contestants train the same model from the same weights on the same
conversations in the same steps with the same AdamW, so their losses (the mean
over the tokens of a step) must agree: all parameters ("full"), or adapters of
rank 8 of all matrices of the layers ("lora", TRL's by PEFT).

Contestants, each a process of its own; they take turns:
  jaxchunk by chunks of `--chunk_size`: one live chunk, all live, layer-outer;
  TRL's SFTTrainer with its own defaults (gradient checkpointing, its fused
  head): batches of `--batch` padded to their longest; the same with the
  conversations of each step in order of length; rows of one; padding-free,
  `--batch` conversations behind each other; and packed ("bfd") into rows as
  long as the longest conversation, so that none is cut. SDPA; on a GPU flash
  attention where conversations lie behind each other, if it is installed.

Parts:
  speed: tokens of conversations, not of padding, over the seconds of all steps
    but the first. "warm" is what jaxchunk takes to begin: it compiles all its
    programs, and runs each once. TRL on CPU is given the threads {1, all} and
    the way of waiting that are best for rows of one.
  longest: doubling lengths of one conversation, until one does not fit into
    `--budget_mb` above the model with its optimizer, gradients included; and
    where a straight line through the two longest meets the budget. For one
    conversation all of TRL's ways are a row of one; of jaxchunk's only
    layer-outer, which takes the least of them, runs on CPU. "by_slopes" is
    the ratio that the lines tend to as the budget grows.

GPU shapes have random weights, bf16, and loss and gradients without an update;
what does not run is counted as the compiler says. Their budget is the device's
memory less the weights and AdamW's moments.

`--cache=FILE` keeps the runs, of one machine and one version of the code; with
`--seconds` the script stops early and goes on when called again.

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
from chat_tail_data import cut_documents, draw_lengths
from chat_tail_table import by_compiler, compare, table, useful, verdicts
from common import record, report, rounded
from peers_job import SHAPES, Job, Task
from peers_runner import (
  Runner,
  device_memory,
  double_lengths,
  settings,
  stdlib_texts,
)
from peers_table import longest_rows, loss_gap, rate_of_steps, speed_rows

_PARTS, _KINDS = ("speed", "longest"), ("full", "lora")
_WANTED = flags.DEFINE_list("parts", list(_PARTS), "What to measure.")
_WAYS = flags.DEFINE_list("ways", list(_KINDS), "What to train.")
_SHAPES = flags.DEFINE_list("shapes", ["small"], "small; 1b and 8b on a GPU.")
_ONLY = flags.DEFINE_list("only", [], "Contestants by part of the name.")
_ROUNDS = flags.DEFINE_integer("rounds", 1, "Turns.", 1)
_STEPS = flags.DEFINE_integer("steps", 5, "Of the speed part.", 2)
_CONVERSATIONS = flags.DEFINE_integer(
  "conversations", 64, "Of a step; a multiple of the batch.", 1
)
_BATCH = flags.DEFINE_integer("batch", 8, "Conversations TRL takes at once.", 1)
_BOUND = flags.DEFINE_integer(
  "bound", 0, "Tokens that 99% have at most; 0 is by shape.", 0
)
_LONGEST = flags.DEFINE_integer(
  "longest", 0, "Tokens of the longest conversation; 0 is by shape.", 0
)
_CHUNK = flags.DEFINE_integer("chunk_size", 0, "C; 0 is by shape.", 0)
_RANK = flags.DEFINE_integer("rank", 8, "Of the adapters.", 1)
_BUDGET = flags.DEFINE_integer(
  "budget_mb", 192, "Of the longest part on CPU.", 1
)
_SHORTEST = flags.DEFINE_integer("shortest", 4096, "Of the longest part.", 1)
_MOST = flags.DEFINE_integer(
  "most", 0, "To run in the longest part; 0 is by shape.", 0
)
_SEED = flags.DEFINE_integer("seed", 0, "Of lengths and contents.")
_CACHE = flags.DEFINE_string("cache", None, "A file that keeps the runs.")
_SECONDS = flags.DEFINE_float("seconds", float("inf"), "Start no run later.")
_RECORD = flags.DEFINE_bool("record", False, "Write benchmarks/results/.")
_DRY = flags.DEFINE_bool("dry_run", False, "GPU shapes made tiny, anywhere.")

_ROWS = "TRL SFTTrainer, rows"
# The first is tried with all settings; the last take minutes.
_TRL = [
  _ROWS,
  "TRL SFTTrainer, padding-free",
  "TRL SFTTrainer, packed",
  "TRL SFTTrainer, padded by length",
  "TRL SFTTrainer, padded",
]
_CPU = [
  "jaxchunk, one live chunk",
  "jaxchunk, all chunks live",
  "jaxchunk, layer-outer",
  *_TRL,
]
_GPU = [
  "jaxchunk pallas_gpu, one live chunk",
  "jaxchunk pallas_gpu, layer-outer",
  "jaxchunk xla, one live chunk",
  *_TRL,
]
# What is left out of the longest part: one conversation is one row, and keys
# and values of all layers take more than layer-outer's inputs in "small".
_ONLY_SPEED = (*_CPU[:2], *_TRL[1:])
# At a rate for fine-tuning, losses differ by rounding alone. AdamW divides
# gradients by their own size, also those that are rounding alone, so after an
# update at ten times the rate TRL's own ways were seen to differ by 2e-5.
_RATE, _TOLERANCE = 1e-4, 1e-4
_TARGETS = {"tokens_per_sec": 2.0, "longest_by_line": 8.0}
# Compiling goes on to this length.
_COMPILED = 1 << 22


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
  """What depends on the shape, in tokens."""

  bound: int
  longest: int
  chunk: int
  most: int


def sizes_of(shape: str) -> Sizes:
  """As the flags say, or by shape."""
  if shape == "small":
    default = Sizes(bound=512, longest=8192, chunk=512, most=32_768)
  elif shape.startswith("dry"):
    default = Sizes(bound=128, longest=1024, chunk=128, most=4096)
  else:
    default = Sizes(bound=4096, longest=131_072, chunk=4096, most=_COMPILED)
  return Sizes(
    bound=_BOUND.value or default.bound,
    longest=_LONGEST.value or default.longest,
    chunk=_CHUNK.value or default.chunk,
    most=_MOST.value or default.most,
  )


def documents(job: Job) -> list[list[np.ndarray]]:
  """The conversations of each step, or one of exactly the job's length."""
  text = np.concatenate(stdlib_texts())
  if job.task == "longest":
    return [[np.resize(text, job.length + 1)]]
  rng = np.random.default_rng(job.seed)
  lengths = draw_lengths(
    rng,
    steps=job.steps,
    conversations=_CONVERSATIONS.value,
    bound=sizes_of(job.shape).bound,
    longest=job.length,
  )
  return cut_documents(rng, text, lengths)


def base_job(
  shape: str, way: str, contestant: str, task: Task, length: int
) -> Job:
  """A job with what depends on the shape and the way to train alone."""
  small, chat = shape == "small", task == "chat"
  return Job(
    contestant=contestant,
    task=task,
    shape=shape,
    dtype="float32" if small else "bfloat16",
    length=length,
    chunk_size=sizes_of(shape).chunk,
    update=small,
    learning_rate=_RATE,
    steps=_STEPS.value if chat else 0,
    seed=_SEED.value if chat else 0,
    lora=_RANK.value if way == "lora" else 0,
    batch=_BATCH.value if chat else 0,
  )


def best_setting(
  runner: Runner, shape: str, names: list[str], tokens: list[int]
) -> dict[str, Any]:
  """Threads, and how they wait, of TRL's first contestant at its best."""
  first = next((n for n in names if n in _TRL), None)
  if first is None:
    return {}
  length = sizes_of(shape).longest
  job = base_job(shape, _WAYS.value[0], first, "chat", length)
  runs = []
  for tried in settings(job):
    # One thread waits for no other.
    if (tried.threads, tried.policy) != (1, "active"):
      runs.append((tried, runner(tried) or {"skipped": "no time"}))
  row = speed_rows(runs, tokens, "chat", rate_of_steps).get(first, {})
  return {name: row[name] for name in ("threads", "policy") if name in row}


def run_speed(
  runner: Runner,
  shape: str,
  way: str,
  names: list[str],
  setting: dict[str, Any],
) -> None:
  """All contestants, turn by turn; TRL with a setting."""
  length = sizes_of(shape).longest
  for turn in range(_ROUNDS.value):
    for name in names:
      job = base_job(shape, way, name, "chat", length)
      if name in _TRL:
        job = dataclasses.replace(job, **setting)
      runner(dataclasses.replace(job, turn=turn))


def run_longest(
  runner: Runner, shape: str, way: str, names: list[str], budget: int
) -> None:
  """Doubling lengths; on a GPU jaxchunk's programs are only compiled."""
  on_cpu = shape == "small" or _DRY.value
  for name in names:
    if name in _ONLY_SPEED:
      continue
    only_compiled = name.startswith("jaxchunk") and not on_cpu
    task: Task = "compile" if only_compiled else "longest"
    job = base_job(shape, way, name, task, _SHORTEST.value)
    most = _COMPILED if only_compiled else sizes_of(shape).most
    double_lengths(runner, job, most, budget)


def budget_of(shape: str, way: str) -> int:
  """Bytes that gradients and activations may take."""
  if shape == "small" or _DRY.value:
    return _BUDGET.value * 1_000_000
  sizes = SHAPES[shape]
  if way == "full":
    return device_memory() - (2 + 8) * sizes.parameters
  return (
    device_memory() - 2 * sizes.parameters - 12 * sizes.adapters(_RANK.value)
  )


def plan_figures(
  shape: str, way: str, steps: list[list[np.ndarray]]
) -> dict[str, Any]:
  """How the conversations lie in chunks, and what that costs to compute."""
  import peers_jax

  from jaxchunk.chunking.cost import plan_cost
  from jaxchunk.chunking.plan import chunk_plan
  from jaxchunk.models.lora import LoRA

  size = sizes_of(shape).chunk
  lengths = [[len(d) - 1 for d in docs] for docs in steps]
  plans = [chunk_plan(step, size) for step in lengths]
  cfg = peers_jax.config_of(SHAPES[shape], "float32")
  if way == "lora":
    cfg = dataclasses.replace(cfg, lora=LoRA(rank=_RANK.value))
  over = {}
  for name, options in peers_jax.WAYS.items():
    costs = [plan_cost(cfg, plan, **options) for plan in plans]
    needed = sum(c.model for c in costs)
    over[name] = {
      "padding": sum(c.padding for c in costs) / needed,
      "recomputed": sum(c.recomputed for c in costs) / needed,
    }
  chunks = [plan.num_chunks for plan in plans]
  return {
    "lanes": [plan.lane_chunks.tolist() for plan in plans],
    "useful_percent": useful(lengths, chunks, size, _BATCH.value),
    "flops_over_needed": over,
  }


def measure(
  runner: Runner, shape: str, way: str, names: list[str]
) -> dict[str, Any]:
  """Both parts for a shape and a way to train, and the table."""
  budget = budget_of(shape, way)
  longest_chat = sizes_of(shape).longest
  steps = documents(base_job(shape, way, names[0], "chat", longest_chat))
  tokens = [sum(len(d) - 1 for d in docs) for docs in steps]
  runner.runs = {}
  if "speed" in _WANTED.value:
    setting = best_setting(runner, shape, names, tokens)
    runner.runs = {}
    run_speed(runner, shape, way, names, setting)
  if "longest" in _WANTED.value:
    run_longest(runner, shape, way, names, budget)
  runs = list(runner.runs.values())
  skipped = {j.contestant: r["skipped"] for j, r in runs if "skipped" in r}
  speed = speed_rows(runs, tokens, "chat", rate_of_steps)
  longest = by_compiler(longest_rows(runs, budget))
  # Random weights are each contestant's own.
  gap = loss_gap(runs, "chat") if shape == "small" else None
  over = compare(speed, longest)
  met = verdicts(gap, over, _TOLERANCE, _TARGETS)
  shown = {k: f"{v:.2f}" for k, v in over.items() if isinstance(v, float)}
  print(
    f"\n{shape}, {way}: {SHAPES[shape].parameters:,} parameters; steps of "
    f"{tokens} tokens; budget {budget / 1e6:,.0f} MB\n"
    + table(names, speed, longest, skipped)
    + f"\nlargest difference of losses: {gap}; ratios {shown}; met: {met}",
    file=sys.stderr,
    flush=True,
  )
  losses = {
    j.contestant: r["losses"]
    for j, r in runs
    if j.task == "chat" and "losses" in r
  }
  return {
    "ok": met,
    "ratios": over,
    "loss_gap": gap and {"nats": gap[0], "of": gap[1], "most": _TOLERANCE},
    "speed": speed,
    "longest": longest,
    "budget_bytes": budget,
    "tokens_of_steps": tokens,
    "plan": plan_figures(shape, way, steps),
    "losses": losses,
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
  pairs = ((_WANTED, _PARTS), (_WAYS, _KINDS), (_SHAPES, public))
  for flag, known in pairs:
    if unknown := sorted(set(flag.value) - set(known)):
      raise app.UsageError(
        f"--{flag.name} has {unknown}; it may have {list(known)}"
      )
  if not chosen(_CPU + _GPU):
    raise app.UsageError(
      f"--only={_ONLY.value} fits none of {sorted({*_CPU, *_GPU})}"
    )
  if _CONVERSATIONS.value % _BATCH.value:
    raise app.UsageError(
      f"--conversations={_CONVERSATIONS.value} is no multiple of "
      f"--batch={_BATCH.value}"
    )


def main(_: list[str]) -> None:
  """Runs the contestants turn by turn and reports."""
  check_flags()
  # The contestants' processes need the memory, and as much as torch may take.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
  import jax

  gpu = jax.default_backend() == "gpu"
  figures: dict[str, Any] = {}
  met: list[bool | None] = []
  with tempfile.TemporaryDirectory() as folder:
    runner = Runner(
      pathlib.Path(folder),
      documents,
      cache=_CACHE.value,
      seconds=_SECONDS.value,
    )
    for shape in _SHAPES.value:
      if shape != "small" and not gpu and not _DRY.value:
        figures[shape] = {"not_measured": "there is no GPU"}
        print(f"\n{shape}: not measured: there is no GPU", file=sys.stderr)
        continue
      dry = shape != "small" and _DRY.value
      run_as = f"dry {shape}" if dry else shape
      names = chosen(_CPU if shape == "small" else _GPU)
      figures[shape] = {"sizes": dataclasses.asdict(sizes_of(run_as))}
      for way in _WAYS.value:
        figures[shape][way] = measure(runner, run_as, way, names)
        met += figures[shape][way]["ok"].values()
  figures = rounded(figures, 6) | {
    "steps": _STEPS.value,
    "conversations": _CONVERSATIONS.value,
    "batch": _BATCH.value,
    "seed": _SEED.value,
    "targets": _TARGETS,
    "complete": not runner.stopped,
  }
  report("chat_tail", **figures, ok=bool(met) and all(met))
  if _RECORD.value:
    device = jax.devices()[0].device_kind
    packages = ("jax", "torch", "transformers", "trl", "peft")
    record("chat_tail", figures, device, packages)


if __name__ == "__main__":
  app.run(main)
