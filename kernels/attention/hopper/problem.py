"""What a GPU kernel is given: the problem, its arrays, and lists of blocks."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxchunk.kernels.attention import tables
from jaxchunk.kernels.attention.block_sizes import GpuBlocks, look_up
from jaxchunk.kernels.attention.blocks import (
  Grid,
  full_blocks,
  live_blocks,
  live_indices,
)
from jaxchunk.kernels.attention.mask import AttentionMask

# Rows of a warpgroup, which wgmma fixes, and warpgroups that multiply.
ROWS = 64
WORKERS = 2
KEYS = ROWS * WORKERS  # of a program for dk and dv
# Registers of a thread: 2 * 240 + 24 = 3 * 168, what a program starts with.
WORK_REGISTERS, FETCH_REGISTERS = 240, 24
LOG2E, LN2 = math.log2(math.e), math.log(2)

# A Ref inside a kernel: Pallas publishes no type for it.
Ref = Any


def choose_blocks(
  H: int, mask: AttentionMask, S: int, blocks: GpuBlocks | None = None
) -> GpuBlocks:
  """Block sizes for a head width, fitted to the mask's table and S."""
  return (blocks or look_up(tables.GPU, H, GpuBlocks())).fit(mask, S)


def unsupported(
  q: Any,
  k: Any,
  mask: AttentionMask,
  *,
  scale: float = 1.0,
  blocks: GpuBlocks | None = None,
) -> str | None:
  """Why this backend cannot serve these inputs, or `None` if it can.

  Args:
    q: Queries `[B,K,G,T,H]`; only shape and dtype are looked at.
    k: Keys `[L,B,K,S,H]`, likewise.
    mask: Which keys each query sees.
    scale: Factor on the scores.
    blocks: Block sizes; by default those of the table.

  Returns:
    A phrase that names what does not fit and its value.
  """
  G, T, H = q.shape[2:]
  S = k.shape[3]
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"q has dtype {q.dtype}, not bfloat16 or float16"
  widths = sorted({width for _, width in tables.GPU})
  if H not in widths:
    return f"the head width is {H}, not one of {widths}"
  if not scale > 0:
    return f"the scale is {scale}, not positive"
  blocks = choose_blocks(H, mask, S, blocks)
  bq = math.lcm(query_block(G), blocks.q_dkv)
  if T % bq:
    return f"there are T={T} queries, not a multiple of {bq}"
  if S % KEYS:
    return f"there are S={S} keys, not a multiple of {KEYS}"
  for name, size in (("q_block", mask.q_block), ("kv_block", mask.kv_block)):
    if mask.block_table is not None and size % ROWS:
      return f"the block table has {name}={size}, not a multiple of {ROWS}"
  return None


def query_block(G: int) -> int:
  """Queries of a program, forward and for dq."""
  return ROWS if G % WORKERS == 0 else ROWS * WORKERS


