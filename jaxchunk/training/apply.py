"""How an update is applied: at once, or by layer.

By layer, the layers of a stack go through a loop, so that what an update needs
besides is a layer's, and whole only of what is not stacked (embeddings). Of a
state in host memory each layer brings its own part to the device and takes it
back. Only optimizers that update each layer of each array by itself can be run
so.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

Tree = Any
"""A pytree of arrays."""

Apply = Callable[
  [
    Tree,
    optax.OptState,
    Tree,
    Float[Array, ""],
    Bool[Array, ""],
    PRNGKeyArray | None,
  ],
  tuple[Tree, optax.OptState],
]
"""`(params, state, grads, factor, finite, key)` to the new params and state.

Gradients are multiplied by `factor`; without `finite` nothing changes. With a
`key`, parameters in bf16 are rounded up or down at random, by how near each
is, so that updates smaller than half a unit are kept on average.
"""

_HOST, _DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


def apply_at_once(optimizer: optax.GradientTransformation) -> Apply:
  """The update with everything on the device."""

  def apply(
    params: Tree,
    state: optax.OptState,
    grads: Tree,
    factor: Any,
    finite: Any,
    key: PRNGKeyArray | None,
  ) -> tuple[Tree, optax.OptState]:
    grads = jax.tree.map(lambda g: g * factor, grads)
    updates, after = optimizer.update(grads, state, params)
    if key is None:
      stepped = optax.apply_updates(params, updates)
    else:
      stepped = _apply_at_random(params, updates, key)

    def keep(new: Array, old: Array) -> Array:
      return jnp.where(finite, new, old)

    return jax.tree.map(keep, stepped, params), jax.tree.map(keep, after, state)

  return apply


def apply_by_layer(
  optimizer: optax.GradientTransformation, stacks: str, groups: int = 1
) -> Apply:
  """The update of one layer after the other; the state may be on the host.

  Args:
    optimizer: Updates each layer of each array by itself.
    stacks: The entry of the parameters whose values are stacks: the leading
      axis of each array in a stack is its layers.
    groups: Pipeline stages, which have a part of each stack's layers each: one
      layer of every stage goes through the loop at a time.
  """
  at_once = apply_at_once(optimizer)

  def part_of(params: Tree, arrays: dict[str, Array]) -> optax.OptState:
    """The state of some of the parameters, out of all its arrays."""
    shapes = jax.eval_shape(optimizer.init, params)
    return jax.tree_util.tree_map_with_path(
      lambda path, _: arrays[_name(path)], shapes
    )

  def apply(
    params: Tree,
    state: optax.OptState,
    grads: Tree,
    factor: Any,
    finite: Any,
    key: PRNGKeyArray | None,
  ) -> tuple[Tree, optax.OptState]:
    before = _by_name(state)
    rest = {name: tree for name, tree in params.items() if name != stacks}
    part = part_of(rest, before)
    rest_grads = {name: grads[name] for name in rest}
    stepped, new = at_once(rest, _fetch(part), rest_grads, factor, finite, key)
    # With the counts of updates, which are in every part.
    after = _by_name(_store(new, part))

    def run_stack(index: Any, number: int) -> Tree:
      """Updates the layers of a stack one after the other."""
      part = part_of({stacks: {index: params[stacks][index]}}, before)
      own = {n: a for n, a in _by_name(part).items() if n not in after}

      def layer(at: Any, carry: tuple[Tree, Tree]) -> tuple[Tree, Tree]:
        whole, own = carry
        one, g, mine = (
          _slice(a, at, groups) for a in (whole, grads[stacks][index], own)
        )
        one = {stacks: {index: one}}
        new, new_part = at_once(
          one,
          part_of(one, before | _fetch(mine)),
          {stacks: {index: g}},
          factor,
          finite,
          None if key is None else _fold_in(key, number, at),
        )
        found = _by_name(new_part)
        mine = _store({name: found[name] for name in mine}, mine)
        return (
          _put(whole, new[stacks][index], at, groups),
          _put(own, mine, at, groups),
        )

      whole = params[stacks][index]
      layers = len(jax.tree.leaves(whole)[0]) // groups
      whole, own = lax.fori_loop(0, layers, layer, (whole, own))
      after.update(own)
      return whole

    stepped[stacks] = {
      index: run_stack(index, number)
      for number, index in enumerate(params[stacks], 1)
    }
    return stepped, jax.tree_util.tree_map_with_path(
      lambda path, _: after[_name(path)], state
    )

  return apply


def _fold_in(key: PRNGKeyArray, *numbers: Any) -> PRNGKeyArray:
  for number in numbers:
    key = jax.random.fold_in(key, number)
  return key


def _apply_at_random(params: Tree, updates: Tree, key: PRNGKeyArray) -> Tree:
  leaves, treedef = jax.tree.flatten(params)
  pairs = zip(leaves, jax.tree.leaves(updates), strict=True)
  return jax.tree.unflatten(
    treedef,
    [
      stochastic_rounding(p.astype(jnp.float32) + u, jax.random.fold_in(key, n))
      if p.dtype == jnp.bfloat16
      else jnp.asarray(p + u, p.dtype)
      for n, (p, u) in enumerate(pairs)
    ],
  )


def stochastic_rounding(
  x: Float[Array, "*B"], key: PRNGKeyArray
) -> Float[Array, "*B"]:
  """fp32 to bf16, up or down with odds by how near each is.

  The mean over keys is x. Infinities and NaN stay what they are.
  """
  bits = lax.bitcast_convert_type(x, jnp.uint32)
  noise = jax.random.bits(key, x.shape, jnp.uint16).astype(jnp.uint32)
  # The lower half of the bits is what bf16 has no room for.
  rounded = (bits + noise) & jnp.uint32(0xFFFF0000)
  rounded = jnp.where(jnp.isfinite(x), rounded, bits)
  return lax.bitcast_convert_type(rounded, jnp.float32).astype(jnp.bfloat16)


def _name(path: tuple[Any, ...]) -> str:
  return jax.tree_util.keystr(path)


def _by_name(tree: Tree) -> dict[str, Array]:
  leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
  return {_name(path): leaf for path, leaf in leaves}


def _on_host(x: Array) -> bool:
  return jax.typeof(x).memory_space == _HOST


def _fetch(tree: Tree) -> Tree:
  """Brings what is in host memory to the device."""
  return jax.tree.map(
    lambda x: jax.device_put(x, _DEVICE) if _on_host(x) else x, tree
  )


def _store(new: Tree, like: Tree) -> Tree:
  """Takes to the host what was there."""
  return jax.tree.map(
    lambda x, old: jax.device_put(x, _HOST) if _on_host(old) else x, new, like
  )


def _slice(stack: Tree, at: Any, groups: int) -> Tree:
  """Layer `at` of each group of layers, `[groups, ...]` of each array."""

  def of_one(x: Array) -> Array:
    if groups == 1:
      return lax.dynamic_slice_in_dim(x, at, 1, 0)
    return lax.dynamic_slice_in_dim(_grouped(x, groups), at, 1, 1)[:, 0]

  return jax.tree.map(of_one, stack)


def _put(stack: Tree, one: Tree, at: Any, groups: int) -> Tree:
  """The inverse of `_slice`."""

  def into(x: Array, new: Array) -> Array:
    if groups == 1:
      return lax.dynamic_update_slice_in_dim(x, new, at, 0)
    whole = _grouped(x, groups)
    whole = lax.dynamic_update_slice_in_dim(whole, new[:, None], at, 1)
    return whole.reshape(x.shape)

  return jax.tree.map(into, stack, one)


def _grouped(x: Array, groups: int) -> Array:
  return x.reshape(groups, -1, *x.shape[1:])
