"""The forward pass of GPU attention, inside the kernel."""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jaxchunk.kernels.attention.block_sizes import GpuBlocks
from jaxchunk.kernels.attention.hopper.problem import (
  FETCH_REGISTERS,
  LN2,
  ROWS,
  WORK_REGISTERS,
  WORKERS,
  Inputs,
  Problem,
)
from jaxchunk.kernels.attention.hopper.warps import (
  Block,
  Place,
  accumulate,
  capped,
  dot,
  drain_ring,
  fill_ring,
  report_blocks,
  spread,
  start_copies,
  worker_role,
)
from jaxchunk.kernels.attention.softmax import LOWEST


class ForwardScratch(NamedTuple):
  """Shared memory and barriers of the forward pass.

  The ring has a barrier for each place: `*_full` when the copy is there,
  `*_free` when both workers are done. `turn` lets one worker multiply while
  the other computes its softmax.
  """

  q: Any
  k: Any
  v: Any
  lse: Any
  q_ids: Any
  k_ids: Any
  q_full: Any
  k_full: Any
  v_full: Any
  k_free: Any
  v_free: Any
  turn: Any

  @classmethod
  def of(cls, P: Problem, blocks: GpuBlocks) -> "ForwardScratch":
    """What to allocate."""
    stages, kv = blocks.stages, blocks.kv
    ring = plgpu.SMEM((stages, kv, P.H), P.dtype)
    rows = (WORKERS, ROWS)
    full = plgpu.Barrier(num_barriers=stages, num_arrivals=1 + P.has_ids)
    free = plgpu.Barrier(num_barriers=stages, num_arrivals=WORKERS)
    return cls(
      q=plgpu.SMEM((*rows, P.H), P.dtype),
      k=ring,
      v=ring,
      lse=plgpu.SMEM(rows, jnp.float32),
      q_ids=plgpu.SMEM(rows, jnp.int32) if P.has_ids else None,
      k_ids=plgpu.SMEM((stages, kv), jnp.int32) if P.has_ids else None,
      q_full=plgpu.Barrier(num_barriers=WORKERS, num_arrivals=1 + P.has_ids),
      k_full=full,
      v_full=plgpu.Barrier(num_barriers=stages),
      k_free=free,
      v_free=free,
      turn=plgpu.Barrier(num_arrivals=WORKERS),
    )


def forward_body(
  P: Problem, blocks: GpuBlocks, x: Inputs, out: Any, m: ForwardScratch
) -> None:
  """One program: two workers, and one warpgroup that fetches for them."""
  wg, works = worker_role()
  place = Place.of(P, wg)

  @pl.when(works)
  def _() -> None:
    plgpu.set_max_registers(WORK_REGISTERS, action="increase")
    _forward_work(P, blocks, x, out, m, wg, place)

  @pl.when(jnp.logical_not(works))
  def _() -> None:
    plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")
    cache = x.numbers[0] * (P.B * P.K) + place.head

    def fetch(n: Any, g: Any, j: Any, masked: bool, carry: None) -> None:
      del g, masked, carry
      keys = pl.ds(j * blocks.kv, blocks.kv)

      def fill_k(slot: Any) -> None:
        pairs = [(x.k.at[cache, keys], m.k.at[slot])]
        if P.has_ids:
          pairs.append((x.k_ids.at[place.batch, keys], m.k_ids.at[slot]))
        start_copies(m.k_full.at[slot], *pairs)

      def fill_v(slot: Any) -> None:
        start_copies(m.v_full.at[slot], (x.v.at[cache, keys], m.v.at[slot]))

      fill_ring(n, blocks.stages, [m.k_free], fill_k)
      fill_ring(n, blocks.stages, [m.v_free], fill_v)

    x.lists.walk(place.row, place.i, fetch)
    total = x.lists.total(place.row, place.i)
    drain_ring(total, blocks.stages, [m.k_free, m.v_free])


def _forward_work(
  P: Problem,
  blocks: GpuBlocks,
  x: Inputs,
  out: Any,
  m: ForwardScratch,
  wg: Any,
  place: Place,
) -> None:
  """One worker: its 64 queries over all keys."""
  rows = pl.ds(place.t0, ROWS)
  q = m.q.at[wg]
  q_ids = m.q_ids.at[wg] if P.has_ids else None
  pairs = [(x.q.at[place.x, rows], q)]
  if P.has_ids:
    pairs.append((x.q_ids.at[place.batch, rows], q_ids))
  start_copies(m.q_full.at[wg], *pairs)
  plgpu.barrier_wait(m.q_full.at[wg])

  def take_turn() -> None:
    plgpu.barrier_arrive(m.turn)
    plgpu.barrier_wait(m.turn)

  def step(n: Any, g: Any, j: Any, masked: bool, carry: Any) -> Any:
    del g
    acc, top, total = carry
    slot = lax.rem(n, blocks.stages)
    plgpu.barrier_wait(m.k_full.at[slot])
    s = dot(P, q, m.k.at[slot], take_turn)
    if P.softcap is not None:
      s = capped(P, s)
    if masked:
      k_ids = m.k_ids.at[slot] if P.has_ids else None
      block = Block(place.t0, j * blocks.kv, place.head, q_ids, k_ids)
      s = jnp.where(block.seen(P, x, s.shape), s, -jnp.inf)
    plgpu.barrier_arrive(m.k_free.at[slot])
    p, acc, top, total = _softmax(P, s, acc, top, total)
    plgpu.barrier_arrive(m.turn)
    plgpu.barrier_wait(m.v_full.at[slot])
    plgpu.barrier_wait(m.turn)
    (acc,) = accumulate(P, (acc,), (lambda: p, m.v.at[slot]))
    plgpu.barrier_arrive(m.v_free.at[slot])
    return acc, top, total

  start = (
    jnp.zeros((ROWS, P.H), jnp.float32),
    jnp.full((ROWS,), LOWEST, jnp.float32),
    jnp.zeros((ROWS,), jnp.float32),
  )
  # The second worker is half a step behind the first.
  pl.when(wg == 1)(take_turn)
  acc, top, total = x.lists.walk(place.row, place.i, step, start)
  pl.when(wg == 0)(take_turn)
  some = total > 0
  total = jnp.where(some, total, 1.0)
  # The queries' place is free: no product reads it any more.
  q[...] = (acc * spread(1 / total, acc.shape)).astype(P.dtype)
  m.lse[wg] = jnp.where(some, top * LN2 + jnp.log(total), -jnp.inf)
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(q, out["o"].at[place.x, rows])
  plgpu.copy_smem_to_gmem(m.lse.at[wg], out["lse"].at[place.x, rows])
  plgpu.wait_smem_to_gmem(0)
  report_blocks(x, out["done"], place.row, place.i, wg)


def _softmax(
  P: Problem, s: Array, acc: Array, top: Array, total: Array
) -> tuple[Array, Array, Array, Array]:
  """Probabilities to a new highest score, and the sums so far to that."""
  new = jnp.maximum(top, s.max(axis=1) * P.factor)
  p = jnp.exp2(s * P.factor - spread(new, s.shape))
  alpha = jnp.exp2(top - new)
  total = total * alpha + p.sum(axis=1)
  return p.astype(P.dtype), acc * spread(alpha, acc.shape), new, total
