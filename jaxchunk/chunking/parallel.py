"""Lanes over a mesh: chunk programs on the devices of a layout.

The lanes of a batch are dealt out to groups of devices (`turns`). Inside a
group a lane lies on the devices of the axis "context", every P-th token on
each, and each layer's heads and widths on those of "tensor". Groups with whole
parameters share no collective while lanes run; those that share parameters
("fsdp") gather them layer by layer in step, or all at once before the first
lane. Each device adds up its own sums, in the parts that it keeps; they are
added up over devices once, at the end.
"""

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array, Float, PRNGKeyArray

from jaxchunk.chunking import executor, pipeline
from jaxchunk.chunking.balance_cost import Timing, lane_works
from jaxchunk.chunking.chunk import Lane
from jaxchunk.chunking.cost import plan_cost
from jaxchunk.chunking.executor import Options, Sums
from jaxchunk.chunking.lanes import LaneArrays, capacity_chunks
from jaxchunk.chunking.layouts import check_hybrid, check_layout
from jaxchunk.chunking.programs import (
  NOWHERE,
  counts_program,
  lane_program,
  loss_program,
)
from jaxchunk.chunking.routing import has_router_losses
from jaxchunk.chunking.shards import Shards
from jaxchunk.chunking.totals import added, zero_totals
from jaxchunk.chunking.turns import (
  GROUPS,
  SEQUENCE,
  Hybrid,
  Turn,
  hybrid_turns,
  make_turns,
  place,
  put,
)
from jaxchunk.models.moe import RouterWeights
from jaxchunk.models.transformer import Transformer
from jaxchunk.sharding.mesh import Layout
from jaxchunk.types import Example


def place_model(
  layout: Layout, model: Transformer, mesh: Mesh | None = None
) -> Transformer:
  """The model on the devices of a layout, each with its parts.

  Args:
    layout: What splits what.
    model: The model.
    mesh: From `layout.mesh`; by default of all devices.

  Raises:
    ValueError: A parameter cannot be split evenly; names it.
    NotImplementedError: The model is quantized, and would be split.
  """
  mesh = layout.mesh() if mesh is None else mesh
  return pipeline.stored_shards(layout, model).put(model, mesh)


class _Ready:
  """What a call needs beside its lanes: the parameters where they are used.

  Attributes:
    stored: How the model is kept, and gradients come out.
    shards: How programs take it.
    model: The model so.
    rng: Of dropout, everywhere.
  """

  def __init__(
    self,
    layout: Layout,
    model: Transformer,
    mesh: Mesh,
    rng: PRNGKeyArray | None = None,
  ):
    self.stored = Shards.of(model, layout)
    self.shards = self.stored
    if layout.gather == "step":
      self.shards = self.stored.gathered()
    self.model = self.shards.put(model, mesh)
    self.rng = jax.device_put(rng, NamedSharding(mesh, NOWHERE))


def accumulate_over(
  layout: Layout,
  model: Transformer,
  examples: Sequence[Example],
  options: Options,
  *,
  mesh: Mesh | None = None,
  rng: PRNGKeyArray | None = None,
  spread: bool = False,
  hybrid: Hybrid | None = None,
) -> Sums:
  """`executor.accumulate` over the devices of a layout.

  The sums are those of one device up to rounding. On several hosts every
  process calls it with the same examples.

  Args:
    layout: What the devices share, and what each has alone.
    model: The model; it is put there if it is not there (`place_model`).
    examples: Sequences of any length.
    options: From `make_options`.
    mesh: From `layout.mesh`; by default of all devices.
    rng: As in `accumulate`.
    spread: Splits gradients further, over devices that have copies of the
      parameter (`Layout.spread`).
    hybrid: Gives each lane a group of its own size, of the devices of "data"
      and "context"; by default all groups are as the layout says.

  Returns:
    The sums; each gradient is split as its parameter is, or further.

  Raises:
    ValueError: A token is not in the vocabulary, or as `check_layout` and
      `place_model`.
    NotImplementedError: As `check_layout`.
  """
  if layout.stage > 1:
    return pipeline.accumulate_stages(
      layout, model, examples, options, mesh=mesh, rng=rng, spread=spread
    )
  strategy = check_layout(layout, model.cfg, options)
  mesh = layout.mesh() if mesh is None else mesh
  ready = _Ready(layout, model, mesh, rng)
  plan, lanes = executor.plan_lanes(model, examples, options.chunk_size)
  costs = plan_cost(
    model.cfg,
    plan,
    live_chunks=options.live_chunks,
    strategy=strategy,
  )
  chunks = [lane.num_chunks for lane in lanes]
  if hybrid is None:
    turns = make_turns(layout, ready.shards.lockstep, costs.lanes, chunks)
  else:
    check_hybrid(layout, ready.shards)
    turns = hybrid_turns(layout, plan, hybrid, model.cfg)
  weight = executor.weight_of(examples)
  placed = [
    _Placed.of(model, turn, lanes, options.chunk_size, mesh) for turn in turns
  ]
  static: Any = {"options": options, "shards": ready.shards}
  router = None
  if has_router_losses(model.cfg):
    tokens = sum(plan.lengths)
    router = _router_weights(ready, placed, tokens, weight, static, mesh)
  totals = zero_totals(mesh, options, ready.shards)(ready.model)
  places = jax.tree.map(lambda a: a.sharding, totals)
  for turn_ in placed:
    totals = lane_program(
      ready.model,
      turn_.lane,
      turn_.counts,
      # On one mesh, or each order of sizes would be a program of its own.
      jax.device_put(totals, places),
      ready.rng,
      router,
      mesh=turn_.mesh,
      **static,
    )
  totals = jax.device_put(totals, places)
  add = added(
    mesh, options, ready.stored, ready.shards, layout if spread else None
  )
  loss, grads = add(totals)
  return Sums(loss, weight, options.trainable.state(grads), plan)


