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
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, PRNGKeyArray

from jaxchunk.chunking import chunk_outer, executor
from jaxchunk.chunking.balance_cost import Timing, lane_works
from jaxchunk.chunking.chunk import Lane
from jaxchunk.chunking.cost import plan_cost
from jaxchunk.chunking.executor import Options, Sums
from jaxchunk.chunking.lanes import LaneArrays, capacity_chunks
from jaxchunk.chunking.memory import Strategy
from jaxchunk.chunking.ops import Stage
from jaxchunk.chunking.routing import has_router_losses, lane_counts
from jaxchunk.chunking.scores import weighted_sum
from jaxchunk.chunking.shards import Shards
from jaxchunk.chunking.spaco import SpaCO
from jaxchunk.chunking.totals import (
  SUMMED,
  added,
  make_zeros,
  total_specs,
  zero_totals,
)
from jaxchunk.chunking.turns import (
  GROUPS,
  SEQUENCE,
  Hybrid,
  Turn,
  hybrid_turns,
  lane_specs,
  make_turns,
  place,
)
from jaxchunk.kernels.state import KVPrefix, KVWindow
from jaxchunk.kernels.vma import vary_like
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.moe import RouterWeights
from jaxchunk.models.transformer import Transformer
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.state import KVContext
from jaxchunk.types import Example

_NOWHERE = PartitionSpec()


def check_layout(
  layout: Layout, cfg: ModelConfig, options: Options
) -> Strategy:
  """Whether lanes can run so; the strategy that they run by.

  Raises:
    ValueError: Chunks or heads cannot be dealt out evenly; names a size that
      can.
    NotImplementedError: The layout has stages, or does not go with the
      options.
  """
  if layout.stage > 1:
    near = dataclasses.replace(layout, stage=1, data=layout.data * layout.stage)
    raise NotImplementedError(
      f"layout.stage={layout.stage}: chunks do not run over it so far; the "
      f"nearest layout is {near}"
    )
  size, devices = options.chunk_size, layout.context
  if size % devices:
    raise ValueError(
      f"chunk_size={size} cannot be dealt out to layout.context={devices} "
      f"devices; take {-(-size // devices) * devices}"
    )
  check_heads(layout, cfg)
  check_experts(layout, cfg)
  if isinstance(options.strategy, SpaCO):
    raise NotImplementedError(f"{options.strategy} with a layout")
  if options.kv_memory == "host":
    raise NotImplementedError("kv_memory='host' with a layout")
  return options.strategy


def check_heads(layout: Layout, cfg: ModelConfig) -> None:
  """Whether a layout can split a model's heads.

  Raises:
    ValueError: There are too few; names the nearest layout.
    NotImplementedError: They need each other.
  """
  heads, parts = cfg.kv_heads, layout.tensor
  if heads % parts:
    fits = math.gcd(heads, parts)
    near = dataclasses.replace(
      layout, tensor=fits, context=layout.context * parts // fits
    )
    raise ValueError(
      f"layout.tensor={parts} does not divide num_kv_heads={heads}; the "
      f"nearest layout is {near}"
    )
  if parts > 1 and cfg.qk_norm and cfg.qk_norm_over != "head":
    raise NotImplementedError(
      f"layout.tensor={parts} with qk_norm_over={cfg.qk_norm_over!r}: its "
      "norm needs all heads of a token; use 'context' or 'fsdp'"
    )


def check_experts(layout: Layout, cfg: ModelConfig) -> None:
  """Whether a layout can split a model's experts.

  Raises:
    ValueError: It cannot, or there are none; names the nearest layout.
  """
  experts = 1 if cfg.moe is None else cfg.moe.num_experts
  fits = math.gcd(experts, layout.expert)
  if fits < layout.expert:
    near = dataclasses.replace(
      layout, expert=fits, data=layout.data * layout.expert // fits
    )
    has = "a model without experts" if cfg.moe is None else f"{experts} experts"
    raise ValueError(
      f"layout.expert={layout.expert} cannot split {has}; the nearest layout "
      f"is {near}"
    )


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
  return _put_model(model, Shards.of(model, layout), mesh)


def _put_model(model: Transformer, shards: Shards, mesh: Mesh) -> Transformer:
  leaves, treedef = jax.tree.flatten(model)
  placed = jax.device_put(leaves, _shardings(shards, len(leaves), mesh))
  return jax.tree.unflatten(treedef, placed)


