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

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from jaxchunk.kernels.attention.softmax import LOWEST
from jaxchunk.kernels.attention.tpu.work import LANES, LOG2_E
from jaxchunk.kernels.paged_attention.pages import KVPages, PageView
from jaxchunk.kernels.vma import vary_like

_HEAD_DIMS = (64, 128, 256)
_PAGE_SIZES = (16, 32, 64, 128, 256)
# Of the 1 MB of scalar memory: entries of one row's table, of which there are
# four copies, and rows, of which each has `_FIELDS` words.
_MAX_ENTRIES = 32 * 1024
_MAX_ROWS = 16 * 1024
# Query heads of a key head; their scores of a step must fit vector memory.
_MAX_GROUP = 64
# Rows of what stands beside the keys in a tile.
_TILE = 8
# Words of a row: its first page, how many it reads, steps of all rows before,
# keys, and the lowest and the highest position of its queries.
_START, _COUNT, _BEFORE, _LENGTH, _LOW, _HIGH, _FIELDS = range(7)


@dataclasses.dataclass(frozen=True)
class TpuSteps:
  """The most that a step takes.

  Attributes:
    keys: Keys.
    queries: Queries, times the query heads of a key head.
  """

  keys: int = 512
  queries: int = 512


@dataclasses.dataclass(frozen=True)
class _Form:
  """What the kernel knows of a call when it is traced.

  Attributes:
    heads: K and G: key heads, and query heads of each.
    queries: Of a row, without heads.
    blocks: Blocks of queries of a sequence.
    rows: Of a core.
    page: Z, keys of a page.
    step: R, pages of a step.
    pages: P, of the cache.
    turned: Keys lie along the lanes, heads' elements along the sublanes.
    beside: Names of what stands beside the keys.
    window: How many positions a query sees.
    scale: Factor on the scores.
    softcap: Cap on the scores.
    dtype: Of queries and products.
  """

  heads: tuple[int, int]
  queries: int
  blocks: int
  rows: int
  page: int
  step: int
  pages: int
  turned: bool
  beside: tuple[str, ...]
  window: int | None
  scale: float
  softcap: float | None
  dtype: Any

  @property
  def keys(self) -> int:
    """Of a step."""
    return self.step * self.page

  @property
  def in_place(self) -> bool:
    """Whether what stands beside the keys is read where it is."""
    return self.page % LANES == 0 and self.pages % _TILE == 0

  def full(self, word: Any, n: Any) -> Any:
    """Whether every query sees every key of step n of a row."""
    if "positions" in self.beside or "log_weights" in self.beside:
      return False
    begin = (word(_START) + n * self.step) * self.page
    end = begin + self.keys
    found = (end <= word(_LENGTH)) & (end - 1 <= word(_LOW))
    if self.window is not None:
      found &= word(_HIGH) - begin < self.window
    return found

  def dot(self, a: Array, b: Array, axis: int) -> Array:
    """Product over a's last axis and one of b's, in fp32."""
    wide = self.dtype == jnp.float32
    return lax.dot_general(
      a,
      b,
      (((1,), (axis,)), ((), ())),
      precision=lax.Precision.HIGHEST if wide else None,
      preferred_element_type=jnp.float32,
    )


