"""Which blocks of queries and keys meet, and which tokens inside them.

What the backends share of `AttentionMask`: from the mask to lists of pairs of
blocks that have work in them, and to the mask inside such a pair.
"""

import functools
import operator
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int, Shaped

from jaxchunk.kernels.attention.mask import AttentionMask
from jaxchunk.kernels.vma import vary_like


class Grid(NamedTuple):
  """A cut of T queries and S keys into blocks of bq and bk.

  The last block starts at `length - size`, so that every block is whole; what
  it shares with the one before is masked there.
  """

  T: int
  S: int
  bq: int
  bk: int

  def num_q(self) -> int:
    """Blocks of queries."""
    return -(-self.T // self.bq)

  def num_kv(self) -> int:
    """Blocks of keys."""
    return -(-self.S // self.bk)

  def q_start(self, i: Any) -> Any:
    """First query of block i."""
    return jnp.minimum(i * self.bq, self.T - self.bq)

  def kv_start(self, j: Any) -> Any:
    """First key of block j."""
    return jnp.minimum(j * self.bk, self.S - self.bk)


def live_blocks(mask: AttentionMask, grid: Grid) -> Bool[Array, "#B I J"]:
  """Which pairs of blocks have a visible pair of tokens, or may have one.

  Exact for causal, window and length together; for segments a pair is live
  where the ranges of ids of the two blocks meet, which is exact under a causal
  mask where the queries' ids are a stretch of the keys' sorted ids. A block
  table is not looked at.
  """
  i = jnp.arange(grid.num_q())[None, :, None]
  j = jnp.arange(grid.num_kv())[None, None]
  p_first = mask.offset + i * grid.bq
  p_last = mask.offset + jnp.minimum((i + 1) * grid.bq, grid.T) - 1
  k_first = j * grid.bk
  k_last = jnp.minimum((j + 1) * grid.bk, grid.S) - 1
  if mask.kv_length is not None:
    k_last = jnp.minimum(k_last, mask.kv_length - 1)
  live = jnp.ones((1, grid.num_q(), grid.num_kv()), bool)
  if mask.window_size is not None:
    near = p_first - k_last < mask.window_size
    near &= k_first - p_last < mask.window_size
    if mask.num_sinks:
      sinks = _pad_to_blocks(mask.sinks(grid.S), grid.bk)
      near = near | sinks.any(-1)[:, None]
    live = live & near
  if mask.is_causal:
    live &= k_first <= p_last
  if mask.kv_length is not None:
    live &= k_first < mask.kv_length
  if mask.q_segment_ids is not None and mask.kv_segment_ids is not None:
    q_min, q_max = _id_range(mask.q_segment_ids, grid.bq)
    k_min, k_max = _id_range(mask.kv_segment_ids, grid.bk)
    live = live & (q_min[:, :, None] <= k_max[:, None])
    live &= k_min[:, None] <= q_max[:, :, None]
  return live


def full_blocks(mask: AttentionMask, grid: Grid) -> Bool[Array, "#B I J"]:
  """Which pairs of blocks have no hidden pair of tokens, and need no mask.

  A last block that shares tokens with the one before is not among them, since
  those are hidden in it. A block table is not looked at.
  """
  visible = Visible.of(mask, grid.T, grid.S)

  def ends(a: Array, size: int) -> tuple[Array, Array]:
    a = jnp.pad(a, ((0, 0), (0, -a.shape[1] % size)), mode="edge")
    a = a.reshape(len(a), -1, size)
    return a.min(2), a.max(2)

  i, j = jnp.arange(grid.num_q()), jnp.arange(grid.num_kv())
  k_first, k_last = j * grid.bk, (j + 1) * grid.bk - 1
  full = (i < grid.T // grid.bq)[:, None] & (k_last < grid.S)[None]
  full = full[None]
  if visible.near is not None:
    near = ends(visible.near, grid.bq)[1]
    full = full & (near[:, :, None] <= k_first[None, None])
  for upper in (visible.far, visible.last):
    if upper is not None:
      last = ends(upper, grid.bq)[0]
      full = full & (k_last[None, None] <= last[:, :, None])
  if visible.q_ids is not None and visible.k_ids is not None:
    q_min, q_max = (a[:, :, None] for a in ends(visible.q_ids, grid.bq))
    k_min, k_max = (a[:, None] for a in ends(visible.k_ids, grid.bk))
    # A padding query has id -1, which no key has.
    full = full & (q_min == k_min) & (q_max == k_max) & (q_min == q_max)
  return full


def _pad_to_blocks(a: Shaped[Array, "B T"], block: int) -> Array:
  B, T = a.shape
  return jnp.pad(a, ((0, 0), (0, -T % block))).reshape(B, -1, block)


def _id_range(
  ids: Int[Array, "B T"], block: int
) -> tuple[Int[Array, "B I"], Int[Array, "B I"]]:
  """Smallest and largest positive id per block; an empty range if none."""
  ids = _pad_to_blocks(ids, block)
  top = jnp.iinfo(ids.dtype).max
  return jnp.where(ids > 0, ids, top).min(-1), ids.max(-1)


def live_indices(
  live: Bool[Array, "I J"], *, first: Bool[Array, "I J"] | None = None
) -> tuple[Array, Array]:
  """For each row the columns that are set, in front; and how many they are.

  Of these, the ones that are set in `first` come first.
  """
  rows, columns = live.shape
  place = jnp.cumsum(live, axis=1, dtype=jnp.int32) - 1
  if first is not None:
    others = jnp.cumsum(live & ~first, axis=1, dtype=jnp.int32)
    before = jnp.sum(first, axis=1, dtype=jnp.int32, keepdims=True)
    # A column comes behind `place + 1 - others` of the first ones.
    place = jnp.where(first, place - others, before + others - 1)
  place = jnp.where(live, place, columns)
  column = jnp.broadcast_to(jnp.arange(columns, dtype=jnp.int32), live.shape)
  row = jnp.broadcast_to(jnp.arange(rows)[:, None], live.shape)
  listed = vary_like(jnp.zeros(live.shape, jnp.int32), live)
  listed = listed.at[row, place].set(column, mode="drop")
  return listed, jnp.sum(live, axis=1, dtype=jnp.int32)


class Visible(NamedTuple):
  """The mask by token, made once, before the loops over blocks.

  Inside them a few numbers per token are read, and nothing is computed per
  pair but comparisons. Fields are `[1|B, T]` of queries or `[1|B, S]` of keys.
  """

  near: Int[Array, "1 T"] | None  # first key in the window
  far: Int[Array, "1 T"] | None  # last key in the window
  last: Int[Array, "1 T"] | None  # last key of all
  q_ids: Int[Array, "B T"] | None
  k_ids: Int[Array, "B S"] | None
  sinks: Bool[Array, "#B S"] | None

  @classmethod
  def of(cls, mask: AttentionMask, T: int, S: int) -> "Visible":
    """From the mask over T queries and S keys; its block table apart."""
    p = (mask.offset + jnp.arange(T))[None]
    last = p if mask.is_causal else None
    near = far = sinks = None
    if mask.window_size is not None:
      near = p - mask.window_size + 1
      if not mask.is_causal:
        far = p + mask.window_size - 1
      if mask.num_sinks:
        sinks = mask.sinks(S)
    if mask.kv_length is not None:
      limit = jnp.full_like(p, mask.kv_length - 1)
      last = limit if last is None else jnp.minimum(last, limit)
    q_ids, k_ids = mask.q_segment_ids, mask.kv_segment_ids
    if q_ids is not None and k_ids is not None:
      # No key then has id -1: a padding query sees nothing.
      q_ids, k_ids = jnp.where(q_ids > 0, q_ids, -1), jnp.maximum(k_ids, 0)
    return cls(near, far, last, q_ids, k_ids, sinks)

  def pairs(
    self,
    s: Int[Array, "*shape"],
    of_query: Callable[[Array], Array],
    of_key: Callable[[Array], Array],
  ) -> Bool[Array, "*shape"] | None:
    """Which pairs of some queries and keys are visible; `None` is all.

    Args:
      s: Places of the keys.
      of_query: Takes the queries out of a field, in a shape for broadcasting.
      of_key: Takes the keys at `s` out of a field.
    """
    seen: list[Array] = []
    if self.near is not None:
      window = of_query(self.near) <= s
      if self.far is not None:
        window &= s <= of_query(self.far)
      if self.sinks is not None:
        window |= of_key(self.sinks)
      seen.append(window)
    if self.last is not None:
      seen.append(s <= of_query(self.last))
    if self.q_ids is not None and self.k_ids is not None:
      seen.append(of_query(self.q_ids) == of_key(self.k_ids))
    return functools.reduce(operator.and_, seen) if seen else None

  def block(
    self, grid: Grid, i: Any, j: Any, *, by_key: bool = False
  ) -> Bool[Array, "#B Q R"]:
    """Block pair (i, j).

    With `by_key` it is `[B,R,Q]`, made so and not transposed: a transpose
    would be done again for every head.
    """
    q0, k0 = grid.q_start(i), grid.kv_start(j)
    q_axis, k_axis = (1, 2) if by_key else (2, 1)

    def of_query(a: Array) -> Array:
      part = lax.dynamic_slice_in_dim(a, q0, grid.bq, 1)
      return jnp.expand_dims(part, q_axis)

    def of_key(a: Array) -> Array:
      part = lax.dynamic_slice_in_dim(a, k0, grid.bk, 1)
      return jnp.expand_dims(part, k_axis)

    t = jnp.expand_dims(q0 + jnp.arange(grid.bq)[None], q_axis)
    s = jnp.expand_dims(k0 + jnp.arange(grid.bk)[None], k_axis)
    seen = self.pairs(s, of_query, of_key)
    seen = jnp.ones((1, 1, 1), bool) if seen is None else seen
    # What the last block shares with the one before belongs to that one.
    if grid.T % grid.bq:
      seen &= t >= i * grid.bq
    if grid.S % grid.bk:
      seen &= s >= j * grid.bk
    shape = (grid.bk, grid.bq) if by_key else (grid.bq, grid.bk)
    return jnp.broadcast_to(seen, (seen.shape[0], *shape))
