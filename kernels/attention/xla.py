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
benchmarks/attention.py.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxchunk.kernels.attention import tables
from jaxchunk.kernels.attention.block_sizes import BlockSizes, look_up
from jaxchunk.kernels.attention.blocks import (
  Grid,
  Visible,
  full_blocks,
  live_blocks,
  live_indices,
)
from jaxchunk.kernels.attention.mask import AttentionMask
from jaxchunk.kernels.attention.softmax import (
  LOWEST,
  SoftmaxCarry,
  pair_gradient,
  softmax_end,
  softmax_start,
  softmax_step,
)
from jaxchunk.kernels.attention.xla_sparse import (
  sparse_backward,
  sparse_forward,
)
from jaxchunk.kernels.vma import vary_like


class _Lists(NamedTuple):
  """For each row of blocks, the blocks of the other side that it meets.

  Attributes:
    full: `[I,J]` those in which everything is visible: they need no mask,
      which is a third of the time of a block.
    num_full: `[I]` how many.
    part: `[I,J]` those in which something is.
    num_part: `[I]` how many.
  """

  full: Int[Array, "I J"]
  num_full: Int[Array, " I"]
  part: Int[Array, "I J"]
  num_part: Int[Array, " I"]

  @classmethod
  def of(
    cls, mask: AttentionMask, grid: Grid, *, by_key: bool = False
  ) -> "_Lists":
    """Rows are blocks of queries, or `by_key` blocks of keys."""
    live = live_blocks(mask, grid).any(0)
    full = live & full_blocks(mask, grid).all(0)
    kinds = (full, live & ~full)
    if by_key:
      kinds = (full.T, (live & ~full).T)
    return cls(*live_indices(kinds[0]), *live_indices(kinds[1]))

  def walk(
    self, i: Any, visit: Callable[[Any, bool, Any], Any], carry: Any
  ) -> Any:
    """`carry = visit(block, masked, carry)` for each block of row i."""

    def full(n: Any, carry: Any) -> Any:
      return visit(self.full[i, n], False, carry)

    def part(n: Any, carry: Any) -> Any:
      return visit(self.part[i, n], True, carry)

    carry = lax.fori_loop(0, self.num_full[i], full, carry)
    return lax.fori_loop(0, self.num_part[i], part, carry)


def _cache_block(
  cache: Float[Array, "L B K S H"], layer: Any, start: Any, size: int
) -> Float[Array, "B K R H"]:
  _, B, K, _, H = cache.shape
  return lax.dynamic_slice(cache, _at(layer, start), (1, B, K, size, H))[0]


def _read_cache(
  k: Float[Array, "L B K S H"],
  v: Float[Array, "L B K S H"],
  layer: Any,
  start: Any,
  size: int,
) -> tuple[Float[Array, "B K R H"], Float[Array, "B K R H"]]:
  """A block of keys and of values.

  On CPU a product of bf16 blocks is one of fp32: without the barrier XLA makes
  all of the cache fp32, before the loop, and reads the blocks from that.
  """
  k, v, start = lax.optimization_barrier((k, v, start))
  return _cache_block(k, layer, start, size), _cache_block(
    v, layer, start, size
  )


def _at(layer: Any, start: Any) -> tuple[Array, ...]:
  return tuple(jnp.asarray(n, jnp.int32) for n in (layer, 0, 0, start, 0))


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
    blocks: Block sizes; a block table brings its own.

  Returns:
    The output in q's dtype, and the log-sum-exp of the scores in at least
    fp32: 0 and -inf for a query that sees nothing. Memory beyond these is one
    score block for all heads, whatever the lengths.
  """
  if mask.block_table is not None:
    return sparse_forward(
      q, k, v, mask, layer=layer, scale=scale, softcap=softcap
    )
  B, K, G, T, H = q.shape
  S = k.shape[3]
  blocks = blocks or look_up(tables.XLA, H, BlockSizes())
  grid = Grid(T, S, min(blocks.q, T), min(blocks.kv, S))
  wide = jnp.promote_types(q.dtype, jnp.float32)
  lists = _Lists.of(mask, grid)
  visible = Visible.of(mask, T, S)

  def attend_block(i: Any, out: tuple[Array, Array]) -> tuple[Array, Array]:
    q_i = lax.dynamic_slice_in_dim(q, grid.q_start(i), grid.bq, 3)

    def step(j: Any, masked: bool, carry: SoftmaxCarry) -> SoftmaxCarry:
      k_j, v_j = _read_cache(k, v, layer, grid.kv_start(j), grid.bk)
      seen = visible.block(grid, i, j)[:, None, None] if masked else None
      return softmax_step(carry, q_i, k_j, v_j, seen, scale, softcap)

    start = vary_like(softmax_start(q_i), q, k, v, mask, layer)
    o_i, lse_i = softmax_end(lists.walk(i, step, start), q.dtype)
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
    blocks: Block sizes; a block table brings its own.

  Returns:
    dq in q's dtype, and dk and dv with this gradient added, in place where
    the caller's buffers are not used again.
  """
  T, S = q.shape[3], k.shape[3]
  wide = jnp.promote_types(q.dtype, jnp.float32)
  delta = jnp.sum(do.astype(wide) * o.astype(wide), axis=-1)
  if dlse is not None:
    delta = delta - dlse
  # exp(s - lse) of a query that sees nothing: exp(-inf - 1e30) = 0.
  lse = jnp.where(jnp.isfinite(lse), lse, -LOWEST)
  if mask.block_table is not None:
    options = {"dkv_start": dkv_start, "layer": layer}
    return sparse_backward(
      *(q, k, v, mask, lse, delta, do, dk, dv),
      scale=scale,
      softcap=softcap,
      **options,
    )
  blocks = blocks or look_up(tables.XLA, q.shape[4], BlockSizes())
  grid = Grid(T, S, min(blocks.q_bwd, T), min(blocks.kv_bwd, S))
  lists = _Lists.of(mask, grid, by_key=True)
  rows = lists.num_full + lists.num_part > 0
  kv_listed, kv_count = live_indices(rows[None])
  visible = Visible.of(mask, T, S)

  def kv_step(n: Any, carry: tuple[Array, Array, Array]) -> Any:
    j = kv_listed[0, n]
    k_j, v_j = _read_cache(k, v, layer, grid.kv_start(j), grid.bk)

    def q_step(i: Any, masked: bool, carry: tuple[Array, Array, Array]) -> Any:
      dq, dk_j, dv_j = carry
      at = grid.q_start(i)
      q_i, do_i, lse_i, delta_i = (
        lax.dynamic_slice_in_dim(of_query, at, grid.bq, 3)
        for of_query in (q, do, lse, delta)
      )
      seen = None
      if masked:
        seen = visible.block(grid, i, j, by_key=True)[:, None, :, None]
      dq_i, dk_ij, dv_ij = pair_gradient(
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
    dq, dk_j, dv_j = lists.walk(j, q_step, start)
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


def _add_block(
  buffer: Float[Array, "L B K R H"],
  block: Float[Array, "B K Q H"],
  layer: Any,
  start: Any,
) -> Float[Array, "L B K R H"]:
  old = _cache_block(buffer, layer, start, block.shape[2])
  new = (old + block.astype(buffer.dtype))[None]
  return lax.dynamic_update_slice(buffer, new, _at(layer, start))
