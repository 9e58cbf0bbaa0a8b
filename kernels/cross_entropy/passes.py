"""The two public functions, made of a kernel's forward and backward pass."""

import functools
from typing import Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxchunk.kernels.vma import match_primal, vary_like


class Passes(Protocol):
  """Two passes over rows and vocabulary; hashable.

  Labels are in range. Every array varies over the same mesh axes.
  """

  def unsupported(self, x: Array, w: Array, dw: Array | None) -> str | None:
    """Why the arguments cannot be served, as the end of a sentence."""

  def forward(
    self, x: Float[Array, "T D"], w: Float[Array, "V D"], labels: Array
  ) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    """The log-sum-exp of every row, and its label's logit."""

  def backward(
    self,
    residuals: tuple[Array, Array, Array, Array],
    cotangents: tuple[Float[Array, " T"], Float[Array, " T"]],
    dw: Float[Array, "V D"] | None,
  ) -> tuple[Float[Array, "T D"], Float[Array, "V D"] | None]:
    """The gradient of x, and `dw` with that of w added.

    Args:
      residuals: x, w, labels and lse.
      cotangents: Of nll and of lse. A row where both are 0 adds nothing
        whatever it holds.
      dw: To add to, in place; `None` if w has no gradient.
    """


def linear_cross_entropy(
  passes: Passes,
  x: Float[Array, "*B T D"],
  w: Float[Array, "V D"],
  labels: Int[Array, "*B T"],
) -> tuple[Float[Array, "*B T"], Float[Array, "*B T"]]:
  """`api.linear_cross_entropy`.

  Raises:
    NotImplementedError: `passes.unsupported` has a reason.
  """
  _raise_unsupported(passes, x, w, None)
  nll, lse = _differentiable(passes, *_flat(x, labels, w))
  return nll.reshape(labels.shape), lse.reshape(labels.shape)


def linear_cross_entropy_with_grad(
  passes: Passes,
  x: Float[Array, "*B T D"],
  w: Float[Array, "V D"],
  labels: Int[Array, "*B T"],
  weights: Float[Array, "*B T"],
  dw: Float[Array, "V D"] | None,
) -> tuple[
  Float[Array, "*B T"],
  Float[Array, "*B T"],
  Float[Array, "*B T D"],
  Float[Array, "V D"] | None,
]:
  """`api.linear_cross_entropy_with_grad`.

  Raises:
    NotImplementedError: `passes.unsupported` has a reason.
  """
  _raise_unsupported(passes, x, w, dw)
  x_TD, w, labels_T = _flat(x, labels, w)
  (nll, lse), residuals = _forward(passes, x_TD, w, labels_T)
  g_nll = weights.reshape(-1).astype(jnp.float32)
  dx, dw = _backward(passes, residuals, (g_nll, jnp.zeros_like(g_nll)), dw)
  shape = labels.shape
  return nll.reshape(shape), lse.reshape(shape), dx.reshape(x.shape), dw


def _raise_unsupported(
  passes: Passes, x: Array, w: Array, dw: Array | None
) -> None:
  reason = passes.unsupported(x, w, dw)
  if reason is not None:
    raise NotImplementedError(
      f"these kernels of cross-entropy cannot run here: {reason}; "
      'implementation="xla" can'
    )


def _flat(x: Array, labels: Array, w: Array) -> tuple[Array, Array, Array]:
  rows = labels.size
  return x.reshape(rows, x.shape[-1]), w, labels.reshape(rows)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _differentiable(
  passes: Passes,
  x: Float[Array, "T D"],
  w: Float[Array, "V D"],
  labels: Int[Array, " T"],
) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
  return _forward(passes, x, w, labels)[0]


def _forward(
  passes: Passes,
  x: Float[Array, "T D"],
  w: Float[Array, "V D"],
  labels: Int[Array, " T"],
) -> tuple[tuple[Array, Array], tuple[Array, Array, Array, Array]]:
  if labels.size == 0:
    empty = vary_like(jnp.zeros(0, jnp.float32), x, w, labels)
    return (empty, empty), (x, w, labels, empty)
  known = _known(labels, w)
  index = jnp.where(known, labels, 0).astype(jnp.int32)
  lse, picked = passes.forward(*vary_like((x, w, index), x, w, labels))
  nll = jnp.where(known, lse - picked, jnp.nan)
  return (nll, lse), (x, w, labels, lse)


def _backward(
  passes: Passes,
  residuals: tuple[Array, Array, Array, Array],
  cotangents: tuple[Array, Array],
  dw: Array | None,
) -> tuple[Array, Array | None]:
  x, w, labels, lse = residuals
  g_nll, g_lse = cotangents
  dw = vary_like(dw, residuals, cotangents)
  if labels.size == 0:
    return vary_like(jnp.zeros_like(x), residuals, cotangents), dw
  known = _known(labels, w)
  g_nll = jnp.where(known | (g_nll == 0), g_nll, jnp.nan)
  index = jnp.where(known, labels, 0).astype(jnp.int32)
  arrays = ((x, w, index, lse), (g_nll, g_lse))
  return passes.backward(*vary_like(arrays, arrays, dw), dw)


def _known(labels: Int[Array, " T"], w: Array) -> Bool[Array, " T"]:
  return (labels >= 0) & (labels < w.shape[0])


def _differentiable_bwd(
  passes: Passes,
  residuals: tuple[Array, Array, Array, Array],
  cotangents: tuple[Array, Array],
) -> tuple[Array, Array, None]:
  x, w, *_ = residuals
  zeros = jnp.zeros(w.shape, jnp.float32)
  dx, dw = _backward(passes, residuals, cotangents, zeros)
  dw = jnp.asarray(match_primal(dw, w), w.dtype)
  return match_primal(dx, x), dw, None


_differentiable.defvjp(_forward, _differentiable_bwd)
