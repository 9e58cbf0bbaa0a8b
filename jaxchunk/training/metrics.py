"""`metrics.jsonl`, TensorBoard events, and the count of compilations."""

import contextlib
import dataclasses
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
from tensorboardX import summary
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

from jaxchunk.training.workdir import write_errors

FILE_NAME = "metrics.jsonl"
DOCUMENTS_NAME = "documents.jsonl"
# Generated modules, whose names no checker sees.
_EVENT: Any = event_pb2
_SUMMARY: Any = summary_pb2
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


def read(workdir: Path, file_name: str = FILE_NAME) -> Iterator[dict[str, Any]]:
  """The lines of a file of steps, in order, but for one torn by a crash."""
  path = workdir / file_name
  if not path.exists():
    return
  with path.open(encoding="utf-8", errors="replace") as file:
    for line in file:
      try:
        values = json.loads(line)
      except json.JSONDecodeError:
        continue
      if isinstance(values, dict) and "step" in values:
        yield values


class StepLog:
  """A file with a line of JSON for each step, cut back when a run resumes.

  A line is with the system when `write` returns, so that killing the process
  does not lose it.

  Args:
    workdir: Where the file is.
    file_name: Its name.
    last_step: The step a run resumes after, 0 for a new one. Lines beyond it
      belong to steps that will be done again, and are dropped.

  Raises:
    OSError: The file cannot be written; as it was before, it is untouched.
  """

  def __init__(self, workdir: Path, file_name: str, *, last_step: int):
    path = workdir / file_name
    kept = (v for v in read(workdir, file_name) if v["step"] <= last_step)
    # Replaced whole: a crash here must not cost the metrics of a long run.
    temporary = path.with_suffix(".tmp")
    with temporary.open("w", encoding="utf-8") as file:
      for values in kept:
        file.write(_to_line(values))
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
    self._path = path
    # Without a buffer: what could not be written is not tried again at the
    # end, where the error would hide the first one.
    self._file = path.open("ab", buffering=0)

  def write(self, values: Mapping[str, Any]) -> None:
    """Appends a line.

    Raises:
      OSError: The disk is full, or the file is gone.
    """
    if os.fstat(self._file.fileno()).st_nlink == 0:
      raise FileNotFoundError(f"{self._path} was removed or replaced")
    data = _to_line(values).encode()
    while data:
      # A disk that fills up takes a part, and fails at the next call.
      data = data[self._file.write(data) :]

  def close(self) -> None:
    """Closes the file."""
    self._file.close()


class MetricsWriter:
  """Appends steps to `metrics.jsonl` and to TensorBoard's event files.

  Args:
    workdir: Where the files are.
    last_step: The step a run resumes after, 0 for a new one.
    documents: Whether to write `documents.jsonl` too.

  Raises:
    CheckpointError: They cannot be written.
  """

  def __init__(self, workdir: Path, *, last_step: int, documents: bool = False):
    self._workdir = workdir
    with write_errors(workdir):
      self._open(workdir, last_step, documents)

  def _open(self, workdir: Path, last_step: int, documents: bool) -> None:
    self._metrics = StepLog(workdir, FILE_NAME, last_step=last_step)
    self._documents = None
    if documents:
      self._documents = StepLog(workdir, DOCUMENTS_NAME, last_step=last_step)
    folder = workdir / "tensorboard"
    folder.mkdir(exist_ok=True)
    # tensorboardX's own writer has a thread, which dies of the first error
    # and leaves the loop waiting for it for ever. Names have seconds, and a
    # file of the same name would be emptied.
    self._events = EventsWriter(str(folder / "events"), f".{os.getpid()}")
    log = _EVENT.SessionLog(status=_EVENT.SessionLog.START)
    self._add_event(step=last_step + 1, session_log=log)

  def write(
    self, values: Mapping[str, Any], documents: Sequence[int] = ()
  ) -> None:
    """Appends the values of one step, `values["step"]`, and flushes.

    Args:
      values: Names and numbers.
      documents: What was trained on, by document id.

    Raises:
      CheckpointError: The disk is full, or the files are gone.
    """
    summaries = [
      summary.scalar(name, value).value[0]
      for name, value in values.items()
      if name != "step" and isinstance(value, int | float)
    ]
    for name in ("startup_compiled", "compiled"):
      for program, seconds in values.get(name, []):
        text = summary.text(name, f"{program}: {seconds:.2f} s")
        summaries.append(text.value[0])
    with write_errors(self._workdir):
      if self._documents is not None:
        line = {"step": values["step"], "epoch": values["epoch"]}
        self._documents.write({**line, "documents": list(documents)})
      self._metrics.write(values)
      self._add_event(
        step=values["step"], summary=_SUMMARY.Summary(value=summaries)
      )
      self._events.flush()

  def _add_event(self, **fields: Any) -> None:
    self._events.write_event(_EVENT.Event(wall_time=time.time(), **fields))

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self._metrics.close()
    if self._documents is not None:
      self._documents.close()
    # What it buffered cannot be written to a disk that has failed.
    with contextlib.suppress(OSError):
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
