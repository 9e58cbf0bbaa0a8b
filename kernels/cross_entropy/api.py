"""Cross-entropy of a linear head that never holds the logits."""

import functools
import logging
import math
import typing
from types import ModuleType
from typing import Literal, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxchunk.kernels.cross_entropy import reference, xla
from jaxchunk.kernels.values import known_values

Implementation: TypeAlias = Literal[
  "xla", "reference", "pallas_tpu", "pallas_gpu"
]


def linear_cross_entropy(
  x: Float[Array, "*B T D"],
  w: Float[Array, "V D"],
  labels: Int[Array, "*B T"],
  *,
  softcap: float | None = None,
  implementation: Implementation | None = None,
) -> tuple[Float[Array, "*B T"], Float[Array, "*B T"]]:
  """Negative log-likelihood of labels under a linear head, token by token.

  The same as::

    logits = x @ w.T
    logits = softcap * tanh(logits / softcap)  # where softcap is given
    lse = logsumexp(logits, -1)
    nll = lse - logits[..., labels]

  without the `[T, V]` logits, in the forward as in the backward pass: tiles of
  about 16 MB are computed, used and dropped, and computed again for the
  gradient (4 matrix products instead of 3). The gradient of `w` adds up in one
  fp32 `[V, D]` buffer.

  Both results are differentiable with respect to `x` and `w`: a z-loss is a
  function of `lse`. Works inside `jax.shard_map` with `check_vma=True`, where
  the gradient of a replicated argument is summed over the mesh. Rows are
  looped over, so under automatic sharding a sharded `T` would be gathered: use
  `shard_map` there.

  Args:
    x: Hidden states, `[..., T, D]`, floating. Matrix products run in this
      dtype with at least fp32 accumulation.
    w: The head, `[V, D]`, floating; cast to the dtype of `x` tile by tile.
    labels: `[..., T]` integers in [0, V). Masked positions need a valid label
      too: give 0, and weight 0 to their nll.
    softcap: Bounds the logits to (-softcap, softcap).
    implementation: "xla", "reference" (naive, holds the logits), or the
      kernels "pallas_tpu" (fp32 and bf16) and "pallas_gpu" (Hopper, 16 bits),
      which have been compiled but not run on such hardware. A named one never
      falls back; `None` is "xla".

  Returns:
    `(nll, lse)`, both `[..., T]` in fp32, or fp64 where `x` is.

  Raises:
    ValueError: Shapes or dtypes do not fit, softcap is not positive, the
      implementation is unknown, or labels whose values are known (outside
      `jit`) are out of range. Where they cannot be known, nll is NaN at such
      labels, and so are the gradients of it.
    NotImplementedError: The named kernels cannot serve the arguments; the
      message says why.
  """
  x, w, labels = jnp.asarray(x), jnp.asarray(w), _checked_labels(labels, w)
  _check(x, w, labels, softcap)
  backend = _choose(implementation)
  nll, lse = backend.linear_cross_entropy(x, w, labels, softcap=softcap)
  return nll, lse


