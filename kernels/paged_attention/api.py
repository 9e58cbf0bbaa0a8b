"""The public op for attention over pages."""

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxchunk.kernels.attention.api import grouped, merge, ungrouped
from jaxchunk.kernels.paged_attention.pages import KVPages, PageView
from jaxchunk.kernels.values import known_values

Implementation = Literal["xla", "pallas_tpu", "pallas_gpu", "reference"]
IMPLEMENTATIONS: tuple[Implementation, ...] = (
  "xla",
  "pallas_tpu",
  "pallas_gpu",
  "reference",
)
# Of pages; those of 8 bits come with scales.
_NARROW = ("int8", "float8_e4m3fn", "float8_e5m2")


def paged_attention(
  q: Float[Array, "B T N H"],
  pages: KVPages,
  view: PageView,
  *,
  q_positions: Int[Array, "B T"],
  layer: Any = 0,
  window: int | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  sink_logits: Float[Array, " N"] | None = None,
  implementation: Implementation | None = None,
  return_lse: bool = False,
) -> Any:
  r"""Attention of 1 to T queries a row over keys and values in pages.

  Key number s of row (b, k) is at place `s % Z` of page
  `view.table[b, k, s // Z]`, for `s < view.lengths[b, k]`. A query sees the
  keys at its own position and before, with `window` only the last so many of
  those. For query head n of key head `k = n // (N / K)`,

      score = softcap * tanh(scale * q (k_scale * k)^T / softcap) + log_weight
      o = softmax(score) (v_scale * v)

  with the soft-cap left out when `softcap` is `None`. Only pages that a row
  has are read. Not differentiable: a cache is for inference.

  Args:
    q: Queries `[B,T,N,H]`, fp32, bf16 or fp16. Rows with fewer than T queries
      have `q_positions` of -1 for the others.
    pages: The cache (`KVPages`), of q's dtype or of 8 bits with scales.
    view: Which pages each row reads (`PageView`).
    q_positions: Position of each query in its sequence, `[B,T]` int32. A
      negative one sees nothing.
    layer: Which layer of the cache; may be traced.
    window: A query sees its own position and `window - 1` before; static.
    scale: Factor on the products; `H ** -0.5` if `None`.
    softcap: Bound on the scores' absolute value.
    sink_logits: As in `attention`.
    implementation: "xla" (everywhere), "pallas_tpu", "pallas_gpu" (Hopper), or
      "reference". `None` is "xla" so far, logged once. A named implementation
      never falls back.
    return_lse: Also return the log-sum-exp of the scores, for `merge`.

  Returns:
    The output `[B,T,N,H]` in q's dtype; with `return_lse` also the lse
    `[B,T,N]` in fp32. A query that sees no key gives 0 and -inf.

  Raises:
    ValueError: Shapes or dtypes do not fit together, the implementation's name
      is unknown, or, where values are known (outside `jit`), a length is
      negative or beyond the table or a page is outside the cache.
    NotImplementedError: The named implementation cannot serve the arguments;
      or a derivative is asked for.
  """
  _check(q, pages, view, q_positions, window)
  _check_values(pages, view, layer)
  if softcap is not None and not softcap > 0:
    raise ValueError(f"softcap must be positive, got {softcap}")
  if sink_logits is not None and sink_logits.shape != q.shape[2:3]:
    raise ValueError(
      f"sink_logits has shape {sink_logits.shape}, not one for each of q's "
      f"N={q.shape[2]} heads"
    )
  o, lse = paged_attention_grouped(
    grouped(q, pages.k.shape[1]),
    pages,
    view,
    q_positions=q_positions,
    layer=layer,
    window=window,
    scale=scale,
    softcap=softcap,
    implementation=implementation,
  )
  o, lse = ungrouped(o), ungrouped(lse[..., None])[..., 0]
  if sink_logits is not None:
    sink = jnp.broadcast_to(sink_logits.astype(lse.dtype), lse.shape)
    o, lse = merge(o, lse, jnp.zeros_like(o), sink)
  return (o, lse) if return_lse else o