@dataclasses.dataclass(frozen=True)
class _Placed:
  """A turn on devices.

  Attributes:
    mesh: Their axes, of this turn's sizes.
    lane: A row for each group.
    counts: How many chunks each group runs.
  """

  mesh: Mesh
  lane: Lane
  counts: Array

  @classmethod
  def of(
    cls,
    model: Transformer,
    turn: Turn,
    lanes: Sequence[LaneArrays],
    chunk_size: int,
    mesh: Mesh,
    chunks: int = 1,
  ) -> "_Placed":
    mesh = _with_context(mesh, turn.context)
    return cls(mesh, *place(model, turn, lanes, chunk_size, mesh, chunks))


@functools.cache
def _with_context(mesh: Mesh, context: int) -> Mesh:
  """The same devices in the same order, with other groups."""
  sizes = dict(mesh.shape)
  sizes["data"] = sizes["data"] * sizes[SEQUENCE] // context
  sizes[SEQUENCE] = context
  return Mesh(
    mesh.devices.reshape(tuple(sizes.values())),
    mesh.axis_names,
    axis_types=mesh.axis_types,
  )


def timings_over(
  layout: Layout,
  model: Transformer,
  options: Options,
  degrees: Sequence[int],
  *,
  chunks: Sequence[int] = (1, 2, 4),
  rounds: int = 2,
  mesh: Mesh | None = None,
) -> list[Timing]:
  """Times lanes on groups of several sizes, for `fit_cost`.

  Args:
    layout: As in `accumulate_over`.
    model: The model.
    options: From `make_options`.
    degrees: Devices of a group, which divide those of "data" and "context".
    chunks: How many of each lane; all groups run one.
    rounds: The least time of so many counts, behind one that compiles.
    mesh: As in `accumulate_over`.

  Returns:
    One for each degree and length, in seconds.

  Raises:
    ValueError: As `accumulate_over`.
  """
  mesh = layout.mesh() if mesh is None else mesh
  ready = _Ready(layout, model, mesh)
  check_hybrid(layout, ready.shards)
  totals = zero_totals(mesh, options, ready.shards)(ready.model)
  places = jax.tree.map(lambda a: a.sharding, totals)
  found = []
  for degree, count in itertools.product(degrees, chunks):
    sub = dataclasses.replace(
      layout,
      data=layout.data * layout.context // degree,
      context=degree,
    )
    check_layout(sub, model.cfg, options)
    token = np.zeros(count * options.chunk_size, np.int32)
    example = Example(token, token, np.ones(len(token), np.float32))
    plan, lanes = executor.plan_lanes(model, [example], options.chunk_size)
    turn = Turn(degree, (0,) * sub.data, (count,) * sub.data)
    turn_ = _Placed.of(model, turn, lanes, options.chunk_size, mesh)
    best = math.inf
    for n in range(rounds + 1):
      start = time.perf_counter()
      totals = lane_program(
        ready.model,
        turn_.lane,
        turn_.counts,
        jax.block_until_ready(jax.device_put(totals, places)),
        None,
        None,
        options=options,
        mesh=turn_.mesh,
        shards=ready.shards,
      )
      jax.block_until_ready(totals)
      if n:
        best = min(best, time.perf_counter() - start)
    (work,) = lane_works(plan, model.cfg.window_pattern)
    found.append(Timing(work, degree, best))
  return found


