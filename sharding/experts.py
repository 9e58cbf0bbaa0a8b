"""Experts over the devices of a mesh axis: rows sent to them, or they fetched.

Experts lie on the devices of an axis in order, E / P on each, always in the
same place (Hwang et al., Tutel, arXiv 2206.03382). A layer then chooses what
travels: its tokens, there and back (`Exchange`), or the matrices of the
experts (`Gather`). No parameter moves when that choice changes.

Dropless rows go in two steps: first how many there are for each expert, then
the rows, in buffers with room for the worst case. Any routing is exact and
nothing is compiled twice, and a device holds P buffers for what on average
fills one. (`ragged_all_to_all` would need no such room, but the CPU has none.)
Where experts have a capacity, the buffers are that.

All functions run inside `jax.shard_map(..., check_vma=True)`.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxchunk.kernels.vma import vary_like


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exchange:
  """Tokens go to the devices that have their experts, and results back.

  Attributes:
    axis: Of the mesh; experts are split over it.
  """

  axis: str = "expert"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gather:
  """The matrices of all experts come to every device for the layer.

  Attributes:
    axis: Of the mesh; experts are split over it.
  """

  axis: str = "expert"


Across = Exchange | Gather


class Ticket(NamedTuple):
  """What leads rows back; see `send_rows`.

  Attributes:
    home: Place of each row of this device in the buffers that it sent.
    inverse: Place of each row that came among the sorted ones, `[P*R]`.
  """

  home: Int[Array, " M"]
  inverse: Int[Array, " PR"]


def gather_experts(
  w: Float[Array, "e D F"], across: Gather
) -> Float[Array, "E D F"]:
  """The matrices of all experts; gradients go to their owners."""
  return lax.all_gather(w, across.axis, tiled=True)


def send_rows(
  rows: tuple[Array, ...],
  counts: Int[Array, " E"],
  *,
  axis: str,
  room: int,
) -> tuple[tuple[Array, ...], Int[Array, " e"], Ticket]:
  """Sends rows to the devices that have their experts.

  Args:
    rows: Arrays `[M, ...]` whose rows belong together, sorted by expert.
    counts: Rows of each expert; those behind them stay.
    axis: Of the mesh; P devices.
    room: R, rows that a device can send to another: at least the largest
      number that any one does.

  Returns:
    Arrays `[P*R, ...]` of what came, sorted by this device's experts, with
    zeros behind; the rows of each of them; and what `return_rows` needs.
  """
  devices = lax.axis_size(axis)
  counts_PE = counts.reshape(devices, -1)
  to_send = counts_PE.sum(1)
  start = jnp.cumsum(to_send) - to_send
  at = jnp.arange(room)
  size = rows[0].shape[0]
  index_PR = jnp.where(
    at[None] < to_send[:, None], start[:, None] + at[None], size
  )
  came = tuple(
    lax.all_to_all(_rows_at(a, index_PR), axis, 0, 0, tiled=True) for a in rows
  )
  came_PE = lax.all_to_all(counts_PE, axis, 0, 0, tiled=True)
  # A row is of the first expert whose rows end behind it, or of none.
  ends_PE = jnp.cumsum(came_PE, axis=1)
  expert_PR = (at[None, :, None] >= ends_PE[:, None]).sum(-1)
  order = jnp.argsort(expert_PR.reshape(-1), stable=True)
  here = tuple(
    _rows_at(a.reshape(-1, *a.shape[2:]), order, unique=True) for a in came
  )
  device = (jnp.arange(size)[:, None] >= jnp.cumsum(to_send)[None]).sum(-1)
  offset = _rows_at(start, device)
  home = jnp.where(
    device < devices,
    device * room + jnp.arange(size) - offset,
    devices * room,
  )
  return here, came_PE.sum(0), Ticket(home, inverse_permutation(order))


def return_rows(
  y: Float[Array, "PR D"], ticket: Ticket, *, axis: str
) -> Float[Array, "M D"]:
  """Brings rows back to where they were sent from; those that stayed are 0."""
  devices = lax.axis_size(axis)
  y = _rows_at(y, ticket.inverse, unique=True)
  y = y.reshape(devices, -1, *y.shape[1:])
  y = lax.all_to_all(y, axis, 0, 0, tiled=True)
  return _rows_at(y.reshape(-1, *y.shape[2:]), ticket.home)


def send_slots(x: Float[Array, "E C D"], *, axis: str) -> Float[Array, "e S D"]:
  """Full buffers of all experts to those that have them: `S = P * C`."""
  return lax.all_to_all(x, axis, 0, 1, tiled=True)


def return_slots(
  y: Float[Array, "e S D"], *, axis: str
) -> Float[Array, "E C D"]:
  """The way back of `send_slots`."""
  return lax.all_to_all(y, axis, 1, 0, tiled=True)


def inverse_permutation(order: Int[Array, " N"]) -> Int[Array, " N"]:
  """Where each number is in a permutation; cheaper than to sort again."""
  places = vary_like(jnp.zeros_like(order), order)
  numbers = jnp.arange(order.shape[0], dtype=order.dtype)
  return places.at[order].set(
    vary_like(numbers, order), unique_indices=True, mode="promise_in_bounds"
  )


def _rows_at(a: Array, index: Array, *, unique: bool = False) -> Array:
  """Rows of an array; 0 where the index is behind its end."""
  return a.at[index].get(mode="fill", fill_value=0, unique_indices=unique)


def check_split(num_experts: int, devices: int) -> None:
  """Whether experts can be dealt out evenly.

  Raises:
    ValueError: They cannot; names the nearest number of devices that can.
  """
  if num_experts % devices:
    fits = [n for n in range(devices, 0, -1) if num_experts % n == 0]
    raise ValueError(
      f"moe.num_experts={num_experts} cannot be split over {devices} devices; "
      f"the nearest number that can is {fits[0]}"
    )
