"""What the GPU kernels' warpgroups do alike: products, masks, the ring."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from jaxchunk.kernels.attention.hopper.problem import (
  LOG2E,
  ROWS,
  WORKERS,
  Inputs,
  Problem,
  query_block,
)
from jaxchunk.kernels.vma import vary_like

# A Ref inside a kernel: Pallas publishes no type for it.
Ref = Any


def launch(
  body: Callable[..., None],
  arguments: Any,
  *,
  out: dict[str, jax.ShapeDtypeStruct],
  scratch: Any,
  programs: int,
  name: str,
  interpret: Any,
) -> Any:
  """Runs `body(*arguments, out, scratch)` in every program."""

  def kernel(*refs: Ref) -> None:
    pl.run_scoped(lambda s: body(*refs, s), scratch, collective_axes="wg")

  (results,) = pl.kernel(
    kernel,
    (out,),
    mesh=plgpu.Mesh(
      grid=(programs,),
      grid_names=("program",),
      num_threads=WORKERS + 1,
      thread_name="wg",
      kernel_name=name,
    ),
    compiler_params=plgpu.CompilerParams(
      approx_math=True,
      lowering_semantics=plgpu.LoweringSemantics.Warpgroup,
    ),
    interpret=interpret,
    name=name,
  )(*arguments)
  return results


def dot(
  P: Problem,
  a: Ref,
  b: Ref,
  meanwhile: Callable[[], None] = lambda: None,
) -> Array:
  """`a @ b.T`, both in shared memory; `meanwhile` runs under the product."""
  if P.interpret:
    meanwhile()
    return _interpreted(a[...], b[...])

  def body(acc: Ref) -> Array:
    plgpu.wgmma(acc, a, b.transpose((1, 0)))
    meanwhile()
    return acc[...]

  return pl.run_scoped(body, _accumulator(a, b))


def two_dots(
  P: Problem,
  first: tuple[Ref, Ref],
  second: tuple[Ref, Ref],
  between: Callable[[Array], Any],
) -> tuple[Any, Array]:
  """`between(a @ b.T)` under the second product, and that."""
  if P.interpret:
    return between(dot(P, *first)), dot(P, *second)

  def body(one: Ref, two: Ref) -> Any:
    for acc, (a, b) in ((one, first), (two, second)):
      plgpu.wgmma(acc, a, b.transpose((1, 0)))
    value = between(plgpu.wgmma_accumulator_load(one, wait_n=1))
    return value, plgpu.wgmma_accumulator_load(two, wait_n=0)

  return pl.run_scoped(body, _accumulator(*first), _accumulator(*second))


def accumulate(
  P: Problem,
  sums: tuple[Array, ...],
  *products: tuple[Callable[[], Array], Ref],
) -> tuple[Array, ...]:
  """`sum + a() @ b` for each sum; a in registers, b in shared memory."""
  if P.interpret:
    return tuple(
      s + _interpreted(a(), b[...], contract=0)
      for s, (a, b) in zip(sums, products, strict=True)
    )

  def body(refs: tuple[Ref, ...]) -> None:
    for ref, (a, b) in zip(refs, products, strict=True):
      plgpu.wgmma(ref, a(), b)

  return pl.run_state(body)(tuple(plgpu.ACC.init(s) for s in sums))


def _accumulator(a: Ref, b: Ref) -> Any:
  return plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32)


def _interpreted(a: Array, b: Array, contract: int = 1) -> Array:
  dims = (((1,), (contract,)), ((), ()))
  return lax.dot_general(a, b, dims, preferred_element_type=jnp.float32)


def spread(row: Array, shape: tuple[int, ...], axis: int = 0) -> Array:
  """A number for each place along `axis`, repeated along the other."""
  return lax.broadcast_in_dim(row, shape, (axis,))


def capped(P: Problem, s: Array) -> Array:
  """`tanh(scale * s / softcap)`.

  From exp2: the GPU's own tanh errs by 5e-4, which a cap of 50 would make 3%
  of a probability. At both ends rsqrt gives what it should, 0 and 1.
  """
  assert P.softcap is not None
  r = lax.rsqrt(1 + jnp.exp2(s * (2 * LOG2E * P.scale / P.softcap)))
  return 1 - 2 * (r * r)


class Block(NamedTuple):
  """A worker's part of a pair of blocks, for the mask.

  Attributes:
    t0: Its first query.
    s0: Its first key.
    head: Key head, of B * K.
    q_ids: Ref to the queries' ids, or `None`.
    k_ids: Ref to the keys' ids, or `None`.
    q_axis: Where queries lie in the scores.
  """

  t0: Any
  s0: Any
  head: Any
  q_ids: Ref | None
  k_ids: Ref | None
  q_axis: int = 0

  def seen(self, P: Problem, x: Inputs, shape: tuple[int, ...]) -> Array:
    """Which pairs of a query and a key are visible."""
    k_axis = 1 - self.q_axis
    s = self.s0 + lax.broadcasted_iota(jnp.int32, shape, k_axis)
    p = lax.broadcasted_iota(jnp.int32, shape, self.q_axis)
    p = p + (x.numbers[1] + self.t0)
    # One number for each token, and a comparison for each pair.
    seen: list[Array] = []
    k_ids = None
    if self.q_ids is not None and self.k_ids is not None:
      k_ids = self.k_ids[...]
      ids = spread(lax.shift_right_arithmetic(k_ids, 1), shape, k_axis)
      seen.append(ids == spread(self.q_ids[...], shape, self.q_axis))
    if P.is_causal:
      seen.append(s <= p)
    if P.window is not None:
      near = p - s < P.window
      if not P.is_causal:
        near &= s - p < P.window
      if P.sinks and k_ids is not None:
        near |= spread(k_ids & 1, shape, k_axis) == 1
      elif P.sinks:
        near |= s < P.sinks
      seen.append(near)
    if P.has_length:
      seen.append(s < x.numbers[2])
    if P.q_block:
      i, j = lax.div(self.t0, P.q_block), lax.div(self.s0, P.kv_block)
      chosen = x.table[self.head, i, j]
      seen.append(lax.broadcast_in_dim(chosen, shape, ()) == 1)
    if not seen:
      seen.append(s >= 0)
    return functools.reduce(lax.bitwise_and, seen)


class Place(NamedTuple):
  """What a program of the forward pass or for dq does.

  Attributes:
    head: Key head, of B * K.
    batch: Its sequence.
    i: Block of queries.
    row: Which lists.
    x: The worker's query head, of X.
    t0: The worker's first query.
  """

  head: Any
  batch: Any
  i: Any
  row: Any
  x: Any
  t0: Any

  @classmethod
  def of(cls, P: Problem, worker: Any) -> "Place":
    """The heads of a group side by side, then the longest lists first."""
    program = lax.axis_index("program")
    bq = query_block(P.G)
    together = bq == ROWS
    parts = P.G // WORKERS if together else P.G
    part = lax.rem(program, parts)
    rest = lax.div(program, parts)
    blocks = P.T // bq
    head = lax.div(rest, blocks)
    i = blocks - 1 - lax.rem(rest, blocks)
    g = part * WORKERS + worker if together else part
    t0 = i * bq if together else i * bq + worker * ROWS
    return cls(
      head, lax.div(head, P.K), i, P.list_row(head), head * P.G + g, t0
    )


def worker_role() -> tuple[Any, Any]:
  """Number of this warpgroup, and whether it works or fetches."""
  wg = lax.axis_index("wg")
  return wg, wg < WORKERS


def fill_ring(
  n: Any, stages: int, free: Sequence[Ref], fill: Callable[[Any], None]
) -> None:
  """Fills the ring's place for step n, once it is free."""
  slot = lax.rem(n, stages)

  @pl.when(n >= stages)
  def _() -> None:
    for barrier in free:
      plgpu.barrier_wait(barrier.at[slot])

  fill(slot)


def drain_ring(total: Any, stages: int, free: Sequence[Ref]) -> None:
  """Waits until the workers have left the ring."""

  @pl.loop(jnp.maximum(total - stages, 0), total)
  def _(n: Any) -> None:
    for barrier in free:
      plgpu.barrier_wait(barrier.at[lax.rem(n, stages)])


def start_copies(barrier: Ref, *pairs: tuple[Ref, Ref]) -> None:
  """Starts copies into shared memory; the barrier counts them."""
  for source, target in pairs:
    plgpu.copy_gmem_to_smem(source, target, barrier)


def report_blocks(x: Inputs, done: Ref, row: Any, i: Any, wg: Any) -> None:
  """Writes how many blocks this program went through."""

  @pl.when(wg == 0)
  def _() -> None:
    done[lax.axis_index("program")] = x.lists.total(row, i)


def like_all(*trees: Any) -> Array:
  """A number that varies over every mesh axis that the trees vary over."""
  return vary_like(jnp.zeros(()), trees)
