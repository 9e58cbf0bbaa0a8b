"""The TPU kernels themselves: one step on a pair of blocks."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Bool, Float

from jaxchunk.kernels.attention.blocks import Grid
from jaxchunk.kernels.attention.softmax import LOWEST
from jaxchunk.kernels.attention.tpu.work import (
  COLUMN,
  FIRST,
  FULL,
  LANES,
  LAST,
  LIVE,
  LOG2_E,
  MAX_BLOCKS,
  ROW,
)


class Step(NamedTuple):
  """A pair of blocks (i of queries, j of keys), and what there is to do."""

  i: Array
  j: Array
  flags: Array

  def when(self, flag: int) -> Any:
    """Runs the decorated function where the flag is set."""
    return pl.when((self.flags & flag) != 0)

  def visit(self, body: Callable[[bool], None]) -> None:
    """Runs `body(masked)` for a live pair."""
    state = self.flags & (LIVE | FULL)
    pl.when(state == LIVE)(lambda: body(True))
    pl.when(state == LIVE | FULL)(lambda: body(False))


@dataclasses.dataclass(frozen=True)
class Form:
  """What the kernels know of a call when they are traced.

  Attributes:
    grid: How the lengths are cut.
    heads: K and G: key heads, and query heads of each.
    width: H.
    turned: Tokens lie along the lanes, heads' elements along the sublanes.
    by_key: Rows of the list are blocks of keys.
    share: Key heads per list.
    length: Of a list.
    scale: Factor on the scores.
    softcap: Cap on the scores.
    precision: Of products.
  """

  grid: Grid
  heads: tuple[int, int]
  width: int
  turned: bool
  by_key: bool
  share: int
  length: int
  scale: float
  softcap: float | None
  precision: lax.Precision | None

  def step(self, x: Any, n: Any, words: Any) -> Step:
    """Step n of key head x."""
    if words.shape[0] > self.length:
      n = lax.div(x, jnp.int32(self.share)) * self.length + n
    word = words[n]
    row, column = word >> ROW, (word >> COLUMN) & (MAX_BLOCKS - 1)
    return Step(*((column, row) if self.by_key else (row, column)), word)

  def dot(self, a: Array, b: Array, axes: tuple[int, int]) -> Array:
    """Product of two blocks over one axis of each, in fp32."""
    return lax.dot_general(
      a,
      b,
      (((axes[0],), (axes[1],)), ((), ())),
      precision=self.precision,
      preferred_element_type=jnp.float32,
    )

  @property
  def width_axis(self) -> int:
    """Which axis of a block is H; the other one is of tokens."""
    return 0 if self.turned else 1

  def scores(
    self, q: Array, k: Array, seen: Any
  ) -> tuple[Float[Array, "R Q"], Float[Array, "R Q"] | None]:
    """Scores in units of log 2, -inf where unseen; the tanh of a soft-cap."""
    s = self.dot(k, q, (self.width_axis, self.width_axis))
    t = None
    if self.softcap is None:
      s = s * (self.scale * LOG2_E)
    else:
      t = jnp.tanh(s * (self.scale / self.softcap))
      s = t * (self.softcap * LOG2_E)
    return (s if seen is None else jnp.where(seen, s, -jnp.inf)), t

  def seen(self, step: Step, visible: Any) -> Bool[Array, "R Q"]:
    """The mask of a pair; the fields of `visible` are references to rows."""
    shape = (self.grid.bk, self.grid.bq)
    s = step.j * self.grid.bk + lax.broadcasted_iota(jnp.int32, shape, 0)

    def of_key(row: Any) -> Array:
      # From lanes to sublanes by a transpose of whole registers.
      column = jnp.broadcast_to(row[...], (LANES, self.grid.bk)).T[:, :1]
      return column != 0 if row is visible.sinks else column

    return visible.pairs(s, lambda row: row[...], of_key)

  def gradient(
    self, pair: "_Pair", g: int, seen: Any
  ) -> tuple[Float[Array, "R Q"], Float[Array, "R Q"]]:
    """Probabilities and the cotangent of scores of query head g."""
    h = self.width_axis
    s, t = self.scores(pair.q[g], pair.k[...], seen)
    p = jnp.exp2(s - pair.lse[pl.ds(g, 1)])
    dp = self.dot(pair.v[...], pair.do[g], (h, h))
    ds = p * (dp - pair.delta[pl.ds(g, 1)])
    if t is not None:
      ds = ds * (1 - t * t)
    return p.astype(pair.q.dtype), ds.astype(pair.q.dtype)


class _Pair(NamedTuple):
  """References to what the backward kernels read of a pair of blocks."""

  q: Any
  do: Any
  lse: Any
  delta: Any
  k: Any
  v: Any


def forward_kernel(
  form: Form, step: Step, visible: Any, refs: tuple[Any, ...]
) -> None:
  """Takes one block of keys in for one block of queries."""
  q, k, v, o, lse, acc, m, z = refs
  h = form.width_axis

  @step.when(FIRST)
  def _start() -> None:
    acc[...] = jnp.zeros_like(acc)
    m[...] = jnp.full_like(m, LOWEST)
    z[...] = jnp.zeros_like(z)

  @step.visit
  def _attend(masked: bool) -> None:
    seen = form.seen(step, visible) if masked else None
    for g in range(form.heads[1]):
      s, _ = form.scores(q[g], k[...], seen)
      m_new = jnp.maximum(m[g], s.max(0, keepdims=True))
      p = jnp.exp2(s - m_new)
      alpha = jnp.exp2(m[g] - m_new)
      m[g] = m_new
      z[g] = z[g] * alpha + p.sum(0, keepdims=True)
      pv = form.dot(v[...], p.astype(v.dtype), (1 - h, 0))
      acc[g] = acc[g] * alpha + pv

  @step.when(LAST)
  def _end() -> None:
    for g in range(form.heads[1]):
      some = z[g] > 0
      total = jnp.where(some, z[g], 1)
      o_g = (acc[g] / total).astype(o.dtype)
      o[g] = o_g if form.turned else o_g.T
      found = m[g] * (1 / LOG2_E) + jnp.log(total)
      lse[pl.ds(g, 1)] = jnp.where(some, found, -jnp.inf)


def dkv_kernel(
  form: Form, step: Step, visible: Any, refs: tuple[Any, ...]
) -> None:
  """Adds what one block of queries gives to one block of dk and dv."""
  pair = _Pair(*refs[:6])
  dk_old, dv_old, dk, dv, dk_acc, dv_acc = refs[6:]

  @step.when(FIRST)
  def _start() -> None:
    dk_acc[...] = jnp.zeros_like(dk_acc)
    dv_acc[...] = jnp.zeros_like(dv_acc)

  def product(p: Array, of_query: Array) -> Array:
    if form.turned:
      return form.dot(of_query, p, (1, 1))
    return form.dot(p, of_query, (1, 0))

  @step.visit
  def _add(masked: bool) -> None:
    seen = form.seen(step, visible) if masked else None
    for g in range(form.heads[1]):
      p, ds = form.gradient(pair, g, seen)
      dv_acc[...] += product(p, pair.do[g])
      dk_acc[...] += product(ds, pair.q[g])

  @step.when(LAST)
  def _end() -> None:
    # Added in fp32 and rounded once, whatever the buffers hold.
    dk[...] = (dk_old[...] + dk_acc[...] * form.scale).astype(dk.dtype)
    dv[...] = (dv_old[...] + dv_acc[...]).astype(dv.dtype)


def dq_kernel(
  form: Form, step: Step, visible: Any, refs: tuple[Any, ...]
) -> None:
  """Adds what one block of keys gives to one block of dq."""
  pair = _Pair(*refs[:6])
  dq, acc = refs[6:]

  @step.when(FIRST)
  def _start() -> None:
    acc[...] = jnp.zeros_like(acc)

  @step.visit
  def _add(masked: bool) -> None:
    seen = form.seen(step, visible) if masked else None
    for g in range(form.heads[1]):
      _, ds = form.gradient(pair, g, seen)
      acc[g] += form.dot(pair.k[...], ds, (1 - form.width_axis, 0))

  @step.when(LAST)
  def _end() -> None:
    for g in range(form.heads[1]):
      dq_g = (acc[g] * form.scale).astype(dq.dtype)
      dq[g] = dq_g if form.turned else dq_g.T
