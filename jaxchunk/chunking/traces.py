"""Programs of a layout traced for devices that need not be there."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxchunk.chunking.chunk import Lane
from jaxchunk.chunking.executor import Options
from jaxchunk.chunking.lanes import capacity_chunks
from jaxchunk.chunking.layouts import check_layout, check_stages
from jaxchunk.chunking.pipeline import ROWS, Static, stage_program
from jaxchunk.chunking.programs import NOWHERE, lane_program, loss_program
from jaxchunk.chunking.routing import has_router_losses
from jaxchunk.chunking.shards import Shards
from jaxchunk.chunking.totals import added, make_zeros, total_specs
from jaxchunk.chunking.turns import GROUPS, lane_specs
from jaxchunk.models.moe import RouterWeights
from jaxchunk.models.transformer import Transformer
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.pipeline.executor import Row
from jaxchunk.sharding.pipeline.table import Lanes


def trace_over(
  layout: Layout,
  model: Transformer,
  capacity: int,
  options: Options,
  *,
  mesh: Mesh | None = None,
) -> jax.stages.Traced:
  """The program for a lane of each group, neither lowered nor compiled.

  Args:
    layout: As in `accumulate_over`.
    model: The model, real or abstract.
    capacity: Tokens of each lane; rounded up to a power of two of chunks. Over
      stages of the longest lane, with two of one chunk for each stage.
    options: From `make_options`.
    mesh: Of the devices to compile for, which need not be there.

  Returns:
    The program, `.lower().compile()` it or count what it sends
    (`sharding.traffic`); its accumulators are donated.

  Raises:
    ValueError: As `accumulate_over`.
    NotImplementedError: As `accumulate_over`.
  """
  mesh = layout.mesh() if mesh is None else mesh
  if layout.stage > 1:
    chunks = -(-int(capacity) // options.chunk_size)
    sizes = lanes_under_way(chunks, chunks, layout.stage)
    return trace_stages(layout, model, sizes, options, mesh=mesh)
  shapes = _Shapes.of(layout, model, capacity, options, mesh)
  router = None
  if model.cfg.moe is not None and has_router_losses(model.cfg):
    wide = jnp.promote_types(model.cfg.dtype, jnp.float32)
    size = (model.cfg.num_layers, model.cfg.moe.num_experts)
    balance: Any = _shape(size, wide, mesh, NOWHERE)
    z: Any = _shape((), wide, mesh, NOWHERE)
    router = RouterWeights(balance, z)
  totals = _totals(shapes.model, options, mesh, shapes.shards)
  return lane_program.trace(
    shapes.model,
    shapes.lane,
    shapes.counts,
    totals,
    None,
    router,
    options=options,
    mesh=mesh,
    shards=shapes.shards,
  )


def lanes_under_way(chunks: int, total: int, stages: int) -> tuple[int, ...]:
  """Chunks of a group's lanes that need the most room of a batch's.

  Args:
    chunks: Of the longest.
    total: Of all of the group's lanes in a batch.
    stages: P.

  Returns:
    Two of the longest, where the batch has room for them, and behind them two
    lanes of one chunk for each stage, so that none has room left over.
  """
  return (chunks,) * max(1, min(2, total // chunks)) + (1,) * (2 * stages)


def trace_stages(
  layout: Layout,
  model: Transformer,
  lanes: Sequence[int] | Lanes,
  options: Options,
  *,
  mesh: Mesh | None = None,
) -> jax.stages.Traced:
  """`trace_over` for stages: a table of lanes of so many chunks.

  Args:
    layout: The stages and their schedule, and what else devices share.
    model: The model, real or abstract, with layers as in `Transformer`.
    lanes: Chunks of each lane of a group.
    options: From `make_options`; K is its `live_chunks`.
    mesh: Of the devices to compile for, which need not be there.
  """
  check_stages(layout, model.cfg, options)
  mesh = layout.mesh() if mesh is None else mesh
  if not isinstance(lanes, Lanes):
    lanes = Lanes(tuple(lanes), options.live_chunks)
  table = layout.pipeline.table(layout.stage, lanes)
  static, staged = Static.exactly(layout, model, table)
  if layout.gather == "step":
    static = static._replace(shards=static.shards.gathered())
  leaves, treedef = jax.tree.flatten(staged)
  leaves = [
    _shape(a.shape, a.dtype, mesh, static.shards.spec(n))
    for n, a in enumerate(leaves)
  ]
  model = jax.tree.unflatten(treedef, leaves)
  rows = _shape(
    (static.room.ticks, layout.stage, len(Row._fields)), jnp.int32, mesh, ROWS
  )
  groups = math.prod(mesh.shape[axis] for axis in GROUPS)
  size = (groups, static.room.chunks * options.chunk_size)
  return stage_program.trace(
    model,
    _lane(model, size, mesh),
    rows,
    _shape((), jnp.int32, mesh, NOWHERE),
    _totals(model, options, mesh, static.shards),
    None,
    options=options,
    mesh=mesh,
    static=static,
  )


def trace_loss_over(
  layout: Layout,
  model: Transformer,
  capacity: int,
  options: Options,
  *,
  mesh: Mesh | None = None,
) -> jax.stages.Traced:
  """`trace_over` for the program of `loss_sum_over`."""
  if layout.stage > 1:
    # The loss is that of the gradient's program.
    options = options._replace(strategy="chunk_outer")
    return trace_over(layout, model, capacity, options, mesh=mesh)
  mesh = layout.mesh() if mesh is None else mesh
  shapes = _Shapes.of(layout, model, capacity, options, mesh)
  return loss_program.trace(
    shapes.model,
    shapes.lane,
    shapes.counts,
    options=options,
    mesh=mesh,
    shards=shapes.shards,
  )


def trace_sums_over(
  layout: Layout,
  model: Transformer,
  options: Options,
  *,
  mesh: Mesh | None = None,
) -> jax.stages.Traced:
  """The program by which `accumulate_over(spread=True)` ends."""
  mesh = layout.mesh() if mesh is None else mesh
  if layout.stage > 1:
    check_stages(layout, model.cfg, options)
    table = layout.pipeline.table(layout.stage, layout.stage)
    _, model = Static.exactly(layout, model, table)
  else:
    check_layout(layout, model.cfg, options)
  stored = Shards.of(model, layout)
  shards = stored.gathered() if layout.gather == "step" else stored
  add = added(mesh, options, stored, shards, layout)
  traced: jax.stages.Traced = add.trace(_totals(model, options, mesh, shards))
  return traced


def _totals(
  model: Transformer, options: Options, mesh: Mesh, shards: Shards
) -> Any:
  return jax.tree.map(
    lambda a, spec: _shape(a.shape, a.dtype, mesh, spec),
    jax.eval_shape(make_zeros(mesh, options, shards), model),
    total_specs(options, shards),
  )


@dataclasses.dataclass(frozen=True)
class _Shapes:
  """What a program is given, as shapes on the devices of a mesh."""

  shards: Shards
  model: Transformer
  lane: Lane
  counts: jax.ShapeDtypeStruct

  @classmethod
  def of(
    cls,
    layout: Layout,
    model: Transformer,
    capacity: int,
    options: Options,
    mesh: Mesh,
  ) -> "_Shapes":
    check_layout(layout, model.cfg, options)
    shards = Shards.of(model, layout)
    if layout.gather == "step":
      shards = shards.gathered()
    leaves, treedef = jax.tree.flatten(model)
    leaves = [
      _shape(a.shape, a.dtype, mesh, shards.spec(n))
      for n, a in enumerate(leaves)
    ]
    chunks = capacity_chunks(-(-int(capacity) // options.chunk_size))
    groups = math.prod(mesh.shape[axis] for axis in GROUPS)
    _, by_group = lane_specs()
    return cls(
      shards,
      jax.tree.unflatten(treedef, leaves),
      _lane(model, (groups, chunks * options.chunk_size), mesh),
      _shape((groups,), jnp.int32, mesh, by_group),
    )


def _lane(model: Transformer, size: tuple[int, int], mesh: Mesh) -> Lane:
  """Lanes of all groups, `[groups, tokens]`."""
  rows, _ = lane_specs()
  wide = jnp.promote_types(model.cfg.dtype, jnp.float32)
  fields: Any = {
    field.name: _shape(
      size, wide if field.name == "weights" else jnp.int32, mesh, rows
    )
    for field in dataclasses.fields(Lane)
  }
  return Lane(**fields)


def _shape(
  shape: Sequence[int], dtype: Any, mesh: Mesh, spec: PartitionSpec
) -> jax.ShapeDtypeStruct:
  sharding = NamedSharding(mesh, spec)
  return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)