def _shardings(shards: Shards, leaves: int, mesh: Mesh) -> list[NamedSharding]:
  return [NamedSharding(mesh, shards.spec(n)) for n in range(leaves)]


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
    self.model = _put_model(model, self.shards, mesh)
    self.rng = jax.device_put(rng, NamedSharding(mesh, _NOWHERE))


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
    _check_hybrid(layout, ready.shards)
    turns = hybrid_turns(layout, plan, hybrid, model.cfg)
  weight = executor.weight_of(examples)
  placed = [
    _Placed.of(model, turn, lanes, options.chunk_size, mesh) for turn in turns
  ]
  static: Any = {"options": options, "shards": ready.shards}
  router = None
  if has_router_losses(model.cfg):
    tokens = sum(plan.lengths)
    router = _router_weights(ready, placed, tokens, weight, static)
  totals = zero_totals(mesh, options, ready.shards)(ready.model)
  places = jax.tree.map(lambda a: a.sharding, totals)
  for turn_ in placed:
    totals = _program(
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


def _check_hybrid(layout: Layout, shards: Shards) -> None:
  if shards.lockstep or layout.fsdp * layout.expert > 1:
    near = dataclasses.replace(
      layout, data=layout.data * layout.fsdp * layout.expert, fsdp=1, expert=1
    )
    raise ValueError(
      f"hybrid groups need whole parameters on every device, and {layout} "
      f"splits them; the nearest layout is {near}"
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
  _check_hybrid(layout, ready.shards)
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
      totals = _program(
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
    How many programs there are.
  """
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
      router = _router_weights(ready, [turn_], 1, 1.0, static)
    totals = _program(
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
  """`executor.loss_sum` over the devices of a layout; see `accumulate_over`."""
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
    part = _loss_program(
      ready.model,
      lane,
      counts,
      options=options,
      mesh=mesh,
      shards=ready.shards,
    )
    total = part if total is None else _sum(total, part)
  return total


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
    capacity: Tokens of each lane; rounded up to a power of two of chunks.
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
  shapes = _Shapes.of(layout, model, capacity, options, mesh)
  router = None
  if model.cfg.moe is not None and has_router_losses(model.cfg):
    wide = jnp.promote_types(model.cfg.dtype, jnp.float32)
    size = (model.cfg.num_layers, model.cfg.moe.num_experts)
    balance: Any = _shape(size, wide, mesh, _NOWHERE)
    z: Any = _shape((), wide, mesh, _NOWHERE)
    router = RouterWeights(balance, z)
  totals = jax.eval_shape(
    make_zeros(mesh, options, shapes.shards), shapes.model
  )
  totals = jax.tree.map(
    lambda a, spec: _shape(a.shape, a.dtype, mesh, spec),
    totals,
    total_specs(options, shapes.shards),
  )
  return _program.trace(
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


def trace_loss_over(
  layout: Layout,
  model: Transformer,
  capacity: int,
  options: Options,
  *,
  mesh: Mesh | None = None,
) -> jax.stages.Traced:
  """`trace_over` for the program of `loss_sum_over`."""
  mesh = layout.mesh() if mesh is None else mesh
  shapes = _Shapes.of(layout, model, capacity, options, mesh)
  return _loss_program.trace(
    shapes.model,
    shapes.lane,
    shapes.counts,
    options=options,
    mesh=mesh,
    shards=shapes.shards,
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
    rows, by_group = lane_specs()
    wide = jnp.promote_types(model.cfg.dtype, jnp.float32)
    size = (groups, chunks * options.chunk_size)
    fields: Any = {
      field.name: _shape(
        size, wide if field.name == "weights" else jnp.int32, mesh, rows
      )
      for field in dataclasses.fields(Lane)
    }
    return cls(
      shards,
      jax.tree.unflatten(treedef, leaves),
      Lane(**fields),
      _shape((groups,), jnp.int32, mesh, by_group),
    )


def _shape(
  shape: Sequence[int], dtype: Any, mesh: Mesh, spec: PartitionSpec
) -> jax.ShapeDtypeStruct:
  sharding = NamedSharding(mesh, spec)
  return jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=sharding)


@functools.partial(
  jax.jit,
  static_argnames=("options", "mesh", "shards"),
  donate_argnames=("totals",),
)
def _program(
  model: Transformer,
  lane: Lane,
  counts: Array,
  totals: Any,
  rng: PRNGKeyArray | None,
  router: RouterWeights | None,
  *,
  options: Options,
  mesh: Mesh,
  shards: Shards,
) -> Any:
  """Adds a lane of each group to the totals of its devices."""
  stage = _local_stage(options, model.cfg, mesh, shards)
  leaves, treedef = jax.tree.flatten(model)

  def local(
    leaves: Any, lane: Any, counts: Any, totals: Any, rng: Any, router: Any
  ) -> Any:
    here = dataclasses.replace(stage, router=router)
    totals = jax.tree.map(lambda a: a[0], totals)
    # Parameters that vary keep the loops free of sums over the devices.
    model = jax.tree.unflatten(treedef, vary_like(leaves, lane))
    sums = executor.lane_gradient(
      here, options, model, lane, counts[0], totals, rng
    )
    return jax.tree.map(lambda a: a[None], sums)

  specs = [shards.spec(n) for n in range(len(leaves))]
  summed = total_specs(options, shards)
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(specs, *lane_specs(), summed, _NOWHERE, _NOWHERE),
    out_specs=summed,
    check_vma=True,
  )(leaves, lane, counts, totals, rng, router)


@functools.partial(jax.jit, static_argnames=("options", "mesh", "shards"))
def _loss_program(
  model: Transformer,
  lane: Lane,
  counts: Array,
  *,
  options: Options,
  mesh: Mesh,
  shards: Shards,
) -> Array:
  """`sum(weights * nll)` of a lane of each group, added up."""
  stage = _local_stage(options, model.cfg, mesh, shards)
  leaves, treedef = jax.tree.flatten(model)

  def local(leaves: Any, lane: Any, counts: Any) -> Any:
    model = jax.tree.unflatten(treedef, vary_like(leaves, lane))
    nll = chunk_outer.lane_nll(stage, model, lane, counts[0])
    return jax.lax.psum(weighted_sum(lane.weights, nll), SUMMED)

  specs = [shards.spec(n) for n in range(len(leaves))]
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(specs, *lane_specs()),
    out_specs=_NOWHERE,
    check_vma=True,
  )(leaves, lane, counts)


def _router_weights(
  ready: _Ready,
  placed: Sequence[_Placed],
  tokens: int,
  weight: float,
  static: Any,
) -> RouterWeights:
  """See `executor.accumulate`: what routers' sums count for."""
  cfg = ready.model.cfg
  moe = cfg.moe
  assert moe is not None
  counts: Any = None
  if moe.balance_loss:
    for turn in placed:
      part = _counts_program(
        ready.model,
        turn.lane,
        turn.counts,
        ready.rng,
        mesh=turn.mesh,
        **static,
      )
      counts = part if counts is None else _sum(counts, part)
  return _weights_over(
    counts, cfg=cfg, tokens=tokens, weight=weight, mesh=placed[0].mesh
  )


@functools.partial(jax.jit, static_argnames=("cfg", "tokens", "weight", "mesh"))
def _weights_over(
  counts: Array | None,
  *,
  cfg: ModelConfig,
  tokens: int,
  weight: float,
  mesh: Mesh,
) -> RouterWeights:
  moe = cfg.moe
  assert moe is not None
  if counts is None:
    counts = jnp.zeros((cfg.num_layers, moe.num_experts), jnp.int32)
  wide = jnp.promote_types(cfg.dtype, jnp.float32)
  found = RouterWeights.of(
    moe, counts, jnp.asarray(tokens, wide), jnp.asarray(weight, wide)
  )
  return jax.lax.with_sharding_constraint(found, NamedSharding(mesh, _NOWHERE))


@functools.partial(jax.jit, static_argnames=("options", "mesh", "shards"))
def _counts_program(
  model: Transformer,
  lane: Lane,
  counts: Array,
  rng: PRNGKeyArray | None,
  *,
  options: Options,
  mesh: Mesh,
  shards: Shards,
) -> Array:
  """Copies that each expert gets of a lane of each group, `[L,E]`."""
  stage = _local_stage(options, model.cfg, mesh, shards)
  leaves, treedef = jax.tree.flatten(model)
  moe = model.cfg.moe
  assert moe is not None
  shape = (model.cfg.num_layers, moe.num_experts)

  def local(leaves: Any, lane: Any, counts: Any, rng: Any) -> Any:
    model = jax.tree.unflatten(treedef, vary_like(leaves, lane))
    zeros = jnp.zeros(shape, jnp.int32)
    found = lane_counts(stage, model, lane, counts[0], zeros, rng)
    return jax.lax.psum(found, SUMMED)

  specs = [shards.spec(n) for n in range(len(leaves))]
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(specs, *lane_specs(), _NOWHERE),
    out_specs=_NOWHERE,
    check_vma=True,
  )(leaves, lane, counts, rng)


@jax.jit
def _sum(a: Array, b: Array) -> Array:
  return a + b


def _local_stage(
  options: Options, cfg: ModelConfig, mesh: Mesh, shards: Shards
) -> Stage:
  """The stage of one device: its part of each chunk, and of the heads."""
  stage = options.stage(cfg)
  size = stage.chunk_size // mesh.shape[SEQUENCE]
  states = []
  for state in stage.states:
    assert isinstance(state, KVPrefix)
    heads = state.num_kv_heads // mesh.shape["tensor"]
    local = dataclasses.replace(state, num_kv_heads=heads, chunk_size=size)
    if mesh.shape[SEQUENCE] > 1:
      local = _over_context(local)
    states.append(local)
  return dataclasses.replace(
    stage, chunk_size=size, states=tuple(states), shards=shards
  )


def _over_context(state: KVPrefix) -> KVContext:
  fields = {
    field.name: getattr(state, field.name)
    for field in dataclasses.fields(KVPrefix)
  }
  window = state.window if isinstance(state, KVWindow) else None
  return KVContext(**fields | {"window": window, "axis": SEQUENCE})
