"""Which keys each query sees: one description that every backend honours."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int

# A scalar or an array, known now or inside a program.
_Index = int | np.integer | Array


class _Constructor:
  """A static method that refuses to be called on an instance.

  `mask.window(8)` would forget what `mask` already holds.
  """

  def __init__(self, function: Callable[..., "AttentionMask"]):
    # Undecorated, so that it can be traced like any function.
    self.function = getattr(function, "__func__", function)
    self.__doc__ = function.__doc__

  def __get__(self, instance: Any, owner: Any) -> Any:
    if instance is not None:
      name = self.function.__name__
      raise TypeError(
        f"AttentionMask.{name} starts a new mask; combine masks with &: "
        f"mask & AttentionMask.{name}(...)"
      )
    return self.function


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class AttentionMask:
  """A conjunction of conditions on the pair (query t, key s).

  With `p = q_offset + t` the position of query t in the order of the keys:

  - `is_causal`: s <= p
  - `window_size`: |p - s| < window_size, or s is one of the first `num_sinks`
    keys of its segment
  - segments: `q_segment_ids[b,t] == kv_segment_ids[b,s] > 0`
  - `kv_length`: s < kv_length
  - `block_table`: `s // kv_block` is in `block_table[b, k, t // q_block]`, for
    key head k

  Build masks from the constructors and combine them with `&`:

      AttentionMask.causal(offset) & AttentionMask.segments(q_ids, kv_ids)

  Attributes:
    is_causal: A query sees itself and what came before.
    window_size: Number of keys up to and including the query's own (with
      `is_causal`), or `None`.
    q_offset: Position of query 0 in the order of the keys; may be traced.
    q_segment_ids: `[B,T]` int; 0 (or less) is padding, which sees nothing.
    kv_segment_ids: `[B,S]` int.
    kv_length: How many keys are valid; may be traced. `None` is all of them.
    num_sinks: How many first keys of a segment a window never hides.
    block_table: `[B,K,I,M]` int: for each key head and block of queries the
      blocks of keys that it may see, in any order; -1 is none.
    q_block: Queries per block of the table.
    kv_block: Keys per block of the table.
  """

  is_causal: bool = dataclasses.field(default=False, metadata={"static": True})
  window_size: int | None = dataclasses.field(
    default=None, metadata={"static": True}
  )
  q_offset: _Index | None = None
  q_segment_ids: Int[Array, "B T"] | None = None
  kv_segment_ids: Int[Array, "B S"] | None = None
  kv_length: _Index | None = None
  num_sinks: int = dataclasses.field(default=0, metadata={"static": True})
  block_table: Int[Array, "B K I M"] | None = None
  q_block: int = dataclasses.field(default=0, metadata={"static": True})
  kv_block: int = dataclasses.field(default=0, metadata={"static": True})

  @_Constructor
  @staticmethod
  def causal(q_offset: _Index | None = None) -> "AttentionMask":
    """Query t sees keys up to position `q_offset + t` (offset 0 if `None`).

    Args:
      q_offset: The position of the first query in the order of the keys: the
        length of the prefix when the queries are a chunk of a longer
        sequence. An integer or an integer scalar array.

    Returns:
      The mask.
    """
    return AttentionMask(is_causal=True, q_offset=q_offset)

  @_Constructor
  @staticmethod
  def window(size: int, *, sinks: int = 0) -> "AttentionMask":
    """Keys nearer than `size`: |q - k| < size. With `causal`, the last `size`.

    Args:
      size: A positive Python integer.
      sinks: How many keys at the start of a segment stay visible outside the
        window (StreamingLLM, arXiv 2309.17453). A segment is a stretch of
        keys with the same id; without segments, all keys.

    Returns:
      The mask.

    Raises:
      ValueError: `size` is not positive or `sinks` negative.
    """
    if size < 1:
      raise ValueError(f"window size must be at least 1, got {size}")
    if sinks < 0:
      raise ValueError(f"sinks must be 0 or more, got {sinks}")
    return AttentionMask(window_size=int(size), num_sinks=int(sinks))

  @_Constructor
  @staticmethod
  def blocks(
    table: Int[Array, "B K I M"], *, q_block: int, kv_block: int
  ) -> "AttentionMask":
    """Only the listed blocks of keys, chosen by key head and query block.

    Args:
      table: `[B,K,I,M]` integers: queries `[i * q_block, (i + 1) * q_block)`
        of the group of key head k see the blocks `table[b,k,i]` of `kv_block`
        keys. Any order, twice is once; -1 is none.
      q_block: Queries per block; divides the number of queries.
      kv_block: Keys per block; divides the number of keys.

    Returns:
      The mask.

    Raises:
      ValueError: The table is not four-dimensional or a size not positive.
    """
    table = jnp.asarray(table)
    if table.ndim != 4 or not jnp.issubdtype(table.dtype, jnp.integer):
      raise ValueError(
        "the block table must be integers [batch, key heads, query blocks, "
        f"entries], got {table.dtype} of shape {table.shape}"
      )
    for name, size in (("q_block", q_block), ("kv_block", kv_block)):
      if size < 1:
        raise ValueError(f"{name} must be at least 1, got {size}")
    return AttentionMask(
      block_table=table.astype(jnp.int32),
      q_block=int(q_block),
      kv_block=int(kv_block),
    )

  @_Constructor
  @staticmethod
  def segments(
    q: Int[Array, "B T"], kv: Int[Array, "B S"] | None = None
  ) -> "AttentionMask":
    """Queries see only keys of their own segment; segment 0 is padding.

    Args:
      q: Segment ids of the queries, `[B,T]`.
      kv: Segment ids of the keys, `[B,S]`; by default those of the queries.

    Returns:
      The mask.

    Raises:
      ValueError: The ids are not two-dimensional.
    """
    # Signed, for the comparisons with 0 and -1.
    q = jnp.asarray(q).astype(jnp.int32)
    kv = q if kv is None else jnp.asarray(kv).astype(jnp.int32)
    for name, ids in (("q", q), ("kv", kv)):
      if jnp.ndim(ids) != 2:
        raise ValueError(
          f"{name} segment ids must be [batch, length], got shape "
          f"{jnp.shape(ids)}"
        )
    return AttentionMask(q_segment_ids=q, kv_segment_ids=kv)

  @_Constructor
  @staticmethod
  def valid_keys(length: _Index) -> "AttentionMask":
    """Only the first `length` keys are there; an integer or scalar array."""
    return AttentionMask(kv_length=length)

  def __and__(self, other: "AttentionMask") -> "AttentionMask":
    """Both conditions hold.

    Raises:
      ValueError: Both masks set the same array, or windows with sinks.
    """
    values: dict[str, Any] = {}
    for name in _ARRAYS:
      mine, its = getattr(self, name), getattr(other, name)
      if mine is not None and its is not None and mine is not its:
        raise ValueError(f"both masks set {name}; set it in one of them")
      values[name] = its if mine is None else mine
    windows = {(m.window_size, m.num_sinks) for m in (self, other)}
    windows.discard((None, 0))
    if len(windows) > 1 and any(sinks for _, sinks in windows):
      raise ValueError(
        "both masks set a window, one of them with sinks; set it in one"
      )
    window_size, num_sinks = min(windows, default=(None, 0))
    return AttentionMask(
      is_causal=self.is_causal or other.is_causal,
      window_size=window_size,
      num_sinks=num_sinks,
      q_block=self.q_block or other.q_block,
      kv_block=self.kv_block or other.kv_block,
      **values,
    )

  @property
  def offset(self) -> _Index:
    """`q_offset`, or 0."""
    return 0 if self.q_offset is None else self.q_offset

  def sinks(self, s: int) -> Bool[Array, "#B S"]:
    """Which keys are among the first `num_sinks` of their segment."""
    place = jnp.arange(s, dtype=jnp.int32)[None]
    if self.kv_segment_ids is not None:
      ids = self.kv_segment_ids
      new = jnp.diff(ids, axis=1, prepend=ids[:, :1] - 1) != 0
      starts = jnp.where(new, place, 0)
      place = place - lax.cummax(starts, axis=1)
    return place < self.num_sinks

  def table_blocks(self, s: int) -> Bool[Array, "B K I J"]:
    """The block table as booleans over blocks of `s` keys."""
    if self.block_table is None:
      raise ValueError("the mask has no block table")
    blocks = s // self.kv_block
    table = self.block_table.reshape(-1, self.block_table.shape[3])
    # Entries outside the keys select nothing; a negative index would wrap.
    table = jnp.where(table < 0, blocks, table)
    rows = jnp.arange(len(table))[:, None]
    chosen = jnp.zeros((len(table), blocks), bool)
    chosen = chosen.at[rows, table].set(True, mode="drop")
    return chosen.reshape(*self.block_table.shape[:3], blocks)

  def dense(self, t: int, s: int) -> Bool[Array, "#B #K T S"]:
    """The mask as booleans, for the reference and for tests."""
    p = self.offset + jnp.arange(t)[None, :, None]
    k = jnp.arange(s)[None, None]
    seen = jnp.ones((1, t, s), bool)
    if self.is_causal:
      seen &= k <= p
    if self.window_size is not None:
      seen &= (jnp.abs(p - k) < self.window_size) | self.sinks(s)[:, None]
    if self.kv_length is not None:
      seen &= k < self.kv_length
    if self.q_segment_ids is not None and self.kv_segment_ids is not None:
      q, kv = self.q_segment_ids[:, :, None], self.kv_segment_ids[:, None]
      seen = seen & (q == kv) & (q > 0)
    seen = seen[:, None]
    if self.block_table is not None:
      chosen = jnp.repeat(self.table_blocks(s), self.q_block, axis=2)
      seen = seen & jnp.repeat(chosen, self.kv_block, axis=3)
    return seen


_ARRAYS = (
  "q_offset",
  "q_segment_ids",
  "kv_segment_ids",
  "kv_length",
  "block_table",
)
