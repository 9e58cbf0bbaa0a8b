"""Attention as the formula says it; holds every score. Obviously right."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxchunk.kernels.attention.mask import AttentionMask


def attention_reference(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B S K H"],
  v: Float[Array, "B S K H"],
  *,
  mask: AttentionMask,
  scale: float,
  softcap: float | None = None,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B T N"]]:
  """`softmax(softcap * tanh(scale * q k^T / softcap) + mask) v`, and lse.

  Scores and the softmax are in at least fp32. A query that sees no key gives
  0 and an lse of -inf.
  """
  B, T, N, H = q.shape
  S, K = k.shape[1:3]
  wide = jnp.promote_types(q.dtype, jnp.float32)
  q_BTKGH = q.reshape(B, T, K, N // K, H).astype(wide)
  s_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k.astype(wide)) * scale
  if softcap is not None:
    s_BKGTS = softcap * jnp.tanh(s_BKGTS / softcap)
  seen = mask.dense(T, S)[:, :, None]
  s_BKGTS = jnp.where(seen, s_BKGTS, -jnp.inf)
  m = jnp.max(s_BKGTS, axis=-1, keepdims=True, initial=-jnp.inf)
  m = jnp.where(jnp.isfinite(m), m, 0)
  p_BKGTS = jnp.where(seen, jnp.exp(s_BKGTS - m), 0)
  z = p_BKGTS.sum(-1, keepdims=True)
  p_BKGTS = p_BKGTS / jnp.where(z > 0, z, 1)
  o = jnp.einsum("BKGTS,BSKH->BTKGH", p_BKGTS, v.astype(wide))
  lse = jnp.where(z > 0, m + jnp.log(jnp.where(z > 0, z, 1)), -jnp.inf)[..., 0]
  return (
    o.reshape(B, T, N, H).astype(q.dtype),
    jnp.moveaxis(lse, 3, 1).reshape(B, T, N),
  )
