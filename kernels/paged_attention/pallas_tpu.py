"""Attention over pages as a Pallas kernel for TPU.

A step of the grid is a row: a sequence, a key head and a block of queries with
all query heads of that key head. It walks the row's pages, some at a time,
which come by asynchronous copies into one of two buffers while the other is
computed on; the last step of a row already fetches the first of the next. How
many steps there are is a value, so a row costs what it reads.

Numbers of pages reach scalar memory row by row, so that only one row's table,
not the batch's, must fit. What stands beside the keys (scales, positions,
log-weights) has one number a key; eight pages' rows of it are a tile, which is
fetched whole. Rows narrower than the 128 lanes XLA lays out otherwise, so that
with pages of less than 128 keys it copies those of the layer first: 4 bytes a
key of the layer's pages, padded to whole lanes.

A head narrower than the 128 lanes would be padded to them in memory. Such
pages are handed over *turned*, keys along the lanes, as in
`attention/pallas_tpu.py`; they must then hold whole lanes of keys.

Source: Dao, FlashAttention-2 (arXiv 2307.08691); the buffers follow JAX's
paged attention.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jaxchunk.kernels.attention.tpu.work import LANES
from jaxchunk.kernels.paged_attention.pages import KVPages, PageView
from jaxchunk.kernels.paged_attention.tpu.body import paged_kernel
from jaxchunk.kernels.paged_attention.tpu.work import (
  BESIDE,
  TILE,
  Form,
  TpuSteps,
  row_words,
  unsupported,
)
from jaxchunk.kernels.vma import output, vary_like


def tpu_paged_forward(
  q: Float[Array, "B K G T H"],
  pages: KVPages,
  view: PageView,
  q_positions: Int[Array, "B T"],
  *,
  layer: Any = 0,
  window: int | None = None,
  scale: float,
  softcap: float | None = None,
  sizes: TpuSteps | None = None,
  interpret: Any = False,
) -> tuple[Float[Array, "B K G T H"], Float[Array, "B K G T"]]:
  """See `api.paged_attention`; its queries grouped by key head.

  Args:
    q: Queries, bf16 or fp32.
    pages: The cache. With pages of less than 128 keys, or a number of pages
      that is no multiple of 8, the layer's part of what stands beside the keys
      is copied.
    view: Which pages each row reads.
    q_positions: Position of each query, negative for none.
    layer: Which layer of the cache; may be traced.
    window: How many positions a query sees, its own the last of them.
    scale: Factor on the scores.
    softcap: Scores become `softcap * tanh(score / softcap)`.
    sizes: The most that a step takes.
    interpret: As in `pallas_call`; sizes may then be anything.

  Returns:
    The output in q's dtype and the log-sum-exp in fp32, 0 and -inf for a query
    that sees nothing.

  Raises:
    NotImplementedError: See `unsupported`.
  """
  reason = unsupported(q, pages, view)
  if reason is not None and not interpret:
    raise NotImplementedError(
      f"the TPU kernel of paged attention cannot run here: {reason}; "
      'implementation="xla" can'
    )
  B, K, G, T, H = q.shape
  sizes = sizes or TpuSteps()
  Q = min(T, max(1, sizes.queries // G))
  short = -T % Q
  q_rows = jnp.pad(q, ((0, 0),) * 3 + ((0, short), (0, 0)))
  blocks = q_rows.shape[3] // Q
  q_rows = q_rows.reshape(B, K, G, blocks, Q, H).swapaxes(2, 3)
  # Whole tiles of queries, also of 16 bits.
  fill = -(G * Q) % 16
  q_rows = q_rows.reshape(B * K * blocks, G * Q, H)
  q_rows = jnp.pad(q_rows, ((0, 0), (0, fill), (0, 0)))
  position = jnp.pad(q_positions, ((0, 0), (0, short)), constant_values=-1)
  position = position.reshape(B, blocks, Q)
  Z, rows = pages.k.shape[3], len(q_rows)
  form = Form(
    (K, G),
    Q,
    blocks,
    # Two cores where there are two: each takes a half, in order.
    rows // 2 if rows % 2 == 0 else rows,
    Z,
    max(1, sizes.keys // Z),
    pages.k.shape[2],
    H % LANES != 0 and Z % LANES == 0,
    tuple(name for name in BESIDE if getattr(pages, name) is not None),
    window,
    scale,
    softcap,
    q.dtype,
  )
  words = row_words(form, view, position, pages.positions is None)
  position = jnp.tile(position, (1, 1, G)).reshape(B * blocks, G * Q, 1)
  position = jnp.pad(position, ((0, 0), (0, fill), (0, 0)), constant_values=-1)
  o, lse = _call(
    form, words, q_rows, position, pages, view.table, layer, interpret
  )

  def back(a: Array) -> Array:
    a = a[:, : G * Q].reshape(B, K, blocks, G, Q, *a.shape[2:])
    a = a.swapaxes(2, 3)
    return a.reshape(B, K, G, blocks * Q, *a.shape[5:])[:, :, :, :T]

  return back(o), back(lse)


def _call(
  form: Form,
  words: Int[Array, " words"],
  q: Float[Array, "rows Q H"],
  position: Int[Array, "BI Q 1"],
  pages: KVPages,
  table: Int[Array, "B K M"],
  layer: Any,
  interpret: Any,
) -> tuple[Float[Array, "rows Q H"], Float[Array, "rows Q"]]:
  """Runs the kernel over all rows."""
  rows, Q, H = q.shape
  M = table.shape[2]
  k, v = (a.swapaxes(-1, -2) if form.turned else a for a in (pages.k, pages.v))
  layer = jnp.asarray(layer, jnp.int32)
  beside = [_tiled(form, getattr(pages, name), layer) for name in form.beside]
  # Of k and v, and of what stands beside them.
  layer = jnp.stack([layer, layer if form.in_place else jnp.zeros_like(layer)])
  table = table.reshape(-1, 1, M)
  operands = (words, layer, table, table, q, position, k, v, *beside)
  operands = vary_like(operands, operands)

  anywhere = pl.BlockSpec(memory_space=pl.ANY)
  tail = (H, form.keys) if form.turned else (form.step, form.page, H)
  tiles = (form.step, TILE, form.page)
  buffers = [pltpu.VMEM((2, *tail), a.dtype) for a in (k, v)]
  buffers += [pltpu.VMEM((2, *tiles), a.dtype) for a in beside]
  tables_and_q, out_specs = _specs(form, q.shape, M)
  call = pl.pallas_call(
    functools.partial(paged_kernel, form),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(rows // form.rows, form.rows),
      in_specs=tables_and_q + [anywhere] * (2 + len(beside)),
      out_specs=out_specs,
      scratch_shapes=[
        *buffers,
        pltpu.SemaphoreType.DMA((2,)),
        pltpu.VMEM((Q, H), jnp.float32),
        pltpu.VMEM((Q, LANES), jnp.float32),
        pltpu.VMEM((Q, LANES), jnp.float32),
      ],
    ),
    out_shape=[
      output(q.shape, q.dtype, operands[0]),
      output((rows, Q, 1), jnp.float32, operands[0]),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "arbitrary"),
    ),
    cost_estimate=_cost(form, q, k, rows * M * form.page // form.blocks),
    interpret=interpret,
    name="paged_attention",
  )
  o, lse = call(*operands)
  return o, lse[..., 0]


def _specs(
  form: Form, shape: tuple[int, ...], M: int
) -> tuple[list[pl.BlockSpec], list[pl.BlockSpec]]:
  """Of the tables of a row and of the next, q, positions; of o and the lse."""
  rows, Q, H = shape

  def row(c: Any, i: Any) -> Any:
    return c * form.rows + i

  def of_row(*tail: int) -> pl.BlockSpec:
    zeros = (0,) * len(tail)
    return pl.BlockSpec((None, *tail), lambda c, i, *_: (row(c, i), *zeros))

  def of_table(ahead: int) -> pl.BlockSpec:
    def index(c: Any, i: Any, *_: Any) -> Any:
      x = jnp.minimum(row(c, i) + ahead, rows - 1)
      return lax.div(x, jnp.int32(form.blocks)), 0, 0

    return pl.BlockSpec((None, 1, M), index, memory_space=pltpu.SMEM)

  def of_position(c: Any, i: Any, *_: Any) -> Any:
    b = lax.div(row(c, i), jnp.int32(form.heads[0] * form.blocks))
    block = lax.rem(row(c, i), jnp.int32(form.blocks))
    return b * form.blocks + block, 0, 0

  tables = [of_table(0), of_table(1)]
  position = pl.BlockSpec((None, Q, 1), of_position)
  return [*tables, of_row(Q, H), position], [of_row(Q, H), of_row(Q, 1)]


def _tiled(form: Form, a: Array, layer: Any) -> Array:
  """What stands beside the keys in whole tiles; a layer's part if copied."""
  if form.in_place:
    return a
  a = lax.dynamic_slice_in_dim(a, layer, 1, 0)
  return jnp.pad(a, ((0, 0), (0, 0), (0, -form.pages % TILE), (0, 0)))


def _cost(form: Form, q: Array, k: Array, keys: int) -> pl.CostEstimate:
  """As if every table were full."""
  _, Q, H = q.shape
  return pl.CostEstimate(
    flops=4 * keys * form.blocks * Q * H,
    transcendentals=keys * form.blocks * Q,
    bytes_accessed=2 * keys * form.blocks * H * k.dtype.itemsize,
  )
