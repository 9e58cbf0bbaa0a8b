"""The obvious way: all the logits at once. The truth of every other backend."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def linear_cross_entropy(
  x: Float[Array, "*B T D"],
  w: Float[Array, "V D"],
  labels: Int[Array, "*B T"],
  *,
  softcap: float | None = None,
) -> tuple[Float[Array, "*B T"], Float[Array, "*B T"]]:
  """See `api.linear_cross_entropy`; holds `[T, V]` logits."""
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  logits = jnp.einsum(
    "...d,vd->...v", x, w.astype(x.dtype), preferred_element_type=dtype
  )
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  lse = jax.nn.logsumexp(logits, axis=-1)
  known = (labels >= 0) & (labels < w.shape[0])
  index = jnp.where(known, labels, 0)[..., None]
  picked = jnp.take_along_axis(logits, index, axis=-1)[..., 0]
  # A product rather than a `where`: its gradient is NaN as well.
  return (lse - picked) * jnp.where(known, 1, jnp.nan).astype(dtype), lse


def linear_cross_entropy_with_grad(
  x: Float[Array, "*B T D"],
  w: Float[Array, "V D"],
  labels: Int[Array, "*B T"],
  weights: Float[Array, "*B T"],
  *,
  softcap: float | None = None,
  dw_init: Float[Array, "V D"] | None,
) -> tuple[
  Float[Array, "*B T"],
  Float[Array, "*B T"],
  Float[Array, "*B T D"],
  Float[Array, "V D"] | None,
]:
  """See `api.linear_cross_entropy_with_grad`; holds `[T, V]` logits."""
  nll, lse = linear_cross_entropy(x, w, labels, softcap=softcap)
  live = weights != 0
  x = jnp.where(live[..., None], x, 0)
  labels = jnp.where(live, labels, 0)

  def live_nll(x: Array, w: Array) -> Array:
    return linear_cross_entropy(x, w, labels, softcap=softcap)[0]

  wide = w.astype(nll.dtype if dw_init is None else dw_init.dtype)
  dx, dw = jax.vjp(live_nll, x, wide)[1](weights.astype(nll.dtype))
  return nll, lse, dx, None if dw_init is None else dw_init + dw
