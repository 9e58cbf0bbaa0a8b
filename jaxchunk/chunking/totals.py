"""What each device adds up while lanes run, and the sums of it over devices.

Every device has totals of its own in the parts of parameters that it works
with. They lie as one array with the devices in front.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from jaxchunk.chunking import executor
from jaxchunk.chunking.executor import Options
from jaxchunk.chunking.shards import Shards
from jaxchunk.chunking.turns import GROUPS, SEQUENCE
from jaxchunk.models.transformer import Transformer
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.rules import axis_names

SUMMED = (*GROUPS, SEQUENCE)
"""The mesh axes along which devices have tokens, and so gradients, of their
own; stages have their own of what they all hold."""


def total_specs(options: Options, shards: Shards) -> Any:
  """How totals are split: in front, by the devices that have their own."""

  def total(spec: PartitionSpec) -> PartitionSpec:
    used = {name for split in spec for name in axis_names(split)}
    own = tuple(a for a in ("stage", *SUMMED) if a not in used)
    return PartitionSpec(own, *spec)

  chosen = options.trainable.chosen
  specs = [shards.spec(n) for n, mine in enumerate(chosen) if mine]
  return total(PartitionSpec()), [total(spec) for spec in specs]


def make_zeros(mesh: Mesh, options: Options, shards: Shards) -> Any:
  """A function from a model to its first totals."""
  specs = total_specs(options, shards)

  def zeros(model: Transformer) -> Any:
    totals = executor.zero_totals(model, options.trainable)

    def each(a: Array, spec: PartitionSpec) -> Array:
      return jnp.zeros((_count(mesh, spec), *a.shape), a.dtype)

    return jax.tree.map(each, totals, specs)

  return zeros


@functools.cache
def zero_totals(mesh: Mesh, options: Options, shards: Shards) -> Any:
  """The same compiled: each device makes its own."""
  shardings = jax.tree.map(
    functools.partial(NamedSharding, mesh), total_specs(options, shards)
  )
  return jax.jit(make_zeros(mesh, options, shards), out_shardings=shardings)


@functools.cache
def added(
  mesh: Mesh,
  options: Options,
  stored: Shards,
  shards: Shards,
  spread: Layout | None,
) -> Any:
  """The sums of totals over devices, in the order of the devices.

  An all-reduce adds in an order of its own, another one inside a process than
  between two, and a run would not be the same bits on other numbers of hosts.
  Here each device gets one part of all totals and adds it up: as many bytes as
  a ring sends to scatter a sum.

  Args:
    mesh: The devices.
    options: What is trained.
    stored: How parameters, and so their gradients, are kept.
    shards: How programs take them, and how totals are.
    spread: The layout, if gradients are split further over copies
      (`Layout.spread`).
  """
  chosen = options.trainable.chosen
  wanted = [stored.spec(n) for n, mine in enumerate(chosen) if mine]
  specs = total_specs(options, shards)

  def place(total: Array, spec: PartitionSpec) -> Array:
    if spread is not None:
      spec = spread.spread(spec, total.shape)
    return lax.with_sharding_constraint(total, NamedSharding(mesh, spec))

  def add(totals: Any) -> Any:
    loss, grads = jax.tree.map(functools.partial(_sum, mesh), totals, specs)
    placed = [place(g, spec) for g, spec in zip(grads, wanted, strict=True)]
    return place(loss, PartitionSpec()), placed

  return jax.jit(add)


def _sum(mesh: Mesh, total: Array, spec: PartitionSpec) -> Array:
  """The sum along the first axis, of which each device has one."""
  own, *rest = spec
  count = _count(mesh, spec)
  shape = total.shape[1:]
  rest = [*rest, *[None] * (len(shape) - len(rest))]
  local = [
    size // math.prod(mesh.shape[axis] for axis in axis_names(split))
    for size, split in zip(shape, rest, strict=True)
  ]
  fits = [n for n, size in enumerate(local) if size % count == 0]
  run = functools.partial(jax.shard_map, mesh=mesh, in_specs=spec)
  if not fits and any(rest):
    # No part is whole: added in whatever order.
    return run(lambda a: lax.psum(a[0], own), out_specs=PartitionSpec(*rest))(
      total
    )
  if not fits:
    size = math.prod(shape)
    flat = jnp.pad(
      total.reshape(len(total), size), ((0, 0), (0, -size % count))
    )
    flat = run(
      lambda a: jnp.sum(lax.all_to_all(a[0].reshape(count, -1), own, 0, 0), 0),
      in_specs=PartitionSpec(own),
      out_specs=PartitionSpec(own),
    )(flat)
    return flat[:size].reshape(shape)
  dim = max(fits, key=lambda n: local[n])

  def part(a: Array) -> Array:
    split = (*local[:dim], count, local[dim] // count, *local[dim + 1 :])
    return jnp.sum(lax.all_to_all(a.reshape(split), own, dim, 0), 0)

  rest[dim] = (*axis_names(rest[dim]), *own)
  return run(part, out_specs=PartitionSpec(*rest))(total)


def _count(mesh: Mesh, spec: PartitionSpec) -> int:
  return math.prod(mesh.shape[axis] for axis in axis_names(spec[0]))
