"""The GPU kernel of cross-entropy itself: x w^T by tiles, with two ends."""

import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Int

from jaxchunk.kernels.attention.hopper.problem import (
  FETCH_REGISTERS,
  LOG2E,
  ROWS,
  WORK_REGISTERS,
  WORKERS,
  Ref,
)
from jaxchunk.kernels.attention.hopper.warps import (
  drain_ring,
  fill_ring,
  launch,
  spread,
  start_copies,
  worker_role,
)
from jaxchunk.kernels.attention.softmax import LOWEST
from jaxchunk.kernels.vma import output

TILE_ROWS = ROWS * WORKERS
# Columns of a step: 128 bytes, the widest that shared memory is swizzled by.
DEPTH = 64
# Copies into swizzled memory start at a multiple of so many rows.
EIGHT = 8
# Blocks of rows that go together through the vocabulary.
_GROUP = 16


class Problem(NamedTuple):
  """What is known when a kernel is traced.

  Attributes:
    rows: Of x.
    vocab: Entries of the vocabulary.
    width: D.
    whole: Entries of the whole vocabulary.
    tile: See `GpuBlocks`, like `stages` and `programs`.
    dtype: Of x.
    softcap: Bounds the logits.
    interpret: See `linear_cross_entropy`.
  """

  rows: int
  vocab: int
  width: int
  whole: int
  tile: int
  stages: int
  programs: int
  dtype: Any
  softcap: float | None
  interpret: Any

  @property
  def steps(self) -> int:
    """Of a tile."""
    return self.width // DEPTH

  @property
  def tiles(self) -> tuple[int, int]:
    """Of rows, and of the vocabulary."""
    return self.rows // TILE_ROWS, self.vocab // self.tile

  def count(self, program: Any) -> Any:
    """How many tiles a program has: every `programs`th."""
    tiles = math.prod(self.tiles)
    return lax.div(tiles - 1 - program, self.started()) + 1

  def started(self) -> int:
    """How many programs there are."""
    return min(self.programs, math.prod(self.tiles))

  def place(self, program: Any, n: Any) -> tuple[Any, Any]:
    """The first row and the first entry of a program's nth tile."""
    blocks, entries = self.tiles
    t = program + n * self.started()
    group = lax.div(t, _GROUP * entries)
    t = lax.rem(t, _GROUP * entries)
    size = jnp.minimum(_GROUP, blocks - group * _GROUP)
    row = group * _GROUP + lax.rem(t, size)
    return row * TILE_ROWS, lax.div(t, size) * self.tile


class Inputs(NamedTuple):
  """What the kernel reads, for a block of R rows and W vocabulary entries.

  Attributes:
    x: `[R,D]`.
    w: `[W,D]`, or all of the head.
    numbers: An eighth of where the block starts in w, and the first of its
      entries that no block before it had.
    labels: `[R]`, counted from the block's first entry.
    lse: `[R]`, like all that follows backward only.
    g_nll: `[R]`, the cotangent of nll.
    g_sum: `[R]`, that and the cotangent of lse.
  """

  x: Any
  w: Any
  numbers: Any
  labels: Any
  lse: Any = None
  g_nll: Any = None
  g_sum: Any = None


class _Scratch(NamedTuple):
  """Shared memory and barriers.

  The ring has a barrier for each place: `full` when the copies are there,
  `free` when both workers are done. `rows` holds the fields of `Inputs` that
  are known of a row, and `out` what a tile leaves.
  """

  x: Any
  w: Any
  full: Any
  free: Any
  rows: Any
  rows_full: Any
  out: Any

  @classmethod
  def of(cls, P: Problem, inputs: Inputs, outputs: int) -> "_Scratch":
    """What to allocate; one output is a tile, several are of rows."""
    of_rows = [a for a in inputs[3:] if a is not None]
    tile = outputs == 1
    return cls(
      x=plgpu.SMEM((P.stages * WORKERS, ROWS, DEPTH), P.dtype),
      w=plgpu.SMEM((P.stages, P.tile, DEPTH), P.dtype),
      full=plgpu.Barrier(num_barriers=P.stages, num_arrivals=WORKERS + 1),
      free=plgpu.Barrier(num_barriers=P.stages, num_arrivals=WORKERS),
      rows=[plgpu.SMEM((WORKERS, ROWS), a.dtype) for a in of_rows],
      rows_full=plgpu.Barrier(num_barriers=WORKERS, num_arrivals=len(of_rows)),
      out=[
        plgpu.SMEM((WORKERS, ROWS, P.tile), P.dtype)
        if tile
        else plgpu.SMEM((WORKERS, ROWS), jnp.float32)
        for _ in range(outputs)
      ],
    )


