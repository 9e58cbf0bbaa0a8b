"""Runs the ticks of a table: one program for every schedule.

Inside a `jax.shard_map`, each device of the mesh axis "stage" loops over ticks
and does what its entry of the table says. What stages send each other goes
through an inbox: at the end of a tick every device passes what it made to both
neighbours, and tables say where it goes.

Operations are loops of one or no step rather than branches: a loop's buffers
stay in place, where a branch copies them. Devices of other axes (data, FSDP,
tensor, context) have the same table, so that they take the same steps together
and may talk inside an operation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, Int32

from jaxchunk.kernels.vma import vary_like
from jaxchunk.sharding.pipeline.slots import Rows

Carry = TypeVar("Carry")

# What a device keeps between operations: slots, states, gradients.
State = Any


class Row(NamedTuple):
  """What a device does in a tick; the fields of `Rows`, as scalars."""

  kind: Int[Array, ""]
  stage: Int[Array, ""]
  part: Int[Array, ""]
  item: Int[Array, ""]
  place: Int[Array, ""]
  source: Int[Array, ""]
  kept: Int[Array, ""]
  owed: Int[Array, ""]
  state: Int[Array, ""]
  cotangent: Int[Array, ""]
  fresh: Int[Array, ""]
  from_above: Int[Array, ""]
  from_below: Int[Array, ""]
  from_self: Int[Array, ""]
  opens: Int[Array, ""]
  open_item: Int[Array, ""]
  open_to: Int[Array, ""]
  closes: Int[Array, ""]
  close_item: Int[Array, ""]
  close_to: Int[Array, ""]
  opens_back: Int[Array, ""]
  back_item: Int[Array, ""]


class StageOps(Protocol):
  """What the operations of a table do.

  `opens` and `closes`, `opens_back` run on the device of the first or last
  stage, or, where the vocabulary lies over all stages, on every device in the
  same tick: then they may talk over the stages.
  """

  def open(self, state: State, row: Row) -> Float[Array, "B C D"]:
    """The input of the first stage, for `row.open_item`."""

  def forward(
    self, state: State, x: Float[Array, "B C D"], row: Row
  ) -> tuple[State, Float[Array, "B C D"]]:
    """A stage's output, and what it leaves behind."""

  def close(
    self, state: State, y: Float[Array, "B C D"], row: Row
  ) -> tuple[State, Float[Array, "B C D"]]:
    """The loss of `row.close_item`, added up, and the cotangent of y.

    y is the output of this device's stage; the last one's is what counts.
    """

  def backward(
    self, state: State, dy: Float[Array, "B C D"], row: Row
  ) -> tuple[State, Float[Array, "B C D"]]:
    """The cotangent of a stage's input, from that of its output."""

  def open_back(
    self, state: State, dx: Float[Array, "B C D"], row: Row
  ) -> State:
    """Adds what `open` owes for `row.back_item`."""

  def weights(self, state: State, row: Row) -> State:
    """Adds the gradients that `backward` put off."""

  def update(self, state: State, batch: Int[Array, ""]) -> State:
    """Changes the weights by a batch's gradients; on all devices at once."""


def stacked(rows: Rows, ticks: int | None = None) -> Int32[np.ndarray, "T P F"]:
  """A table as one array, the fields of `Row` last.

  Args:
    rows: The table.
    ticks: Length to pad to, so that one program serves tables up to it.
  """
  fields = [np.asarray(getattr(rows, name), np.int32) for name in Row._fields]
  whole = np.stack(fields, -1)
  if ticks is not None and ticks > len(whole):
    whole = np.pad(whole, ((0, ticks - len(whole)), (0, 0), (0, 0)))
  return whole


def run_table(
  ops: StageOps,
  rows: Int32[Array, "T F"],
  ticks: Int[Array, ""],
  state: State,
  message: Float[Array, "B C D"],
  *,
  inbox: int,
  axis: str = "stage",
  split: bool = False,
  updates: Int[Array, " T"] | None = None,
) -> State:
  """Runs a table on this device, inside `jax.shard_map`.

  Args:
    ops: What the operations do.
    rows: This device's part of `stacked`.
    ticks: How many of them; the same on all devices.
    state: What `ops` begin with; its arrays vary as they will behind them.
    message: Zeros like what stages send.
    inbox: Slots for messages.
    axis: The mesh axis of the stages.
    split: Whether there are `W`.
    updates: For each tick one more than the batch whose gradients are complete
      behind it, or 0; the same on all devices.

  Returns:
    The state at the end.
  """
  devices = lax.axis_size(axis)
  down = [(n, (n + 1) % devices) for n in range(devices)]
  up = [(n, m) for m, n in down]

  def tick(number: Any, carry: tuple[State, Array]) -> tuple[State, Array]:
    state, box = carry
    row = Row(*lax.dynamic_index_in_dim(rows, number, 0, keepdims=False))

    def open_first(box: Array) -> Array:
      return _put(box, ops.open(state, row), row.open_to)

    box = once(row.opens, open_first, box)
    # Out here: loops that hold the box would have it copied.
    came = lax.dynamic_index_in_dim(box, row.source, 0, keepdims=False)

    def forward(carry: Any) -> Any:
      return ops.forward(carry[0], came, row)

    def backward(carry: Any) -> Any:
      return ops.backward(carry[0], came, row)

    state, sent = once(row.kind == 1, forward, (state, message))

    def close(carry: tuple[State, Array]) -> tuple[State, Array]:
      state, box = carry
      state, dy = ops.close(state, sent, row)
      return state, _put(box, dy, row.close_to)

    state, box = once(row.closes, close, (state, box))
    state, sent = once(row.kind == 2, backward, (state, sent))
    state = once(
      row.opens_back, lambda state: ops.open_back(state, sent, row), state
    )
    if split:
      state = once(row.kind == 3, lambda state: ops.weights(state, row), state)
    if updates is not None:
      batch = lax.dynamic_index_in_dim(updates, number, 0, keepdims=False)
      state = once(batch > 0, lambda state: ops.update(state, batch - 1), state)
    box = _put(box, sent, row.from_self)
    if devices > 1:
      above = lax.ppermute(sent, axis, down)
      below = lax.ppermute(sent, axis, up)
      box = _put(_put(box, above, row.from_above), below, row.from_below)
    return state, box

  # One more, for what nobody wants.
  box = jnp.zeros((inbox + 1, *message.shape), message.dtype)
  box = vary_like(box, message, rows)
  message = vary_like(message, box)
  return lax.fori_loop(0, ticks, tick, (state, box))[0]


def once(
  flag: Array, function: Callable[[Carry], Carry], carry: Carry
) -> Carry:
  """`function(carry)` if the flag is set: a loop of one step, or none.

  Unlike a branch it leaves buffers in place, and unlike a choice it costs
  nothing where the flag is not set.
  """

  def body(_: Any, carry: Carry) -> Carry:
    new = function(carry)
    return jax.tree.map(vary_like, new, carry)

  return lax.fori_loop(0, jnp.asarray(flag, jnp.int32), body, carry)


def _put(box: Array, value: Array, slot: Array) -> Array:
  value = vary_like(value.astype(box.dtype), box)
  return lax.dynamic_update_index_in_dim(box, value, slot, 0)
