"""The GPU kernel for pages: one program, of three warpgroups."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jaxchunk.kernels.attention.hopper.problem import (
  LN2,
  LOG2E,
  ROWS,
  WORKERS,
)
from jaxchunk.kernels.attention.hopper.warps import (
  accumulate,
  capped,
  dot,
  drain_ring,
  fill_ring,
  spread,
  start_copies,
  worker_role,
)
from jaxchunk.kernels.attention.softmax import LOWEST
from jaxchunk.kernels.paged_attention.hopper.problem import (
  Beside,
  Inputs,
  PagedProblem,
  Range,
)

# Columns of an output, and of keys or values, that are gone through at a time.
COLUMNS = 64
# A Ref inside a kernel: Pallas publishes no type for it.
Ref = Any


class PagedScratch(NamedTuple):
  """Shared memory and barriers.

  The ring has two barriers for each place and for keys and values: `*_full`
  when the copies are there, `*_free` when the worker whose step it is, is
  done. `wide` holds a worker's keys, then its values, converted from 8 bits.
  """

  q: Any
  q_positions: Any
  k: Any
  v: Any
  beside: Beside
  wide: Any
  o: Any
  lse: Any
  q_full: Any
  k_full: Any
  v_full: Any
  k_free: Any
  v_free: Any

  @classmethod
  def of(cls, P: PagedProblem, x: Inputs) -> "PagedScratch":
    """What to allocate."""
    keys = (P.stages, P.kv)

    def numbers(a: Array | None) -> Any:
      return None if a is None else plgpu.SMEM(keys, a.dtype)

    beside = Beside(*(numbers(a) for a in beside_of(x)))
    several = P.T > 1
    parts = copies_of(P)
    of_k = sum(a is not None for a in beside._replace(v_scale=None))
    of_v = beside.v_scale is not None
    free = plgpu.Barrier(num_barriers=P.stages)
    return cls(
      q=plgpu.SMEM((ROWS, P.H), P.dtype),
      q_positions=plgpu.SMEM((ROWS,), jnp.int32) if several else None,
      k=plgpu.SMEM((*keys, P.H), x.k.dtype),
      v=plgpu.SMEM((*keys, P.H), x.v.dtype),
      beside=beside,
      wide=plgpu.SMEM((WORKERS, P.kv, P.H), P.dtype) if P.narrow else None,
      o=plgpu.SMEM((WORKERS, ROWS, COLUMNS), jnp.float32),
      lse=plgpu.SMEM((WORKERS, ROWS), jnp.float32),
      q_full=plgpu.Barrier(num_arrivals=1 + several),
      k_full=plgpu.Barrier(
        num_barriers=P.stages, num_arrivals=parts * (1 + of_k)
      ),
      v_full=plgpu.Barrier(
        num_barriers=P.stages, num_arrivals=parts * (1 + of_v)
      ),
      k_free=free,
      v_free=free,
    )


def beside_of(x: Inputs) -> Beside:
  """What stands beside the pages in global memory."""
  return Beside(x.k_scale, x.v_scale, x.positions, x.log_weights)


def copies_of(P: PagedProblem) -> int:
  """Copies that bring the keys of a step: its pages, or a part of one."""
  return max(1, P.kv // P.Z)


class Walk(NamedTuple):
  """A program's place, and the steps of `kv` keys that it goes through.

  Attributes:
    row: Sequence and key head.
    block: Which 64 of the row's queries.
    split: Which part of the row's keys.
    keys: Which keys of the row can be seen.
    first: The first step.
    full: The first step in which all queries see all keys.
    n_full: How many of those there are.
    total: How many steps there are.
  """

  row: Any
  block: Any
  split: Any
  keys: Range
  first: Any
  full: Any
  n_full: Any
  total: Any

  @classmethod
  def of(cls, P: PagedProblem, x: Inputs) -> "Walk":
    """The blocks of queries side by side: they read the same pages."""
    program = lax.axis_index("program")
    block = lax.rem(program, P.blocks)
    rest = lax.div(program, P.blocks)
    split, row = lax.rem(rest, P.splits), lax.div(rest, P.splits)
    keys = Range(*(x.ranges[row, i] for i in range(len(Range._fields))))
    begin, end = lax.div(keys.begin, P.kv), _ceil(keys.end, P.kv)
    each = _ceil(jnp.maximum(end - begin, 0), P.splits)
    first = begin + split * each
    last = jnp.maximum(jnp.minimum(first + each, end), first)
    full = jnp.clip(_ceil(keys.full_begin, P.kv), first, last)
    full_end = jnp.clip(lax.div(keys.full_end, P.kv), full, last)
    return cls(
      *(row, block, split, keys, first, full), full_end - full, last - first
    )

  def step(self, n: Any) -> Any:
    """The n-th step: the full ones, those before them, those after."""
    before = self.full - self.first
    rest = jnp.where(n < self.n_full + before, n - self.n_full, n)
    return jnp.where(n < self.n_full, self.full + n, self.first + rest)


def _ceil(a: Any, b: int) -> Any:
  return lax.div(a + (b - 1), b)


def paged_body(P: Any, x: Inputs, out: Any, m: PagedScratch) -> None:
  """One program: two workers, and one warpgroup that fetches for them."""
  wg, works = worker_role()
  walk = Walk.of(P, x)

  @pl.when(works)
  def _() -> None:
    plgpu.set_max_registers(P.registers[0], action="increase")
    _work(P, x, out, m, wg, walk)

  @pl.when(jnp.logical_not(works))
  def _() -> None:
    plgpu.set_max_registers(P.registers[1], action="decrease")
    block = lax.div(walk.row, P.K) * P.blocks + walk.block
    rows = pl.ds(walk.block * ROWS, P.rows)
    pairs = [(x.q.at[walk.row, rows], m.q.at[pl.ds(0, P.rows)])]
    if P.T > 1:
      pairs.append((x.q_positions.at[block], m.q_positions))
    start_copies(m.q_full, *pairs)
    fetch = functools.partial(_fetch, P, x, m, walk)
    lax.fori_loop(0, walk.total, fetch, _found(P, x, walk, 0))
    drain_ring(walk.total, P.stages, [m.k_free, m.v_free])


def _found(P: PagedProblem, x: Inputs, walk: Walk, n: Any) -> tuple[Any, ...]:
  """Numbers of the pages of the n-th step."""
  first = lax.div(walk.step(n) * P.kv, P.Z)
  # Behind the row's last page comes that page again: it counts as unseen.
  last = jnp.maximum(lax.div(walk.keys.end - 1, P.Z), 0)
  entries = (jnp.minimum(first + i, last) for i in range(copies_of(P)))
  return tuple(walk.keys.base + x.table[walk.row, e] for e in entries)


def _fetch(
  P: PagedProblem,
  x: Inputs,
  m: PagedScratch,
  walk: Walk,
  n: Any,
  found: tuple[Any, ...],
) -> tuple[Any, ...]:
  """Copies the pages of a step, and looks up those of the next meanwhile."""
  rows = P.kv // len(found)
  keys = pl.ds(lax.rem(walk.step(n), P.Z // rows) * rows, rows)
  following = _found(P, x, walk, n + 1)

  def fill(
    barrier: Ref, *arrays: tuple[Ref | None, Ref | None]
  ) -> Callable[[Any], None]:
    pairs = [(a, s) for a, s in arrays if a is not None and s is not None]

    def copy(slot: Any) -> None:
      for i, page in enumerate(found):
        to = pl.ds(i * rows, rows)
        copies = [(a.at[page, keys], s.at[slot, to]) for a, s in pairs]
        start_copies(barrier.at[slot], *copies)

    return copy

  b = m.beside
  fill_k = fill(
    m.k_full,
    (x.k, m.k),
    (x.k_scale, b.k_scale),
    (x.positions, b.positions),
    (x.log_weights, b.log_weights),
  )
  fill_v = fill(m.v_full, (x.v, m.v), (x.v_scale, b.v_scale))
  fill_ring(n, P.stages, [m.k_free], fill_k)
  fill_ring(n, P.stages, [m.v_free], fill_v)
  return following


def _work(
  P: Any, x: Inputs, out: Any, m: PagedScratch, wg: Any, walk: Walk
) -> None:
  """One worker: every other step, for all queries."""
  plgpu.barrier_wait(m.q_full)
  q_positions = m.q_positions[...] if P.T > 1 else None

  def step(masked: bool) -> Callable[[Any, Any], Any]:
    def body(i: Any, carry: Any) -> Any:
      n = i * WORKERS + wg
      slot = lax.rem(n, P.stages)
      beside = Beside(*(None if a is None else a.at[slot] for a in m.beside))
      place = walk.step(n) * P.kv if masked else None
      wide = m.wide.at[wg] if P.narrow else None
      keys = Keys(P, walk.keys, place, beside, wide)
      acc, top, total = carry
      plgpu.barrier_wait(m.k_full.at[slot])
      s = keys.scores(m.q, m.k.at[slot], q_positions)
      # Positions and weights are looked at again with the values.
      looked = masked and not (x.positions is None and x.log_weights is None)
      if not looked:
        plgpu.barrier_arrive(m.k_free.at[slot])
      p, acc, top, total = _softmax(s, acc, top, total)
      plgpu.barrier_wait(m.v_full.at[slot])
      if beside.v_scale is not None:
        p = p * spread(keys.factors(beside.v_scale), p.shape, 1)
      v = keys.values(m.v.at[slot])
      if looked:
        plgpu.barrier_arrive(m.k_free.at[slot])
      (acc,) = accumulate(P, (acc,), (lambda: p.astype(P.dtype), v))
      plgpu.barrier_arrive(m.v_free.at[slot])
      return acc, top, total

    return body

  carry: Any = (
    jnp.zeros((ROWS, P.H), jnp.float32),
    jnp.full((ROWS,), LOWEST, jnp.float32),
    jnp.zeros((ROWS,), jnp.float32),
  )
  full, end = (_ceil(n - wg, WORKERS) for n in (walk.n_full, walk.total))
  if x.positions is None and x.log_weights is None:
    carry = lax.fori_loop(0, full, step(False), carry)
  acc, top, total = lax.fori_loop(full, end, step(True), carry)
  _write(P, out, m, wg, walk, acc, top, total)


class Keys(NamedTuple):
  """What a worker does with the keys and values of a step.

  Attributes:
    P: The problem.
    range: Which keys of the row can be seen.
    place: The first key, or `None` if all queries see all keys.
    beside: What stands beside the keys.
    wide: Where keys, then values, of 8 bits are converted to.
  """

  P: Any
  range: Range
  place: Any
  beside: Beside
  wide: Ref

  def used(self) -> Array:
    """Which keys some query may see."""
    place = self.place + lax.broadcasted_iota(jnp.int32, (self.P.kv,), 0)
    return self.range.used(self.P, place, self.beside)

  def factors(self, scale: Ref) -> Array:
    """A scale for each key, 0 where it is not seen: there it may be NaN."""
    if self.place is None:
      return scale[...]
    return jnp.where(self.used(), scale[...], 0.0)

  def scores(self, q: Ref, k: Ref, q_positions: Array | None) -> Array:
    """Exponents of 2, `[64,kv]`."""
    P = self.P
    if P.narrow:
      k = self.copied(k, self.wide)
    s = dot(P, q, k)
    if self.beside.k_scale is not None:
      s = s * spread(self.beside.k_scale[...], s.shape, 1)
    if P.softcap is not None:
      s = capped(P, s)
    s = s * P.factor
    if self.beside.log_weights is not None:
      s = s + spread(self.beside.log_weights[...] * LOG2E, s.shape, 1)
    if self.place is None:
      return s
    return jnp.where(self.seen(s.shape, q_positions), s, -jnp.inf)

  def seen(self, shape: tuple[int, ...], q_positions: Array | None) -> Array:
    """Which pairs of a query and a key are visible."""
    seen = spread(self.used(), shape, 1)
    if q_positions is None:
      return seen
    if self.beside.positions is not None:
      position = spread(self.beside.positions[...], shape, 1)
    else:
      position = self.place + lax.broadcasted_iota(jnp.int32, shape, 1)
    ahead = spread(q_positions, shape) - position
    seen &= ahead >= 0
    if self.P.window is not None:
      seen &= ahead < self.P.window
    return seen

  def values(self, v: Ref) -> Ref:
    """The values to multiply; those that nobody sees as 0: they may be NaN."""
    used = None if self.place is None else self.used()
    if self.P.narrow:
      return self.copied(v, self.wide, used)
    return v if used is None else self.copied(v, v, used)

  def copied(self, source: Ref, target: Ref, used: Array | None = None) -> Ref:
    """Numbers in q's dtype, 0 where not used; by columns for registers."""
    for i in range(0, self.P.H, COLUMNS):
      columns = pl.ds(i, COLUMNS)
      value = source[:, columns]
      if self.P.narrow:
        value = _widened(value, self.P.dtype)
      if used is not None:
        value = jnp.where(
          spread(used, value.shape), value, jnp.zeros_like(value)
        )
      target[:, columns] = value
    plgpu.commit_smem()
    return target


