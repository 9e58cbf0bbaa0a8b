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


def step_parts(line: Mapping[str, Any]) -> dict[str, float]:
  """The seconds of one line of the metrics, by the names of `PARTS`.

  Compute is what is left of the wall time when all else is taken off, at most
  the step's `seconds`; FLOPs divide it. Where a line has no `wall_seconds` it
  is taken to be the sum of what the line knows.

  Args:
    line: Fields may be missing or `None`: they count 0.
  """

  def get(name: str) -> float:
    value = line.get(name)
    if isinstance(value, int | float) and math.isfinite(value):
      return max(float(value), 0.0)
    return 0.0

  outside = {
    "input wait": get("input_wait"),
    "save stall": get("save_stall"),
    "compile in steps": get("compile_seconds"),
    "evaluation": get("eval_seconds"),
    "start and warm-up": get("startup_seconds") + get("warmup_seconds"),
  }
  wall = get("wall_seconds") or sum(
    get(name) for name in ("seconds", "save_stall", "eval_seconds")
  )
  left = max(wall - sum(outside.values()), 0.0)
  compute = min(left, get("seconds"))
  hardware = get("hardware_flops")
  if hardware:
    useful = compute * min(get("model_flops") / hardware, 1)
    padding = min(compute * get("padding_flops") / hardware, compute - useful)
    divided = {
      "useful compute": useful,
      "padding": padding,
      "recomputation": compute - useful - padding,
    }
  else:
    divided = {"undivided compute": compute}
  return {**divided, **outside, "other": left - compute}


def breakdown(lines: Lines) -> dict[str, float]:
  """The seconds of all lines, in the order of `PARTS`, without empty parts."""
  total = dict.fromkeys((part.name for part in PARTS), 0.0)
  for line in lines:
    for name, seconds in step_parts(line).items():
      total[name] += seconds
  return {name: seconds for name, seconds in total.items() if seconds > 0}


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
