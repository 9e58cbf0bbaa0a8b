"""Flash attention as Pallas kernels for TPU, forward and backward.

The same calling convention as xla.py. A list of the pairs of blocks that the
mask leaves alive is made by a few XLA operations and prefetched as scalars;
the kernels walk it, so that every step of the grid is work and the number of
steps is a value inside the program. A pair that is wholly visible runs without
a mask.

Scores are transposed, [keys, queries]: what is known of a query (maximum, sum,
lse, delta, ids) then lies along the lanes and is broadcast for free. The query
heads of a key head go through a step together and share its keys and mask.

A head narrower than the 128 lanes would be padded to them in memory, twice the
cache at H = 64. Such arrays are therefore handed over *turned*, tokens along
the lanes, which is also how XLA lays them out by itself.

Source: Dao, FlashAttention-2 (arXiv 2307.08691); the prefetched lists follow
JAX's splash attention.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jaxchunk.kernels.attention.block_sizes import TpuBlocks
from jaxchunk.kernels.attention.blocks import Grid, Visible
from jaxchunk.kernels.attention.mask import AttentionMask
from jaxchunk.kernels.attention.softmax import LOWEST
from jaxchunk.kernels.attention.tpu.bodies import (
  Form,
  Step,
  dkv_kernel,
  dq_kernel,
  forward_kernel,
)
from jaxchunk.kernels.attention.tpu.work import (
  LANES,
  LOG2_E,
  Work,
  choose_blocks,
  unsupported,
)
from jaxchunk.kernels.vma import output, vary_like


@dataclasses.dataclass(frozen=True)
class _Call:
  """One run of a kernel: its list of pairs, and where its blocks come from.

  Attributes:
    form: What is static.
    work: The list of pairs.
    visible: The mask by token.
    place: Layer, and the block of keys at row 0 of dk and dv.
    interpret: As `pallas_call`.
    count_blocks: Also return how many pairs were executed.
  """

  form: Form
  work: Work
  visible: Visible
  place: Int[Array, " 2"]
  interpret: Any
  count_blocks: bool

  @classmethod
  def of(
    cls,
    q: Float[Array, "B K G T H"],
    mask: AttentionMask,
    grid: Grid,
    *,
    layer: Any,
    dkv_start: Any = 0,
    by_key: bool = False,
    scale: float,
    softcap: float | None,
    interpret: Any,
    count_blocks: bool,
  ) -> "_Call":
    """From the arguments of `tpu_forward` and `tpu_backward`."""
    B, K, G, _, H = q.shape
    base = jnp.asarray(dkv_start, jnp.int32) // grid.bk
    fallback = jnp.clip(base, 0, grid.num_kv() - 1)
    work = Work.of(q, mask, grid, by_key=by_key, fallback=fallback)
    form = Form(
      grid,
      (K, G),
      H,
      turned=H % LANES != 0,
      by_key=by_key,
      share=work.share,
      length=len(work.words) * work.share // (B * K),
      scale=scale,
      softcap=softcap,
      # A product of fp32 blocks is otherwise one of bf16.
      precision=lax.Precision.HIGHEST if q.dtype == jnp.float32 else None,
    )
    visible = jax.tree.map(
      lambda a: a.astype(jnp.int32)[:, None], Visible.of(mask, grid.T, grid.S)
    )
    place = jnp.stack([jnp.asarray(layer, jnp.int32), base])
    return cls(form, work, visible, place, interpret, count_blocks)

  def enter(self, a: Array, *leading: int) -> Array:
    """The array as the kernels take it; in memory it stays where it is."""
    a = a.reshape(*leading, *a.shape[-2:])
    return a.swapaxes(-1, -2) if self.form.turned else a

  def leave(self, a: Array, shape: tuple[int, ...]) -> Array:
    """The inverse of `enter`."""
    a = a.swapaxes(-1, -2) if self.form.turned else a
    return a.reshape(shape)

  def _spec(self, shape: tuple[int | None, ...], place: Any) -> pl.BlockSpec:
    def index(x: Any, n: Any, words: Any, where: Any) -> Any:
      return place(x, self.form.step(x, n, words), where)

    return pl.BlockSpec(shape, index)

  def of_queries(self) -> pl.BlockSpec:
    """A block of `[X,G,T,H]`, of `[X,G,H,T]` if turned."""
    form = self.form
    G, bq, H = form.heads[1], form.grid.bq, form.width
    if form.turned:
      return self._spec((None, G, H, bq), lambda x, at, _: (x, 0, 0, at.i))
    return self._spec((None, G, bq, H), lambda x, at, _: (x, 0, at.i, 0))

  def of_rows(self) -> pl.BlockSpec:
    """A block of `[X,G,T]`."""
    shape = (None, self.form.heads[1], self.form.grid.bq)
    return self._spec(shape, lambda x, at, _: (x, 0, at.i))

  def of_cache(self, *, gradient: bool = False) -> pl.BlockSpec:
    """A block of `[L,X,S,H]`, of `[L,X,H,S]` if turned, or of dk and dv."""
    bk, H = self.form.grid.bk, self.form.width

    def index(x: Any, at: Step, where: Any) -> Any:
      block = at.j - where[1] if gradient else at.j
      tail = (0, block) if self.form.turned else (block, 0)
      return (where[0], x, *tail)

    tail = (H, bk) if self.form.turned else (bk, H)
    return self._spec((None, None, *tail), index)

  def of_visible(self) -> Visible:
    """Blocks of the rows of the mask, where it has them."""
    K = self.form.heads[0]

    def spec(field: str, a: Array | None) -> pl.BlockSpec | None:
      if a is None:
        return None
      batched, keys = len(a) > 1, field in ("k_ids", "sinks")
      size = self.form.grid.bk if keys else self.form.grid.bq
      return self._spec(
        (None, 1, size),
        lambda x, at, _: (
          lax.div(x, jnp.int32(K)) if batched else 0,
          0,
          at.j if keys else at.i,
        ),
      )

    return Visible._make(map(spec, Visible._fields, self.visible))

  def run(
    self,
    kernel: Any,
    inputs: list[tuple[Array, pl.BlockSpec]],
    outputs: list[tuple[tuple[int, ...], Any, pl.BlockSpec]],
    scratch: list[tuple[int, ...]],
    *,
    products: int,
    in_place: int = 0,
  ) -> list[Array]:
    """Runs a kernel over the list.

    Args:
      kernel: Takes the form, the step, the mask's rows, and all references.
      inputs: Arrays and their blocks.
      outputs: Shapes, dtypes and blocks.
      scratch: Shapes in fp32.
      products: Matrix products per pair and query head.
      in_place: How many last inputs are updated in place, in order.

    Returns:
      The outputs, and with `count_blocks` how many pairs each key head had.
    """
    X = inputs[0][0].shape[0]
    arrays, in_specs = zip(*inputs, strict=True)
    operands = (self.work.words, self.place, self.visible, *arrays)
    if self.count_blocks:
      count = self._spec((None, 8, LANES), lambda x, at, _: (x, 0, 0))
      outputs = [*outputs, ((X, 8, LANES), jnp.int32, count)]
    operands, steps = vary_like((operands, self.work.steps), operands)
    like = operands[0]
    first = len(jax.tree.leaves(operands)) - in_place
    results = pl.pallas_call(
      functools.partial(self._body, kernel, len(inputs) + len(outputs) - 1),
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(X, steps),
        in_specs=[self.of_visible(), *in_specs],
        out_specs=[spec for *_, spec in outputs],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
      ),
      out_shape=[output(shape, dtype, like) for shape, dtype, _ in outputs],
      input_output_aliases={first + n: n for n in range(in_place)},
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"),
      ),
      cost_estimate=self._cost(products, arrays[0].dtype.itemsize),
      interpret=self.interpret,
      name=kernel.__name__.strip("_"),
    )(*operands)
    if self.count_blocks:
      results = [*results[:-1], results[-1][:, 0, 0]]
    return list(results)

  def _body(self, kernel: Any, place_of_count: int, *refs: Any) -> None:
    words, _, visible, *blocks = refs
    x, n = pl.program_id(0), pl.program_id(1)
    step = self.form.step(x, n, words)
    if self.count_blocks:
      count = blocks.pop(place_of_count)

      @pl.when(n == 0)
      def _start() -> None:
        count[...] = jnp.zeros_like(count)

      @step.visit
      def _add(_: bool) -> None:
        count[...] += 1

    kernel(self.form, step, visible, tuple(blocks))

  def _cost(self, products: int, itemsize: int) -> pl.CostEstimate:
    """As if every pair of blocks that may be live were."""
    form, pairs = self.form, len(self.work.words) * self.work.share
    rows = form.heads[1] * form.grid.bq
    scores = pairs * rows * form.grid.bk
    # What a step fetches anew: queries and do, or keys and values.
    fetched = 2 * pairs * (rows if form.by_key else form.grid.bk)
    return pl.CostEstimate(
      flops=2 * products * scores * form.width,
      transcendentals=scores,
      bytes_accessed=fetched * form.width * itemsize,
    )


def tpu_forward(
  q: Float[Array, "B K G T H"],
  k: Float[Array, "L B K S H"],
  v: Float[Array, "L B K S H"],
  mask: AttentionMask,
  *,
  layer: Any = 0,
  scale: float,
  softcap: float | None = None,
  blocks: TpuBlocks | None = None,
  interpret: Any = False,
  count_blocks: bool = False,
) -> Any:
  """Attention of a block of queries over one layer of a cache.

  Args:
    q: Queries, bf16 or fp32.
    k: Keys of every layer.
    v: Values of every layer.
    mask: Which keys each query sees.
    layer: Which layer of the cache; may be traced.
    scale: Factor on the scores.
    softcap: Scores become `softcap * tanh(score / softcap)`.
    blocks: The largest block sizes; by default from a table.
    interpret: As in `pallas_call`; block sizes may then be anything.
    count_blocks: Also count the pairs of blocks that were executed.

  Returns:
    The output in q's dtype and the log-sum-exp of the scores in fp32, 0 and
    -inf for a query that sees nothing; with `count_blocks` also counts `[B*K]`.

  Raises:
    NotImplementedError: See `unsupported`.
  """
  sizes = _sizes(q, k, mask, blocks, interpret)
  B, K, G, T, H = q.shape
  X = B * K
  grid = Grid(T, k.shape[3], sizes.q, sizes.kv)
  call = _Call.of(
    q,
    mask,
    grid,
    layer=layer,
    scale=scale,
    softcap=softcap,
    interpret=interpret,
    count_blocks=count_blocks,
  )
  q_ = call.enter(q, X, G)
  k_, v_ = (call.enter(a, len(a), X) for a in (k, v))
  o, lse, *count = call.run(
    forward_kernel,
    [
      (q_, call.of_queries()),
      (k_, call.of_cache()),
      (v_, call.of_cache()),
    ],
    [
      (q_.shape, q.dtype, call.of_queries()),
      ((X, G, T), jnp.float32, call.of_rows()),
    ],
    [(G, H, grid.bq), (G, 1, grid.bq), (G, 1, grid.bq)],
    products=2,
  )
  return (call.leave(o, q.shape), lse.reshape(B, K, G, T), *count)


def tpu_backward(
  q: Float[Array, "B K G T H"],
  k: Float[Array, "L B K S H"],
  v: Float[Array, "L B K S H"],
  mask: AttentionMask,
  o: Float[Array, "B K G T H"],
  lse: Float[Array, "B K G T"],
  do: Float[Array, "B K G T H"],
  dk: Float[Array, "L B K R H"],
  dv: Float[Array, "L B K R H"],
  *,
  dlse: Float[Array, "B K G T"] | None = None,
  dkv_start: Any = 0,
  dkv_multiple: int = 0,
  layer: Any = 0,
  scale: float,
  softcap: float | None = None,
  blocks: TpuBlocks | None = None,
  interpret: Any = False,
  count_blocks: bool = False,
) -> Any:
  """Gradient of `tpu_forward`, adding into the caller's `dk` and `dv`.

  Args:
    q: As given to the forward pass, like k, v, mask, layer, scale, softcap.
    k: Keys of every layer.
    v: Values of every layer.
    mask: Which keys each query sees.
    o: Output of the forward pass.
    lse: Log-sum-exp of the forward pass.
    do: Cotangent of o.
    dk: Accumulator for the gradient of k. It may hold a part of the keys
      only: key s is at row `s - dkv_start`. Every block of `blocks.kv_bwd`
      keys with a visible key must lie inside.
    dv: Accumulator for the gradient of v.
    dlse: Cotangent of lse, or `None` for zero.
    dkv_start: The key at row 0 of dk and dv, a multiple of the block of keys;
      may be traced, may be negative. If it is traced and no multiple, the
      gradients are NaN.
    dkv_multiple: A multiple of the blocks of keys, so that a traced `dkv_start`
      that is a multiple of this is one of theirs; 0 is any.
    layer: Which layer; may be traced.
    scale: Factor on the scores.
    softcap: Cap on the scores.
    blocks: The largest block sizes; by default from a table.
    interpret: As in `pallas_call`; block sizes may then be anything.
    count_blocks: Also count the pairs of blocks that were executed.

  Returns:
    dq in q's dtype, and dk and dv with this gradient added, in place where
    the caller's buffers are not used again; with `count_blocks` also counts
    `[2,B*K]`, for dq and for dk and dv.

  Raises:
    NotImplementedError: See `unsupported`.
  """
  sizes = _sizes(
    *(q, k, mask, blocks, interpret),
    dk=dk,
    dkv_start=dkv_start,
    dkv_multiple=dkv_multiple,
  )
  B, K, G, T, H = q.shape
  grid = Grid(T, k.shape[3], sizes.q_bwd, sizes.kv_bwd)
  make = functools.partial(
    _Call.of,
    q,
    mask,
    grid,
    layer=layer,
    dkv_start=dkv_start,
    scale=scale,
    softcap=softcap,
    interpret=interpret,
    count_blocks=count_blocks,
  )
  delta = jnp.sum(do.astype(jnp.float32) * o.astype(jnp.float32), axis=-1)
  if dlse is not None:
    delta = delta - dlse
  # exp2(s - lse) of a query that sees nothing: exp2(-inf - 1e30) = 0.
  lse = jnp.where(jnp.isfinite(lse), lse * LOG2_E, -LOWEST)
  # Rows of another block would be added to; NaN is seen, wrong rows are not.
  lse = jnp.where(jnp.asarray(dkv_start) % grid.bk == 0, lse, jnp.nan)

  def pair(call: _Call) -> list[tuple[Array, pl.BlockSpec]]:
    rows = (a.reshape(B * K, G, T) for a in (lse, delta))
    return [
      *((call.enter(a, B * K, G), call.of_queries()) for a in (q, do)),
      *((a, call.of_rows()) for a in rows),
      *((call.enter(a, len(a), B * K), call.of_cache()) for a in (k, v)),
    ]

  call = make(by_key=True)
  buffers = [call.enter(a, len(a), B * K) for a in (dk, dv)]
  place = call.of_cache(gradient=True)
  new_dk, new_dv, *count = call.run(
    dkv_kernel,
    [*pair(call), *((a, place) for a in buffers)],
    [(a.shape, a.dtype, place) for a in buffers],
    [(H, grid.bk) if call.form.turned else (grid.bk, H)] * 2,
    products=4,
    in_place=2,
  )
  call = make(by_key=False)
  inputs = pair(call)
  dq, *dq_count = call.run(
    dq_kernel,
    inputs,
    [(inputs[0][0].shape, q.dtype, call.of_queries())],
    [(G, H, grid.bq)],
    products=3,
  )
  results = [
    call.leave(a, shape)
    for a, shape in ((dq, q.shape), (new_dk, dk.shape), (new_dv, dv.shape))
  ]
  if count_blocks:
    results.append(jnp.stack([*dq_count, *count]))
  return tuple(results)


def _sizes(
  q: Array,
  k: Array,
  mask: AttentionMask,
  blocks: TpuBlocks | None,
  interpret: Any,
  *,
  dk: Array | None = None,
  dkv_start: Any = 0,
  dkv_multiple: int = 0,
) -> TpuBlocks:
  reason = unsupported(
    *(q, k, mask),
    blocks=blocks,
    dk=dk,
    dkv_start=dkv_start,
    dkv_multiple=dkv_multiple,
  )
  if reason is not None and not interpret:
    raise NotImplementedError(
      f"the TPU kernels of attention cannot run here: {reason}; "
      'implementation="xla" can'
    )
  return choose_blocks(
    q, k, mask, blocks=blocks, dk=dk, dkv_multiple=dkv_multiple
  )
