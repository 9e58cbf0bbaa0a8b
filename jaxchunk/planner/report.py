"""A plan for people, and as plain values."""

import dataclasses
import sys
from collections.abc import Iterator
from typing import Any

from jaxchunk.planner.candidates import Candidate, Request, config_of
from jaxchunk.planner.plan import Choice, Plan
from jaxchunk.planner.seconds import EFFICIENCY
from jaxchunk.training.config import LayoutConfig, TrainConfig

_GIB = 2**30


def progress(line: str) -> None:
  """Tells on stderr what goes on."""
  print(line, file=sys.stderr, flush=True)


def table(plan: Plan, most: int = 10) -> str:
  """The best candidates, one a line, the fastest first.

  Args:
    plan: From `make_plan`.
    most: Lines, but for those of what was refused.
  """
  # Compiled ones are shown wherever they are.
  lines = [_head(plan)]
  lines += [
    _line(c)
    for n, c in enumerate(plan.choices)
    if n < most or c.compiled is not None
  ]
  if plan.refused:
    lines.append("by formula these fit, compiled they do not:")
    lines += [_line(c) for c in plan.refused]
  return "\n".join(lines)


def text(plan: Plan, most: int = 10) -> str:
  """A plan's table, what its best is made of, and how to run it."""
  best = plan.best
  parts = [table(plan, most), f"best: {best.candidate}", details(best)]
  return "\n\n".join([*parts, command(plan, best)])


def _head(plan: Plan) -> str:
  request = plan.request
  lengths, machine = request.lengths, request.machine
  return (
    f"{lengths.sequences:,} sequences, {lengths.tokens:,} tokens, the longest "
    f"{lengths.longest:,}; batches of {request.batch_tokens:,}\n"
    f"{machine.count} x {machine.target.kind}, {request.limit / _GIB:.2f} GiB "
    f"of each; {plan.weighed:,} candidates, {len(plan.choices):,} fit\n"
    f"products at {EFFICIENCY:.0%} of {machine.flops / 1e12:.0f} TFLOP/s; "
    "times were not measured\n"
    f"{'predicted':>9} {'compiled':>9} {'step s':>8} {'tokens/s':>9} "
    f"{'MFU':>4} {'pad':>4}  candidate"
  )


def _line(choice: Choice) -> str:
  step, peak = choice.step, choice.compiled_peak
  compiled = "-" if peak is None else f"{peak / _GIB:.2f}"
  return (
    f"{choice.predicted.peak / _GIB:9.2f} {compiled:>9} {step.seconds:8.3g} "
    f"{step.tokens_per_second:9,.0f} {step.flops_share:4.0%} "
    f"{step.padding:4.0%}  {choice.candidate}"
  )


def details(choice: Choice) -> str:
  """What the memory of a candidate is made of, and each program's."""
  lines = ["while the largest lane runs, by formula:"]
  for name, size in choice.predicted.parts.items():
    lines.append(f"  {name:24} {size / _GIB:8.2f} GiB")
  if choice.predicted.host:
    size = choice.predicted.host
    lines.append(f"  {'(in host memory)':24} {size / _GIB:8.2f} GiB")
  lines.append(f"{'program':26} {'predicted':>9} {'compiled':>9}")
  for name, size in choice.predicted.programs.items():
    need = (choice.compiled or {}).get(name)
    compiled = "-" if need is None else f"{need.peak / _GIB:.2f}"
    lines.append(f"  {name:24} {size / _GIB:9.2f} {compiled:>9}")
  return "\n".join(lines)


def flags_of(request: Request, candidate: Candidate) -> list[str]:
  """How `scripts/train.py` is told to run so, but for the model and data.

  Raises:
    ValueError: A run cannot; see `candidates.layout_config`.
  """
  config = config_of(request, candidate)
  return [
    *_changed("config.layout", config.layout, LayoutConfig()),
    *_changed("config.train", config.train, TrainConfig()),
    f"--config.data.batch_tokens={config.data.batch_tokens}",
    f"--config.data.max_document_tokens={config.data.max_document_tokens}",
  ]


def _changed(name: str, config: Any, default: Any) -> Iterator[str]:
  """Flags of what is not as by default, and of what always matters."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if value != getattr(default, field.name) or field.name == "chunk_size":
      yield f"--{name}.{field.name}={value}"


def command(plan: Plan, choice: Choice) -> str:
  """The command that runs so."""
  flags = flags_of(plan.request, choice.candidate)
  start = "python scripts/train.py --config=configs/NAME.py --workdir=DIR"
  return " \\\n  ".join([start, *flags])


def as_json(plan: Plan, most: int = 50) -> dict[str, Any]:
  """A plan as plain values.

  Args:
    plan: From `make_plan`.
    most: Choices to tell.
  """
  request = plan.request
  return {
    "machine": request.machine.name,
    "devices": request.machine.count,
    "limit_bytes": request.limit,
    "longest": request.lengths.longest,
    "batch_tokens": request.batch_tokens,
    "efficiency": EFFICIENCY,
    "candidates": plan.weighed,
    "fitting": len(plan.choices),
    "best": _values(plan.request, plan.best),
    "choices": [_values(request, c) for c in plan.choices[:most]],
    "refused": [_values(request, c) for c in plan.refused],
  }


def _values(request: Request, choice: Choice) -> dict[str, Any]:
  candidate, compiled = choice.candidate, choice.compiled
  return {
    "name": str(candidate),
    "layout": candidate.layout.shape,
    "strategy": candidate.strategy,
    "chunk_size": candidate.chunk_size,
    "live_chunks": candidate.live_chunks,
    "keep": candidate.keep,
    "kv_memory": candidate.kv_memory,
    "schedule": candidate.schedule,
    "predicted_bytes": choice.predicted.programs,
    "parts_bytes": choice.predicted.parts,
    "host_bytes": choice.predicted.host,
    "compiled_bytes": compiled
    and {name: need.peak for name, need in compiled.items()},
    "step_seconds": choice.step.seconds,
    "tokens_per_second": choice.step.tokens_per_second,
    "flags": flags_of(request, candidate),
  }
