"""The arithmetic on one pair of blocks, forward and backward.

Source: Dao, FlashAttention-2 (arXiv 2307.08691).
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

# Below every real score and finite, so that (-inf) - LOWEST is -inf, not NaN.
LOWEST = -1e30


# Of the queries of a block so far: the weighted sum of values `[*B,G,Q,H]`,
# the largest score `[*B,G,Q]`, and the sum of exponentials relative to it.
SoftmaxCarry = tuple[Array, Array, Array]


def softmax_start(q: Float[Array, "*B G Q H"]) -> SoftmaxCarry:
  """Before the first keys."""
  wide = jnp.promote_types(q.dtype, jnp.float32)
  rows = q.shape[:-1]
  return (
    jnp.zeros(q.shape, wide),
    jnp.full(rows, LOWEST, wide),
    jnp.zeros(rows, wide),
  )


def softmax_step(
  carry: SoftmaxCarry,
  q: Float[Array, "*B G Q H"],
  k: Float[Array, "*B R H"],
  v: Float[Array, "*B R H"],
  seen: Bool[Array, "*B G Q R"] | None,
  scale: float,
  softcap: float | None,
) -> SoftmaxCarry:
  """Takes a block of keys in; `seen` of `None` is all of it."""
  acc, m, z = carry
  s = _wide_einsum("...GQH,...RH->...GQR", q, k)
  if softcap is not None:
    s, scale = softcap * jnp.tanh(s * (scale / softcap)), 1.0
  elif scale <= 0:
    s, scale = s * scale, 1.0
  if seen is not None:
    s = jnp.where(seen, s, -jnp.inf)
  # Not scaled before its maximum is known: XLA would write it once more.
  m_new = jnp.maximum(m, s.max(-1) * scale)
  p = jnp.exp(s * scale - m_new[..., None])
  alpha = jnp.exp(m - m_new)
  pv = _wide_einsum("...GQR,...RH->...GQH", p.astype(v.dtype), v)
  return acc * alpha[..., None] + pv, m_new, z * alpha + p.sum(-1)


def softmax_end(carry: SoftmaxCarry, dtype: Any) -> tuple[Array, Array]:
  """The output in `dtype` and the lse; 0 and -inf where no key was seen."""
  acc, m, z = carry
  some = z > 0
  o = (acc / jnp.where(some, z, 1)[..., None]).astype(dtype)
  return o, jnp.where(some, m + jnp.log(jnp.where(some, z, 1)), -jnp.inf)


def pair_gradient(
  q: Float[Array, "*B G Q H"],
  k: Float[Array, "*B R H"],
  v: Float[Array, "*B R H"],
  seen: Bool[Array, "*B R G Q"] | None,
  lse: Float[Array, "*B G Q"],
  delta: Float[Array, "*B G Q"],
  do: Float[Array, "*B G Q H"],
  scale: float,
  softcap: float | None,
) -> tuple[Array, Array, Array]:
  """Gradient of one pair of blocks; that of q and k still without `scale`.

  Scores are transposed, [keys, queries]: then only dq multiplies by a
  transpose, and what is known of a query lies along the fast axis. A group's
  heads stay an axis of their own: split again inside an element-wise kernel,
  the fast axis would not be read in order, which made it seven times slower.
  """
  s = _wide_einsum("...GQH,...RH->...RGQ", q, k) * scale
  if softcap is not None:
    s = softcap * jnp.tanh(s / softcap)
  if seen is not None:
    s = jnp.where(seen, s, -jnp.inf)
  p = jnp.exp(s - jnp.expand_dims(lse, -3))
  dp = _wide_einsum("...GQH,...RH->...RGQ", do, v)
  ds = p * (dp - jnp.expand_dims(delta, -3))
  if softcap is not None:
    # s is -inf where unseen; there ds is 0 and must stay so.
    ds = ds * (1 - jnp.square(jnp.where(p > 0, s, 0) / softcap))
  ds, p = ds.astype(q.dtype), p.astype(q.dtype)
  dv = _wide_einsum("...RGQ,...GQH->...RH", p, do)
  dk = _wide_einsum("...RGQ,...GQH->...RH", ds, q)
  # As a matrix: a product by a transpose of more axes would copy it first.
  flat = ds.reshape(*ds.shape[:-2], -1)
  dq = _wide_einsum("...RQ,...RH->...QH", flat, k)
  return dq.reshape(q.shape), dk, dv


def _wide_einsum(spec: str, a: Array, b: Array) -> Array:
  """A product of two blocks, summed and returned in at least fp32."""
  wide = jnp.promote_types(a.dtype, jnp.float32)
  return jnp.einsum(spec, a, b, preferred_element_type=wide)
