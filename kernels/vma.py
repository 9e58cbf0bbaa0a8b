"""Helpers for `jax.shard_map(..., check_vma=True)`.

Inside a checked shard_map every value knows over which mesh axes it varies.
Three things then need care, and they are silent errors with the check off:

- a loop carry made from nothing (`jnp.zeros`) does not vary, but what the loop
  puts into it does: `vary_like`;
- what a kernel returns must say so itself: `output`;
- a custom_vjp rule must return the cotangent of a replicated primal summed
  over the axes on which the replicas differ: `match_primal`.

Outside a shard_map nothing varies, and values are returned as they are.
"""

from collections.abc import Iterable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax import lax

Tree = TypeVar("Tree")


def varying_axes(*trees: Any) -> frozenset[str]:
  """The mesh axes over which any array of the trees varies."""
  axes: frozenset[str] = frozenset()
  for leaf in jax.tree.leaves(trees):
    axes |= jax.typeof(leaf).manual_axis_type.varying
  return axes


def vary_like(value: Tree, *references: Any) -> Tree:
  """Makes every array of `value` vary over the axes of the references.

  Args:
    value: A pytree of arrays, such as the initial carry of a loop.
    *references: Pytrees of arrays; the union of their axes is taken.

  Returns:
    `value`, unchanged outside a shard_map.
  """
  return vary(value, varying_axes(*references))


def vary(value: Tree, axes: Iterable[str]) -> Tree:
  """Makes every array of `value` vary over mesh axes, if it does not yet."""
  wanted = frozenset(axes)

  def vary_leaf(leaf: jax.Array) -> jax.Array:
    missing = tuple(sorted(wanted - varying_axes(leaf)))
    return lax.pcast(leaf, missing, to="varying") if missing else leaf

  return jax.tree.map(vary_leaf, value) if wanted else value


def zeros_like_type(
  kind: jax.ShapeDtypeStruct, leading: tuple[int, ...] = ()
) -> jax.Array:
  """Zeros that vary as a result of `jax.eval_shape` does.

  Args:
    kind: Shape and dtype, from inside the same shard_map.
    leading: Axes in front of its own.
  """
  zeros = jnp.zeros((*leading, *kind.shape), kind.dtype)
  axes = kind.manual_axis_type
  return zeros if axes is None else vary(zeros, axes.varying)


def output(
  shape: tuple[int, ...], dtype: Any, like: jax.Array
) -> jax.ShapeDtypeStruct:
  """A kernel's output that varies over the mesh axes of `like`."""
  axes = jax.typeof(like).manual_axis_type
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)


def match_primal(cotangent: Tree, primal: Any) -> Tree:
  """Sums a cotangent over the axes on which its primal is replicated.

  Args:
    cotangent: A pytree of arrays as a custom_vjp rule computed them.
    primal: The primals, of the same structure.

  Returns:
    Cotangents that vary exactly as the primals do.
  """

  def match(ct: jax.Array, x: jax.Array) -> jax.Array:
    extra = tuple(sorted(varying_axes(ct) - varying_axes(x)))
    return vary_like(lax.psum(ct, extra) if extra else ct, x)

  return jax.tree.map(match, cotangent, primal)
