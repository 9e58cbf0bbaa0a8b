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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxchunk.kernels.vma import match_primal
from jaxchunk.models.quantized import Matrix, Quantized, widened
from jaxchunk.models.ragged import ragged_product, replayed_ragged_product
from jaxchunk.models.turned import Turned


class Tape:
  """Keeps named products (`Tape()`) or gives them back (`Tape(saved)`).

  A backward pass can be cut in two. With `taps`, zeros that are added to the
  products, the cotangents of the taps are those of the products, and weights
  need no gradient at once. A tape with `detached` gives the products as
  functions of their weights alone, for `outputs` to be differentiated later
  with those cotangents.

  Attributes:
    saved: Output of each product that was kept.
    outputs: Output of every product, if `detached`.
    router: What the layer's router said of its tokens, a
      `jaxchunk.models.moe.RouterSums`; `None` where there is none.
  """

  def __init__(
    self,
    saved: Mapping[str, Array] | None = None,
    *,
    taps: Mapping[str, Array] | None = None,
    detached: bool = False,
  ):
    self._replay = saved is not None
    self._taps = dict(taps or {})
    self._detached = detached
    self.saved: dict[str, Array] = dict(saved or {})
    self.outputs: dict[str, Array] = {}
    self.router: Any = None

  def _input(self, x: Array) -> Array:
    return lax.stop_gradient(x) if self._detached else x

  def _output(self, name: str, y: Array, keep: bool) -> Array:
    """Remembers a product."""
    if keep and not self._replay:
      self.saved[name] = y
    if self._detached:
      self.outputs[name] = y
    return y + self._taps[name] if name in self._taps else y

  def product(
    self,
    name: str,
    spec: str,
    x: Array,
    w: Matrix,
    *,
    keep: bool = True,
    like: Array | None = None,
  ) -> Array:
    """`einsum(spec, x, w)` in x's dtype.

    Args:
      name: Unique among the products of one layer.
      spec: Einsum of two operands in which every letter occurs twice.
      x: Activations.
      w: Weights; cast to x's dtype, differentiated in at least fp32. Quantized
        ones are widened where they are used; they and those that are turned
        have no gradient.
      keep: Whether the backward pass reads the output.
      like: What the output varies like, inside a `jax.shard_map` whose devices
        have parts of what is summed: the parts' products are added up.

    Returns:
      The product, computed or given back.
    """
    x = self._input(x)
    if self._replay and name in self.saved:
      return self._output(name, _replayed(spec, self.saved[name], x, w), keep)
    y = _product(spec, x, w)
    if like is not None:
      y = match_primal(y, like)
    return self._output(name, y, keep)

  def ragged_product(
    self, name: str, x: Array, w: Array, *, sizes: Array, keep: bool = True
  ) -> Array:
    """Rows times the matrix of their group; see `ragged.ragged_product`.

    Args:
      name: As in `product`.
      x: Rows `[M,D]`, sorted by group.
      w: `[E,D,F]`.
      sizes: Rows of each group, `[E]`.
      keep: As in `product`.

    Returns:
      The products `[M,F]`, computed or given back.
    """
    x = self._input(x)
    if self._replay and name in self.saved:
      y = replayed_ragged_product(self.saved[name], x, w, sizes)
    else:
      y = ragged_product(x, w, sizes)
    return self._output(name, y, keep)

  def adapted_product(
    self,
    name: str,
    spec: str,
    x: Array,
    w: Matrix,
    a: Array,
    b: Array,
    *,
    scale: float,
    keep: bool = True,
    like: Array | None = None,
  ) -> Array:
    """`einsum(spec, x, w + scale * a @ b)` in x's dtype, without that sum.

    Args:
      name: As in `product`.
      spec: As in `product`; the letters of w are those that are summed, then
        the others. R is none of them.
      x: Activations.
      w: Weights; their gradient is computed only if somebody reads it.
      a: `[in,R]`, where in is all that is summed.
      b: `[R,out]`.
      scale: A factor.
      keep: As in `product`.
      like: As in `product`.

    Returns:
      The product, computed or given back.
    """
    x = self._input(x)
    if self._replay and name in self.saved:
      y = _adapted_replayed(spec, scale, self.saved[name], x, w, a, b)
      return self._output(name, y, keep)
    y = _adapted(spec, scale, x, w, a, b)
    if like is not None:
      y = match_primal(y, like)
    return self._output(name, y, keep)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(spec: str, x: Array, w: Matrix) -> Array:
  if isinstance(w, Turned):
    return w.product(spec, x)
  return jnp.einsum(spec, x, widened(w, x.dtype))


def _product_fwd(spec: str, x: Array, w: Matrix) -> tuple[Array, Any]:
  return _product(spec, x, w), (x, w)


def _product_bwd(
  spec: str, saved: Any, dy: Array
) -> tuple[Array, Array | None]:
  x, w = saved
  dx = _input_gradient(spec, x, w, dy)
  if isinstance(w, Quantized | Turned):
    return dx, None
  return dx, _weight_gradient(spec, x, w, dy)


