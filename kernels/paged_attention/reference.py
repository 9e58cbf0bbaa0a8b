"""Attention over pages as its formula says, holding every score."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxchunk.kernels.paged_attention.pages import KVPages, PageView


def paged_reference(
  q: Float[Array, "B K G T H"],
  pages: KVPages,
  view: PageView,
  q_positions: Int[Array, "B T"],
  *,
  layer: Any = 0,
  window: int | None = None,
  scale: float,
  softcap: float | None = None,
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K G T"]]:
  """See `api.paged_attention`; its queries grouped by key head."""
  B, K = q.shape[:2]
  Z = pages.k.shape[3]
  wide = jnp.promote_types(q.dtype, jnp.float32)
  table = jnp.clip(view.table, 0, pages.k.shape[2] - 1)

  def rows(a: Array) -> Array:
    """What the rows read of a field, `[B,K,S]` or `[B,K,S,H]`."""
    found = a[layer][jnp.arange(K)[None, :, None], table]
    return found.reshape(B, K, -1, *a.shape[4:])

  k, v = rows(pages.k).astype(wide), rows(pages.v).astype(wide)
  if pages.k_scale is not None:
    k = k * rows(pages.k_scale)[..., None]
  if pages.v_scale is not None:
    v = v * rows(pages.v_scale)[..., None]
  s = jnp.einsum("BKGTH,BKSH->BKGTS", q.astype(wide), k) * scale
  if softcap is not None:
    s = softcap * jnp.tanh(s / softcap)
  if pages.log_weights is not None:
    s = s + rows(pages.log_weights)[:, :, None, None]
  place = positions = jnp.arange(view.table.shape[2] * Z)[None, None]
  if pages.positions is not None:
    positions = rows(pages.positions)
  seen = (place < view.lengths[..., None])[:, :, None]
  before = q_positions[:, None, :, None] - positions[:, :, None]
  seen = seen & (before >= 0) & (q_positions >= 0)[:, None, :, None]
  if window is not None:
    seen &= before < window
  if pages.log_weights is not None:
    seen &= (rows(pages.log_weights) != -jnp.inf)[:, :, None]
  s = jnp.where(seen[:, :, None], s, -jnp.inf)
  top = s.max(-1, keepdims=True)
  p = jnp.exp(s - jnp.where(jnp.isfinite(top), top, 0))
  total = p.sum(-1, keepdims=True)
  some = total > 0
  # A place that is not seen may hold anything, and 0 times NaN is NaN.
  v = jnp.where(seen.any(2)[..., None], v, 0)
  o = jnp.einsum("BKGTS,BKSH->BKGTH", p / jnp.where(some, total, 1), v)
  lse = jnp.where(some, jnp.log(jnp.where(some, total, 1)) + top, -jnp.inf)
  return o.astype(q.dtype), lse[..., 0]
