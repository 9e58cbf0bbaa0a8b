"""The backward pass of GPU attention: dq, and dk with dv."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jaxchunk.kernels.attention.block_sizes import GpuBlocks
from jaxchunk.kernels.attention.blocks import Grid
from jaxchunk.kernels.attention.hopper.problem import (
  FETCH_REGISTERS,
  KEYS,
  ROWS,
  WORK_REGISTERS,
  WORKERS,
  Inputs,
  Problem,
  Ref,
  make_lists,
  query_block,
)
from jaxchunk.kernels.attention.hopper.warps import (
  Block,
  Place,
  accumulate,
  capped,
  dot,
  drain_ring,
  fill_ring,
  launch,
  like_all,
  report_blocks,
  spread,
  start_copies,
  two_dots,
  worker_role,
)
from jaxchunk.kernels.attention.mask import AttentionMask
from jaxchunk.kernels.vma import output, vary_like


def _pair(
  P: Problem,
  scores: tuple[Ref, Ref],
  dp: tuple[Ref, Ref] | None,
  lse: Callable[[], Array],
  delta: Callable[[], Array],
  seen: Callable[[tuple[int, ...]], Array] | None,
  q_axis: int,
) -> tuple[Array, Callable[[], Array]]:
  """Probabilities, and dS without `scale`, of one pair of blocks.

  Args:
    P: The problem.
    scores: Two operands whose product is q k^T or its transpose.
    dp: Two whose product is do v^T or its transpose; `None` if dS is unused.
    lse: To base 2, by query; read late, as it takes registers.
    delta: By query, likewise.
    seen: The mask for a shape; `None` if all is visible.
    q_axis: Where queries lie.

  Returns:
    The probabilities and a function for dS, both in q's dtype.
  """

  def probabilities(s: Array) -> tuple[Array, Array]:
    if P.softcap is not None:
      s = capped(P, s)
    p = jnp.exp2(s * P.factor - spread(lse(), s.shape, q_axis))
    if seen is not None:
      # After exp2: a hidden score may exceed the lse by any amount.
      p = jnp.where(seen(s.shape), p, 0.0)
    # The slope of the cap goes into p at once, as both would take registers.
    return p.astype(P.dtype), p if P.softcap is None else p * (1 - s * s)

  if dp is None:
    p, _ = probabilities(dot(P, *scores))
    return p, lambda: p
  (p, weight), product = two_dots(P, scores, dp, probabilities)

  def ds() -> Array:
    ds = weight * (product - spread(delta(), weight.shape, q_axis))
    return ds.astype(P.dtype)

  return p, ds


class _DqScratch(NamedTuple):
  """Shared memory and barriers for dq, as in `ForwardScratch`."""

  q: Any
  do: Any
  lse: Any
  delta: Any
  q_ids: Any
  k: Any
  v: Any
  k_ids: Any
  q_full: Any
  full: Any
  free: Any

  @classmethod
  def of(cls, P: Problem, blocks: GpuBlocks) -> "_DqScratch":
    """What to allocate."""
    stages, kv = blocks.stages_dq, blocks.kv_dq
    rows = (WORKERS, ROWS)
    ring = plgpu.SMEM((stages, kv, P.H), P.dtype)
    return cls(
      q=plgpu.SMEM((*rows, P.H), P.dtype),
      do=plgpu.SMEM((*rows, P.H), P.dtype),
      lse=plgpu.SMEM(rows, jnp.float32),
      delta=plgpu.SMEM(rows, jnp.float32),
      q_ids=plgpu.SMEM(rows, jnp.int32) if P.has_ids else None,
      k=ring,
      v=ring,
      k_ids=plgpu.SMEM((stages, kv), jnp.int32) if P.has_ids else None,
      q_full=plgpu.Barrier(num_barriers=WORKERS, num_arrivals=4 + P.has_ids),
      full=plgpu.Barrier(num_barriers=stages, num_arrivals=2 + P.has_ids),
      free=plgpu.Barrier(num_barriers=stages, num_arrivals=WORKERS),
    )


def _dq_body(
  P: Problem, blocks: GpuBlocks, x: Inputs, out: Any, m: _DqScratch
) -> None:
  wg, works = worker_role()
  place = Place.of(P, wg)

  @pl.when(works)
  def _() -> None:
    plgpu.set_max_registers(WORK_REGISTERS, action="increase")
    _dq_work(P, blocks, x, out, m, wg, place)

  @pl.when(jnp.logical_not(works))
  def _() -> None:
    plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
    cache = x.numbers[0] * (P.B * P.K) + place.head

    def fetch(n: Any, g: Any, j: Any, masked: bool, carry: None) -> None:
      del g, masked, carry
      keys = pl.ds(j * blocks.kv_dq, blocks.kv_dq)

      def fill(slot: Any) -> None:
        pairs = [
          (x.k.at[cache, keys], m.k.at[slot]),
          (x.v.at[cache, keys], m.v.at[slot]),
        ]
        if P.has_ids:
          pairs.append((x.k_ids.at[place.batch, keys], m.k_ids.at[slot]))
        start_copies(m.full.at[slot], *pairs)

      fill_ring(n, blocks.stages_dq, [m.free], fill)

    x.lists.walk(place.row, place.i, fetch)
    total = x.lists.total(place.row, place.i)
    drain_ring(total, blocks.stages_dq, [m.free])


def _dq_work(
  P: Problem,
  blocks: GpuBlocks,
  x: Inputs,
  out: Any,
  m: _DqScratch,
  wg: Any,
  place: Place,
) -> None:
  """One worker: its 64 queries over all keys."""
  rows = pl.ds(place.t0, ROWS)
  q, do = m.q.at[wg], m.do.at[wg]
  q_ids = m.q_ids.at[wg] if P.has_ids else None
  pairs = [
    (x.q.at[place.x, rows], q),
    (x.do.at[place.x, rows], do),
    (x.lse.at[place.x, rows], m.lse.at[wg]),
    (x.delta.at[place.x, rows], m.delta.at[wg]),
  ]
  if P.has_ids:
    pairs.append((x.q_ids.at[place.batch, rows], q_ids))
  start_copies(m.q_full.at[wg], *pairs)
  plgpu.barrier_wait(m.q_full.at[wg])
  lse, delta = m.lse[wg], m.delta[wg]

  def step(n: Any, g: Any, j: Any, masked: bool, dq: Array) -> Array:
    del g
    slot = lax.rem(n, blocks.stages_dq)
    plgpu.barrier_wait(m.full.at[slot])
    k, v = m.k.at[slot], m.v.at[slot]
    seen = None
    if masked:
      k_ids = m.k_ids.at[slot] if P.has_ids else None
      block = Block(place.t0, j * blocks.kv_dq, place.head, q_ids, k_ids)
      seen = functools.partial(block.seen, P, x)
    _, ds = _pair(
      P, (q, k), (do, v), lambda: lse, lambda: delta, seen, q_axis=0
    )
    (dq,) = accumulate(P, (dq,), (ds, k))
    plgpu.barrier_arrive(m.free.at[slot])
    return dq

  dq = jnp.zeros((ROWS, P.H), jnp.float32)
  dq = x.lists.walk(place.row, place.i, step, dq)
  q[...] = (dq * P.scale).astype(P.dtype)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(q, out["dq"].at[place.x, rows])
  plgpu.wait_smem_to_gmem(0)
  report_blocks(x, out["done"], place.row, place.i, wg)


class _DkvScratch(NamedTuple):
  """Shared memory and barriers for dk and dv, as in `ForwardScratch`.

  `sums` holds columns of what the caller's buffers have so far.
  """

  k: Any
  v: Any
  k_ids: Any
  q: Any
  do: Any
  lse: Any
  delta: Any
  q_ids: Any
  sums: Any
  k_full: Any
  full: Any
  free: Any
  sums_full: Any

  @classmethod
  def of(
    cls, P: Problem, blocks: GpuBlocks, parts: tuple[str, ...]
  ) -> "_DkvScratch":
    """What to allocate for the given gradients."""
    stages, bq = blocks.stages_for(parts), blocks.q_dkv
    rows = (WORKERS, ROWS)
    keys = plgpu.SMEM((*rows, P.H), P.dtype)
    ring = plgpu.SMEM((stages, bq, P.H), P.dtype)
    row = plgpu.SMEM((stages, bq), jnp.float32)
    dk = "dk" in parts
    return cls(
      k=keys,
      v=keys if dk else None,
      k_ids=plgpu.SMEM(rows, jnp.int32) if P.has_ids else None,
      q=ring,
      do=ring,
      lse=row,
      delta=row if dk else None,
      q_ids=plgpu.SMEM((stages, bq), jnp.int32) if P.has_ids else None,
      sums=plgpu.SMEM((*rows, _columns(P)), jnp.float32),
      k_full=plgpu.Barrier(
        num_barriers=WORKERS, num_arrivals=1 + dk + P.has_ids
      ),
      full=plgpu.Barrier(num_barriers=stages, num_arrivals=3 + dk + P.has_ids),
      free=plgpu.Barrier(num_barriers=stages, num_arrivals=WORKERS),
      sums_full=plgpu.Barrier(num_barriers=WORKERS),
    )


def _columns(P: Problem) -> int:
  """How many columns of dk or dv are added at a time."""
  return math.gcd(P.H, 32 if P.H > 128 else 64)


def _dkv_body(
  P: Problem,
  blocks: GpuBlocks,
  parts: tuple[str, ...],
  x: Inputs,
  sums: dict[str, Ref],
  out: Any,
  m: _DkvScratch,
) -> None:
  wg, works = worker_role()
  program = lax.axis_index("program")
  head, j = lax.div(program, P.S // KEYS), lax.rem(program, P.S // KEYS)
  row, batch = P.list_row(head), lax.div(head, P.K)

  @pl.when(works)
  def _() -> None:
    plgpu.set_max_registers(WORK_REGISTERS, action="increase")

    # Rows of a block that no query sees may not exist in the buffers.
    @pl.when(x.lists.total(row, j) > 0)
    def _() -> None:
      _dkv_work(P, blocks, parts, x, sums, m, wg, head, j)

    report_blocks(x, out["done"], row, j, wg)

  @pl.when(jnp.logical_not(works))
  def _() -> None:
    plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")

    def fetch(n: Any, g: Any, i: Any, masked: bool, carry: None) -> None:
      del masked, carry
      queries = pl.ds(i * blocks.q_dkv, blocks.q_dkv)
      at = (head * P.G + g, queries)

      def fill(slot: Any) -> None:
        pairs = [
          (x.q.at[at], m.q.at[slot]),
          (x.do.at[at], m.do.at[slot]),
          (x.lse.at[at], m.lse.at[slot]),
        ]
        if "dk" in parts:
          pairs.append((x.delta.at[at], m.delta.at[slot]))
        if P.has_ids:
          pairs.append((x.q_ids.at[batch, queries], m.q_ids.at[slot]))
        start_copies(m.full.at[slot], *pairs)

      fill_ring(n, blocks.stages_for(parts), [m.free], fill)

    x.lists.walk(row, j, fetch, repeat=P.G)
    total = x.lists.total(row, j) * P.G
    drain_ring(total, blocks.stages_for(parts), [m.free])


def _dkv_work(
  P: Problem,
  blocks: GpuBlocks,
  parts: tuple[str, ...],
  x: Inputs,
  sums: dict[str, Ref],
  m: _DkvScratch,
  wg: Any,
  head: Any,
  j: Any,
) -> None:
  """One worker: its 64 keys over all queries of the group's heads."""
  s0 = j * KEYS + wg * ROWS
  cache = x.numbers[0] * (P.B * P.K) + head
  keys = pl.ds(s0, ROWS)
  k, v = m.k.at[wg], m.v.at[wg] if "dk" in parts else None
  k_ids = m.k_ids.at[wg] if P.has_ids else None
  pairs = [(x.k.at[cache, keys], k)]
  if v is not None:
    pairs.append((x.v.at[cache, keys], v))
  if P.has_ids:
    pairs.append((x.k_ids.at[lax.div(head, P.K), keys], k_ids))
  start_copies(m.k_full.at[wg], *pairs)
  plgpu.barrier_wait(m.k_full.at[wg])

  def step(n: Any, g: Any, i: Any, masked: bool, carry: Any) -> Any:
    del g
    slot = lax.rem(n, blocks.stages_for(parts))
    plgpu.barrier_wait(m.full.at[slot])
    q, do = m.q.at[slot], m.do.at[slot]
    seen = None
    if masked:
      q_ids = m.q_ids.at[slot] if P.has_ids else None
      block = Block(i * blocks.q_dkv, s0, head, q_ids, k_ids, q_axis=1)
      seen = functools.partial(block.seen, P, x)
    dp = None if v is None else (v, do)
    p, ds = _pair(
      P,
      (k, q),
      dp,
      lambda: m.lse[slot],
      lambda: m.delta[slot],
      seen,
      q_axis=1,
    )
    products = {
      "dv": (lambda: p, do),
      "dk": (ds, q),
    }
    carry = accumulate(P, carry, *(products[name] for name in parts))
    plgpu.barrier_arrive(m.free.at[slot])
    return carry

  carry = tuple(jnp.zeros((ROWS, P.H), jnp.float32) for _ in parts)
  row = P.list_row(head)
  carry = x.lists.walk(row, j, step, carry, repeat=P.G)
  at = pl.ds(s0 - x.numbers[3], ROWS)
  for name, new in zip(parts, carry, strict=True):
    new = new * P.scale if name == "dk" else new
    _add_rows(P, sums[name].at[cache, at], new, m, wg)


