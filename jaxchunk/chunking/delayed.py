"""PipeDream-2BW: batch after batch through the stages, without a flush.

While a batch runs backward on the first stages, the next one runs forward, with
the weights that are there: its gradient is that of weights one update old,

    W[t+1] = W[t] + u(gradient of batch t at W[t-1]),        W[-1] = W[0],

where u is what the optimizer adds. Two versions of the weights and of the
gradients are kept, however many stages there are. A batch's update comes in the
tick in which its last gradient is complete, on all devices at once, so that the
norm over all parameters is known and no tick is lost. With a `correction` c the
step is `u[t] + c * (u[t] - u[t-1])` instead, which takes back a part of what
the delay does.

Source: PipeDream-2BW (arXiv 2006.09503).
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

from jaxchunk.chunking import executor
from jaxchunk.chunking.chunk import Lane
from jaxchunk.chunking.delayed_ops import Delayed as Delayed
from jaxchunk.chunking.delayed_ops import DelayedOps, Versions
from jaxchunk.chunking.executor import Options
from jaxchunk.chunking.lanes import LaneArrays
from jaxchunk.chunking.layouts import check_stages
from jaxchunk.chunking.pipeline import (
  ROWS,
  STAGE,
  Static,
  arena_stage,
  deal_lanes,
  local_leaves,
  place_chunks,
  place_rows,
)
from jaxchunk.chunking.programs import NOWHERE
from jaxchunk.chunking.stage_ops import ChunkOps
from jaxchunk.chunking.totals import SUMMED
from jaxchunk.chunking.trainable import Subset, widened
from jaxchunk.chunking.turns import lane_specs, put
from jaxchunk.kernels.vma import vary_like
from jaxchunk.models.transformer import Transformer
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.pipeline.executor import run_table
from jaxchunk.sharding.pipeline.table import Lanes, Table
from jaxchunk.sharding.pipeline.tables import two_bw
from jaxchunk.sharding.pipeline.validate import check_table
from jaxchunk.types import Example


class DelayedState(NamedTuple):
  """What one call of `delayed_steps` leaves for the next, which uses it up.

  Attributes:
    model: The weights W[t].
    previous: W[t-1] of what is trained, in the order of `trainable`.
    opt_state: Of the optimizer, for lists in that order.
    last: u[t-1], in at least fp32; zero before the first update.
    steps: t.
  """

  model: Transformer
  previous: list[Array]
  opt_state: Any
  last: list[Array]
  steps: Int[Array, ""]


def start_delayed(
  model: Transformer, options: Options, delayed: Delayed
) -> DelayedState:
  """The state before the first batch."""
  chosen, _ = Subset(options.trainable.chosen).split(model)
  wide = [widened(a) for a in chosen]
  zeros = [jnp.zeros_like(a) for a in wide]
  # Buffers of their own: the first call donates them, and not the model.
  previous, opt_state = jax.tree.map(
    jnp.copy, (chosen, delayed.optimizer.init(wide))
  )
  steps = jnp.zeros((), jnp.int32)
  return DelayedState(model, previous, opt_state, zeros, steps)


def delayed_steps(
  layout: Layout,
  state: DelayedState,
  batches: Sequence[Sequence[Example]],
  options: Options,
  delayed: Delayed,
  *,
  mesh: Mesh | None = None,
) -> tuple[DelayedState, Float[Array, " N"]]:
  """Takes a step for each batch, without waiting between them.

  Without dropout, which needs a key for each step.

  Args:
    layout: The stages, and what else devices share.
    state: From `start_delayed`, or the last call; all of it but the model is
      donated.
    batches: Sequences of each batch.
    options: From `make_options`.
    delayed: How weights change.
    mesh: From `layout.mesh`; by default of all devices.

  Returns:
    The state after the last update, and the loss of each batch, at the weights
    that its gradient was taken at.

  Raises:
    ValueError: As `check_stages`; or layers are not the same on all stages, or
      a batch weighs nothing.
    NotImplementedError: As `check_stages`.
  """
  model = state.model
  check_stages(layout, model.cfg, options)
  mesh = layout.mesh() if mesh is None else mesh
  sums = [executor.weight_of(batch) for batch in batches]
  if not all(sums):
    raise ValueError(
      f"weights of batches[{sums.index(0)}] sum to 0: there is nothing to "
      "train on; leave it out"
    )
  plan = _plan(layout, model, batches, options)
  static, _ = Static.of(layout, model, plan.table, options)
  if not static.staging.as_is:
    raise ValueError(
      f"num_layers={model.cfg.num_layers} cannot be dealt out evenly to "
      f"layout.stage={layout.stage}, which delayed steps need; take a divisor"
    )
  whole = Lanes(plan.table.lanes.sizes, options.live_chunks)
  lane = place_chunks(
    *(model, whole, plan.rows, plan.lanes, options.chunk_size),
    static.room,
    mesh,
  )
  rows, ticks = place_rows(plan.table, static, mesh)
  everywhere = NamedSharding(mesh, NOWHERE)
  batch_of = np.zeros(lane.tokens.shape[1] // options.chunk_size, np.int32)
  batch_of[: whole.count] = plan.batch_of
  updates = np.zeros(rows.shape[0], np.int32)
  updates[list(plan.table.updates)] = 1 + np.arange(len(batches))
  wide = np.dtype(jnp.promote_types(model.cfg.dtype, jnp.float32))
  weights = np.asarray(sums, wide)
  numbers = [put(a, everywhere) for a in (batch_of, updates, weights)]
  specs = _specs(state, options, static, delayed)
  leaves, treedef = jax.tree.flatten(model)
  leaves, history = jax.tree.map(
    lambda a, spec: jax.device_put(a, NamedSharding(mesh, spec)),
    (leaves, tuple(state[1:])),
    specs,
  )
  model = jax.tree.unflatten(treedef, leaves)
  newest, history, losses = _delayed_program(
    model,
    history,
    lane,
    rows,
    ticks,
    *numbers,
    options=options,
    mesh=mesh,
    static=static,
    delayed=delayed,
    specs=_Frozen.of(specs),
  )
  _, rebuild = Subset(options.trainable.chosen).split(model)
  return DelayedState(rebuild(newest), *history), losses


class _Plan(NamedTuple):
  """What runs: the table, its lanes, and the batch of each chunk."""

  table: Table
  rows: list[tuple[int | None, ...]]
  lanes: list[LaneArrays]
  batch_of: list[int]


def _plan(
  layout: Layout,
  model: Transformer,
  batches: Sequence[Sequence[Example]],
  options: Options,
) -> _Plan:
  rows: list[tuple[int | None, ...]] = []
  lanes: list[LaneArrays] = []
  each: list[Lanes] = []
  for examples in batches:
    dealt = deal_lanes(layout, model, examples, options)
    first = len(lanes)
    rows += [
      tuple(None if n is None else first + n for n in row) for row in dealt.rows
    ]
    lanes += dealt.lanes
    each.append(Lanes(dealt.sizes, options.live_chunks))
  table = two_bw(layout.stage, each)
  check_table(table)
  batch_of = [n for n, one in enumerate(each) for _ in range(one.count)]
  return _Plan(table, rows, lanes, batch_of)


# W[t-1], the optimizer's state, u[t-1], t.
_History = tuple[list[Array], Any, list[Array], Array]


def _specs(
  state: DelayedState, options: Options, static: Static, delayed: Delayed
) -> Any:
  """How the model and what goes with it are split.

  The optimizer's state is as its parameters.
  """
  count = len(options.trainable.chosen)
  leaves = [static.shards.spec(n) for n in range(count)]
  mine = [
    spec
    for spec, chosen in zip(leaves, options.trainable.chosen, strict=True)
    if chosen
  ]
  opt_state = optax.tree_utils.tree_map_params(
    delayed.optimizer,
    lambda _, spec: spec,
    state.opt_state,
    mine,
    transform_non_params=lambda _: NOWHERE,
  )
  return leaves, (mine, opt_state, mine, NOWHERE)


class _Frozen(NamedTuple):
  """A pytree of specs that a program can be compiled for."""

  leaves: tuple[PartitionSpec, ...]
  treedef: Any

  @classmethod
  def of(cls, tree: Any) -> "_Frozen":
    leaves, treedef = jax.tree.flatten(
      tree, is_leaf=lambda a: isinstance(a, PartitionSpec)
    )
    return cls(tuple(leaves), treedef)

  def tree(self) -> Any:
    return jax.tree.unflatten(self.treedef, self.leaves)


@functools.partial(
  jax.jit,
  static_argnames=("options", "mesh", "static", "delayed", "specs"),
  donate_argnames=("history",),
)
def _delayed_program(
  model: Transformer,
  history: _History,
  lane: Lane,
  rows: Array,
  ticks: Array,
  batch_of: Array,
  updates: Array,
  weights: Array,
  *,
  options: Options,
  mesh: Mesh,
  static: Static,
  delayed: Delayed,
  specs: _Frozen,
) -> tuple[list[Array], _History, Array]:
  """Runs the batches on every device: W[t] of what is trained, and the rest."""
  stage = arena_stage(options, model.cfg, mesh, static)
  leaves, treedef = jax.tree.flatten(model)
  subset = Subset(options.trainable.chosen)
  count = weights.shape[0]

  def local(
    leaves: list[Array],
    history: _History,
    lane: Any,
    rows: Any,
    ticks: Any,
    batch_of: Any,
    updates: Any,
    weights: Any,
  ) -> Any:
    rows = rows[:, 0]
    previous, opt_state, last, steps = history
    chosen, rebuild = subset.split(leaves)

    def base(version: list[Array], grads: list[Array]) -> ChunkOps:
      here = local_leaves(rebuild(version), lane, options, static)
      return ChunkOps(
        stage,
        static.staging,
        jax.tree.unflatten(treedef, here),
        lane,
        everywhere=static.everywhere,
        drops=static.room.drops,
      )

    shape = (*lane.tokens.shape[:1], stage.chunk_size, model.cfg.d_model)
    message = vary_like(jnp.zeros(shape, model.cfg.dtype), lane, rows)
    ops = DelayedOps(base, message, batch_of, weights, delayed)
    zeros = [jnp.zeros_like(widened(a)) for a in chosen]
    inner = base(chosen, zeros).init(
      static.room.sizes, (jnp.zeros((), weights.dtype), zeros), rows
    )
    state = Versions(
      inner._replace(grads=[]),
      (inner.grads, inner.grads),
      (previous, chosen),
      opt_state,
      last,
      steps,
      vary_like(jnp.zeros(count, weights.dtype), inner.loss),
    )
    state = run_table(
      ops,
      rows,
      ticks,
      state,
      message,
      inbox=static.room.sizes.inbox,
      updates=updates,
    )
    new, old = state.versions[::-1] if count % 2 == 0 else state.versions
    losses = lax.psum(state.losses, (STAGE, *SUMMED)) / weights
    return new, (old, state.opt_state, state.last, state.steps), losses

  by_lane, _ = lane_specs()
  whole, parts = specs.tree()
  mine, _ = subset.split(whole)
  run = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(whole, parts, by_lane, ROWS, *[NOWHERE] * 4),
    out_specs=(mine, parts, NOWHERE),
    check_vma=True,
  )
  result: tuple[list[Array], _History, Array] = run(
    leaves, history, lane, rows, ticks, batch_of, updates, weights
  )
  return result