def run(P: Problem, finish: Any, inputs: Inputs, name: str) -> list[Array]:
  """Runs the kernel over a block of rows and vocabulary."""
  rows = output((P.tiles[1], P.rows), jnp.float32, inputs.x)
  out = {"top": rows, "total": rows, "picked": rows}
  if inputs.lse is not None:
    out = {"d": output((P.rows, P.vocab), P.dtype, inputs.x)}
  out = launch(
    functools.partial(_body, P, finish),
    (inputs,),
    out=out,
    scratch=_Scratch.of(P, inputs, len(out)),
    programs=P.started(),
    name=f"cross_entropy_{name}",
    interpret=P.interpret,
  )
  return list(out.values())


def _body(
  P: Problem, finish: Any, inputs: Inputs, out: Any, m: _Scratch
) -> None:
  """One program: two workers, and one warpgroup that fetches for them."""
  wg, works = worker_role()
  program = lax.axis_index("program")
  count = P.count(program)

  @pl.when(works)
  def _() -> None:
    plgpu.set_max_registers(WORK_REGISTERS, action="increase")

    @pl.loop(0, count)
    def _(n: Any) -> None:
      row, entry = P.place(program, n)
      row = row + wg * ROWS
      of_rows = [a for a in inputs[3:] if a is not None]
      start_copies(
        m.rows_full.at[wg],
        *(
          (a.at[pl.ds(row, ROWS)], b.at[wg])
          for a, b in zip(of_rows, m.rows, strict=True)
        ),
      )
      s = _product(P, m, wg, n * P.steps)
      plgpu.barrier_wait(m.rows_full.at[wg])
      finish(P, inputs, out, m, s, wg, row, entry)

  @pl.when(jnp.logical_not(works))
  def _() -> None:
    plgpu.set_max_registers(FETCH_REGISTERS, action="decrease")

    @pl.loop(0, count * P.steps)
    def _(n: Any) -> None:
      row, entry = P.place(program, lax.div(n, P.steps))
      entry = entry + inputs.numbers[0] * EIGHT
      columns = pl.ds(lax.rem(n, P.steps) * DEPTH, DEPTH)

      def fill(slot: Any) -> None:
        pairs = [(inputs.w.at[pl.ds(entry, P.tile), columns], m.w.at[slot])]
        for worker in range(WORKERS):
          rows = pl.ds(row + worker * ROWS, ROWS)
          place = m.x.at[slot * WORKERS + worker]
          pairs.append((inputs.x.at[rows, columns], place))
        start_copies(m.full.at[slot], *pairs)

      fill_ring(n, P.stages, [m.free], fill)

    drain_ring(count * P.steps, P.stages, [m.free])


