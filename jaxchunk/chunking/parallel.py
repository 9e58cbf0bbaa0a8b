"""Lanes over a mesh: each group of devices runs its own, without waiting.

The lanes of a batch are dealt out to the groups of a layout by what they cost,
the costliest first. Inside a group a lane lies on the devices of the axis
"context", every P-th token on each. Groups share no collective while lanes run,
so each goes on as soon as it is done; their sums are added up once, at the end.
Every device holds the parameters and fp32 gradients.
"""

import dataclasses
import functools
import heapq
from collections.abc import Sequence
from typing import Any

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
from jaxchunk.chunking.memory import Strategy
from jaxchunk.chunking.ops import Stage
from jaxchunk.chunking.spaco import SpaCO
from jaxchunk.kernels.state import KVPrefix, KVWindow
from jaxchunk.kernels.vma import vary_like
from jaxchunk.models.transformer import Transformer
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.schemes import Ring, device_order
from jaxchunk.sharding.state import KVContext
from jaxchunk.types import Example

_SEQUENCE = "context"
_STRIPED = Ring(order="striped")
_NOWHERE = PartitionSpec()


def check_layout(layout: Layout, options: Options) -> Strategy:
  """Whether lanes can run so; the strategy that they run by.

  Raises:
    ValueError: Chunks cannot be dealt out evenly; names a size that can.
    NotImplementedError: The layout splits more than lanes and sequences, or
      does not go with the options.
  """
  for axis in ("stage", "fsdp", "expert", "tensor"):
    if (size := getattr(layout, axis)) > 1:
      groups = layout.num_devices // layout.context
      near = Layout(data=groups, context=layout.context)
      raise NotImplementedError(
        f"layout.{axis}={size}: chunks run over the axes 'data' and 'context' "
        f"so far; the nearest layout is {near}"
      )
  size, devices = options.chunk_size, layout.context
  if size % devices:
    raise ValueError(
      f"chunk_size={size} cannot be dealt out to layout.context={devices} "
      f"devices; take {-(-size // devices) * devices}"
    )
  if isinstance(options.strategy, SpaCO):
    raise NotImplementedError(f"{options.strategy} with a layout")
  if options.kv_memory == "host":
    raise NotImplementedError("kv_memory='host' with a layout")
  return options.strategy


def accumulate_over(
  layout: Layout,
  model: Transformer,
  examples: Sequence[Example],
  options: Options,
  *,
  mesh: Mesh | None = None,
  rng: PRNGKeyArray | None = None,
) -> Sums:
  """`executor.accumulate` over the devices of a layout.

  The sums are those of one device up to rounding. On several hosts every
  process calls it with the same examples.

  Args:
    layout: How many groups have lanes of their own ("data"), and how many
      devices share a lane ("context").
    model: The model; it is copied to all devices if it is not there.
    examples: Sequences of any length.
    options: From `make_options`.
    mesh: From `layout.mesh`; by default of all devices.
    rng: As in `accumulate`.

  Returns:
    The sums, on all devices.

  Raises:
    ValueError: A token is not in the vocabulary, or as `check_layout`.
    NotImplementedError: As `check_layout`.
  """
  strategy = check_layout(layout, options)
  mesh = layout.mesh() if mesh is None else mesh
  everywhere = NamedSharding(mesh, _NOWHERE)
  model, rng = jax.device_put((model, rng), everywhere)
  plan, lanes = executor.plan_lanes(model, examples, options.chunk_size)
  costs = plan_cost(
    model.cfg,
    plan,
    live_chunks=options.live_chunks,
    strategy=strategy,
  )
  groups = balanced(costs.lanes, layout.data)
  totals = _zeros(mesh, options)(model)
  for number in range(max(map(len, groups))):
    turn = [
      lanes[group[number]] if number < len(group) else None for group in groups
    ]
    lane, counts = _placed(model, turn, options.chunk_size, mesh)
    totals = _program(
      model, lane, counts, totals, rng, options=options, mesh=mesh
    )
  loss, grads = _added(everywhere)(totals)
  weight = executor.weight_of(examples)
  return Sums(loss, weight, options.trainable.state(grads), plan)