def linear_cross_entropy_with_grad(
  x: Float[Array, "*B T D"],
  w: Float[Array, "V D"],
  labels: Int[Array, "*B T"],
  weights: Float[Array, "*B T"],
  *,
  softcap: float | None = None,
  dw_init: Float[Array, "V D"] | None,
  axis: str | tuple[str, ...] | None = None,
  implementation: Implementation | None = None,
) -> tuple[
  Float[Array, "*B T"],
  Float[Array, "*B T"],
  Float[Array, "*B T D"],
  Float[Array, "V D"] | None,
]:
  """Values and gradient in one pass, the cotangents being known beforehand.

  The same as::

    (nll, lse), vjp = jax.vjp(linear_cross_entropy, x, w, labels)
    dx, dw, _ = vjp((weights, zeros_like(lse)))
    dw = dw_init + dw

  with the gradient of `w` added into `dw_init` in place: donate it, or carry it
  through a loop. A block of rows keeps its logits (16 MB, or an eighth of the
  bytes of dw if that is more) so that 3 matrix products do instead of 4; with
  V beyond 16k and D below 2k those bytes are too few rows to be worth it, and
  the logits are computed twice.

  A row of weight 0 adds nothing to dx or dw whatever it holds, be it infinite
  or NaN, and whatever its label; its nll is still that of its contents. Not
  differentiable further. Inside `jax.shard_map` dx and dw are each device's
  own share: sum them over the mesh once, after the last call.

  Args:
    x: Hidden states, `[..., T, D]`, floating.
    w: The head, `[V, D]`, floating; cast to the dtype of `x`.
    labels: `[..., T]` integers in [0, V).
    weights: Cotangent of every nll, `[..., T]`, floating.
    softcap: Bounds the logits to (-softcap, softcap).
    dw_init: fp32 or fp64 `[V, D]` to add the gradient of `w` to. `None` where
      `w` is frozen: its gradient is not computed.
    axis: Inside `jax.shard_map`, the mesh axis (or axes, from the slowest to
      the fastest) whose devices hold parts of the vocabulary: `w` is this
      device's, labels are of the whole, nll, lse and dx come out over all
      parts, the same on each device. "xla" only.
    implementation: As `linear_cross_entropy`. "pallas_tpu" computes the logits
      three times, "pallas_gpu" twice.

  Returns:
    `(nll, lse, dx, dw)`; dx has the dtype of `x`, dw that of `dw_init`, or is
    `None` with it.

  Raises:
    ValueError: As `linear_cross_entropy`, where labels of weight 0 count too;
      or weights or dw_init do not fit.
    NotImplementedError: As `linear_cross_entropy`.
  """
  if axis is None:
    labels = _checked_labels(labels, w)
  x, w, labels = jnp.asarray(x), jnp.asarray(w), jnp.asarray(labels)
  weights = jnp.asarray(weights)
  _check(x, w, labels, softcap)
  if weights.shape != labels.shape or not _is_float(weights):
    raise ValueError(
      f"weights must be floating with the shape of labels, {labels.shape}; got "
      f"{weights.dtype} {weights.shape}"
    )
  if dw_init is not None:
    dw_init = jnp.asarray(dw_init)
    if dw_init.shape != w.shape or dw_init.dtype not in (
      jnp.float32,
      jnp.float64,
    ):
      raise ValueError(
        "dw_init must be float32 or float64 with the shape of w, "
        f"{w.shape}; got {dw_init.dtype} {dw_init.shape}"
      )
  backend = _choose(implementation)
  if axis is not None:
    if backend is not xla:
      raise NotImplementedError(
        f"implementation={implementation!r} with axis={axis!r}: only 'xla' "
        "splits the vocabulary"
      )
    nll, lse, dx, dw = xla.linear_cross_entropy_with_grad(
      x, w, labels, weights, softcap=softcap, dw_init=dw_init, axis=axis
    )
    return nll, lse, dx, dw
  nll, lse, dx, dw = backend.linear_cross_entropy_with_grad(
    x, w, labels, weights, softcap=softcap, dw_init=dw_init
  )
  return nll, lse, dx, dw


def _checked_labels(labels: Array, w: Array) -> Array:
  """Labels as an array; raises where they are known to be out of range."""
  values = known_values(labels)
  if values is not None and np.ndim(w) == 2:
    vocab = np.shape(w)[0]
    wrong = np.argwhere((values < 0) | (values >= vocab))
    if len(wrong):
      index = tuple(int(i) for i in wrong[0])
      raise ValueError(
        f"labels must lie in [0, V={vocab}), got {values[index]} at {index} "
        f"({len(wrong)} such); give masked positions label 0 and weight 0"
      )
  labels = jnp.asarray(labels)
  if jnp.issubdtype(labels.dtype, jnp.integer):
    # V may not fit a narrower type: 256 is 0 in uint8.
    labels = labels.astype(jnp.promote_types(labels.dtype, jnp.int32))
  return labels


def _check(x: Array, w: Array, labels: Array, softcap: float | None) -> None:
  if x.ndim < 2 or not _is_float(x):
    raise ValueError(f"x must be floating [..., T, D], got {x.dtype} {x.shape}")
  if w.ndim != 2 or not _is_float(w):
    raise ValueError(f"w must be floating [V, D], got {w.dtype} {w.shape}")
  if x.shape[-1] != w.shape[1]:
    raise ValueError(
      f"x has width D={x.shape[-1]}, w has D={w.shape[1]}: "
      f"x {x.shape}, w {w.shape} (w is [V, D])"
    )
  if w.shape[0] == 0:
    raise ValueError(f"w must have at least one row, got shape {w.shape}")
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f"labels must be integers, got {labels.dtype}")
  if labels.shape != x.shape[:-1]:
    raise ValueError(
      f"labels have shape {labels.shape}, not that of x without its last "
      f"axis, {x.shape[:-1]}"
    )
  if softcap is not None and not (math.isfinite(softcap) and softcap > 0):
    raise ValueError(f"softcap must be positive and finite, got {softcap}")


def _choose(implementation: str | None) -> ModuleType:
  """The module of an implementation; Pallas is loaded when asked for."""
  if implementation is None:
    _log_choice("xla")
    return xla
  if implementation == "pallas_tpu":
    from jaxchunk.kernels.cross_entropy import pallas_tpu

    return pallas_tpu
  if implementation == "pallas_gpu":
    from jaxchunk.kernels.cross_entropy import pallas_gpu

    return pallas_gpu
  known: dict[str, ModuleType] = {"xla": xla, "reference": reference}
  if implementation not in known:
    raise ValueError(
      f"implementation {implementation!r} is unknown; there are "
      f"{sorted(typing.get_args(Implementation))}"
    )
  return known[implementation]


@functools.cache
def _log_choice(name: str) -> None:
  logging.getLogger(__name__).info("linear_cross_entropy runs %r", name)


def _is_float(x: Array) -> bool:
  return bool(jnp.issubdtype(x.dtype, jnp.floating))