def paged_attention_grouped(
  q: Float[Array, "B K G T H"],
  pages: KVPages,
  view: PageView,
  *,
  q_positions: Int[Array, "B T"],
  layer: Any = 0,
  window: int | None = None,
  scale: float | None = None,
  softcap: float | None = None,
  implementation: str | None = None,
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K G T"]]:
  """`paged_attention` with queries grouped by key head, as models have them.

  Shapes are taken as they come. Arguments are those of `paged_attention`.

  Returns:
    The output in q's dtype, and the lse in at least fp32.
  """
  scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
  o, lse = _underivable(
    _forward(implementation),
    window,
    scale,
    softcap,
    q,
    pages,
    jax.tree.map(lambda a: jnp.asarray(a, jnp.int32), view),
    jnp.asarray(q_positions, jnp.int32),
    jnp.asarray(layer, jnp.int32),
  )
  return o, lse


def _forward(name: str | None) -> Callable[..., tuple[Array, Array]]:
  """An implementation's function, loaded when first asked for."""
  if name is None:
    name = "xla"
    _log_choice(name)
  if name == "xla":
    from jaxchunk.kernels.paged_attention import xla

    return xla.paged_forward
  if name == "pallas_tpu":
    from jaxchunk.kernels.paged_attention import pallas_tpu

    return pallas_tpu.tpu_paged_forward
  if name == "pallas_gpu":
    from jaxchunk.kernels.paged_attention import pallas_gpu

    return pallas_gpu.gpu_paged_forward
  if name == "reference":
    from jaxchunk.kernels.paged_attention import reference

    return reference.paged_reference
  raise ValueError(
    f"unknown paged attention implementation {name!r}; there are "
    f"{list(IMPLEMENTATIONS)}"
  )


@functools.partial(jax.custom_jvp, nondiff_argnums=(0, 1, 2, 3))
def _underivable(
  forward: Callable[..., tuple[Array, Array]],
  window: int | None,
  scale: float,
  softcap: float | None,
  *arguments: Any,
) -> tuple[Array, Array]:
  *operands, layer = arguments
  return forward(
    *operands, layer=layer, window=window, scale=scale, softcap=softcap
  )


@_underivable.defjvp
def _refuse(*arguments: Any) -> Any:
  raise NotImplementedError(
    "paged_attention has no derivative: a cache of pages is for inference; "
    "train with jaxchunk.attention"
  )


def _check(
  q: Array,
  pages: KVPages,
  view: PageView,
  q_positions: Array,
  window: int | None,
) -> None:
  if q.ndim != 4 or not jnp.issubdtype(q.dtype, jnp.floating):
    raise ValueError(
      "q must be floating [batch, queries, heads, head width], got "
      f"{q.dtype} {q.shape}"
    )
  if pages.k.ndim != 5 or pages.k.shape != pages.v.shape:
    raise ValueError(
      "k and v must both be [layers, key heads, pages, page size, head width],"
      f" got {pages.k.shape} and {pages.v.shape}"
    )
  _check_pages(q, pages)
  B, T, N, H = q.shape
  K = pages.k.shape[1]
  if 0 in q.shape or 0 in pages.k.shape:
    raise ValueError(f"empty attention: q {q.shape}, pages {pages.k.shape}")
  if pages.k.shape[4] != H:
    raise ValueError(
      f"q has head width H={H}, the pages have H={pages.k.shape[4]}"
    )
  if N % K:
    raise ValueError(f"q has N={N} heads, not a multiple of the pages' K={K}")
  if (
    view.table.ndim != 3
    or view.table.shape[:2] != (B, K)
    or (view.table.shape[2] == 0)
  ):
    raise ValueError(
      f"the table has shape {view.table.shape}, not [batch, key heads, entries]"
      f" = {(B, K, 'M')}"
    )
  for name, array, shape in (
    ("lengths", view.lengths, (B, K)),
    ("q_positions", q_positions, (B, T)),
  ):
    if array.shape != shape:
      raise ValueError(f"{name} has shape {array.shape}, not {shape}")
  for name, array in (
    ("the table", view.table),
    ("lengths", view.lengths),
    ("q_positions", q_positions),
  ):
    if not jnp.issubdtype(array.dtype, jnp.integer):
      raise ValueError(f"{name} must be integers, got {array.dtype}")
  if window is not None and window < 1:
    raise ValueError(f"window must be at least 1, got {window}")


def _check_pages(q: Array, pages: KVPages) -> None:
  """Dtypes of the pages, and what stands beside them."""
  narrow = pages.k.dtype.name in _NARROW
  if pages.k.dtype != pages.v.dtype or not (narrow or pages.k.dtype == q.dtype):
    raise ValueError(
      f"the pages must have q's dtype {q.dtype}, or one of {_NARROW} with "
      f"scales; got k {pages.k.dtype}, v {pages.v.dtype}"
    )
  if narrow and (pages.k_scale is None or pages.v_scale is None):
    raise ValueError(
      f"pages of {pages.k.dtype} need k_scale and v_scale "
      "[layers, key heads, pages, page size]"
    )
  for name in ("k_scale", "v_scale", "positions", "log_weights"):
    array = getattr(pages, name)
    if array is None:
      continue
    if array.shape != pages.k.shape[:4]:
      raise ValueError(
        f"{name} has shape {array.shape}, not that of k without its last "
        f"axis, {pages.k.shape[:4]}"
      )
    wanted = jnp.int32 if name == "positions" else jnp.float32
    if array.dtype != wanted:
      raise ValueError(f"{name} must be {wanted.__name__}, got {array.dtype}")


def _check_values(pages: KVPages, view: PageView, layer: Any) -> None:
  """What can be known only outside `jit`."""
  L, _, P, Z, _ = pages.k.shape
  if isinstance(layer, int | np.integer) and not 0 <= layer < L:
    raise ValueError(f"layer {layer} is outside the cache's L={L} layers")
  table, lengths = map(known_values, (view.table, view.lengths))
  if table is None or lengths is None:
    return
  if lengths.min() < 0:
    raise ValueError(f"lengths must not be negative, got {lengths.min()}")
  if lengths.max() > table.shape[2] * Z:
    raise ValueError(
      f"a row has {lengths.max()} keys, its table only {table.shape[2]} pages "
      f"of {Z}"
    )
  used = np.arange(table.shape[2]) * Z < lengths[..., None]
  wrong = used & ((table < 0) | (table >= P))
  if wrong.any():
    raise ValueError(
      f"the table names page {table[wrong][0]}, outside the cache's P={P} pages"
    )


@functools.cache
def _log_choice(implementation: str) -> None:
  logging.getLogger("jaxchunk").info(
    "paged attention: running %s", implementation
  )
