"""What surrounds a run: signals to stop, and traces of a few steps."""

import collections
import signal
import threading
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxchunk.training import distributed


class StopSignal:
  """Turns the first SIGTERM or SIGINT into a wish to stop after the step.

  The second one does what it would have done without us. Outside the main
  thread, where Python takes no signals, this does nothing.

  Attributes:
    received: The signal's name, or `None`.
  """

  def __init__(self) -> None:
    self.received: str | None = None
    self._previous: dict[signal.Signals, Any] = {}

  def _handle(self, number: int, frame: FrameType | None) -> None:
    self.received = signal.Signals(number).name
    self._restore()
    logging.warning(
      "%s: saving after this step, then stopping; again to stop at once",
      self.received,
    )

  def _restore(self) -> None:
    for number, handler in self._previous.items():
      signal.signal(number, handler)
    self._previous = {}

  def __enter__(self) -> Self:
    if threading.current_thread() is threading.main_thread():
      for number in (signal.SIGTERM, signal.SIGINT):
        self._previous[number] = signal.signal(number, self._handle)
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self._restore()


class SharedStop:
  """A wish of any process to stop, known to all at the same step.

  Each step brings the signals of all processes together on the devices, and
  the answer comes with the step's metrics. Alone, a process knows at once.

  Args:
    signals: What this process received.
    mesh: All devices; `None` is one.
  """

  def __init__(self, signals: StopSignal, mesh: Mesh | None):
    self._signals = signals
    self._asked: collections.deque[Array] = collections.deque()
    self._received: str | None = None
    self._mesh = mesh if distributed.count() > 1 else None
    if self._mesh is not None:
      everywhere = NamedSharding(self._mesh, PartitionSpec())
      self._largest = jax.jit(jnp.max, out_shardings=everywhere)

  @property
  def received(self) -> str | None:
    """The signal's name, or `None`; the same in all processes."""
    return self._signals.received if self._mesh is None else self._received

  def ask(self) -> None:
    """Asks the others; each does after dispatching a step."""
    if self._mesh is None:
      return
    name = self._signals.received
    number = np.int32(0 if name is None else signal.Signals[name])
    apart = NamedSharding(self._mesh, PartitionSpec(self._mesh.axis_names))
    numbers = jax.make_array_from_callback(
      (self._mesh.size,), apart, lambda where: np.full(1, number)
    )
    self._asked.append(self._largest(numbers))

  def settle(self) -> None:
    """Waits for the answer to the oldest question, when its step is done."""
    if self._asked and (number := int(self._asked.popleft())):
      self._received = signal.Signals(number).name


class Profiler:
  """Traces steps `first` to `last`, both included, for xprof.

  Args:
    folder: Where the trace goes.
    steps: `(first, last)`, or `None` for no trace.
  """

  def __init__(self, folder: Path, steps: tuple[int, int] | None):
    self._folder = folder
    self._steps = steps
    self._running = False

  def before(self, step: int) -> None:
    """Starts the trace if this step is the first of it."""
    if self._steps is not None and step == self._steps[0]:
      jax.profiler.start_trace(self._folder)
      self._running = True

  def ends_with(self, step: int) -> bool:
    """Whether this is the last step of a running trace."""
    return self._running and self._steps is not None and step == self._steps[1]

  def stop(self) -> None:
    """Writes the trace, if one is running; its work must be done."""
    if self._running:
      jax.profiler.stop_trace()
      self._running = False
      logging.info("Wrote a trace to %s; look at it with xprof", self._folder)

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.stop()