def warm_up_over(
  layout: Layout,
  model: Transformer,
  longest: int,
  options: Options,
  *,
  mesh: Mesh | None = None,
  rng: PRNGKeyArray | None = None,
) -> int:
  """`executor.warm_up` for `accumulate_over`, with its arguments.

  Args:
    layout: As in `accumulate_over`.
    model: The model.
    longest: Length of the longest sequence to come, in tokens.
    options: From `make_options`.
    mesh: As in `accumulate_over`.
    rng: Any key if dropout will be used.

  Returns:
    How many programs there are.
  """
  check_layout(layout, options)
  mesh = layout.mesh() if mesh is None else mesh
  everywhere = NamedSharding(mesh, _NOWHERE)
  model, rng = jax.device_put((model, rng), everywhere)
  token = np.zeros(1, np.int32)
  example = Example(token, token, np.zeros(1, np.float32))
  _, (lane,) = executor.plan_lanes(model, [example], options.chunk_size)
  totals = _zeros(mesh, options)(model)
  top = capacity_chunks(-(-longest // options.chunk_size))
  capacities = [1 << n for n in range(top.bit_length())]
  for capacity in capacities:
    placed, counts = _placed(
      model, [lane] * layout.data, options.chunk_size, mesh, capacity
    )
    totals = _program(
      model, placed, counts, totals, rng, options=options, mesh=mesh
    )
  jax.block_until_ready(_added(everywhere)(totals))
  return len(capacities)


def balanced(costs: Sequence[int], groups: int) -> list[list[int]]:
  """Deals lanes out by longest processing time (Graham, 1969).

  Args:
    costs: Of each lane.
    groups: How many get some.

  Returns:
    The lanes of each group, the costliest first: what the costliest group has
    is at most 4/3 of the least that is possible.
  """
  heap = [(0, group) for group in range(groups)]
  dealt: list[list[int]] = [[] for _ in range(groups)]
  for lane in sorted(range(len(costs)), key=lambda n: -costs[n]):
    total, group = heapq.heappop(heap)
    dealt[group].append(lane)
    heapq.heappush(heap, (total + costs[lane], group))
  return dealt


def _placed(
  model: Transformer,
  chosen: Sequence[LaneArrays | None],
  chunk_size: int,
  mesh: Mesh,
  chunks: int = 1,
) -> tuple[Lane, Array]:
  """A lane for each group, or none, in the room of the longest.

  Args:
    model: The model.
    chosen: The lanes.
    chunk_size: C.
    mesh: Where to.
    chunks: The least room.
  """
  most = max(lane.num_chunks for lane in chosen if lane is not None)
  length = capacity_chunks(max(most, chunks)) * chunk_size
  devices = mesh.shape[_SEQUENCE]
  wide = np.dtype(jnp.promote_types(model.cfg.dtype, jnp.float32))
  rows = NamedSharding(mesh, PartitionSpec("data", _SEQUENCE))

  def field(name: str) -> Array:
    dtype = wide if name == "weights" else np.dtype(np.int32)
    whole = np.zeros((len(chosen), length), dtype)
    for row, lane in zip(whole, chosen, strict=True):
      if lane is not None:
        row[:] = getattr(pad_lane(lane, length), name)
    whole = whole[:, device_order(length, devices, _STRIPED)]
    return _put(whole, rows)

  names = [field.name for field in dataclasses.fields(Lane)]
  # A group without a lane runs one chunk of padding.
  counts = np.asarray([1 if c is None else c.num_chunks for c in chosen])
  counts = counts.astype(np.int32)
  by_group = NamedSharding(mesh, PartitionSpec("data"))
  return Lane(**{name: field(name) for name in names}), _put(counts, by_group)


def _put(whole: np.ndarray[Any, Any], sharding: NamedSharding) -> Array:
  """Each process puts what its own devices need."""
  # On purpose; jax takes the callback's result for an accident.
  with jax.transfer_guard_host_to_device("allow"):
    return jax.make_array_from_callback(
      whole.shape, sharding, whole.__getitem__
    )


@functools.partial(
  jax.jit, static_argnames=("options", "mesh"), donate_argnames=("totals",)
)
def _program(
  model: Transformer,
  lane: Lane,
  counts: Array,
  totals: Any,
  rng: PRNGKeyArray | None,
  *,
  options: Options,
  mesh: Mesh,
) -> Any:
  """Adds a lane of each group to the totals of its devices."""
  stage = _shared(options.stage(model.cfg), mesh.shape[_SEQUENCE])

  def local(model: Any, lane: Any, count: Any, totals: Any, rng: Any) -> Any:
    totals = jax.tree.map(lambda a: a[0], totals)
    # Parameters that vary keep the loops free of sums over the devices.
    model = vary_like(model, lane)
    sums = executor.lane_gradient(
      stage, options, model, lane, count[0], totals, rng
    )
    return jax.tree.map(lambda a: a[None], sums)

  per_device = PartitionSpec(("data", _SEQUENCE))
  rows = PartitionSpec("data", _SEQUENCE)
  return jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(_NOWHERE, rows, PartitionSpec("data"), per_device, _NOWHERE),
    out_specs=per_device,
    check_vma=True,
  )(model, lane, counts, totals, rng)


def _shared(stage: Stage, devices: int) -> Stage:
  """The stage of one device of those that share a lane."""
  if devices == 1:
    return stage
  size = stage.chunk_size // devices
  states = []
  for state in stage.states:
    assert isinstance(state, KVPrefix)
    fields = {
      field.name: getattr(state, field.name)
      for field in dataclasses.fields(KVPrefix)
    }
    window = state.window if isinstance(state, KVWindow) else None
    fields |= {"chunk_size": size, "window": window, "axis": _SEQUENCE}
    states.append(KVContext(**fields))
  return dataclasses.replace(stage, chunk_size=size, states=tuple(states))


@functools.cache
def _zeros(mesh: Mesh, options: Options) -> Any:
  """Totals of each device, in front of everything else."""
  per_device = NamedSharding(mesh, PartitionSpec(("data", _SEQUENCE)))
  count = mesh.shape["data"] * mesh.shape[_SEQUENCE]

  def zeros(model: Transformer) -> Any:
    totals = executor.zero_totals(model, options.trainable)
    return jax.tree.map(lambda a: jnp.zeros((count, *a.shape), a.dtype), totals)

  return jax.jit(zeros, out_shardings=per_device)


@functools.cache
def _added(everywhere: NamedSharding) -> Any:
  def add(totals: Any) -> Any:
    return jax.tree.map(lambda a: jnp.sum(a, 0), totals)

  return jax.jit(add, out_shardings=everywhere)
