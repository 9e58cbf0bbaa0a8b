"""Blockwise attention in plain XLA: runs everywhere, and is fast on CPU.

Queries come as `[B,K,G,T,H]`, keys and values as one layer of a cache
`[L,B,K,S,H]`, which is sliced block by block and never copied. A score block
exists for one pair of blocks at a time. Which pairs are computed follows from
the mask: the host never waits, blocks that no query sees cost nothing, and
the number of steps is a value inside the program, not a shape.

The backward pass adds into buffers of `dk` and `dv` that the caller owns, in
place, which is what the chunk executor needs (and an ordinary gradient is the
case of buffers that start at zero).

Source: Dao, FlashAttention-2 (arXiv 2307.08691); block sizes measured with
benchmarks/attention_cpu.py.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxchunk.kernels.attention.mask import AttentionMask
from jaxchunk.kernels.vma import vary_like

# Below every real score and finite, so that (-inf) - _LOWEST is -inf, not NaN.
_LOWEST = -1e30


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """Tokens per block of queries and of keys, forward and backward."""

  q: int = 512
  kv: int = 256
  q_bwd: int = 512
  kv_bwd: int = 256


class _Grid(NamedTuple):
  """A cut of T queries and S keys into blocks of bq and bk.

  The last block starts at `length - size`, so that every block is whole; what
  it shares with the one before is masked there.
  """

  T: int
  S: int
  bq: int
  bk: int

  def num_q(self) -> int:
    return -(-self.T // self.bq)

  def num_kv(self) -> int:
    return -(-self.S // self.bk)

  def q_start(self, i: Any) -> Any:
    return jnp.minimum(i * self.bq, self.T - self.bq)

  def kv_start(self, j: Any) -> Any:
    return jnp.minimum(j * self.bk, self.S - self.bk)


def live_blocks(mask: AttentionMask, grid: _Grid) -> Bool[Array, "I J"]:
  """Which pairs of blocks have a visible pair of tokens, or may have one.

  Exact for causal, window and length together; for segments a pair is live
  where the ranges of ids of the two blocks meet, which is exact under a causal
  mask where the queries' ids are a stretch of the keys' sorted ids.
  """
  i, j = jnp.arange(grid.num_q()), jnp.arange(grid.num_kv())
  p_first = (mask.offset + i * grid.bq)[:, None]
  p_last = (mask.offset + jnp.minimum((i + 1) * grid.bq, grid.T) - 1)[:, None]
  k_first = (j * grid.bk)[None]
  k_last = (jnp.minimum((j + 1) * grid.bk, grid.S) - 1)[None]
  if mask.kv_length is not None:
    k_last = jnp.minimum(k_last, mask.kv_length - 1)
  live = jnp.ones((grid.num_q(), grid.num_kv()), bool)
  if mask.is_causal:
    live &= k_first <= p_last
  if mask.window_size is not None:
    live &= p_first - k_last < mask.window_size
    live &= k_first - p_last < mask.window_size
  if mask.kv_length is not None:
    live &= k_first < mask.kv_length
  if mask.q_segment_ids is not None and mask.kv_segment_ids is not None:
    q_min, q_max = _id_range(mask.q_segment_ids, grid.bq)
    k_min, k_max = _id_range(mask.kv_segment_ids, grid.bk)
    meet = (q_min[:, :, None] <= k_max[:, None]) & (
      k_min[:, None] <= q_max[:, :, None]
    )
    live &= jnp.any(meet, axis=0)
  return live


def _id_range(
  ids: Int[Array, "B T"], block: int
) -> tuple[Int[Array, "B I"], Int[Array, "B I"]]:
  """Smallest and largest positive id per block; an empty range if none."""
  B, T = ids.shape
  ids = jnp.pad(ids, ((0, 0), (0, -T % block))).reshape(B, -1, block)
  top = jnp.iinfo(ids.dtype).max
  return jnp.where(ids > 0, ids, top).min(-1), ids.max(-1)


def _indices(live: Bool[Array, "I J"]) -> tuple[Array, Array]:
  """For each row the columns that are set, first; and how many they are."""
  rows, columns = live.shape
  place = jnp.cumsum(live, axis=1, dtype=jnp.int32) - 1
  place = jnp.where(live, place, columns)
  column = jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32), live.shape)
  row = jnp.broadcast_to(jnp.arange(rows)[:, None], live.shape)
  listed = vary_like(jnp.zeros(live.shape, jnp.int32), live)
  listed = listed.at[row, place].set(column, mode="drop")
  return listed, jnp.sum(live, axis=1, dtype=jnp.int32)


class _Visible(NamedTuple):
  """The mask by token: key s is seen where `low <= s <= high` and ids agree.

  Made once, before the loops over blocks, so that inside them a few integers
  per token are read and nothing is computed per pair but the comparisons.
  """

  low: Int[Array, " T"] | None
  high: Int[Array, " T"] | None
  q_ids: Int[Array, "B T"] | None
  k_ids: Int[Array, "B S"] | None

  @classmethod
  def of(cls, mask: AttentionMask, grid: _Grid) -> "_Visible":
    """From the mask."""
    p = mask.offset + jnp.arange(grid.T)
    high, low = p if mask.is_causal else None, None
    if mask.window_size is not None:
      low = p - mask.window_size + 1
      if high is None:
        high = p + mask.window_size - 1
    if mask.kv_length is not None:
      last = jnp.full_like(p, mask.kv_length - 1)
      high = last if high is None else jnp.minimum(high, last)
    q_ids, k_ids = mask.q_segment_ids, mask.kv_segment_ids
    if q_ids is None or k_ids is None:
      return cls(low, high, None, None)
    # No key then has id -1: a padding query sees nothing.
    q_ids = jnp.where(q_ids > 0, q_ids, -1)
    return cls(low, high, q_ids, jnp.maximum(k_ids, 0))

  def block(
    self, grid: _Grid, i: Any, j: Any, *, by_key: bool = False
  ) -> Bool[Array, "B Q R"]:
    """Block pair (i, j); the leading axis is 1 or B.

    With `by_key` it is `[B,R,Q]`, made so and not transposed: a transpose
    would be done again for every head.
    """
    q0, k0 = grid.q_start(i), grid.kv_start(j)
    q_axis, k_axis = (1, 2) if by_key else (2, 1)

    def rows(of_query: Array) -> Array:
      part = lax.dynamic_slice_in_dim(of_query, q0, grid.bq, 1)
      return jnp.expand_dims(part, q_axis)

    t = jnp.expand_dims(q0 + jnp.arange(grid.bq)[None], q_axis)
    s = jnp.expand_dims(k0 + jnp.arange(grid.bk)[None], k_axis)
    seen = jnp.ones((1, 1, 1), bool)
    if self.low is not None:
      seen &= rows(self.low[None]) <= s
    if self.high is not None:
      seen &= s <= rows(self.high[None])
    if self.q_ids is not None and self.k_ids is not None:
      k_ids = lax.dynamic_slice_in_dim(self.k_ids, k0, grid.bk, 1)
      seen &= rows(self.q_ids) == jnp.expand_dims(k_ids, k_axis)
    # What the last block shares with the one before belongs to that one.
    if grid.T % grid.bq:
      seen &= t >= i * grid.bq
    if grid.S % grid.bk:
      seen &= s >= j * grid.bk
    shape = (grid.bk, grid.bq) if by_key else (grid.bq, grid.bk)
    return jnp.broadcast_to(seen, (seen.shape[0], *shape))


def _cache_block(
  cache: Float[Array, "L B K S H"], layer: Any, start: Any, size: int
) -> Float[Array, "B K R H"]:
  _, B, K, _, H = cache.shape
  return lax.dynamic_slice(cache, _at(layer, start), (1, B, K, size, H))[0]


def _at(layer: Any, start: Any) -> tuple[Array, ...]:
  return tuple(jnp.asarray(n, jnp.int32) for n in (layer, 0, 0, start, 0))


def _scores(
  spec: str,
  q: Float[Array, "B K G Q H"],
  k: Float[Array, "B K R H"],
  seen: Bool[Array, "*shape"],
  scale: float,
  softcap: float | None,
) -> Float[Array, "*shape"]:
  """Scaled, capped and masked scores in at least fp32; -inf where unseen."""
  s = _wide_einsum(spec, q, k) * scale
  if softcap is not None:
    s = softcap * jnp.tanh(s / softcap)
  return jnp.where(seen, s, -jnp.inf)


def flash_forward(
  q: Float[Array, "B K G T H"],
  k: Float[Array, "L B K S H"],
  v: Float[Array, "L B K S H"],
  mask: AttentionMask,
  *,
  layer: Any = 0,
  scale: float,
  softcap: float | None = None,
  blocks: BlockSizes | None = None,
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K G T"]]:
  """Attention of a block of queries over one layer of a cache.

  Args:
    q: Queries.
    k: Keys of every layer.
    v: Values of every layer.
    mask: Which keys each query sees.
    layer: Which layer of the cache; may be traced.
    scale: Factor on the scores.
    softcap: Scores become `softcap * tanh(score / softcap)`.
    blocks: Block sizes.

  Returns:
    The output in q's dtype, and the log-sum-exp of the scores in at least
    fp32: 0 and -inf for a query that sees nothing. Memory beyond these is one
    score block for all heads, whatever the lengths.
  """
  B, K, G, T, H = q.shape
  S = k.shape[3]
  blocks = blocks or BlockSizes()
  grid = _Grid(T, S, min(blocks.q, T), min(blocks.kv, S))
  wide = jnp.promote_types(q.dtype, jnp.float32)
  listed, count = _indices(live_blocks(mask, grid))
  visible = _Visible.of(mask, grid)

  def attend_block(i: Any, out: tuple[Array, Array]) -> tuple[Array, Array]:
    q_i = lax.dynamic_slice_in_dim(q, grid.q_start(i), grid.bq, 3)

    def step(n: Any, carry: tuple[Array, Array, Array]) -> Any:
      acc, m, z = carry
      j = listed[i, n]
      k_j = _cache_block(k, layer, grid.kv_start(j), grid.bk)
      v_j = _cache_block(v, layer, grid.kv_start(j), grid.bk)
      seen = visible.block(grid, i, j)[:, None, None]
      s = _scores("BKGQH,BKRH->BKGQR", q_i, k_j, seen, scale, softcap)
      m_new = jnp.maximum(m, s.max(-1))
      p = jnp.exp(s - m_new[..., None])
      alpha = jnp.exp(m - m_new)
      pv = _wide_einsum("BKGQR,BKRH->BKGQH", p.astype(v_j.dtype), v_j)
      return acc * alpha[..., None] + pv, m_new, z * alpha + p.sum(-1)

    rows = (B, K, G, grid.bq)
    start = (
      jnp.zeros((*rows, H), wide),
      jnp.full(rows, _LOWEST, wide),
      jnp.zeros(rows, wide),
    )
    start = vary_like(start, q, k, v, mask, layer)
    acc, m, z = lax.fori_loop(0, count[i], step, start)
    some = z > 0
    o_i = (acc / jnp.where(some, z, 1)[..., None]).astype(q.dtype)
    lse_i = jnp.where(some, m + jnp.log(jnp.where(some, z, 1)), -jnp.inf)
    o, lse = out
    at = grid.q_start(i)
    # The last block repeats rows of the one before where T is not a multiple;
    # its queries are masked there, so only its own rows are written.
    own = at + jnp.arange(grid.bq) >= i * grid.bq
    o_old = lax.dynamic_slice_in_dim(o, at, grid.bq, 3)
    lse_old = lax.dynamic_slice_in_dim(lse, at, grid.bq, 3)
    o_i = jnp.where(own[:, None], o_i, o_old)
    lse_i = jnp.where(own, lse_i, lse_old)
    return (
      lax.dynamic_update_slice_in_dim(o, o_i, at, 3),
      lax.dynamic_update_slice_in_dim(lse, lse_i, at, 3),
    )

  out = (jnp.zeros(q.shape, q.dtype), jnp.zeros((B, K, G, T), wide))
  out = vary_like(out, q, k, v, mask, layer)
  return lax.fori_loop(0, grid.num_q(), attend_block, out)


def flash_backward(
  q: Float[Array, "B K G T H"],
  k: Float[Array, "L B K S H"],
  v: Float[Array, "L B K S H"],
  mask: AttentionMask,
  o: Float[Array, "B K G T H"],
  lse: Float[Array, "B K G T"],
  do: Float[Array, "B K G T H"],
  dk: Float[Array, "L B K R H"],
  dv: Float[Array, "L B K R H"],
  *,
  dlse: Float[Array, "B K G T"] | None = None,
  dkv_start: Any = 0,
  layer: Any = 0,
  scale: float,
  softcap: float | None = None,
  blocks: BlockSizes | None = None,
) -> tuple[
  Float[Array, "B K G T H"],
  Float[Array, "L B K R H"],
  Float[Array, "L B K R H"],
]:
  """Gradient of `flash_forward`, adding into the caller's `dk` and `dv`.

  Args:
    q: As given to the forward pass, like k, v, mask, layer, scale, softcap.
    k: Keys of every layer.
    v: Values of every layer.
    mask: Which keys each query sees.
    o: Output of the forward pass.
    lse: Log-sum-exp of the forward pass.
    do: Cotangent of o.
    dk: Accumulator for the gradient of k, at least fp32. It may hold a part
      of the keys only: key s is at row `s - dkv_start`. Every block of
      `blocks.kv_bwd` keys with a visible key must lie inside.
    dv: Accumulator for the gradient of v.
    dlse: Cotangent of lse, or `None` for zero.
    dkv_start: The key at row 0 of dk and dv; may be traced, may be negative.
    layer: Which layer; may be traced.
    scale: Factor on the scores.
    softcap: Cap on the scores.
    blocks: Block sizes.

  Returns:
    dq in q's dtype, and dk and dv with this gradient added, in place where
    the caller's buffers are not used again.
  """
  T, S = q.shape[3], k.shape[3]
  blocks = blocks or BlockSizes()
  grid = _Grid(T, S, min(blocks.q_bwd, T), min(blocks.kv_bwd, S))
  wide = jnp.promote_types(q.dtype, jnp.float32)
  delta = jnp.sum(do.astype(wide) * o.astype(wide), axis=-1)
  if dlse is not None:
    delta = delta - dlse
  # exp(s - lse) of a query that sees nothing: exp(-inf - 1e30) = 0.
  lse = jnp.where(jnp.isfinite(lse), lse, -_LOWEST)
  live = live_blocks(mask, grid)
  listed, count = _indices(live.T)
  kv_listed, kv_count = _indices(jnp.any(live, axis=0)[None])
  visible = _Visible.of(mask, grid)

  def kv_step(n: Any, carry: tuple[Array, Array, Array]) -> Any:
    j = kv_listed[0, n]
    k_j = _cache_block(k, layer, grid.kv_start(j), grid.bk)
    v_j = _cache_block(v, layer, grid.kv_start(j), grid.bk)

    def q_step(n: Any, carry: tuple[Array, Array, Array]) -> Any:
      dq, dk_j, dv_j = carry
      i = listed[j, n]
      at = grid.q_start(i)
      q_i, do_i, lse_i, delta_i = (
        lax.dynamic_slice_in_dim(of_query, at, grid.bq, 3)
        for of_query in (q, do, lse, delta)
      )
      seen = visible.block(grid, i, j, by_key=True)[:, None, :, None]
      dq_i, dk_ij, dv_ij = _pair_gradient(
        q_i, k_j, v_j, seen, lse_i, delta_i, do_i, scale, softcap
      )
      dq_i = dq_i * scale + lax.dynamic_slice_in_dim(dq, at, grid.bq, 3)
      return (
        lax.dynamic_update_slice_in_dim(dq, dq_i, at, 3),
        dk_j + dk_ij,
        dv_j + dv_ij,
      )

    dq, dk, dv = carry
    zero = jnp.zeros(k_j.shape, wide)
    start = (dq, *vary_like((zero, zero), dq))
    dq, dk_j, dv_j = lax.fori_loop(0, count[j], q_step, start)
    at = grid.kv_start(j) - dkv_start
    return (
      dq,
      _add_block(dk, dk_j * scale, layer, at),
      _add_block(dv, dv_j, layer, at),
    )

  inputs = (q, k, v, mask, o, lse, do, dk, dv, dlse, layer, dkv_start)
  start = vary_like((jnp.zeros(q.shape, wide), dk, dv), inputs)
  dq, dk, dv = lax.fori_loop(0, kv_count[0], kv_step, start)
  return dq.astype(q.dtype), dk, dv


def _pair_gradient(
  q: Float[Array, "B K G Q H"],
  k: Float[Array, "B K R H"],
  v: Float[Array, "B K R H"],
  seen: Bool[Array, "B 1 R 1 Q"],
  lse: Float[Array, "B K G Q"],
  delta: Float[Array, "B K G Q"],
  do: Float[Array, "B K G Q H"],
  scale: float,
  softcap: float | None,
) -> tuple[Array, Array, Array]:
  """Gradient of one pair of blocks; that of q and k still without `scale`.

  Scores are transposed, [keys, queries]: then only dq multiplies by a
  transpose, and what is known of a query lies along the fast axis. A group's
  heads stay an axis of their own: split again inside an element-wise kernel,
  the fast axis would not be read in order, which made it seven times slower.
  """
  B, K, G, Q, H = q.shape
  s = _scores("BKGQH,BKRH->BKRGQ", q, k, seen, scale, softcap)
  p = jnp.exp(s - lse[:, :, None])
  dp = _wide_einsum("BKGQH,BKRH->BKRGQ", do, v)
  ds = p * (dp - delta[:, :, None])
  if softcap is not None:
    # s is -inf where masked; there ds is 0 and must stay so.
    ds = ds * (1 - jnp.square(jnp.where(p > 0, s, 0) / softcap))
  ds, p = ds.astype(q.dtype), p.astype(q.dtype)
  dv = _wide_einsum("BKRGQ,BKGQH->BKRH", p, do)
  dk = _wide_einsum("BKRGQ,BKGQH->BKRH", ds, q)
  # As a matrix: a product by a transpose of more axes would copy it first.
  flat = ds.reshape(B, K, -1, G * Q)
  dq = _wide_einsum("BKRQ,BKRH->BKQH", flat, k)
  return dq.reshape(B, K, G, Q, H), dk, dv


def _wide_einsum(spec: str, a: Array, b: Array) -> Array:
  """A product of two blocks, summed and returned in at least fp32."""
  wide = jnp.promote_types(a.dtype, jnp.float32)
  return jnp.einsum(spec, a, b, preferred_element_type=wide)


def _add_block(
  buffer: Float[Array, "L B K R H"],
  block: Float[Array, "B K Q H"],
  layer: Any,
  start: Any,
) -> Float[Array, "L B K R H"]:
  old = _cache_block(buffer, layer, start, block.shape[2])
  new = (old + block.astype(buffer.dtype))[None]
  return lax.dynamic_update_slice(buffer, new, _at(layer, start))