def _add_rows(
  P: Problem, target: Ref, new: Array, m: _DkvScratch, wg: Any
) -> None:
  """Adds to rows in global memory that no other program touches."""
  stage, size = m.sums.at[wg], _columns(P)
  for c in range(0, P.H, size):
    columns = target.at[:, pl.ds(c, size)]
    plgpu.copy_gmem_to_smem(columns, stage, m.sums_full.at[wg])
    plgpu.barrier_wait(m.sums_full.at[wg])
    stage[...] = stage[...] + new[:, c : c + size]
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(stage, columns)
    plgpu.wait_smem_to_gmem(0)


def dq_pass(
  P: Problem,
  blocks: GpuBlocks,
  x: Inputs,
  mask: AttentionMask,
) -> tuple[Array, Array]:
  """The gradient of q, and how many blocks were gone through."""
  grid = Grid(P.T, P.S, query_block(P.G), blocks.kv_dq)
  x = x._replace(lists=make_lists(mask, grid))
  programs = P.B * P.K * P.G * P.T // (ROWS * WORKERS)
  like = like_all(x)
  out = {
    "dq": output(x.q.shape, P.dtype, like),
    "done": output((programs,), jnp.int32, like),
  }
  out = launch(
    functools.partial(_dq_body, P, blocks),
    (x,),
    out=out,
    scratch=_DqScratch.of(P, blocks),
    programs=programs,
    name="flash_dq",
    interpret=P.interpret,
  )
  return out["dq"], out["done"].sum()


