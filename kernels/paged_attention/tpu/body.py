"""The TPU kernel for pages itself: one row."""

import functools
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Bool, Float, Int

from jaxchunk.kernels.attention.softmax import LOWEST
from jaxchunk.kernels.attention.tpu.work import LANES, LOG2_E
from jaxchunk.kernels.paged_attention.tpu.work import (
  BEFORE,
  COUNT,
  FIELDS,
  LENGTH,
  START,
  TILE,
  Form,
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


def paged_kernel(form: Form, *refs: Any) -> None:
  """One row: fetches its pages and attends to them."""
  n = 8 + len(form.beside)
  ends = (refs[6:n], *refs[n : n + 2], refs[n + 2 : -4], *refs[-4:])
  r = _Refs._make((*refs[:6], *ends))
  i = pl.program_id(1)
  x = pl.program_id(0) * form.rows + i

  def steps(x: Any) -> Any:
    pages = _word(r, x, COUNT)
    return lax.div(pages + (form.step - 1), jnp.int32(form.step))

  def slot(n: Any) -> Any:
    return lax.rem(_word(r, x, BEFORE) + n, jnp.int32(2))

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
  return r.words[x * FIELDS + field]


def _fetch(
  form: Form, r: _Refs, x: Any, table: Any, n: Any, slot: Any, *, wait: bool
) -> None:
  """Starts the copies of step n of row x, or waits for them."""
  head = lax.div(x, jnp.int32(form.blocks))
  head = lax.rem(head, jnp.int32(form.heads[0]))
  first = n * form.step
  number = jnp.minimum(_word(r, x, COUNT) - first, form.step)

  def page(m: Any, _: None) -> None:
    at = _page(form, table, _word(r, x, START) + first + m)
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


def _page(form: Form, table: Any, m: Any) -> Any:
  """The m-th page of a row; a wrong number must not read outside."""
  return jnp.clip(table[0, m], 0, form.pages - 1)


def _copies(
  form: Form, r: _Refs, head: Any, page: Any, slot: Any, m: Any
) -> list[Any]:
  """What brings a page, and what stands beside it, to place m of a buffer."""
  copies = []
  for n, (source, buffer) in enumerate(zip(r.sources, r.buffers, strict=True)):
    source, buffer = source.at[r.layer[min(n, 2) // 2], head], buffer.at[slot]
    if n >= 2:
      tile = lax.div(page, jnp.int32(TILE)) * TILE
      source = source.at[pl.ds(pl.multiple_of(tile, TILE), TILE)]
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
  form: Form, r: _Refs, word: Any, n: Any, slot: Any, *, masked: bool
) -> None:
  """Takes the keys of a step in."""
  first = word(START) + n * form.step
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
    pages = (word(START) + word(COUNT)) * form.page
    number = jnp.minimum(word(LENGTH), pages) - first * form.page
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
  form: Form, r: _Refs, first: Any, slot: Any, name: str
) -> Float[Array, "1 S"] | None:
  """What stands beside the keys of a step; page `first` is its first."""
  if name not in form.beside:
    return None
  buffer = r.buffers[2 + form.beside.index(name)]
  rows = []
  for m in range(form.step):
    at = jnp.minimum(first + m, r.table.shape[1] - 1)
    row = lax.rem(_page(form, r.table, at), jnp.int32(TILE))
    rows.append(buffer[slot, m, pl.ds(row, 1)])
  return jnp.concatenate(rows, axis=1)


def _seen(
  form: Form, r: _Refs, inside: Bool[Array, "1 S"], key: Int[Array, "1 S"]
) -> Bool[Array, "Q S"]:
  """Which keys of a step each query sees, by their positions."""
  query = r.position[...]
  before = query - key
  seen = inside & (before >= 0) & (query >= 0)
  return seen if form.window is None else seen & (before < form.window)


def _clean(
  form: Form, v: Array, inside: Bool[Array, "1 S"], number: Any
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
