"""Matrix products that are remembered by name.

The chunk executor runs a layer forward now and backward later, and wants
three things that a plain `jax.vjp` does not give: what is kept in between is
chosen by name and holds no weights; the backward pass repeats no product that
was kept; and gradients of weights come out in at least fp32.

A model function takes a `Tape` and sends its products through it. On the way
forward a recording tape keeps the named outputs. On the way back the same
function is differentiated again with a replaying tape: a kept product is not
computed but returned, with the product's own gradient rule, so that only
element-wise work is repeated and what nobody reads is never computed.
"""

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxchunk.kernels.vma import match_primal


class Tape:
  """Keeps named products (`Tape()`) or gives them back (`Tape(saved)`).

  Attributes:
    saved: Output of each product that was kept.
  """

  def __init__(self, saved: Mapping[str, Array] | None = None):
    self._replay = saved is not None
    self.saved: dict[str, Array] = dict(saved or {})

  def product(
    self, name: str, spec: str, x: Array, w: Array, *, keep: bool = True
  ) -> Array:
    """`einsum(spec, x, w)` in x's dtype.

    Args:
      name: Unique among the products of one layer.
      spec: Einsum of two operands in which every letter occurs twice.
      x: Activations.
      w: Weights; cast to x's dtype, differentiated in at least fp32.
      keep: Whether the backward pass reads the output.

    Returns:
      The product, computed or given back.
    """
    if self._replay:
      if name in self.saved:
        return _replayed(spec, self.saved[name], x, w)
      return _product(spec, x, w)
    y = _product(spec, x, w)
    if keep:
      self.saved[name] = y
    return y


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(spec: str, x: Array, w: Array) -> Array:
  return jnp.einsum(spec, x, w.astype(x.dtype))


def _product_fwd(spec: str, x: Array, w: Array) -> tuple[Array, Any]:
  return _product(spec, x, w), (x, w)


def _product_bwd(spec: str, saved: Any, dy: Array) -> tuple[Array, Array]:
  x, w = saved
  inputs, out = spec.split("->")
  x_spec, w_spec = inputs.split(",")
  dx = jnp.einsum(f"{out},{w_spec}->{x_spec}", dy, w.astype(dy.dtype))
  wide = jnp.promote_types(w.dtype, jnp.float32)
  dw = jnp.einsum(
    f"{x_spec},{out}->{w_spec}", x, dy, preferred_element_type=wide
  )
  return match_primal((dx, dw.astype(w.dtype)), (x, w))


_product.defvjp(_product_fwd, _product_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _replayed(spec: str, y: Array, x: Array, w: Array) -> Array:
  """y, with the gradient of `_product(spec, x, w)`."""
  del spec, x, w
  return y


def _replayed_fwd(spec: str, y: Array, x: Array, w: Array) -> tuple[Array, Any]:
  del spec
  return y, (x, w)


def _replayed_bwd(spec: str, saved: Any, dy: Array) -> tuple[Any, Array, Array]:
  return None, *_product_bwd(spec, saved, dy)


_replayed.defvjp(_replayed_fwd, _replayed_bwd)