class _Refs(NamedTuple):
  """The kernel's references; `beside` and its buffers in the form's order."""

  words: Any
  layer: Any
  table: Any
  next_table: Any
  q: Any
  position: Any
  sources: Any
  o: Any
  lse: Any
  buffers: Any
  arrived: Any
  acc: Any
  m: Any
  z: Any


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
  form = _Form(
    (K, G),
    Q,
    blocks,
    # Two cores where there are two: each takes a half, in order.
    rows // 2 if rows % 2 == 0 else rows,
    Z,
    max(1, sizes.keys // Z),
    pages.k.shape[2],
    H % LANES != 0 and Z % LANES == 0,
    tuple(name for name in _BESIDE if getattr(pages, name) is not None),
    window,
    scale,
    softcap,
    q.dtype,
  )
  words = _words(form, view, position, pages.positions is None)
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


_BESIDE = ("k_scale", "v_scale", "positions", "log_weights")


def _words(
  form: _Form,
  view: PageView,
  position: Int[Array, "B I Q"],
  ordered: bool,
) -> Int[Array, " words"]:
  """`_FIELDS` words of each row, and of an empty one behind the last."""
  Z = form.page
  low, high = position.min(-1)[:, None], position.max(-1)[:, None]
  some = jnp.where(position < 0, jnp.iinfo(jnp.int32).max, position)
  end = -(-view.lengths // Z)[:, :, None]
  end = jnp.where(high >= 0, end, 0)
  start = jnp.zeros_like(end)
  if ordered:
    end = jnp.minimum(end, high // Z + 1)
    if form.window is not None:
      first = jnp.maximum(some.min(-1)[:, None] - (form.window - 1), 0)
      start += first // Z
  count = jnp.maximum(end - start, 0)
  steps = -(-count // form.step).reshape(-1)
  before = jnp.cumsum(steps, dtype=jnp.int32) - steps
  before = before.reshape(count.shape)
  fields = (start, count, before, view.lengths[:, :, None], low, high)
  words = jnp.stack([jnp.broadcast_to(a, count.shape) for a in fields], -1)
  words = words.astype(jnp.int32).reshape(-1)
  return jnp.pad(words, (0, _FIELDS))


def _call(
  form: _Form,
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
  tiles = (form.step, _TILE, form.page)
  buffers = [pltpu.VMEM((2, *tail), a.dtype) for a in (k, v)]
  buffers += [pltpu.VMEM((2, *tiles), a.dtype) for a in beside]
  tables_and_q, out_specs = _specs(form, q.shape, M)
  call = pl.pallas_call(
    functools.partial(_kernel, form),
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
      _result(q.shape, q.dtype, operands[0]),
      _result((rows, Q, 1), jnp.float32, operands[0]),
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
  form: _Form, shape: tuple[int, ...], M: int
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


def _tiled(form: _Form, a: Array, layer: Any) -> Array:
  """What stands beside the keys in whole tiles; a layer's part if copied."""
  if form.in_place:
    return a
  a = lax.dynamic_slice_in_dim(a, layer, 1, 0)
  return jnp.pad(a, ((0, 0), (0, 0), (0, -form.pages % _TILE), (0, 0)))


def _result(
  shape: tuple[int, ...], dtype: Any, like: Array
) -> jax.ShapeDtypeStruct:
  axes = jax.typeof(like).manual_axis_type
  return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=axes)


def _cost(form: _Form, q: Array, k: Array, keys: int) -> pl.CostEstimate:
  """As if every table were full."""
  _, Q, H = q.shape
  return pl.CostEstimate(
    flops=4 * keys * form.blocks * Q * H,
    transcendentals=keys * form.blocks * Q,
    bytes_accessed=2 * keys * form.blocks * H * k.dtype.itemsize,
  )


def _kernel(form: _Form, *refs: Any) -> None:
  """One row: fetches its pages and attends to them."""
  n = 8 + len(form.beside)
  ends = (refs[6:n], *refs[n : n + 2], refs[n + 2 : -4], *refs[-4:])
  r = _Refs._make((*refs[:6], *ends))
  i = pl.program_id(1)
  x = pl.program_id(0) * form.rows + i

  def steps(x: Any) -> Any:
    pages = _word(r, x, _COUNT)
    return lax.div(pages + (form.step - 1), jnp.int32(form.step))

  def slot(n: Any) -> Any:
    return lax.rem(_word(r, x, _BEFORE) + n, jnp.int32(2))

  fetch = functools.partial(_fetch, form, r)

  # The last step of the row before fetched the first of this one, if there
  # were both.
  alone = (i == 0) | (steps(jnp.maximum(x - 1, 0)) == 0)

  @pl.when(alone & (steps(x) > 0))
  def _first() -> None:
    fetch(x, r.table, 0, slot(0), wait=False)

  r.acc[...] = jnp.zeros_like(r.acc)
  r.m[...] = jnp.full_like(r.m, LOWEST)
  r.z[...] = jnp.zeros_like(r.z)

  def step(n: Any, _: None) -> None:
    last = n + 1 == steps(x)

    @pl.when(jnp.logical_not(last))
    def _next_step() -> None:
      fetch(x, r.table, n + 1, slot(n + 1), wait=False)

    @pl.when(last & (i + 1 < form.rows) & (steps(x + 1) > 0))
    def _next_row() -> None:
      fetch(x + 1, r.next_table, 0, slot(n + 1), wait=False)

    fetch(x, r.table, n, slot(n), wait=True)
    own = functools.partial(_word, r, x)
    full = form.full(own, n)
    if full is not False:
      pl.when(full)(lambda: _attend(form, r, own, n, slot(n), masked=False))
    masked = jnp.logical_not(full)
    pl.when(masked)(lambda: _attend(form, r, own, n, slot(n), masked=True))

  lax.fori_loop(0, steps(x), step, None)
  _finish(r)


def _word(r: _Refs, x: Any, field: int) -> Any:
  return r.words[x * _FIELDS + field]


def _fetch(
  form: _Form, r: _Refs, x: Any, table: Any, n: Any, slot: Any, *, wait: bool
) -> None:
  """Starts the copies of step n of row x, or waits for them."""
  head = lax.div(x, jnp.int32(form.blocks))
  head = lax.rem(head, jnp.int32(form.heads[0]))
  first = n * form.step
  number = jnp.minimum(_word(r, x, _COUNT) - first, form.step)

  def page(m: Any, _: None) -> None:
    at = _page(form, table, _word(r, x, _START) + first + m)
    for copy in _copies(form, r, head, at, slot, m):
      copy.wait() if wait else copy.start()

  lax.fori_loop(0, number, page, None)


def _finish(r: _Refs) -> None:
  """Writes a row's outputs."""
  z = r.z[...][:, :1]
  some = z > 0
  total = jnp.where(some, z, 1)
  r.o[...] = (r.acc[...] / total).astype(r.o.dtype)
  found = r.m[...][:, :1] * (1 / LOG2_E) + jnp.log(total)
  r.lse[...] = jnp.where(some, found, -jnp.inf)


def _page(form: _Form, table: Any, m: Any) -> Any:
  """The m-th page of a row; a wrong number must not read outside."""
  return jnp.clip(table[0, m], 0, form.pages - 1)


def _copies(
  form: _Form, r: _Refs, head: Any, page: Any, slot: Any, m: Any
) -> list[Any]:
  """What brings a page, and what stands beside it, to place m of a buffer."""
  copies = []
  for n, (source, buffer) in enumerate(zip(r.sources, r.buffers, strict=True)):
    source, buffer = source.at[r.layer[min(n, 2) // 2], head], buffer.at[slot]
    if n >= 2:
      tile = lax.div(page, jnp.int32(_TILE)) * _TILE
      source = source.at[pl.ds(pl.multiple_of(tile, _TILE), _TILE)]
    else:
      source = source.at[page]
    if n < 2 and form.turned:
      place = pl.multiple_of(m * form.page, form.page)
      buffer = buffer.at[:, pl.ds(place, form.page)]
    else:
      buffer = buffer.at[m]
    copies.append(pltpu.make_async_copy(source, buffer, r.arrived.at[slot]))
  return copies


def _attend(
  form: _Form, r: _Refs, word: Any, n: Any, slot: Any, *, masked: bool
) -> None:
  """Takes the keys of a step in."""
  first = word(_START) + n * form.step
  beside = functools.partial(_beside, form, r, first, slot)
  k, v = (
    buffer[slot].astype(form.dtype)
    if form.turned
    else buffer[slot].astype(form.dtype).reshape(form.keys, -1)
    for buffer in r.buffers[:2]
  )
  s = form.dot(r.q[...], k, 0 if form.turned else 1)
  scale = beside("k_scale")
  if scale is not None:
    s = s * scale
  if form.softcap is None:
    s = s * (form.scale * LOG2_E)
  else:
    s = jnp.tanh(s * (form.scale / form.softcap)) * (form.softcap * LOG2_E)
  weights = beside("log_weights")
  if weights is not None:
    s = s + weights * LOG2_E
  if masked:
    # Of the last step, only the pages that were read hold anything.
    pages = (word(_START) + word(_COUNT)) * form.page
    number = jnp.minimum(word(_LENGTH), pages) - first * form.page
    place = lax.broadcasted_iota(jnp.int32, (1, form.keys), 1)
    inside = place < number
    if weights is not None:
      inside &= weights != -jnp.inf
    key = beside("positions")
    key = first * form.page + place if key is None else key
    s = jnp.where(_seen(form, r, inside, key), s, -jnp.inf)
    v = _clean(form, v, inside, number)
  m_old = r.m[...][:, :1]
  m_new = jnp.maximum(m_old, s.max(1, keepdims=True))
  p = jnp.exp2(s - m_new)
  alpha = jnp.exp2(m_old - m_new)
  r.m[...] = jnp.broadcast_to(m_new, r.m.shape)
  z = r.z[...][:, :1] * alpha + p.sum(1, keepdims=True)
  r.z[...] = jnp.broadcast_to(z, r.z.shape)
  scale = beside("v_scale")
  if scale is not None:
    p = p * (jnp.where(inside, scale, 0) if masked else scale)
  pv = form.dot(p.astype(form.dtype), v, 1 if form.turned else 0)
  r.acc[...] = r.acc[...] * alpha + pv


def _beside(
  form: _Form, r: _Refs, first: Any, slot: Any, name: str
) -> Float[Array, "1 S"] | None:
  """What stands beside the keys of a step; page `first` is its first."""
  if name not in form.beside:
    return None
  buffer = r.buffers[2 + form.beside.index(name)]
  rows = []
  for m in range(form.step):
    at = jnp.minimum(first + m, r.table.shape[1] - 1)
    row = lax.rem(_page(form, r.table, at), jnp.int32(_TILE))
    rows.append(buffer[slot, m, pl.ds(row, 1)])
  return jnp.concatenate(rows, axis=1)


def _seen(
  form: _Form, r: _Refs, inside: Bool[Array, "1 S"], key: Int[Array, "1 S"]
) -> Bool[Array, "Q S"]:
  """Which keys of a step each query sees, by their positions."""
  query = r.position[...]
  before = query - key
  seen = inside & (before >= 0) & (query >= 0)
  return seen if form.window is None else seen & (before < form.window)


def _clean(
  form: _Form, v: Array, inside: Bool[Array, "1 S"], number: Any
) -> Array:
  """Values without what is no key's: 0 times NaN is NaN."""
  if form.turned:
    keep = jnp.broadcast_to(inside, v.shape)
  elif "log_weights" in form.beside:
    # From lanes to sublanes by a transpose of whole registers.
    row = jnp.where(inside, 1.0, 0.0)
    keep = jnp.broadcast_to(row, (LANES, form.keys)).T[:, :1] > 0
    keep = jnp.broadcast_to(keep, v.shape)
  else:
    keep = lax.broadcasted_iota(jnp.int32, v.shape, 0) < number
  return jnp.where(keep, v, jnp.zeros((), v.dtype))


def unsupported(
  q: Float[Array, "B K G T H"], pages: KVPages, view: PageView
) -> str | None:
  """Why this kernel cannot serve the arguments; `None` if it can.

  Args:
    q: Queries, like the others arrays or shapes and dtypes.
    pages: The cache.
    view: Which pages each row reads.

  Returns:
    The reason, as the end of a sentence.
  """
  if q.dtype not in (jnp.float32, jnp.bfloat16):
    return f"the dtype is {q.dtype}, not float32 or bfloat16"
  B, K, G, T, H = q.shape
  Z, M = pages.k.shape[3], view.table.shape[2]
  if H not in _HEAD_DIMS:
    return f"the head width H={H} is none of {_HEAD_DIMS}"
  if Z not in _PAGE_SIZES:
    return f"the page size Z={Z} is none of {_PAGE_SIZES}"
  if H % LANES and Z % LANES:
    return f"pages of H={H} need Z a multiple of {LANES}, got Z={Z}"
  if G > _MAX_GROUP:
    return (
      f"G={G} query heads for a key head are more than the {_MAX_GROUP} whose "
      "scores fit vector memory"
    )
  if M > _MAX_ENTRIES:
    return (
      f"a row's table has M={M} entries, more than the {_MAX_ENTRIES} that fit "
      "the scalar memory"
    )
  Q = min(T, max(1, TpuSteps().queries // G))
  rows = B * K * -(-T // Q)
  if rows > _MAX_ROWS:
    return f"{rows} rows are more than the {_MAX_ROWS} that fit scalar memory"
  return None
