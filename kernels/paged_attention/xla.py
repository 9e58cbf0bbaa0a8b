"""Attention over pages in plain XLA: runs everywhere, and is fast on CPU.

A row is a sequence, a key head and a block of queries. Rows are sorted by how
many pages they read and go together in small groups; a group takes a few
pages of each of its rows at a time, until its longest row has none left. What
is gathered at once is thus a few pages, whatever the lengths, and a short row
does not wait for a long one. Pages of 8 bits are not multiplied out: their
scales go to the scores and to the probabilities.

Source: Dao, FlashAttention-2 (arXiv 2307.08691); the pages are those of vLLM
(arXiv 2309.06180).
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxchunk.kernels.attention.softmax import (
  SoftmaxCarry,
  softmax_end,
  softmax_start,
)
from jaxchunk.kernels.paged_attention.pages import KVPages, PageView
from jaxchunk.kernels.vma import vary_like


@dataclasses.dataclass(frozen=True)
class StepSizes:
  """How much a step takes; measured on two CPU cores, 8192 keys a row.

  Attributes:
    rows: Rows that go together.
    keys: Keys of each of them.
    queries: Queries of a row, times the query heads of its key head.
  """

  rows: int = 2
  keys: int = 512
  queries: int = 1024


class _Rows(NamedTuple):
  """Rows `r` sorted by how many pages they read, most first.

  Attributes:
    q: `[r,G,Q,H]`.
    position: Of the queries, `[r,Q]`.
    head: Which key head, `[r]`.
    table: Numbers of pages, `[r,M]`.
    length: How many keys, `[r]`.
    start: The first page that is read, `[r]`.
    number: How many are, `[r]`.
  """

  q: Float[Array, "r G Q H"]
  position: Int[Array, "r Q"]
  head: Int[Array, " r"]
  table: Int[Array, "r M"]
  length: Int[Array, " r"]
  start: Int[Array, " r"]
  number: Int[Array, " r"]


def paged_forward(
  q: Float[Array, "B K G T H"],
  pages: KVPages,
  view: PageView,
  q_positions: Int[Array, "B T"],
  *,
  layer: Any = 0,
  window: int | None = None,
  scale: float,
  softcap: float | None = None,
  sizes: StepSizes | None = None,
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K G T"]]:
  """See `api.paged_attention`; its queries grouped by key head.

  Args:
    q: Queries.
    pages: The cache.
    view: Which pages each row reads.
    q_positions: Position of each query, negative for none.
    layer: Which layer of the cache; may be traced.
    window: How many positions a query sees, its own the last of them.
    scale: Factor on the scores.
    softcap: Scores become `softcap * tanh(score / softcap)`.
    sizes: How much a step takes.

  Returns:
    The output in q's dtype and the log-sum-exp in at least fp32, 0 and -inf
    for a query that sees nothing. Memory beyond these is a step's pages and
    scores.
  """
  sizes = sizes or StepSizes()
  Z = pages.k.shape[3]
  ordered = pages.positions is None
  rows, place = _sorted_rows(
    q, view, q_positions, Z, window if ordered else None, sizes, ordered
  )
  total, G, *_ = rows.q.shape
  W = min(sizes.rows, total)
  R = max(1, min(sizes.keys // Z, view.table.shape[2]))
  rows = jax.tree.map(lambda a: _padded(a, -total % W), rows)

  def attend_group(g: Any, out: tuple[Array, Array]) -> tuple[Array, Array]:
    group = jax.tree.map(
      lambda a: lax.dynamic_slice_in_dim(a, g * W, W, 0), rows
    )

    def step(n: Any, carry: SoftmaxCarry) -> SoftmaxCarry:
      number = group.start[:, None] + n * R + jnp.arange(R)[None]
      inside = jnp.arange(R)[None] < (group.number - n * R)[:, None]
      found = _found(pages, layer, group, number)
      s = number[:, :, None] * Z + jnp.arange(Z)[None, None]
      seen = inside[:, :, None] & (s < group.length[:, None, None])
      seen = _seen(found, s.reshape(W, -1), seen.reshape(W, -1), group, window)
      return _step(carry, group.q, found, seen, scale, softcap)

    start = vary_like(softmax_start(group.q), q, pages, view, layer, rows)
    steps = -(-group.number[0] // R)
    ends = softmax_end(lax.fori_loop(0, steps, step, start), q.dtype)
    o, lse = (
      lax.dynamic_update_slice_in_dim(a, end, g * W, 0)
      for a, end in zip(out, ends, strict=True)
    )
    return o, lse

  wide = jnp.promote_types(q.dtype, jnp.float32)
  lse = jnp.full(rows.q.shape[:3], -jnp.inf, wide)
  out = (jnp.zeros_like(rows.q), lse)
  out = vary_like(out, q, pages, view, layer, rows)
  groups = -(-jnp.sum(rows.number > 0) // W)
  o, lse = lax.fori_loop(0, groups, attend_group, out)
  B, K, _, T, _ = q.shape

  def unsorted(a: Array) -> Array:
    a = a[place].reshape(B, K, -1, *a.shape[1:]).swapaxes(2, 3)
    return a.reshape(B, K, G, -1, *a.shape[5:])[:, :, :, :T]

  return unsorted(o), unsorted(lse)


def _sorted_rows(
  q: Float[Array, "B K G T H"],
  view: PageView,
  q_positions: Int[Array, "B T"],
  Z: int,
  window: int | None,
  sizes: StepSizes,
  ordered: bool,
) -> tuple[_Rows, Int[Array, " r"]]:
  """Rows, sorted, and where each of them stands then.

  With `ordered` keys a row reads only the pages from the first that its
  queries see to the last.
  """
  B, K, G, T, H = q.shape
  Q = min(T, max(1, sizes.queries // G))
  short = -T % Q
  q = jnp.pad(q, ((0, 0), (0, 0), (0, 0), (0, short), (0, 0)))
  position = jnp.pad(q_positions, ((0, 0), (0, short)), constant_values=-1)
  position = position.reshape(B, -1, Q)
  blocks = position.shape[1]
  top = position.max(-1)
  lowest = jnp.where(position < 0, jnp.iinfo(jnp.int32).max, position).min(-1)
  end = -(-view.lengths // Z)[:, :, None]
  end = jnp.where((top >= 0)[:, None], end, 0)
  start = jnp.zeros_like(end)
  if ordered:
    end = jnp.minimum(end, (top // Z + 1)[:, None])
    if window is not None:
      start += (jnp.maximum(lowest - (window - 1), 0) // Z)[:, None]

  def every(a: Array, axis: int) -> Array:
    """One entry a row, from an array that lacks an axis of it."""
    a = jnp.expand_dims(a, axis)
    a = jnp.broadcast_to(a, (B, K, blocks, *a.shape[3:]))
    return a.reshape(B * K * blocks, *a.shape[3:])

  rows = _Rows(
    q.reshape(B, K, G, blocks, Q, H).swapaxes(2, 3).reshape(-1, G, Q, H),
    every(position, 1),
    every(jnp.arange(K)[None] + jnp.zeros((B, 1), jnp.int32), 2),
    every(view.table, 2),
    every(view.lengths, 2),
    start.reshape(-1),
    jnp.maximum(end - start, 0).reshape(-1),
  )
  order = jnp.argsort(-rows.number, stable=True)
  return jax.tree.map(lambda a: a[order], rows), jnp.argsort(order)


def _padded(a: Array, more: int) -> Array:
  return jnp.pad(a, ((0, more), *((0, 0),) * (a.ndim - 1)))


def _found(
  pages: KVPages, layer: Any, group: _Rows, number: Int[Array, "W R"]
) -> KVPages:
  """The pages of a step, `[W,R*Z]` and `[W,R*Z,H]`, beyond a row any."""
  M = group.table.shape[1]
  page = jnp.take_along_axis(group.table, jnp.minimum(number, M - 1), axis=1)

  def get(a: Array) -> Array:
    # XLA on CPU widens what it reads of a narrow float, and would widen the
    # whole cache ahead of the loop if the cache were the same in each step.
    a, at = lax.optimization_barrier((a, page))
    found = a.at[layer, group.head[:, None], at].get(mode="clip")
    return found.reshape(len(at), -1, *found.shape[3:])

  return jax.tree.map(get, pages)


def _seen(
  found: KVPages,
  s: Int[Array, "W S"],
  inside: Bool[Array, "W S"],
  group: _Rows,
  window: int | None,
) -> Bool[Array, "W Q S"]:
  """Which keys of a step each query sees."""
  if found.log_weights is not None:
    inside &= found.log_weights != -jnp.inf
  key = s if found.positions is None else found.positions
  query = group.position[:, :, None]
  before = query - key[:, None]
  seen = inside[:, None] & (before >= 0) & (query >= 0)
  return seen if window is None else seen & (before < window)


def _step(
  carry: SoftmaxCarry,
  q: Float[Array, "W G Q H"],
  found: KVPages,
  seen: Bool[Array, "W Q S"],
  scale: float,
  softcap: float | None,
) -> SoftmaxCarry:
  """Takes the keys of a step in."""
  acc, m, z = carry
  wide = acc.dtype
  k = found.k.astype(q.dtype)
  s = jnp.einsum("WGQH,WSH->WGQS", q, k, preferred_element_type=wide) * scale
  if found.k_scale is not None:
    s = s * found.k_scale[:, None, None]
  if softcap is not None:
    s = softcap * jnp.tanh(s / softcap)
  if found.log_weights is not None:
    s = s + found.log_weights[:, None, None]
  s = jnp.where(seen[:, None], s, -jnp.inf)
  m_new = jnp.maximum(m, s.max(-1))
  p = jnp.exp(s - m_new[..., None])
  alpha = jnp.exp(m - m_new)
  # A place that nobody sees may hold anything, and 0 times NaN is NaN.
  some = seen.any(1)
  weight = p
  if found.v_scale is not None:
    weight = p * jnp.where(some, found.v_scale, 0)[:, None, None]
  v = jnp.where(some[:, :, None], found.v, jnp.zeros((), found.v.dtype))
  pv = jnp.einsum(
    "WGQS,WSH->WGQH",
    weight.astype(q.dtype),
    v.astype(q.dtype),
    preferred_element_type=wide,
  )
  return acc * alpha[..., None] + pv, m_new, z * alpha + p.sum(-1)
