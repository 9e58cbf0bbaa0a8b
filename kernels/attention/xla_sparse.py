"""Blockwise attention under a block table, in plain XLA.

A row is a key head and a block of queries (of keys in the backward pass) with
its list of blocks of the other side. Rows are sorted by the length of their
lists and go together in groups, so that a step is one product as large as a
dense one and nearly every entry in it is work; what a list does not name
costs nothing.

X = B * K key heads; a layer of a cache is at heads `layer * X` of all.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxchunk.kernels.attention.blocks import (
  Grid,
  Visible,
  full_blocks,
  live_blocks,
  live_indices,
)
from jaxchunk.kernels.attention.mask import AttentionMask
from jaxchunk.kernels.attention.softmax import (
  SoftmaxCarry,
  pair_gradient,
  softmax_end,
  softmax_start,
  softmax_step,
)
from jaxchunk.kernels.vma import vary_like

# Scores of a step, and least tokens of a list that a step takes; measured with
# benchmarks/attention.py.
_SCORES = 1 << 20
_TOKENS = 512


class _Work(NamedTuple):
  """Rows with their lists, sorted by length, and how they are walked.

  Attributes:
    grid: Blocks as the table has them.
    together: W, rows that go together.
    merged: R, blocks of a list that go together.
    head: `[rows]` key head of a row; X behind the last row.
    block: `[rows]` its block.
    listed: `[rows,M]` its list, -1 behind its end.
    length: `[rows]` how many entries that is, descending.
    full: `[rows]` how many of them, the first ones, need no mask.
    visible: The rest of the mask, in fields `[X,T]` and `[X,S]`.
  """

  grid: Grid
  together: int
  merged: int
  head: Int[Array, " rows"]
  block: Int[Array, " rows"]
  listed: Int[Array, "rows M"]
  length: Int[Array, " rows"]
  full: Int[Array, " rows"]
  visible: Visible

  @classmethod
  def of(
    cls,
    mask: AttentionMask,
    q: Float[Array, "B K G T H"],
    S: int,
    *,
    by_key: bool = False,
  ) -> "_Work":
    """From the mask: lists of keys by queries, or of queries `by_key`."""
    B, K, G, T, _ = q.shape
    grid = Grid(T, S, mask.q_block, mask.kv_block)
    live = mask.table_blocks(S) & live_blocks(mask, grid)[:, None]
    full = live & full_blocks(mask, grid)[:, None]
    if by_key:
      live, full = live.swapaxes(2, 3), full.swapaxes(2, 3)
    rows, blocks = live.shape[2:]
    size = grid.bq if by_key else grid.bk
    merged = max(1, min(_TOKENS // size, blocks))
    scores = G * grid.bq * grid.bk * merged
    together = max(1, min(_SCORES // scores, B * K * rows))
    full = full.reshape(-1, blocks)
    listed, count = live_indices(live.reshape(-1, blocks), first=full)
    listed = jnp.where(jnp.arange(blocks)[None] < count[:, None], listed, -1)
    order = jnp.argsort(-count, stable=True)
    pad = (0, -len(order) % together)
    filler = jnp.pad(order, pad, constant_values=B * K * rows)
    visible = jax.tree.map(
      lambda a: jnp.repeat(jnp.broadcast_to(a, (B, a.shape[1])), K, axis=0),
      Visible.of(mask, T, S),
    )
    return cls(
      grid,
      together,
      merged,
      filler // rows,
      filler % rows,
      jnp.pad(listed[order], (pad, (0, -blocks % merged)), constant_values=-1),
      jnp.pad(count[order], pad),
      jnp.pad(full.sum(1, dtype=jnp.int32)[order], pad),
      visible,
    )

  def groups(self) -> Any:
    """Groups of rows in which some list is not empty."""
    return -(-jnp.sum(self.length > 0) // self.together)

  def group(self, g: Any) -> tuple[Array, Array]:
    """Heads and blocks of the rows of group g."""
    at, size = g * self.together, self.together
    head, block = (
      lax.dynamic_slice_in_dim(a, at, size) for a in (self.head, self.block)
    )
    return head, block

  def walk(
    self, g: Any, visit: Callable[[Any, bool, Any], Any], carry: Any
  ) -> Any:
    """`carry = visit(n, masked, carry)` for each step n of group g."""
    at, size = g * self.together, self.together
    full = lax.dynamic_slice_in_dim(self.full, at, size).min() // self.merged
    steps = -(-self.length[at] // self.merged)
    carry = lax.fori_loop(0, full, lambda n, c: visit(n, False, c), carry)
    return lax.fori_loop(full, steps, lambda n, c: visit(n, True, c), carry)

  def rows_in(self, g: Any) -> Any:
    """How many rows of group g are rows: in the last some are filler."""
    left = jnp.sum(self.length > 0) - g * self.together
    return jnp.minimum(left, self.together)

  def step(self, g: Any, n: Any) -> Int[Array, "W R"]:
    """The n-th blocks of the lists of group g."""
    at = _at(g * self.together, n * self.merged)
    return lax.dynamic_slice(self.listed, at, (self.together, self.merged))

  def seen(
    self, x: Int[Array, " W"], i: Array, j: Array, *, by_key: bool
  ) -> Bool[Array, "W Q R"]:
    """The mask between blocks i of queries and j of keys, `[W,*]` both."""
    q_axis, k_axis = (1, 2) if by_key else (2, 1)
    bq, bk = self.grid.bq, self.grid.bk

    def tokens(a: Array, blocks: Array, size: int, axis: int) -> Array:
      part = _gather(a[:, None], x, blocks, size)[:, 0]
      return jnp.expand_dims(part, axis)

    s = (j[:, :, None] * bk + jnp.arange(bk)[None, None]).reshape(len(j), -1)
    s = jnp.expand_dims(s, k_axis)
    listed = jnp.expand_dims(jnp.repeat(i >= 0, bq, axis=1), q_axis) & (s >= 0)
    pairs = self.visible.pairs(
      s,
      lambda a: tokens(a, i, bq, q_axis),
      lambda a: tokens(a, j, bk, k_axis),
    )
    return listed if pairs is None else listed & pairs


def sparse_forward(
  q: Float[Array, "B K G T H"],
  k: Float[Array, "L B K S H"],
  v: Float[Array, "L B K S H"],
  mask: AttentionMask,
  *,
  layer: Any = 0,
  scale: float,
  softcap: float | None = None,
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K G T"]]:
  """`xla.flash_forward` for a mask with a block table."""
  work = _Work.of(mask, q, k.shape[3])
  grid = work.grid
  heads = q.reshape(-1, *q.shape[2:])
  caches = _cache(k), _cache(v)

  def attend_group(g: Any, out: tuple[Array, Array]) -> tuple[Array, Array]:
    x, i = work.group(g)
    q_i = _gather(heads, x, i[:, None], grid.bq)

    def step(n: Any, masked: bool, carry: SoftmaxCarry) -> SoftmaxCarry:
      j = work.step(g, n)
      k_j, v_j = (
        _gather_keys(a, layer * len(heads) + x, j, grid.bk) for a in caches
      )
      seen = None
      if masked:
        seen = work.seen(x, i[:, None], j, by_key=False)[:, None]
      return softmax_step(carry, q_i, k_j, v_j, seen, scale, softcap)

    start = vary_like(softmax_start(q_i), q, k, v, mask, layer)
    ends = softmax_end(work.walk(g, step, start), q.dtype)

    def put(w: Any, out: tuple[Array, Array]) -> tuple[Array, Array]:
      at = _at(x[w], 0, i[w] * grid.bq, 0)
      o, lse = (
        lax.dynamic_update_slice(a, end[w][None], at[: a.ndim])
        for a, end in zip(out, ends, strict=True)
      )
      return o, lse

    return lax.fori_loop(0, work.rows_in(g), put, out)

  wide = jnp.promote_types(q.dtype, jnp.float32)
  lse = jnp.full(heads.shape[:-1], -jnp.inf, wide)
  out = vary_like((jnp.zeros_like(heads), lse), q, k, v, mask, layer)
  o, lse = lax.fori_loop(0, work.groups(), attend_group, out)
  return o.reshape(q.shape), lse.reshape(q.shape[:-1])


def sparse_backward(
  q: Float[Array, "B K G T H"],
  k: Float[Array, "L B K S H"],
  v: Float[Array, "L B K S H"],
  mask: AttentionMask,
  lse: Float[Array, "B K G T"],
  delta: Float[Array, "B K G T"],
  do: Float[Array, "B K G T H"],
  dk: Float[Array, "L B K R H"],
  dv: Float[Array, "L B K R H"],
  *,
  dkv_start: Any = 0,
  layer: Any = 0,
  scale: float,
  softcap: float | None = None,
) -> tuple[Array, Array, Array]:
  """`xla.flash_backward` for a mask with a block table.

  Here `lse` is finite everywhere, and `delta` is `sum(do * o) - dlse`.
  """
  work = _Work.of(mask, q, k.shape[3], by_key=True)
  grid = work.grid
  by_query = [a.reshape(-1, *a.shape[2:]) for a in (q, do, lse, delta)]
  caches = _cache(k), _cache(v)
  X = len(by_query[0])
  wide = jnp.promote_types(q.dtype, jnp.float32)

  def key_group(g: Any, carry: tuple[Array, Array, Array]) -> Any:
    x, j = work.group(g)
    k_j, v_j = (
      _gather_keys(a, layer * X + x, j[:, None], grid.bk) for a in caches
    )

    def step(n: Any, masked: bool, carry: tuple[Array, Array, Array]) -> Any:
      dq, dk_j, dv_j = carry
      i = work.step(g, n)
      q_i, do_i, lse_i, delta_i = (_gather(a, x, i, grid.bq) for a in by_query)
      seen = None
      if masked:
        seen = work.seen(x, i, j[:, None], by_key=True)[:, :, None]
      dq_i, dk_i, dv_i = pair_gradient(
        q_i, k_j, v_j, seen, lse_i, delta_i, do_i, scale, softcap
      )
      dq = _add_blocks(dq, x, i, grid.bq, dq_i * scale)
      return dq, dk_j + dk_i, dv_j + dv_i

    dq, dk, dv = carry
    zero = vary_like(jnp.zeros(k_j.shape, wide), dq)
    dq, dk_j, dv_j = work.walk(g, step, (dq, zero, zero))
    dk_j *= scale

    def add(w: Any, buffers: tuple[Array, Array]) -> tuple[Array, Array]:
      head = (x[w] // dk.shape[2], x[w] % dk.shape[2])
      at = _at(layer, *head, j[w] * grid.bk - dkv_start, 0)
      new_dk, new_dv = (
        _add(a, of_block[w][None, None, None], at)
        for a, of_block in zip(buffers, (dk_j, dv_j), strict=True)
      )
      return new_dk, new_dv

    return dq, *lax.fori_loop(0, work.rows_in(g), add, (dk, dv))

  dq = jnp.zeros(by_query[0].shape, wide)
  start = (dq, dk, dv)
  inputs = (q, k, v, mask, lse, delta, do, dk, dv, layer, dkv_start)
  dq, dk, dv = lax.fori_loop(
    0, work.groups(), key_group, vary_like(start, inputs)
  )
  return dq.astype(q.dtype).reshape(q.shape), dk, dv


def _cache(a: Float[Array, "L B K S H"]) -> Float[Array, "LX S H"]:
  return a.reshape(-1, *a.shape[3:])


def _gather_keys(
  a: Float[Array, "LX S H"],
  x: Int[Array, " W"],
  blocks: Int[Array, "W R"],
  size: int,
) -> Float[Array, "W S2 H"]:
  """As `_gather`, for a cache.

  On CPU XLA would make all of a bf16 cache fp32 ahead of the loop (the
  barrier), or in every step where there is an axis of one (the query heads').
  """
  a, blocks = lax.optimization_barrier((a, blocks))
  whole = a.reshape(len(a), -1, size, a.shape[2])
  found = whole.at[x[:, None], blocks].get(mode="clip")
  return found.reshape(len(blocks), -1, a.shape[2])


def _gather(
  a: Float[Array, "X G T *H"],
  x: Int[Array, " W"],
  blocks: Int[Array, "W R"],
  size: int,
) -> Float[Array, "W G Q *H"]:
  """A head's blocks side by side, for each row; outside reads anything."""
  X, G, T, *rest = a.shape
  whole = a.reshape(X, G, T // size, size, *rest)
  found = whole.at[x[:, None], :, blocks].get(mode="clip")
  W, R = blocks.shape
  return found.swapaxes(1, 2).reshape(W, G, R * size, *rest)


def _add_blocks(
  a: Float[Array, "X G T H"],
  x: Int[Array, " W"],
  blocks: Int[Array, "W R"],
  size: int,
  new: Float[Array, "W G Q H"],
) -> Float[Array, "X G T H"]:
  """The inverse of `_gather`: adds; what comes for -1 must be 0."""
  W, R = blocks.shape

  def add(n: Any, a: Array) -> Array:
    w, r = n // R, n % R
    shape = (1, new.shape[1], size, new.shape[3])
    part = lax.dynamic_slice(new, _at(w, 0, r * size, 0), shape)
    return _add(a, part, _at(x[w], 0, blocks[w, r] * size, 0))

  return lax.fori_loop(0, W * R, add, a)


def _add(a: Array, part: Array, at: tuple[Array, ...]) -> Array:
  """Adds in place; a place outside is moved inside, as slices are."""
  old = lax.dynamic_slice(a, at, part.shape)
  return lax.dynamic_update_slice(a, old + part.astype(a.dtype), at)


def _at(*starts: Any) -> tuple[Array, ...]:
  return tuple(jnp.asarray(n, jnp.int32) for n in starts)
