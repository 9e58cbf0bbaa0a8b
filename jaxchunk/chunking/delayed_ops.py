"""What the operations of a table do where batches see different weights.

`delayed.py` has the schedule and the program; here are the two versions of the
weights and of the gradients, and the update.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Float, Int

from jaxchunk.chunking.stage_ops import ChunkOps, StageState
from jaxchunk.kernels.vma import vary_like, varying_axes
from jaxchunk.sharding.pipeline.executor import Row, once


@dataclasses.dataclass(frozen=True, kw_only=True)
class Delayed:
  """How weights change between batches that overlap.

  Attributes:
    optimizer: Each parameter by itself; no norms over all of them in it.
    clip_norm: The longest that the gradient of a batch may be, over all
      parameters; `None` is any.
    correction: c, of the last change of the update.
  """

  optimizer: optax.GradientTransformation
  clip_norm: float | None = None
  correction: float = 0.0


class Versions(NamedTuple):
  """On one device; entry n of a pair is of the batches t with t % 2 == n.

  Attributes:
    inner: Slots and arenas, which all batches share.
    grads: Of the two batches under way.
    versions: The weights that they see.
    opt_state: Of the optimizer.
    last: The last update.
    steps: How many there were.
    losses: Of each batch, this device's part of the sum.
  """

  inner: StageState
  grads: tuple[list[Array], list[Array]]
  versions: tuple[list[Array], list[Array]]
  opt_state: Any
  last: list[Array]
  steps: Int[Array, ""]
  losses: Float[Array, " N"]


class DelayedOps:
  """`StageOps` of batches that see different weights."""

  def __init__(
    self,
    base: Callable[[list[Array], list[Array]], ChunkOps],
    message: Array,
    batch_of: Int[Array, " M"],
    weights: Float[Array, " N"],
    delayed: Delayed,
  ):
    self.base, self.message = base, message
    self.batch_of, self.batch_weights = batch_of, weights
    self.delayed = delayed

  def open(self, state: Versions, row: Row) -> Array:
    """See `StageOps`."""

    def run(ops: ChunkOps, inner: StageState, x: Array) -> Any:
      return inner, ops.open(inner, row)

    return self._run(state, row.open_item, self.message, run)[1]

  def forward(
    self, state: Versions, x: Array, row: Row
  ) -> tuple[Versions, Array]:
    """See `StageOps`."""
    return self._run(
      state, row.item, x, lambda ops, inner, x: ops.forward(inner, x, row)
    )

  def close(
    self, state: Versions, y: Array, row: Row
  ) -> tuple[Versions, Array]:
    """See `StageOps`."""
    # From zero: what a chunk adds to the sum of many would be rounded to that.
    none = jnp.zeros_like(state.inner.loss)
    state = state._replace(inner=state.inner._replace(loss=none))
    state, dy = self._run(
      state, row.close_item, y, lambda ops, inner, y: ops.close(inner, y, row)
    )
    part = state.inner.loss
    losses = state.losses.at[self.batch_of[row.close_item]].add(part)
    return state._replace(losses=losses), dy

  def backward(
    self, state: Versions, dy: Array, row: Row
  ) -> tuple[Versions, Array]:
    """See `StageOps`."""
    return self._run(
      state, row.item, dy, lambda ops, inner, dy: ops.backward(inner, dy, row)
    )

  def open_back(self, state: Versions, dx: Array, row: Row) -> Versions:
    """See `StageOps`."""

    def run(ops: ChunkOps, inner: StageState, dx: Array) -> Any:
      return ops.open_back(inner, dx, row), dx

    return self._run(state, row.back_item, dx, run)[0]

  def weights(self, state: Versions, row: Row) -> Versions:
    """See `StageOps`."""
    raise NotImplementedError("the table has no gradients that wait")

  def _run(
    self,
    state: Versions,
    item: Array,
    x: Array,
    run: Callable[[ChunkOps, StageState, Array], tuple[StageState, Array]],
  ) -> tuple[Versions, Array]:
    """With the weights and gradients of the item's batch."""
    turn = self.batch_of[item] % 2
    carry = (state.inner, state.grads, vary_like(x, self.message))
    for n in range(2):

      def with_version(carry: Any, n: int = n) -> Any:
        inner, grads, x = carry
        ops = self.base(state.versions[n], grads[n])
        inner, y = run(ops, inner._replace(grads=grads[n]), x)
        both = (inner.grads, grads[1]) if n == 0 else (grads[0], inner.grads)
        return inner._replace(grads=[]), both, y

      carry = once(turn == n, with_version, carry)
    inner, grads, y = carry
    return state._replace(inner=inner, grads=grads), y

  def update(self, state: Versions, batch: Int[Array, ""]) -> Versions:
    """See `StageOps`; a batch's weights become those of the next but one."""
    weight = self.batch_weights[batch]
    for n in range(2):

      def step(state: Versions, n: int = n) -> Versions:
        grads = [
          _over_devices(g, like) / weight
          for g, like in zip(state.grads[n], state.last, strict=True)
        ]
        grads = _clipped(grads, self.delayed.clip_norm)
        newest = state.versions[1 - n]
        change: Any
        change, opt_state = self.delayed.optimizer.update(
          grads, state.opt_state, newest
        )
        whole = self._corrected(state, change)
        weights = optax.apply_updates(newest, whole)
        zeros = [jnp.zeros_like(g) for g in state.grads[n]]
        opt_state = jax.tree.map(
          lambda new, old: new.astype(old.dtype), opt_state, state.opt_state
        )
        return state._replace(
          grads=_with(state.grads, n, zeros),
          versions=_with(state.versions, n, weights),
          opt_state=opt_state,
          last=[
            u.astype(old.dtype)
            for u, old in zip(change, state.last, strict=True)
          ],
          steps=state.steps + 1,
        )

      state = once(batch % 2 == n, step, state)
    return state

  def _corrected(self, state: Versions, change: list[Array]) -> list[Array]:
    """The update, and a part of how it differs from the one before."""
    factor = jnp.where(state.steps > 0, self.delayed.correction, 0.0)
    return [
      u + factor.astype(u.dtype) * (u - old)
      for u, old in zip(change, state.last, strict=True)
    ]


def _over_devices(g: Array, like: Array) -> Array:
  """A gradient's sum over the devices that share its parameter."""
  axes = tuple(sorted(varying_axes(g) - varying_axes(like)))
  return lax.psum(g, axes) if axes else g


def _clipped(grads: list[Array], most: float | None) -> list[Array]:
  """Gradients scaled so that their norm over all devices is no more."""
  if most is None:
    return grads
  total: Any = 0.0
  for g in grads:
    square = jnp.sum(jnp.square(g))
    axes = tuple(sorted(varying_axes(square)))
    total += lax.psum(square, axes) if axes else square
  norm = jnp.sqrt(total)
  factor = jnp.minimum(1.0, most / jnp.maximum(norm, 1e-30))
  return [g * factor.astype(g.dtype) for g in grads]


def _with(pair: tuple[Any, Any], n: int, item: Any) -> tuple[Any, Any]:
  return (item, pair[1]) if n == 0 else (pair[0], item)