def _widened(a: Array, dtype: Any) -> Array:
  """Numbers of 8 bits in a dtype that holds them."""
  if jnp.issubdtype(a.dtype, jnp.floating):
    # Hopper converts to fp16 only.
    return a.astype(jnp.float32).astype(dtype)
  return a.astype(dtype)


def _softmax(
  s: Array, acc: Array, top: Array, total: Array
) -> tuple[Array, Array, Array, Array]:
  """Probabilities to a new highest score, and the sums so far to that."""
  new = jnp.maximum(top, s.max(axis=1))
  p = jnp.exp2(s - spread(new, s.shape))
  alpha = jnp.exp2(top - new)
  total = total * alpha + p.sum(axis=1)
  return p, acc * spread(alpha, acc.shape), new, total


def _write(
  P: PagedProblem,
  out: Any,
  m: PagedScratch,
  wg: Any,
  walk: Walk,
  acc: Array,
  top: Array,
  total: Array,
) -> None:
  """Writes a worker's part of the result."""
  part = walk.split * WORKERS + wg
  rows, some = pl.ds(walk.block * ROWS, P.rows), total > 0
  total = jnp.where(some, total, 1.0)
  acc = acc * spread(1 / total, acc.shape)
  m.lse[wg] = jnp.where(some, top * LN2 + jnp.log(total), -jnp.inf)
  for i in range(0, P.H, COLUMNS):
    m.o[wg] = acc[:, i : i + COLUMNS]
    plgpu.commit_smem()
    if i == 0:
      plgpu.copy_smem_to_gmem(
        m.lse.at[wg, pl.ds(0, P.rows)], out["lse"].at[part, walk.row, rows]
      )
    plgpu.copy_smem_to_gmem(
      m.o.at[wg, pl.ds(0, P.rows)],
      out["o"].at[part, walk.row, rows, pl.ds(i, COLUMNS)],
    )
    plgpu.wait_smem_to_gmem(0)