class Problem(NamedTuple):
  """What is known when a kernel is traced."""

  B: int
  K: int
  G: int
  T: int
  S: int
  H: int
  dtype: Any
  scale: float
  softcap: float | None
  is_causal: bool
  window: int | None
  sinks: int
  has_length: bool
  has_ids: bool
  q_block: int  # of the block table, or 0
  kv_block: int
  lists: int  # 1 for all, B, or B * K
  interpret: Any

  @classmethod
  def of(
    cls,
    q: Array,
    k: Array,
    mask: AttentionMask,
    scale: float,
    softcap: float | None,
    interpret: Any,
  ) -> "Problem":
    """From what the caller gives; raises where it does not fit."""
    reason = unsupported(q, k, mask, scale=scale)
    if reason is not None:
      raise NotImplementedError(
        f"the GPU kernel cannot serve this attention: {reason}; "
        "implementation='xla' can"
      )
    B, K, G, T, H = q.shape
    ids = mask.q_segment_ids
    per_batch = 1 if ids is None else ids.shape[0]
    return cls(
      *(B, K, G, T, k.shape[3], H, q.dtype, scale, softcap),
      is_causal=mask.is_causal,
      window=mask.window_size,
      sinks=mask.num_sinks,
      has_length=mask.kv_length is not None,
      has_ids=ids is not None,
      q_block=0 if mask.block_table is None else mask.q_block,
      kv_block=mask.kv_block,
      lists=per_batch if mask.block_table is None else B * K,
      interpret=interpret,
    )

  @property
  def factor(self) -> float:
    """From products, or capped products, to exponents of 2."""
    return LOG2E * (self.scale if self.softcap is None else self.softcap)

  def list_row(self, head: Any) -> Any:
    """Where the lists of key head `head` of B * K are."""
    return lax.div(head, self.B * self.K // self.lists)


class Lists(NamedTuple):
  """The other side's blocks, for each block of one side.

  Attributes:
    full: `[lists,I,J]` blocks in which everything is visible.
    part: `[lists,I,J]` blocks in which something is.
    counts: `[lists,I,2]` how many of each.
  """

  full: Any
  part: Any
  counts: Any

  def total(self, row: Any, i: Any) -> Any:
    """How many blocks there are for block i."""
    return self.counts[row, i, 0] + self.counts[row, i, 1]

  def walk(
    self,
    row: Any,
    i: Any,
    visit: Callable[..., Any],
    carry: Any = None,
    *,
    repeat: int = 1,
  ) -> Any:
    """`carry = visit(n, g, block, masked, carry)` for each block, in order.

    Args:
      row: Which lists.
      i: Which block of the side that the lists are of.
      visit: Called with the number of the step, of the repetition, the block,
        whether a mask is needed, and the carry.
      carry: What goes through.
      repeat: How often each block is visited.

    Returns:
      The last carry.
    """
    n_full = self.counts[row, i, 0] * repeat
    n_part = self.counts[row, i, 1] * repeat

    def full(n: Any, carry: Any) -> Any:
      block = self.full[row, i, lax.div(n, repeat)]
      return visit(n, lax.rem(n, repeat), block, False, carry)

    def part(n: Any, carry: Any) -> Any:
      block = self.part[row, i, lax.div(n, repeat)]
      return visit(n_full + n, lax.rem(n, repeat), block, True, carry)

    carry = lax.fori_loop(0, n_full, full, carry)
    return lax.fori_loop(0, n_part, part, carry)


class Inputs(NamedTuple):
  """What every kernel reads, with X = B * K * G heads of queries.

  Attributes:
    q: `[X,T,H]`.
    k: `[LBK,S,H]`.
    v: `[LBK,S,H]`.
    do: `[X,T,H]`, backward.
    lse: `[X,T]` to base 2; 1e30 where nothing is seen. Backward.
    delta: `[X,T]`, backward.
    numbers: Layer, position of query 0, number of keys, key at row 0 of dk.
    q_ids: `[B,T]` segment ids; -1 is padding.
    k_ids: `[B,S]` twice the segment ids, and 1 more for a sink.
    table: `[BK,I,J]` the block table as 0 and 1.
    lists: Which blocks meet.
  """

  q: Any
  k: Any
  v: Any
  do: Any
  lse: Any
  delta: Any
  numbers: Any
  q_ids: Any
  k_ids: Any
  table: Any
  lists: Any


def make_inputs(
  q: Array,
  k: Array,
  v: Array,
  mask: AttentionMask,
  layer: Any,
  first: Any = 0,
) -> Inputs:
  """All but what only the backward pass has, and the lists."""
  *_, T, H = q.shape
  S = k.shape[3]
  length = S if mask.kv_length is None else mask.kv_length
  numbers = (layer, mask.offset, length, first)
  q_ids, k_ids, table = mask.q_segment_ids, mask.kv_segment_ids, None
  if q_ids is not None and k_ids is not None:
    # No key then has id -1: a padding query sees nothing.
    q_ids, k_ids = jnp.where(q_ids > 0, q_ids, -1), 2 * jnp.maximum(k_ids, 0)
    if mask.num_sinks:
      k_ids = k_ids + mask.sinks(S)
  if mask.block_table is not None:
    table = mask.table_blocks(S).astype(jnp.int32)
    table = table.reshape(-1, *table.shape[2:])
  return Inputs(
    q=q.reshape(-1, T, H),
    k=k.reshape(-1, S, H),
    v=v.reshape(-1, S, H),
    do=None,
    lse=None,
    delta=None,
    numbers=jnp.stack([jnp.asarray(n, jnp.int32) for n in numbers]),
    q_ids=q_ids,
    k_ids=k_ids,
    table=table,
    lists=None,
  )


def make_lists(
  mask: AttentionMask, grid: Grid, *, by_key: bool = False
) -> Lists:
  """Lists of keys by queries, or of queries `by_key`."""
  live = live_blocks(mask, grid)[:, None]
  full = full_blocks(mask, grid)[:, None]
  if mask.block_table is not None:
    chosen = mask.table_blocks(grid.S)
    # By ROWS, which divides the table's blocks; then by those of the grid.
    for axis, size, wanted in (
      (2, mask.q_block, grid.bq),
      (3, mask.kv_block, grid.bk),
    ):
      chosen = jnp.repeat(chosen, size // math.gcd(size, wanted), axis=axis)
    *lead, rows, columns = chosen.shape
    num_q, num_kv = grid.num_q(), grid.num_kv()
    parts = (num_q, rows // num_q, num_kv, columns // num_kv)
    chosen = chosen.reshape(*lead, *parts)
    live = live & chosen.any((3, 5))
    full = full & chosen.all((3, 5))
  full = live & full
  kinds = [full, jnp.broadcast_to(live, full.shape) & ~full]
  if by_key:
    kinds = [a.swapaxes(2, 3) for a in kinds]
  *_, rows, columns = kinds[0].shape
  listed, count = zip(
    *(live_indices(a.reshape(-1, columns)) for a in kinds), strict=True
  )
  full, part = (a.reshape(-1, rows, columns) for a in listed)
  return Lists(full, part, jnp.stack(count, axis=-1).reshape(-1, rows, 2))
