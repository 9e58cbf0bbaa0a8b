"""Choosing blocks of keys: summaries, scores, and tables for sparse masks.

A choice is an array of booleans `[B,K,I,J]`: whether the queries of block i
in the group of key head k see block j of the keys. Choices combine with `|`
and `&`, and `table_of` turns one into the table that `AttentionMask.blocks`
takes. Everything here runs inside `jit`.

    scores = block_scores(q, block_means(k, 128), q_block=128)
    allowed = causal_blocks(T, S, q_block=128, kv_block=128)
    chosen = top_k(scores, 16, allowed=allowed) | sink_and_window(
      T, S, q_block=128, kv_block=128, sinks=1, window=2)
    mask = AttentionMask.causal() & AttentionMask.blocks(
      table_of(chosen & allowed), q_block=128, kv_block=128)
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxchunk.kernels.values import known_values


def block_means(
  k: Float[Array, "B S K H"], kv_block: int
) -> Float[Array, "B K J H"]:
  """The mean key of each block, in at least fp32.

  Args:
    k: Keys.
    kv_block: Keys per block; divides S.

  Returns:
    One vector a block, with J = S / kv_block.

  Raises:
    ValueError: The blocks do not divide the keys.
  """
  return _blocked(k, kv_block, "kv_block").mean(3)


def block_bounds(
  k: Float[Array, "B S K H"], kv_block: int
) -> tuple[Float[Array, "B K J H"], Float[Array, "B K J H"]]:
  """The least and the largest of each channel in each block of keys.

  See `block_means`; for `bounded_scores`.
  """
  blocks = _blocked(k, kv_block, "kv_block")
  return blocks.min(3), blocks.max(3)


def block_scores(
  q: Float[Array, "B T N H"],
  summaries: Float[Array, "B K J H"],
  *,
  q_block: int,
) -> Float[Array, "B K I J"]:
  """How much a block of queries asks for a block of keys.

  The mean over a block's queries and its group's heads of `q . summary`,
  scaled by `H ** -0.5`.

  Args:
    q: Queries; N is a multiple of K.
    summaries: From `block_means`.
    q_block: Queries per block; divides T.

  Returns:
    Scores in at least fp32, with I = T / q_block.

  Raises:
    ValueError: The blocks do not divide, or heads do not.
  """
  means = _queries(q, summaries.shape[1], q_block).mean((3, 4))
  scores = jnp.einsum("BKIH,BKJH->BKIJ", means, summaries)
  return scores * q.shape[-1] ** -0.5


def bounded_scores(
  q: Float[Array, "B T N H"],
  bounds: tuple[Float[Array, "B K J H"], Float[Array, "B K J H"]],
  *,
  q_block: int,
) -> Float[Array, "B K I J"]:
  """No score of a query of block i on a key of block j is higher than this.

  The largest over the block's queries and heads of
  `sum_h max(q_h * min_h, q_h * max_h)`, scaled by `H ** -0.5`.

  Source: Quest (arXiv 2406.10774). Arguments as `block_scores`, with the
  bounds of `block_bounds`.
  """
  low, high = bounds
  rows = _queries(q, low.shape[1], q_block)
  # max(q * low, q * high) = max(q, 0) * high + min(q, 0) * low
  upper = jnp.einsum("BKIGQH,BKJH->BKIGQJ", jnp.maximum(rows, 0), high)
  upper += jnp.einsum("BKIGQH,BKJH->BKIGQJ", jnp.minimum(rows, 0), low)
  return upper.max((3, 4)) * q.shape[-1] ** -0.5


def causal_blocks(
  t: int, s: int, *, q_block: int, kv_block: int, q_offset: Any = 0
) -> Bool[Array, "1 1 I J"]:
  """Blocks of keys that some query of a block sees under a causal mask.

  Args:
    t: Queries.
    s: Keys.
    q_block: Queries per block.
    kv_block: Keys per block.
    q_offset: Position of the first query; may be traced.

  Returns:
    The choice.
  """
  last = q_offset + (jnp.arange(t // q_block) + 1) * q_block - 1
  first = jnp.arange(s // kv_block) * kv_block
  return (first[None] <= last[:, None])[None, None]


def sink_and_window(
  t: int,
  s: int,
  *,
  q_block: int,
  kv_block: int,
  sinks: int,
  window: int,
  q_offset: Any = 0,
) -> Bool[Array, "1 1 I J"]:
  """The first blocks of keys, and the last ones up to the queries' own.

  Args:
    t: Queries.
    s: Keys.
    q_block: Queries per block.
    kv_block: Keys per block.
    sinks: Blocks at the start.
    window: Blocks up to and including that of the block's last query; those
      of its other queries are added where they lie before the window.
    q_offset: Position of the first query; may be traced.

  Returns:
    The choice.
  """
  start = q_offset + jnp.arange(t // q_block) * q_block
  own = (start + q_block - 1) // kv_block
  first = jnp.minimum(start // kv_block, own - window + 1)
  j = jnp.arange(s // kv_block)[None]
  near = (first[:, None] <= j) & (j <= own[:, None])
  return ((j < sinks) | near)[None, None]


def top_k(
  scores: Float[Array, "B K I J"],
  count: int,
  *,
  allowed: Bool[Array, "#B #K I J"] | None = None,
) -> Bool[Array, "B K I J"]:
  """The `count` blocks with the highest scores of each row.

  Args:
    scores: Of the blocks.
    count: How many to choose; fewer where fewer are allowed.
    allowed: What may be chosen at all, such as `causal_blocks`.

  Returns:
    The choice; of equal scores the earlier block.

  Raises:
    ValueError: `count` is not positive.
  """
  if count < 1:
    raise ValueError(f"count must be at least 1, got {count}")
  scores = _within(scores, allowed)
  values, index = lax.top_k(scores, min(count, scores.shape[-1]))
  hot = jax.nn.one_hot(index, scores.shape[-1], dtype=bool)
  return (hot & (values > -jnp.inf)[..., None]).any(-2)


def threshold(
  scores: Float[Array, "B K I J"],
  mass: float,
  *,
  allowed: Bool[Array, "#B #K I J"] | None = None,
) -> Bool[Array, "B K I J"]:
  """The fewest blocks whose softmax over the scores sums to at least `mass`.

  Args:
    scores: Of the blocks.
    mass: Between 0 and 1.
    allowed: What may be chosen at all.

  Returns:
    The choice.

  Raises:
    ValueError: `mass` is out of range.
  """
  if not 0 < mass <= 1:
    raise ValueError(f"mass must be in (0, 1], got {mass}")
  scores = _within(scores, allowed)
  top = scores.max(-1, keepdims=True)
  weights = jnp.exp(scores - jnp.where(jnp.isfinite(top), top, 0))
  order = jnp.argsort(-weights, axis=-1, stable=True)
  ranked = jnp.take_along_axis(weights, order, axis=-1)
  before = jnp.cumsum(ranked, axis=-1) - ranked
  kept = (before < mass * ranked.sum(-1, keepdims=True)) & (ranked > 0)
  rank = jnp.argsort(order, axis=-1)
  return jnp.take_along_axis(kept, rank, axis=-1)


def union_over_queries(
  chosen: Bool[Array, "B K I J"], blocks: int
) -> Bool[Array, "B K I2 J"]:
  """One choice for every `blocks` neighbouring blocks of queries.

  Raises:
    ValueError: `blocks` does not divide the blocks of queries.
  """
  I2, rest = divmod(chosen.shape[2], blocks)
  if rest:
    raise ValueError(
      f"{chosen.shape[2]} blocks of queries are not a multiple of {blocks}"
    )
  return chosen.reshape(*chosen.shape[:2], I2, blocks, -1).any(3)


def union_over_groups(
  chosen: Bool[Array, "B N I J"], num_kv_heads: int
) -> Bool[Array, "B K I J"]:
  """One choice for the query heads of each key head, from one for each.

  Raises:
    ValueError: The query heads are not a multiple of the key heads.
  """
  B, N, *blocks = chosen.shape
  if N % num_kv_heads:
    raise ValueError(f"N={N} heads are not a multiple of K={num_kv_heads}")
  return chosen.reshape(B, num_kv_heads, -1, *blocks).any(2)


def table_of(
  chosen: Bool[Array, "B K I J"], entries: int | None = None
) -> Int[Array, "B K I M"]:
  """The table of a choice, for `AttentionMask.blocks`.

  Args:
    chosen: The choice.
    entries: M, at least as many as any row has chosen; J if `None`. A row
      with more loses its last blocks: outside `jit` that raises.

  Returns:
    Block numbers in ascending order, and -1 behind them.

  Raises:
    ValueError: A row has more than `entries` blocks, where that is known.
  """
  J = chosen.shape[-1]
  entries = J if entries is None else min(entries, J)
  known = known_values(chosen)
  if known is not None:
    most = int(known.sum(-1).max(initial=0))
    if most > entries:
      raise ValueError(f"a row has {most} blocks, the table only {entries}")
  # Chosen blocks have distinct keys in descending order, the others 0.
  rank = jnp.where(chosen, J - jnp.arange(J), 0)
  values, _ = lax.top_k(rank, entries)
  return jnp.where(values > 0, J - values, -1).astype(jnp.int32)


def _within(scores: Array, allowed: Array | None) -> Array:
  return scores if allowed is None else jnp.where(allowed, scores, -jnp.inf)


def _blocked(
  x: Float[Array, "B T N H"], size: int, name: str
) -> Float[Array, "B N I Q H"]:
  B, T, N, H = x.shape
  if size < 1 or T % size:
    raise ValueError(f"length {T} is not a multiple of {name}={size}")
  wide = jnp.promote_types(x.dtype, jnp.float32)
  blocks = x.astype(wide).reshape(B, T // size, size, N, H)
  return blocks.transpose(0, 3, 1, 2, 4)


def _queries(
  q: Float[Array, "B T N H"], K: int, q_block: int
) -> Float[Array, "B K I G Q H"]:
  if q.shape[2] % K:
    raise ValueError(f"q has N={q.shape[2]} heads, not a multiple of K={K}")
  blocks = _blocked(q, q_block, "q_block")
  B, N, *rest = blocks.shape
  return blocks.reshape(B, K, N // K, *rest).swapaxes(2, 3)