def _product(P: Problem, m: _Scratch, wg: Any, first: Any) -> Array:
  """A worker's 64 rows times a tile of the vocabulary, from step `first`."""

  def place(k: Any) -> Any:
    return lax.rem(first + k, P.stages)

  if P.interpret:

    def add(k: Any, s: Array) -> Array:
      plgpu.barrier_wait(m.full.at[place(k)])
      dims = (((1,), (1,)), ((), ()))
      x, w = m.x[place(k) * WORKERS + wg], m.w[place(k)]
      s += lax.dot_general(x, w, dims, preferred_element_type=jnp.float32)
      plgpu.barrier_arrive(m.free.at[place(k)])
      return s

    s = jnp.zeros((ROWS, P.tile), jnp.float32)
    return lax.fori_loop(0, P.steps, add, s)

  def body(acc: Ref) -> Array:
    def multiply(k: Any) -> None:
      plgpu.barrier_wait(m.full.at[place(k)])
      w = m.w.at[place(k)].transpose((1, 0))
      plgpu.wgmma(acc, m.x.at[place(k) * WORKERS + wg], w)

    multiply(0)

    @pl.loop(1, P.steps)
    def _(k: Any) -> None:
      multiply(k)
      # While this step is multiplied, the one before it is done.
      plgpu.wgmma_wait(1)
      plgpu.barrier_arrive(m.free.at[place(k - 1)])

    s = acc[...]
    plgpu.barrier_arrive(m.free.at[place(P.steps - 1)])
    return s

  return pl.run_scoped(body, plgpu.ACC((ROWS, P.tile), jnp.float32))


def _capped(P: Problem, s: Array) -> tuple[Array, Array | None]:
  """The logits, and their share of the cap.

  From exp2: the GPU's own tanh errs by 5e-4, which a cap of 50 would make 3%
  of a probability. At both ends rsqrt gives what it should, 0 and 1.
  """
  if P.softcap is None:
    return s, None
  r = lax.rsqrt(1 + jnp.exp2(s * (2 * LOG2E / P.softcap)))
  t = 1 - 2 * (r * r)
  return t * P.softcap, t


def _columns(shape: tuple[int, ...], entry: Any) -> Int[Array, "R W"]:
  return lax.broadcasted_iota(jnp.int32, shape, 1) + entry


def finish_forward(
  P: Problem,
  inputs: Inputs,
  out: Any,
  m: _Scratch,
  s: Array,
  wg: Any,
  row: Any,
  entry: Any,
) -> None:
  """Leaves the maximum, the sum and the label's logit of every row."""
  s, _ = _capped(P, s)
  columns = _columns(s.shape, entry)
  if P.whole % P.vocab:
    s = jnp.where(columns >= inputs.numbers[1], s, -jnp.inf)
  (labels,) = (a[wg] for a in m.rows)
  hit = columns == spread(labels, s.shape)
  picked = jnp.where(hit, s, 0.0).sum(axis=1)
  # Finite, so that a tile that is masked throughout gives 0.
  top = jnp.maximum(s.max(axis=1), LOWEST)
  total = jnp.exp2((s - spread(top, s.shape)) * LOG2E).sum(axis=1)
  for buffer, value in zip(m.out, (top, total, picked), strict=True):
    buffer[wg] = value
  plgpu.commit_smem()
  block = lax.div(entry, P.tile)
  for buffer, target in zip(m.out, out.values(), strict=True):
    rows = target.at[block, pl.ds(row, ROWS)]
    plgpu.copy_smem_to_gmem(buffer.at[wg], rows)
  plgpu.wait_smem_to_gmem(0)


def finish_backward(
  P: Problem,
  inputs: Inputs,
  out: Any,
  m: _Scratch,
  s: Array,
  wg: Any,
  row: Any,
  entry: Any,
) -> None:
  """Leaves the cotangent of the logits."""
  s, t = _capped(P, s)
  labels, lse, g_nll, g_sum = (spread(a[wg], s.shape) for a in m.rows)
  columns = _columns(s.shape, entry)
  d = jnp.exp2((s - lse) * LOG2E) * g_sum
  d = d - jnp.where(columns == labels, g_nll, 0.0)
  if t is not None:
    d = d * (1 - t * t)
  if P.whole % P.vocab:
    d = jnp.where(columns >= inputs.numbers[1], d, 0.0)
  (buffer,) = m.out
  buffer[wg] = d.astype(P.dtype)
  plgpu.commit_smem()
  target = out["d"].at[pl.ds(row, ROWS), pl.ds(entry, P.tile)]
  plgpu.copy_smem_to_gmem(buffer.at[wg], target)
  plgpu.wait_smem_to_gmem(0)