def _input_gradient(spec: str, x: Array, w: Matrix, dy: Array) -> Array:
  x_spec, w_spec, out = _operands(spec)
  dx = jnp.einsum(f"{out},{w_spec}->{x_spec}", dy, widened(w, dy.dtype))
  return match_primal(dx, x)


def _weight_gradient(spec: str, x: Array, w: Array, dy: Array) -> Array:
  x_spec, w_spec, out = _operands(spec)
  wide = jnp.promote_types(w.dtype, jnp.float32)
  dw = jnp.einsum(
    f"{x_spec},{out}->{w_spec}", x, dy, preferred_element_type=wide
  )
  return match_primal(dw.astype(w.dtype), w)


def _operands(spec: str) -> tuple[str, str, str]:
  """The letters of x, of w and of the product."""
  inputs, out = spec.split("->")
  x_spec, w_spec = inputs.split(",")
  return x_spec, w_spec, out


_product.defvjp(_product_fwd, _product_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _replayed(spec: str, y: Array, x: Array, w: Matrix) -> Array:
  """y, with the gradient of `_product(spec, x, w)`."""
  del spec, x, w
  return y


def _replayed_fwd(
  spec: str, y: Array, x: Array, w: Matrix
) -> tuple[Array, Any]:
  del spec
  return y, (x, w)


def _replayed_bwd(
  spec: str, saved: Any, dy: Array
) -> tuple[None, Array, Array | None]:
  return None, *_product_bwd(spec, saved, dy)


_replayed.defvjp(_replayed_fwd, _replayed_bwd)


class LowRankParts(NamedTuple):
  """The einsums of `x @ a` and `(x @ a) @ b`, and a and b in their shapes."""

  a_spec: str
  b_spec: str
  a: Array
  b: Array


def low_rank_parts(spec: str, w: Matrix, a: Array, b: Array) -> LowRankParts:
  """How `x @ a @ b` is computed where `einsum(spec, x, w)` is."""
  x_spec, w_spec, out = _operands(spec)
  summed = "".join(letter for letter in w_spec if letter in x_spec)
  others = "".join(letter for letter in w_spec if letter not in x_spec)
  if summed + others != w_spec or "R" in spec:
    raise ValueError(f"spec {spec!r}: w must be what is summed, then the rest")
  tokens = "".join(letter for letter in x_spec if letter not in summed)
  sizes = w.shape[: len(summed)], w.shape[len(summed) :]
  return LowRankParts(
    f"{x_spec},{summed}R->{tokens}R",
    f"{tokens}R,R{others}->{out}",
    a.reshape(*sizes[0], -1),
    b.reshape(-1, *sizes[1]),
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _adapted(
  spec: str, scale: float, x: Array, w: Matrix, a: Array, b: Array
) -> Array:
  parts = low_rank_parts(spec, w, a, b)
  h = _product(parts.a_spec, x, parts.a)
  return _product(spec, x, w) + scale * _product(parts.b_spec, h, parts.b)


def _adapted_fwd(
  spec: str, scale: float, x: Array, w: Matrix, a: Array, b: Array
) -> tuple[Array, Any]:
  return _adapted(spec, scale, x, w, a, b), (x, w, a, b)


def _adapted_bwd(
  spec: str, scale: float, saved: Any, dy: Array
) -> tuple[Array | None, ...]:
  x, w, a, b = saved
  parts = low_rank_parts(spec, w, a, b)
  dx, dw = _product_bwd(spec, (x, w), dy)
  # x @ a is R wide: cheaper to compute again than to keep.
  h = _product(parts.a_spec, x, parts.a)
  db = _weight_gradient(parts.b_spec, h, parts.b, dy * scale)
  dh = _input_gradient(parts.b_spec, h, parts.b, dy * scale)
  da = _weight_gradient(parts.a_spec, x, parts.a, dh)
  dx += _input_gradient(parts.a_spec, x, parts.a, dh)
  return dx, dw, da.reshape(a.shape), db.reshape(b.shape)


_adapted.defvjp(_adapted_fwd, _adapted_bwd)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _adapted_replayed(
  spec: str, scale: float, y: Array, x: Array, w: Matrix, a: Array, b: Array
) -> Array:
  """y, with the gradient of `_adapted(spec, scale, x, w, a, b)`."""
  del spec, scale, x, w, a, b
  return y


def _adapted_replayed_fwd(
  spec: str, scale: float, y: Array, x: Array, w: Matrix, a: Array, b: Array
) -> tuple[Array, Any]:
  del spec, scale
  return y, (x, w, a, b)


def _adapted_replayed_bwd(
  spec: str, scale: float, saved: Any, dy: Array
) -> tuple[Any, ...]:
  return None, *_adapted_bwd(spec, scale, saved, dy)


_adapted_replayed.defvjp(_adapted_replayed_fwd, _adapted_replayed_bwd)
