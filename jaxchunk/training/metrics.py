"""`metrics.jsonl`, TensorBoard events, and the count of compilations."""

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
from tensorboardX import SummaryWriter

FILE_NAME = "metrics.jsonl"
CLOCKED = frozenset(
  {
    "compile_seconds",
    "compiled",
    "compiles",
    "eval_seconds",
    "hfu",
    "input_wait",
    "mfu",
    "peak_flops",
    "peak_source",
    "save_stall",
    "seconds",
    "startup_compiled",
    "startup_seconds",
    "tokens_per_sec",
    "wall_seconds",
    "warmup_seconds",
  }
)
"""Metrics that equal runs do not share: they depend on clock and machine."""

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


def read(workdir: Path) -> Iterator[dict[str, Any]]:
  """The lines of `metrics.jsonl`, in order, but for one torn by a crash."""
  path = workdir / FILE_NAME
  if not path.exists():
    return
  with path.open(encoding="utf-8") as file:
    for line in file:
      try:
        values = json.loads(line)
      except json.JSONDecodeError:
        continue
      if isinstance(values, dict) and "step" in values:
        yield values


class MetricsWriter:
  """Appends steps to `metrics.jsonl` and to TensorBoard's event files.

  Args:
    workdir: Where the files are.
    last_step: The step a run resumes after, 0 for a new one. Lines beyond it
      belong to steps that will be done again, and are dropped.
  """

  def __init__(self, workdir: Path, *, last_step: int):
    path = workdir / FILE_NAME
    kept = [line for line in read(workdir) if line["step"] <= last_step]
    # Replaced whole: a crash here must not cost the metrics of a long run.
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
      for values in kept:
        file.write(_to_line(values))
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
    self._file = path.open("a", encoding="utf-8")
    self._events = SummaryWriter(
      str(workdir / "tensorboard"), purge_step=last_step + 1
    )

  def write(self, values: Mapping[str, Any]) -> None:
    """Appends the values of one step, `values["step"]`, and flushes."""
    self._file.write(_to_line(values))
    self._file.flush()
    for name, value in values.items():
      if name != "step" and isinstance(value, int | float):
        self._events.add_scalar(name, value, values["step"])
    for name in ("startup_compiled", "compiled"):
      for program, seconds in values.get(name, []):
        text = f"{program}: {seconds:.2f} s"
        self._events.add_text(name, text, values["step"])
    self._events.flush()

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self._file.close()
    self._events.close()


def _to_line(values: Mapping[str, Any]) -> str:
  """One line of JSON; what is not finite becomes null, as JSON has no NaN."""
  finite = {
    name: None if isinstance(v, float) and not math.isfinite(v) else v
    for name, v in values.items()
  }
  return json.dumps(finite, allow_nan=False) + "\n"


@dataclasses.dataclass(frozen=True)
class CompileEvent:
  """A program that XLA compiled, or fetched from its cache.

  Attributes:
    name: Of the function.
    seconds: Lowering is not in it.
  """

  name: str
  seconds: float


class CompileCounter:
  """Counts the programs that XLA compiles while it is entered."""

  def __init__(self) -> None:
    self._events: list[CompileEvent] = []

  def take(self) -> int:
    """How many since the last call."""
    return len(self.take_events())

  def take_events(self) -> list[CompileEvent]:
    """Those since the last call."""
    events, self._events = self._events, []
    return events

  def add_to(self, values: dict[str, Any], *, timed: bool = True) -> None:
    """Adds those since the last call to the metrics of a step.

    `compiles` is their number, and `compiled`, which is there if they are,
    lists `[name, seconds]`.

    Args:
      values: The metrics.
      timed: Whether they were compiled within the step's `seconds`; then
        `compile_seconds` is how much of these.
    """
    events = self.take_events()
    values["compiles"] = values.get("compiles", 0) + len(events)
    if timed:
      spent = sum(event.seconds for event in events)
      values["compile_seconds"] = values.get("compile_seconds", 0.0) + spent
    if events:
      values.setdefault("compiled", []).extend(as_lists(events))

  def _listen(
    self, event: str, duration_secs: float, **context: str | int
  ) -> None:
    if event == _COMPILE_EVENT:
      name = str(context.get("fun_name", "unknown"))
      self._events.append(CompileEvent(name, duration_secs))

  def __enter__(self) -> Self:
    jax.monitoring.register_event_duration_secs_listener(self._listen)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    jax.monitoring.unregister_event_duration_listener(self._listen)


def as_lists(events: Iterable[CompileEvent]) -> list[list[str | float]]:
  """Events as `metrics.jsonl` holds them: `[name, seconds]` each."""
  return [[event.name, event.seconds] for event in events]