def warm_up_over(
  layout: Layout,
  model: Transformer,
  longest: int,
  options: Options,
  *,
  mesh: Mesh | None = None,
  rng: PRNGKeyArray | None = None,
  spread: bool = False,
) -> int:
  """`executor.warm_up` for `accumulate_over`, with its arguments.

  Args:
    layout: As in `accumulate_over`.
    model: The model.
    longest: Length of the longest sequence to come, in tokens.
    options: From `make_options`.
    mesh: As in `accumulate_over`.
    rng: Any key if dropout will be used.
    spread: As in `accumulate_over`.

  Returns:
    How many programs there are; over stages it is what lanes a batch has that
    decides, and none is compiled beforehand.
  """
  if layout.stage > 1:
    return 0
  check_layout(layout, model.cfg, options)
  mesh = layout.mesh() if mesh is None else mesh
  ready = _Ready(layout, model, mesh, rng)
  token = np.zeros(1, np.int32)
  example = Example(token, token, np.zeros(1, np.float32))
  _, lanes = executor.plan_lanes(model, [example], options.chunk_size)
  groups = math.prod(getattr(layout, axis) for axis in GROUPS)
  turn = Turn(layout.context, (0,) * groups, (1,) * groups)
  static: Any = {"options": options, "shards": ready.shards}
  totals = zero_totals(mesh, options, ready.shards)(ready.model)
  top = capacity_chunks(-(-longest // options.chunk_size))
  capacities = [1 << n for n in range(top.bit_length())]
  for capacity in capacities:
    size = options.chunk_size
    turn_ = _Placed.of(model, turn, lanes, size, mesh, capacity)
    router = None
    if has_router_losses(model.cfg):
      router = _router_weights(ready, [turn_, turn_], 1, 1.0, static, mesh)
    totals = lane_program(
      ready.model,
      turn_.lane,
      turn_.counts,
      totals,
      ready.rng,
      router,
      mesh=turn_.mesh,
      **static,
    )
  add = added(
    mesh, options, ready.stored, ready.shards, layout if spread else None
  )
  jax.block_until_ready(add(totals))
  return len(capacities)


def loss_sum_over(
  layout: Layout,
  model: Transformer,
  examples: Sequence[Example],
  options: Options,
  *,
  mesh: Mesh | None = None,
) -> Float[Array, ""]:
  """`executor.loss_sum` over the devices of a layout; see `accumulate_over`.

  Over stages it costs as much as the gradient.
  """
  if layout.stage > 1:
    options = options._replace(strategy="chunk_outer")
    return accumulate_over(layout, model, examples, options, mesh=mesh).loss
  check_layout(layout, model.cfg, options)
  mesh = layout.mesh() if mesh is None else mesh
  ready = _Ready(layout, model, mesh)
  plan, lanes = executor.plan_lanes(model, examples, options.chunk_size)
  costs = plan_cost(
    model.cfg, plan, live_chunks=options.live_chunks, strategy="chunk_outer"
  )
  chunks = [lane.num_chunks for lane in lanes]
  total: Any = None
  for turn in make_turns(layout, ready.shards.lockstep, costs.lanes, chunks):
    lane, counts = place(model, turn, lanes, options.chunk_size, mesh)
    part = loss_program(
      ready.model,
      lane,
      counts,
      options=options,
      mesh=mesh,
      shards=ready.shards,
    )
    total = part if total is None else _sum(total, part)
  return total


def _router_weights(
  ready: _Ready,
  placed: Sequence[_Placed],
  tokens: int,
  weight: float,
  static: Any,
  mesh: Mesh,
) -> RouterWeights:
  """See `executor.accumulate`: what routers' sums count for."""
  cfg = ready.model.cfg
  moe = cfg.moe
  assert moe is not None
  everywhere = NamedSharding(mesh, NOWHERE)
  wide = np.dtype(jnp.promote_types(cfg.dtype, jnp.float32))
  numbers = [put(np.asarray(n, wide), everywhere) for n in (tokens, weight)]
  shape = (cfg.num_layers, moe.num_experts)
  counts = put(np.zeros(shape, np.int32), everywhere)
  if moe.balance_loss:
    for turn in placed:
      part = counts_program(
        ready.model,
        turn.lane,
        turn.counts,
        ready.rng,
        mesh=turn.mesh,
        **static,
      )
      counts = _sum(counts, jax.device_put(part, everywhere))
  return executor.router_weights(moe, counts, *numbers)


@jax.jit
def _sum(a: Array, b: Array) -> Array:
  return a + b
