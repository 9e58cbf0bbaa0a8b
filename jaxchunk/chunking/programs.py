"""The programs of a layout: what each device does with its part of a lane.

As those of `executor`, inside a `jax.shard_map` over all axes of the mesh.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec
from jaxtyping import Array, PRNGKeyArray

from jaxchunk.chunking import chunk_outer, executor
from jaxchunk.chunking.chunk import Lane
from jaxchunk.chunking.executor import Options
from jaxchunk.chunking.ops import Stage
from jaxchunk.chunking.routing import lane_counts
from jaxchunk.chunking.scores import weighted_sum
from jaxchunk.chunking.shards import Shards
from jaxchunk.chunking.totals import SUMMED, total_specs
from jaxchunk.chunking.turns import SEQUENCE, lane_specs
from jaxchunk.kernels.state import KVPrefix, KVWindow
from jaxchunk.kernels.vma import vary_like
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.moe import RouterWeights
from jaxchunk.models.transformer import Transformer
from jaxchunk.sharding.state import KVContext

NOWHERE = PartitionSpec()
"""Of what every device has whole."""


@functools.partial(
  jax.jit,
  static_argnames=("options", "mesh", "shards"),
  donate_argnames=("totals",),
)
def lane_program(
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
  stage = local_stage(options, model.cfg, mesh, shards)

  def local(
    model: Any, lane: Any, count: Any, totals: Any, rng: Any, router: Any
  ) -> Any:
    here = dataclasses.replace(stage, router=router)
    totals = jax.tree.map(lambda a: a[0], totals)
    sums = executor.lane_gradient(
      here, options, model, lane, count, totals, rng
    )
    return jax.tree.map(lambda a: a[None], sums)

  summed = total_specs(options, shards)
  specs = (summed, NOWHERE, NOWHERE)
  run = _on_devices(local, mesh, shards, specs, summed)
  return run(model, lane, counts, totals, rng, router)


@functools.partial(jax.jit, static_argnames=("options", "mesh", "shards"))
def loss_program(
  model: Transformer,
  lane: Lane,
  counts: Array,
  *,
  options: Options,
  mesh: Mesh,
  shards: Shards,
) -> Array:
  """`sum(weights * nll)` of a lane of each group, added up."""
  stage = local_stage(options, model.cfg, mesh, shards)

  def local(model: Any, lane: Any, count: Any) -> Any:
    nll = chunk_outer.lane_nll(stage, model, lane, count)
    return jax.lax.psum(weighted_sum(lane.weights, nll), SUMMED)

  return _on_devices(local, mesh, shards, (), NOWHERE)(model, lane, counts)


@functools.partial(jax.jit, static_argnames=("options", "mesh", "shards"))
def counts_program(
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
  stage = local_stage(options, model.cfg, mesh, shards)
  moe = model.cfg.moe
  assert moe is not None
  shape = (model.cfg.num_layers, moe.num_experts)

  def local(model: Any, lane: Any, count: Any, rng: Any) -> Any:
    zeros = jnp.zeros(shape, jnp.int32)
    found = lane_counts(stage, model, lane, count, zeros, rng)
    return jax.lax.psum(found, SUMMED)

  run = _on_devices(local, mesh, shards, (NOWHERE,), NOWHERE)
  return run(model, lane, counts, rng)


def _on_devices(
  local: Callable[..., Any],
  mesh: Mesh,
  shards: Shards,
  specs: tuple[Any, ...],
  out_specs: Any,
) -> Callable[..., Any]:
  """`local(model, lane, count, ...)` on every device with its own parts.

  Args:
    local: What to run.
    mesh: The devices.
    shards: How the model is split.
    specs: How what comes behind the count is.
    out_specs: How the results are.
  """

  def run(model: Transformer, lane: Lane, counts: Array, *more: Any) -> Any:
    leaves, treedef = jax.tree.flatten(model)

    def here(leaves: Any, lane: Any, counts: Any, *more: Any) -> Any:
      # Parameters that vary keep the loops free of sums over the devices.
      model = jax.tree.unflatten(treedef, vary_like(leaves, lane))
      return local(model, lane, counts[0], *more)

    parts = [shards.spec(n) for n in range(len(leaves))]
    return jax.shard_map(
      here,
      mesh=mesh,
      in_specs=(parts, *lane_specs(), *specs),
      out_specs=out_specs,
      check_vma=True,
    )(leaves, lane, counts, *more)

  return run


def local_stage(
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