def dkv_pass(
  P: Problem,
  blocks: GpuBlocks,
  x: Inputs,
  mask: AttentionMask,
  dk: Array,
  dv: Array,
) -> tuple[Array, Array, Array]:
  """Both sums with theirs added, and how many blocks were gone through."""
  grid = Grid(P.T, P.S, blocks.q_dkv, KEYS)
  x = x._replace(lists=make_lists(mask, grid, by_key=True))
  programs = P.B * P.K * P.S // KEYS
  like = like_all(x, dk, dv)
  sums = {
    name: jax.new_ref(
      vary_like(a, like).reshape(-1, *a.shape[3:]), memory_space=plgpu.GMEM
    )
    for name, a in (("dk", dk), ("dv", dv))
  }
  # Beyond 128 columns the two sums do not fit into registers together.
  both = ("dv", "dk")
  for parts in [both] if P.H <= 128 else [both[:1], both[1:]]:
    out = launch(
      functools.partial(_dkv_body, P, blocks, parts),
      (x, {name: sums[name] for name in parts}),
      out={"done": output((programs,), jnp.int32, like)},
      scratch=_DkvScratch.of(P, blocks, parts),
      programs=programs,
      name="flash_" + "_".join(parts),
      interpret=P.interpret,
    )
  dk, dv = (
    jax.freeze(sums[name]).reshape(a.shape)
    for name, a in (("dk", dk), ("dv", dv))
  )
  return dk, dv, out["done"].sum()
