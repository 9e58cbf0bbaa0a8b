"""When operations of a table really ran: what a picture of a run is drawn from.

A program with `TimedOps` tells the host when each operation begins and when its
result is there. That costs a call to the host twice an operation, so it is for
looking at, not for training.
"""

import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import io_callback
from jaxtyping import Array

from jaxchunk.kernels.vma import vary_like
from jaxchunk.sharding.pipeline.executor import Row, StageOps, State
from jaxchunk.sharding.pipeline.table import Table
from jaxchunk.sharding.pipeline.timeline import Span, Timeline


class Clock:
  """Notes of operations on the devices of this process, in seconds."""

  def __init__(self) -> None:
    self._lock = threading.Lock()
    self._notes: list[tuple[int, bool, bool, float]] = []

  def clear(self) -> None:
    """Forgets all, so that the next run is noted alone."""
    self._notes.clear()

  def note(
    self, device: Any, group: Any, head: Any, ends: Any, _: Any
  ) -> np.ndarray:
    """Called by a program: an operation begins or ends now."""
    now = time.perf_counter()
    if not int(group):
      with self._lock:
        self._notes.append((int(device), bool(head), bool(ends), now))
    return np.zeros((), np.float32)

  def timeline(self, table: Table) -> Timeline:
    """What was noted of one run of a table, from its first operation on.

    Raises:
      ValueError: That is not what the table has.
    """
    spans = []
    start = min((note[3] for note in self._notes), default=0.0)
    for device, order in enumerate(table.orders()):
      for head in (False, True):
        times = [n[3] - start for n in self._notes if n[:2] == (device, head)]
        ops = [op for op in order if not head or _closes(table, op)]
        if head and len(times) != 2 * len(ops):
          # All devices have a part of each head: it is drawn on one.
          continue
        if len(times) != 2 * len(ops):
          raise ValueError(
            f"device {device} noted {len(times) // 2} operations of the "
            f"table's {len(ops)}; run it once, behind `clear`"
          )
        spans += [
          Span(device, "head" if head else op.kind, op.stage, op.item, a, b)
          for op, a, b in zip(ops, times[::2], times[1::2], strict=True)
        ]
    return Timeline(table.placement.devices, tuple(spans))


def _closes(table: Table, op: Any) -> bool:
  """Whether the head runs behind an operation."""
  return op.kind == "F_keep" and op.stage == table.placement.stages - 1


class TimedOps:
  """`StageOps` that tell a clock when they begin and end.

  Of several groups of devices the first is noted.

  Attributes:
    ops: What runs.
    clock: Who is told.
    axis: The mesh axis of the stages.
    others: The other axes.
  """

  def __init__(
    self, ops: StageOps, clock: Clock, axis: str, others: tuple[str, ...]
  ):
    self.ops, self.clock, self.axis, self.others = ops, clock, axis, others

  def open(self, state: State, row: Row) -> Array:
    """See `StageOps`."""
    return self.ops.open(state, row)

  def forward(self, state: State, x: Array, row: Row) -> tuple[State, Array]:
    """See `StageOps`."""
    state, y = self.ops.forward(state, self._tell(x), row)
    return state, self._tell(y, ends=True)

  def close(self, state: State, y: Array, row: Row) -> tuple[State, Array]:
    """See `StageOps`."""
    state, dy = self.ops.close(state, self._tell(y, head=True), row)
    return state, self._tell(dy, head=True, ends=True)

  def backward(self, state: State, dy: Array, row: Row) -> tuple[State, Array]:
    """See `StageOps`."""
    state, dx = self.ops.backward(state, self._tell(dy), row)
    return state, self._tell(dx, ends=True)

  def open_back(self, state: State, dx: Array, row: Row) -> State:
    """See `StageOps`."""
    return self.ops.open_back(state, dx, row)

  def weights(self, state: State, row: Row) -> State:
    """See `StageOps`."""
    state = self._tell_all(state)
    return self._tell_all(self.ops.weights(state, row), ends=True)

  def update(self, state: State, batch: Array) -> State:
    """See `StageOps`."""
    return self.ops.update(state, batch)

  def _tell_all(self, state: State, *, ends: bool = False) -> State:
    """A state whose arrays are all there when the host is told.

    W has no input or output but the state. Its largest array waits in turn:
    what backward passes read.
    """
    leaves, treedef = jax.tree.flatten(state)
    number = max(range(len(leaves)), key=lambda n: leaves[n].size)
    firsts = [a[(0,) * a.ndim].astype(jnp.float32) for a in leaves if a.size]
    leaves[number] = self._tell(leaves[number], sum(firsts), ends=ends)
    return jax.tree.unflatten(treedef, leaves)

  def _tell(
    self,
    x: Array,
    reads: Any = None,
    *,
    head: bool = False,
    ends: bool = False,
  ) -> Array:
    """x, which is there only when the host was told that what is read is."""
    sizes = [lax.axis_size(name) for name in self.others]
    group: Any = jnp.zeros((), jnp.int32)
    for name, size in zip(self.others, sizes, strict=True):
      group = group * size + lax.axis_index(name)
    first = x[(0,) * x.ndim] if reads is None else reads
    zero = io_callback(
      self.clock.note,
      jax.ShapeDtypeStruct((), jnp.float32),
      lax.axis_index(self.axis),
      group,
      jnp.asarray(head),
      jnp.asarray(ends),
      first,
    )
    return x + vary_like(zero, x).astype(x.dtype)
