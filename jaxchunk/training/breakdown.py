"""Where each second of a run went, from the lines of its metrics."""

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Lines = Sequence[Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class Part:
  """A kind of time.

  Attributes:
    name: What it is.
    colour: In pictures.
    meaning: In a sentence.
  """

  name: str
  colour: str
  meaning: str


# Okabe and Ito's palette, which colour-blind readers can tell apart.
PARTS = (
  Part(
    "useful compute",
    "#0072B2",
    "Forward and backward of real tokens: what the MFU counts.",
  ),
  Part(
    "recomputation",
    "#56B4E9",
    "Forward once more, to save memory. More live chunks mean less of it.",
  ),
  Part(
    "padding",
    "#E69F00",
    "The same work on padding. Larger batches or smaller chunks pad less.",
  ),
  Part(
    "undivided compute",
    "#8DA0CB",
    "Steps without FLOPs in their metrics, written by an older version.",
  ),
  Part(
    "input wait",
    "#D55E00",
    "The loop waited for the next batch; the device may have been at work in "
    "a part of that time.",
  ),
  Part("save stall", "#CC79A7", "The loop waited because of saving."),
  Part(
    "compile in steps",
    "#F0E442",
    "Programs compiled after the warm-up: the update and the evaluation the "
    "first time; anything later is a surprise.",
  ),
  Part("evaluation", "#009E73", "Forward on the held-out documents."),
  Part(
    "start and warm-up",
    "#999999",
    "Reading the index and the checkpoint, and compiling all programs for "
    "chunks, once a start.",
  ),
  Part(
    "other", "#666666", "Metrics, the progress bar, saving that is not above."
  ),
)


def breakdown(lines: Lines) -> dict[str, float]:
  """The seconds of some lines by the names of `PARTS`, empty ones left out.

  Compute is the steps' `seconds` without the waits in them; FLOPs divide it. A
  wait belongs to the step that it was for, but falls into the time of the step
  before, which is still running: over many lines this does not matter.

  Args:
    lines: Of `metrics.jsonl`. Fields may be missing or `None`: they count 0.
  """

  def total(name: str) -> float:
    return sum(_number(line, name) for line in lines)

  outside = {
    "save stall": total("save_stall"),
    "evaluation": total("eval_seconds"),
    "start and warm-up": total("startup_seconds") + total("warmup_seconds"),
  }
  inside = {
    "input wait": total("input_wait"),
    "compile in steps": total("compile_seconds"),
  }
  seconds = total("seconds")
  known = seconds + sum(outside.values())
  # Lines of older versions have no wall time.
  wall = sum(
    _number(line, "wall_seconds") or _number(line, "seconds") for line in lines
  )
  # Less than nothing is left where a part of `outside` was in `seconds`.
  left = wall - known if total("wall_seconds") else 0.0
  compute = max(seconds - sum(inside.values()) + min(left, 0.0), 0.0)
  parts = {
    **_divide(lines, compute),
    **inside,
    **outside,
    "other": max(left, 0.0),
  }
  return {p.name: parts[p.name] for p in PARTS if parts.get(p.name)}


def _number(line: Mapping[str, Any], name: str) -> float:
  """A field, or 0 if it is missing, not a number, or less."""
  value = line.get(name)
  if isinstance(value, int | float) and math.isfinite(value):
    return max(float(value), 0.0)
  return 0.0


def _divide(lines: Lines, compute: float) -> dict[str, float]:
  """Compute by what it was for, in proportion to FLOPs."""
  counted = [line for line in lines if _number(line, "hardware_flops")]
  seconds, hardware, model, padding = (
    sum(_number(line, name) for line in counted)
    for name in ("seconds", "hardware_flops", "model_flops", "padding_flops")
  )
  whole = sum(_number(line, "seconds") for line in lines)
  if not whole or not hardware:
    return {"undivided compute": compute}
  divided = compute * seconds / whole
  return {
    "useful compute": divided * model / hardware,
    "padding": divided * padding / hardware,
    "recomputation": divided * (hardware - model - padding) / hardware,
    "undivided compute": compute - divided,
  }


@dataclasses.dataclass(frozen=True)
class Compiled:
  """A compiled program in the metrics.

  Attributes:
    step: Of the line.
    name: Of the function.
    seconds: How long it took.
    expected: Before the first step after a start.
  """

  step: int
  name: str
  seconds: float
  expected: bool


def compile_events(lines: Lines) -> Iterator[Compiled]:
  """All that the metrics know of compilations, in order."""
  for line in lines:
    for field in ("startup_compiled", "compiled"):
      for event in line.get(field) or []:
        match event:
          case [str(name), int() | float() as seconds]:
            expected = field == "startup_compiled"
            yield Compiled(line["step"], name, float(seconds), expected)
