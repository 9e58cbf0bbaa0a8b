"""Lanes over the stages of a pipeline: what `parallel` is for one stage.

The lanes of a batch are dealt out to groups of devices, as many and as long to
each, and all groups run one table: a device of a group has some of the layers,
and runs the table's operations on the chunks of its group.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, PRNGKeyArray

from jaxchunk.chunking import executor
from jaxchunk.chunking.chunk import Lane
from jaxchunk.chunking.cost import plan_cost
from jaxchunk.chunking.executor import Options, Sums
from jaxchunk.chunking.lanes import LaneArrays, capacity_chunks, pad_lane
from jaxchunk.chunking.layouts import check_stages
from jaxchunk.chunking.ops import Stage
from jaxchunk.chunking.plan import ChunkPlan
from jaxchunk.chunking.programs import NOWHERE, local_stage
from jaxchunk.chunking.shards import Shards
from jaxchunk.chunking.stage_ops import ChunkOps
from jaxchunk.chunking.staging import Staging
from jaxchunk.chunking.totals import added, total_specs, zero_totals
from jaxchunk.chunking.turns import GROUPS, SEQUENCE, lane_specs, put
from jaxchunk.kernels.state import KVPrefix, KVWindow
from jaxchunk.kernels.state_arena import KVArena, aligned_blocks
from jaxchunk.kernels.vma import vary, vary_like
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.transformer import Transformer
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.pipeline.executor import StageOps, run_table, stacked
from jaxchunk.sharding.pipeline.measure import Clock, TimedOps
from jaxchunk.sharding.pipeline.slots import Sizes, rows_of, sizes_of
from jaxchunk.sharding.pipeline.table import Lanes, Table
from jaxchunk.sharding.pipeline.validate import check_table
from jaxchunk.sharding.rules import Rules
from jaxchunk.sharding.state import KVContext
from jaxchunk.types import Example

STAGE = "stage"
"""The mesh axis of the stages."""

ROWS = PartitionSpec(None, STAGE)
"""How a table is split: each device has its column."""


class Dealt(NamedTuple):
  """A batch's lanes, dealt out to groups of devices.

  Attributes:
    plan: How sequences were cut into chunks.
    lanes: All of the batch, on the host.
    rows: For each lane of the table that of each group; `None` is padding.
    sizes: How many chunks all groups run for each: those of the longest.
  """

  plan: ChunkPlan
  lanes: list[LaneArrays]
  rows: list[tuple[int | None, ...]]
  sizes: tuple[int, ...]


def deal_lanes(
  layout: Layout,
  model: Transformer,
  examples: Sequence[Example],
  options: Options,
) -> Dealt:
  """Plans a batch and deals its lanes out, those of like cost side by side.

  Raises:
    ValueError: A token is not in the vocabulary.
  """
  plan, lanes = executor.plan_lanes(model, examples, options.chunk_size)
  live = options.live_chunks
  costs = plan_cost(
    model.cfg, plan, live_chunks=live, strategy="chunk_outer"
  ).lanes
  groups = math.prod(getattr(layout, axis) for axis in GROUPS)
  order = sorted(range(len(costs)), key=lambda n: -costs[n])
  rows: list[tuple[int | None, ...]] = []
  for start in range(0, len(order), groups):
    row: list[int | None] = list(order[start : start + groups])
    rows.append((*row, *[None] * (groups - len(row))))
  sizes = [
    max(lanes[n].num_chunks for n in row if n is not None) for row in rows
  ]
  return Dealt(plan, lanes, rows, tuple(sizes))


def accumulate_stages(
  layout: Layout,
  model: Transformer,
  examples: Sequence[Example],
  options: Options,
  *,
  mesh: Mesh | None = None,
  rng: PRNGKeyArray | None = None,
  spread: bool = False,
  clock: Clock | None = None,
) -> Sums:
  """`parallel.accumulate_over` for a layout with several stages.

  Args:
    layout: What the devices share, and what each has alone.
    model: The model; its layers are dealt out to the stages.
    examples: Sequences of any length.
    options: From `make_options`.
    mesh: From `layout.mesh`; by default of all devices.
    rng: As in `accumulate`.
    spread: As in `accumulate_over`.
    clock: Is told when operations run; see `sharding.pipeline.measure`.

  Raises:
    ValueError: As `check_stages`, or there are fewer layers than stages.
    NotImplementedError: As `check_stages`.
  """
  check_stages(layout, model.cfg, options)
  mesh = layout.mesh() if mesh is None else mesh
  dealt = deal_lanes(layout, model, examples, options)
  whole = Lanes(dealt.sizes, options.live_chunks)
  table = layout.pipeline.table(layout.stage, whole)
  check_table(table)
  ready = _Ready.of(layout, model, table, options, mesh)
  lane = place_chunks(
    *(model, whole, dealt.rows, dealt.lanes, options.chunk_size),
    ready.static.room,
    mesh,
  )
  totals = zero_totals(mesh, options, ready.shards)(ready.model)
  rows, ticks = place_rows(table, ready.static, mesh)
  totals = stage_program(
    ready.model,
    lane,
    rows,
    ticks,
    totals,
    jax.device_put(rng, NamedSharding(mesh, NOWHERE)),
    options=options,
    mesh=mesh,
    static=ready.static,
    clock=clock,
  )
  add = added(
    mesh, options, ready.stored, ready.shards, layout if spread else None
  )
  loss, grads = add(totals)
  staging = ready.static.staging
  if not staging.as_is:
    grads = staging.unstaged(options.trainable, grads)
    grads = _stored(layout, model, options, mesh, spread, grads)
  weight = executor.weight_of(examples)
  return Sums(loss, weight, options.trainable.state(grads), dealt.plan)


def _stored(
  layout: Layout,
  model: Transformer,
  options: Options,
  mesh: Mesh,
  spread: bool,
  grads: list[Array],
) -> list[Array]:
  """Gradients where the parameters are kept, layer after layer."""
  shards = stored_shards(layout, model)
  chosen = options.trainable.chosen
  specs = [shards.spec(n) for n, mine in enumerate(chosen) if mine]
  if spread:
    specs = [
      layout.spread(spec, g.shape) for spec, g in zip(specs, grads, strict=True)
    ]
  return jax.device_put(grads, [NamedSharding(mesh, spec) for spec in specs])


def stored_shards(layout: Layout, model: Transformer) -> Shards:
  """How a layout splits a model where its parameters are kept.

  Layers are split over stages where they can be; else all stages keep all.

  Raises:
    ValueError: Another axis cannot be split evenly; names it.
  """
  stacks = [
    model.cfg.layers_of(position) for position in range(len(model.blocks))
  ]
  if any(size % layout.stage for size in stacks):
    changed = dict(layout.rules) | {"layers": None}
    layout = dataclasses.replace(layout, rules=Rules(changed))
  return Shards.of(model, layout)


def stored_as_run(layout: Layout, cfg: ModelConfig) -> bool:
  """Whether stages have their layers where these are kept anyway."""
  if layout.stage == 1:
    return True
  placement = layout.pipeline.placement(layout.stage)
  return Staging.of(cfg, placement, layout.pipeline.layers).as_is


class Room(NamedTuple):
  """What a program has room for.

  Attributes:
    sizes: Slots of a device.
    chunks: Of a group, a power of two.
    ticks: Likewise.
    drops: Whether some forward passes keep nothing.
  """

  sizes: Sizes
  chunks: int
  ticks: int
  drops: bool

  @classmethod
  def of(cls, table: Table) -> "Room":
    """Just enough for a table."""
    return cls(
      sizes_of(table),
      capacity_chunks(table.lanes.count),
      capacity_chunks(len(table.ticks)),
      not all(table.lanes.kept),
    )

  def merged(self, other: "Room") -> "Room":
    """Enough for both."""
    return Room(
      self.sizes.merged(other.sizes),
      max(self.chunks, other.chunks),
      max(self.ticks, other.ticks),
      self.drops or other.drops,
    )


class Static(NamedTuple):
  """What a program of stages is compiled for, besides shapes.

  Attributes:
    staging: Which layers each stage has.
    shards: How parameters are split, stage by stage.
    room: For what batches.
    split: Whether gradients of matrices wait.
    everywhere: Whether embedding and head are over all stages.
  """

  staging: Staging
  shards: Shards
  room: Room
  split: bool
  everywhere: bool

  @classmethod
  def exactly(
    cls, layout: Layout, model: Transformer, table: Table
  ) -> "tuple[Static, Transformer]":
    """For a table alone, and the model stage by stage."""
    staging = Staging.of(model.cfg, table.placement, layout.pipeline.layers)
    staged = staging.staged(model)
    shards = Shards.of(staged, layout)
    everywhere = STAGE in layout.rules["vocab"]
    room = Room.of(table)
    static = cls(staging, shards, room, table.split, everywhere)
    return static, staged

  @classmethod
  def of(
    cls, layout: Layout, model: Transformer, table: Table, options: Options
  ) -> "tuple[Static, Transformer]":
    """For all tables so far."""
    static, staged = cls.exactly(layout, model, table)
    key = (layout, model.cfg, options, table.name)
    return static._replace(room=_grown(key, static.room)), staged


_ROOMS: dict[Any, Room] = {}


def _grown(key: Any, room: Room) -> Room:
  """Enough for any batch so far.

  So that batches of all kinds run the same program, which is compiled again
  only for one that needs more of anything than all before it.
  """
  room = room.merged(_ROOMS.get(key, room))
  _ROOMS[key] = room
  return room


class _Ready(NamedTuple):
  """What a call needs beside its lanes."""

  model: Transformer
  stored: Shards
  static: Static

  @property
  def shards(self) -> Shards:
    return self.static.shards

  @classmethod
  def of(
    cls,
    layout: Layout,
    model: Transformer,
    table: Table,
    options: Options,
    mesh: Mesh,
  ) -> "_Ready":
    static, staged = Static.of(layout, model, table, options)
    stored = static.shards
    if layout.gather == "step":
      static = static._replace(shards=stored.gathered())
    return cls(static.shards.put(staged, mesh), stored, static)


@functools.partial(
  jax.jit,
  static_argnames=("options", "mesh", "static", "clock"),
  donate_argnames=("totals",),
)
def stage_program(
  model: Transformer,
  lane: Lane,
  rows: Array,
  ticks: Array,
  totals: Any,
  rng: PRNGKeyArray | None,
  *,
  options: Options,
  mesh: Mesh,
  static: Static,
  clock: Clock | None = None,
) -> Any:
  """Runs a table for every group, and adds to the totals of its devices.

  Args:
    model: The parameters, stage by stage.
    lane: All chunks of each group, a row for each.
    rows: `stacked` of the table.
    ticks: How many of them.
    totals: Loss and gradients so far; donated.
    rng: Key for dropout.
    options: What runs.
    mesh: Where.
    static: How.
    clock: Who is told when operations begin and end.
  """
  stage = arena_stage(options, model.cfg, mesh, static)
  leaves, treedef = jax.tree.flatten(model)
  summed = total_specs(options, static.shards)

  def local(
    leaves: Any, lane: Any, rows: Any, ticks: Any, totals: Any, rng: Any
  ) -> Any:
    rows = rows[:, 0]
    leaves = local_leaves(leaves, lane, options, static)
    model = jax.tree.unflatten(treedef, leaves)
    ops = ChunkOps(
      stage,
      static.staging,
      model,
      lane,
      everywhere=static.everywhere,
      split=static.split,
      drops=static.room.drops,
      rng=rng,
    )
    totals = jax.tree.map(lambda a: a[0], totals)
    state = ops.init(static.room.sizes, totals, rows)
    timed: StageOps = ops
    if clock is not None:
      others = tuple(name for name in mesh.axis_names if name != STAGE)
      timed = TimedOps(ops, clock, STAGE, others)
    shape = (*lane.tokens.shape[:1], stage.chunk_size, model.cfg.d_model)
    message = vary_like(jnp.zeros(shape, model.cfg.dtype), lane, rows)
    state = run_table(
      timed,
      rows,
      ticks,
      state,
      message,
      inbox=static.room.sizes.inbox,
      split=static.split,
    )
    return jax.tree.map(lambda a: a[None], (state.loss, state.grads))

  by_lane, _ = lane_specs()
  parts = [static.shards.spec(n) for n in range(len(leaves))]
  run = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(parts, by_lane, ROWS, NOWHERE, summed, NOWHERE),
    out_specs=summed,
    check_vma=True,
  )
  return run(leaves, lane, rows, ticks, totals, rng)


def local_leaves(
  leaves: Sequence[Array], lane: Lane, options: Options, static: Static
) -> list[Array]:
  """Parameters that vary like what they are used with.

  That keeps operations free of sums over the devices, which not all run at one
  time. The final norm that all stages use at one time stays as it is.
  """
  paths = options.trainable.paths
  return [
    a if static.everywhere and path[0] == "final_norm" else vary(a, (STAGE,))
    for path, a in zip(paths, vary_like(list(leaves), lane), strict=True)
  ]


def arena_stage(
  options: Options, cfg: ModelConfig, mesh: Mesh, static: Static
) -> Stage:
  """The stage of one device, whose sequence states are arenas."""
  stage = local_stage(options, cfg, mesh, static.shards)
  states = tuple(_in_arena(state) for state in stage.states)
  layers = (static.staging.room,) * len(stage.states)
  return dataclasses.replace(stage, states=states, layers=layers)


def _in_arena(state: Any) -> KVPrefix:
  if isinstance(state, KVContext):
    if state.implementation != "xla":
      return state
    return dataclasses.replace(state, blocks=aligned_blocks(state))
  fields = {
    field.name: getattr(state, field.name)
    for field in dataclasses.fields(KVPrefix)
  }
  window = state.window if isinstance(state, KVWindow) else None
  return KVArena(**fields, window=window)


def place_rows(table: Table, static: Static, mesh: Mesh) -> tuple[Array, Array]:
  """The table on the devices, and how many ticks it has."""
  count = len(table.ticks)
  rows = rows_of(table, everywhere=static.everywhere, sizes=static.room.sizes)
  stack = stacked(rows, static.room.ticks)
  ticks = put(np.asarray(count, np.int32), NamedSharding(mesh, NOWHERE))
  return put(stack, NamedSharding(mesh, ROWS)), ticks


def place_chunks(
  model: Transformer,
  whole: Lanes,
  dealt: Sequence[tuple[int | None, ...]],
  lanes: Sequence[LaneArrays],
  chunk_size: int,
  room: Room,
  mesh: Mesh,
) -> Lane:
  """All chunks of each group in a row, in the order of the table's items."""
  length = room.chunks * chunk_size
  groups = len(dealt[0])
  wide = np.dtype(jnp.promote_types(model.cfg.dtype, jnp.float32))
  spec, _ = lane_specs()
  arrays = {
    field.name: np.zeros(
      (groups, length), wide if field.name == "weights" else np.int32
    )
    for field in dataclasses.fields(Lane)
  }
  segments = np.zeros(groups, np.int32)
  for row, size, start in zip(dealt, whole.sizes, whole.starts, strict=True):
    where = slice(start * chunk_size, (start + size) * chunk_size)
    for group, number in enumerate(row):
      if number is None:
        continue
      lane = pad_lane(lanes[number], size * chunk_size)
      for name, array in arrays.items():
        array[group, where] = getattr(lane, name)
      # Segments differ between lanes, too.
      own = arrays["segment_ids"][group, where]
      own[own > 0] += segments[group]
      segments[group] = max(segments[group], own.max())
  parts = mesh.shape[SEQUENCE]
  order = np.arange(length).reshape(-1, parts).T.reshape(-1)
  return Lane(
    **{
      name: put(array[:, order], NamedSharding(mesh, spec))
      for name, array in arrays.items()
    }
  )
