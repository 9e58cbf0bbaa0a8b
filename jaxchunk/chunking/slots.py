"""Arrays of what live chunks keep, `[count, layers, ...]`, and how they lie."""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental.layout import Layout, with_layout_constraint
from jaxtyping import Array


def store(slots: Array, new: Array, slot: Any, layer: Any) -> Array:
  """`slots[slot, layer] = new`, in place; slots are `[count, layers, ...]`."""
  at = [jnp.asarray(n, jnp.int32) for n in (slot, layer, *[0] * new.ndim)]
  return _in_order(lax.dynamic_update_slice(slots, new[None, None], at))


def load(slots: Array, slot: Any, layer: Any) -> Array:
  """`slots[slot, layer]`."""
  shape = slots.shape[2:]
  at = [jnp.asarray(n, jnp.int32) for n in (slot, layer, *[0] * len(shape))]
  return lax.dynamic_slice(_in_order(slots), at, (1, 1, *shape))[0, 0]


def _in_order(slots: Array) -> Array:
  """With the last axis the fastest in memory.

  Loops that write slots and loops that read them would choose layouts of their
  own, and all slots be copied from one to the other between them. Not so where
  a TPU would fill rows up to 128 with nothing: heads.
  """
  if slots.shape[-1] % 128:
    return slots
  return with_layout_constraint(slots, Layout(tuple(range(slots.ndim))))
