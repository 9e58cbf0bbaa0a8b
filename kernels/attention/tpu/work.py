"""What the TPU kernels are given: block sizes, limits, lists of pairs."""

import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxchunk.kernels.attention import tables
from jaxchunk.kernels.attention.block_sizes import TpuBlocks, look_up
from jaxchunk.kernels.attention.blocks import Grid, full_blocks, live_blocks
from jaxchunk.kernels.attention.mask import AttentionMask

LANES = 128
_HEAD_DIMS = (64, 80, 96, 128, 256)
# Bytes of the query heads of a key head for one token: blocks of 128 queries
# of all of them, several times, must fit vector memory.
_MAX_TOKEN = 8192
# Of the 1 MB of scalar memory, what the list of pairs may take.
_MAX_WORDS = 192 * 1024
# A word of the list: row of blocks, column, and these bits.
FIRST, LAST, LIVE, FULL = 1, 2, 4, 8
COLUMN, ROW = 4, 17
MAX_BLOCKS = 1 << (ROW - COLUMN)
LOG2_E = math.log2(math.e)


# Queries times their heads in a block; more only makes programs longer.
_ROWS = 2048


def choose_blocks(
  q: Float[Array, "B K G T H"],
  k: Float[Array, "L B K S H"],
  mask: AttentionMask,
  *,
  blocks: TpuBlocks | None = None,
  dk: Float[Array, "L B K R H"] | None = None,
  dkv_multiple: int = 0,
) -> TpuBlocks:
  """The blocks that `tpu_forward` and `tpu_backward` use.

  Args:
    q: Queries, like the others an array or a shape and dtype.
    k: Keys of every layer.
    mask: Its block table, if any, must be a multiple of the blocks.
    blocks: Upper bounds; by default from a table, for the device that the
      program is made for.
    dk: Accumulator of the backward pass, if it holds a part of the keys.
    dkv_multiple: What blocks of keys divide in the backward pass besides.

  Returns:
    Sizes that divide the lengths, of whole lanes where the lengths are.
  """
  G, T, H = q.shape[2:]
  if blocks is None:
    width = -(-H // LANES) * LANES
    blocks = look_up(tables.TPU, width, TpuBlocks())
    # Products of fp32 take several of bf16, and their blocks more memory.
    narrow = q.dtype.itemsize // 2
    most = max(_ROWS // narrow // G, LANES)
    blocks = TpuBlocks(
      min(blocks.q, most),
      blocks.kv // narrow,
      min(blocks.q_bwd, most),
      blocks.kv_bwd // narrow,
    )
  S = k.shape[3]
  if mask.block_table is not None:
    T, S = math.gcd(T, mask.q_block), math.gcd(S, mask.kv_block)
  rows = S if dk is None else math.gcd(S, dk.shape[3])
  return TpuBlocks(
    _divisor(T, blocks.q),
    _divisor(S, blocks.kv),
    _divisor(T, blocks.q_bwd),
    _divisor(math.gcd(rows, dkv_multiple), blocks.kv_bwd),
  )


def _divisor(length: int, most: int) -> int:
  """The largest divisor up to `most`, of whole lanes if there is one."""
  sizes = (n for n in range(1, min(most, length) + 1) if length % n == 0)
  return max(sizes, key=lambda n: (n % LANES == 0, n))


def unsupported(
  q: Float[Array, "B K G T H"],
  k: Float[Array, "L B K S H"],
  mask: AttentionMask,
  *,
  blocks: TpuBlocks | None = None,
  dk: Float[Array, "L B K R H"] | None = None,
  dkv_start: Any = 0,
  dkv_multiple: int = 0,
) -> str | None:
  """Why these kernels cannot serve the arguments; `None` if they can.

  Args:
    q: Queries, like the others an array or a shape and dtype.
    k: Keys of every layer.
    mask: Which keys each query sees.
    blocks: As `tpu_forward`.
    dk: Accumulator of the backward pass, if it will be run.
    dkv_start: The key at row 0 of `dk`. A traced one is not looked at, and
      must be a multiple of the block of keys.
    dkv_multiple: As `tpu_backward`.

  Returns:
    The reason, as the end of a sentence.
  """
  if q.dtype not in (jnp.float32, jnp.bfloat16):
    return f"the dtype is {q.dtype}, not float32 or bfloat16"
  G, T, H = q.shape[2:]
  S = k.shape[3]
  if H not in _HEAD_DIMS:
    return f"the head width H={H} is none of {_HEAD_DIMS}"
  if G * H * q.dtype.itemsize > _MAX_TOKEN:
    return (
      f"G={G} query heads of H={H} for a key head are too many: "
      f"{G * H * q.dtype.itemsize} bytes a token, at most {_MAX_TOKEN}"
    )
  lengths = {"T": T, "S": S}
  if mask.block_table is not None:
    lengths |= {"q_block": mask.q_block, "kv_block": mask.kv_block}
  if dk is not None:
    lengths["the rows of dk"] = dk.shape[3]
  lengths["dkv_multiple"] = dkv_multiple
  for name, length in lengths.items():
    if length % LANES:
      return f"{name}={length} is not a multiple of {LANES}"
  sizes = choose_blocks(
    q, k, mask, blocks=blocks, dk=dk, dkv_multiple=dkv_multiple
  )
  for bq, bk in ((sizes.q, sizes.kv), (sizes.q_bwd, sizes.kv_bwd)):
    grid = Grid(T, S, bq, bk)
    lists = 1 if mask.block_table is None else _lists(mask, q)
    words = lists * _max_words(mask, grid)
    if max(grid.num_q(), grid.num_kv()) > MAX_BLOCKS or words > _MAX_WORDS:
      return (
        f"T={T} and S={S} are up to {words} pairs of blocks of {bq} and {bk}, "
        f"more than the {_MAX_WORDS} that fit the scalar memory"
      )
  if isinstance(dkv_start, int) and dkv_start % sizes.kv_bwd:
    return f"dkv_start={dkv_start} is not a multiple of kv_bwd={sizes.kv_bwd}"
  return None


def _max_words(mask: AttentionMask, grid: Grid) -> int:
  """An upper bound on the pairs of blocks that are visited."""
  most = grid.num_kv()
  if mask.window_size is not None and not mask.num_sinks:
    reach = mask.window_size * (1 if mask.is_causal else 2)
    most = min(most, (grid.bq + reach - 2) // grid.bk + 2)
  if mask.block_table is not None:
    most = min(most, mask.block_table.shape[3] * (mask.kv_block // grid.bk))
  per_row = [max(most, 1)] * grid.num_q()
  if mask.is_causal and isinstance(mask.offset, int):
    ends = (mask.offset + (i + 1) * grid.bq for i in range(len(per_row)))
    per_row = [max(1, min(most, -(-end // grid.bk))) for end in ends]
  return sum(per_row)


def _lists(mask: AttentionMask, q: Array) -> int:
  """How many lists there may be: for all heads, by sequence, by key head."""
  if mask.block_table is not None:
    return q.shape[0] * q.shape[1]
  return 1 if mask.q_segment_ids is None else q.shape[0]


class Work(NamedTuple):
  """The pairs of blocks that are visited, in order, as prefetched scalars.

  Attributes:
    words: One list behind the other, padded; a word is a row of blocks, a
      column, and flags.
    steps: Of the longest list; a value, not a shape.
    share: Key heads per list.
  """

  words: Int[Array, " N"]
  steps: Int[Array, ""]
  share: int

  @classmethod
  def of(
    cls,
    q: Float[Array, "B K G T H"],
    mask: AttentionMask,
    grid: Grid,
    *,
    by_key: bool = False,
    fallback: Any = 0,
  ) -> "Work":
    """Rows are blocks of queries, or `by_key` blocks of keys.

    A row of queries without a live pair has one entry that is not live, which
    writes its zeros. By key there is such an entry only in a list without any
    live pair, at row `fallback`.
    """
    X = q.shape[0] * q.shape[1]
    length = _max_words(mask, grid)
    live = live_blocks(mask, grid)
    full = full_blocks(mask, grid)
    if mask.block_table is not None:
      chosen = mask.table_blocks(grid.S)
      chosen = jnp.repeat(chosen, mask.q_block // grid.bq, axis=2)
      chosen = jnp.repeat(chosen, mask.kv_block // grid.bk, axis=3)
      live = (live[:, None] & chosen).reshape(X, *live.shape[1:])
      full = jnp.repeat(full, X // full.shape[0], axis=0)
    elif length * _lists(mask, q) > _MAX_WORDS:
      # One list for the whole batch: what any sequence needs.
      live, full = live.any(0, keepdims=True), full.all(0, keepdims=True)
    full = jnp.broadcast_to(full, live.shape)
    if by_key:
      live, full = live.swapaxes(1, 2), full.swapaxes(1, 2)
      empty = ~live.any((1, 2))[:, None]
      empty = empty & (jnp.arange(live.shape[1])[None] == fallback)
    else:
      empty = ~live.any(2)
    words, count = _sorted_words(live, full, empty, length)
    return cls(words.reshape(-1), jnp.max(count), X // len(live))


def _sorted_words(
  live: Bool[Array, "P I J"],
  full: Bool[Array, "P I J"],
  empty: Bool[Array, "P I"],
  length: int,
) -> tuple[Int[Array, "P N"], Int[Array, " P"]]:
  """Words of the live pairs and of empty rows, in order; how many they are.

  What follows them repeats the last pair without its flags, so that nothing
  is fetched and nothing done.
  """
  rows, columns = live.shape[1:]
  column = jnp.arange(columns, dtype=jnp.int32)
  keep = live | (empty[:, :, None] & (column == 0)[None, None])
  number = jnp.cumsum(keep, axis=2, dtype=jnp.int32)
  words = (jnp.arange(rows, dtype=jnp.int32) << ROW)[None, :, None]
  words = words | (column << COLUMN)[None, None]
  for bit, flag in (
    (FIRST, number == 1),
    (LAST, number == number[:, :, -1:]),
    (LIVE, live),
    (FULL, live & full),
  ):
    words = words | jnp.where(flag, jnp.int32(bit), 0)
  words = jnp.where(keep, words, jnp.iinfo(jnp.int32).max)
  # A sort of few words is cheaper than a scatter; rows are the high bits.
  words = jnp.sort(words.reshape(len(live), -1), axis=1)[:, :length]
  words = jnp.pad(words, ((0, 0), (0, length - words.shape[1])))
  count = jnp.sum(keep, axis=(1, 2), dtype=jnp.int32)
  end = jnp.take_along_axis(words, count[:, None] - 1, axis=1)
  inside = jnp.arange(length)[None] < count[:, None]
  return jnp.where(inside, words, end >> COLUMN << COLUMN), count
