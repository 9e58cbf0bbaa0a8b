"""The TPU kernels of cross-entropy themselves: one tile."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int

LANES = 128
# The width is gone through in pieces, so that no sum over it is held twice.
PIECE = 1024
# States of a block of rows: none, some, or all of them have a cotangent.
DEAD, MIXED, FULL = 0, 1, 2


class Tile(NamedTuple):
  """How many rows and vocabulary entries meet in a step."""

  rows: int
  vocab: int


class Form(NamedTuple):
  """What the kernels know when they are traced."""

  tile: Tile
  rows: int
  vocab: int
  softcap: float | None
  by_vocab: bool

  @property
  def grid(self) -> tuple[int, int]:
    """Blocks that stay, and blocks that pass by."""
    rows = pl.cdiv(self.rows, self.tile.rows)
    vocab = pl.cdiv(self.vocab, self.tile.vocab)
    return (vocab, rows) if self.by_vocab else (rows, vocab)

  def place(self, stays: Any, passes_by: Any) -> tuple[Any, Any]:
    """Block of rows and block of vocabulary, from a place in the grid."""
    return (passes_by, stays) if self.by_vocab else (stays, passes_by)


class Step(NamedTuple):
  """A tile inside a kernel: its blocks, and how far the walk has come."""

  form: Form
  i: Any
  j: Any
  n: Any

  @classmethod
  def of(cls, form: Form) -> "Step":
    """Where the program is."""
    n = pl.program_id(1)
    return cls(form, *form.place(pl.program_id(0), n), n)

  def first(self, body: Callable[[], None]) -> None:
    """Runs the body at the first step of what stays."""
    pl.when(self.n == 0)(body)

  def last(self, body: Callable[[], None]) -> None:
    """Runs the body at the last step of what stays."""
    pl.when(self.n == self.form.grid[1] - 1)(body)

  def entries(self, shape: tuple[int, ...]) -> Int[Array, "W _"]:
    """Which entry of the vocabulary each row of a tile is."""
    first = self.j * self.form.tile.vocab
    return lax.broadcasted_iota(jnp.int32, shape, 0) + first

  def logits(self, x: Any, w: Any) -> Float[Array, "W R"]:
    """The tile's, capped."""
    s = jnp.zeros((self.form.tile.vocab, self.form.tile.rows), jnp.float32)
    for piece in _pieces(x.shape[1]):
      s += _dot(w[:, piece].astype(x.dtype), x[:, piece], (1, 1))
    cap = self.form.softcap
    return s if cap is None else cap * jnp.tanh(s * (1 / cap))

  def live(self, rows: "Rows") -> Int[Array, "1 R"]:
    """1 for rows that there are and that have a cotangent, 0 for others."""
    live = (rows.g_nll[...] != 0) | (rows.g_sum[...] != 0)
    size = self.form.tile.rows
    if self.form.rows % size:
      row = lax.broadcasted_iota(jnp.int32, live.shape, 1)
      live &= row + self.i * size < self.form.rows
    return live.astype(jnp.int32)

  def gradient(self, rows: "Rows", x: Any, w: Any) -> Float[Array, "W R"]:
    """The cotangent of the tile's logits before the cap, in x's dtype.

    It is 0 where the tile overruns an axis.
    """
    s = self.logits(x, w)
    entries = self.entries(s.shape)
    d = rows.g_sum[...] * jnp.exp(s - rows.lse[...])
    d -= jnp.where(entries == rows.labels[...], rows.g_nll[...], 0)
    if self.form.softcap is not None:
      d *= 1 - jnp.square(s * (1 / self.form.softcap))
    live = self.live(rows) != 0
    if self.form.vocab % self.form.tile.vocab:
      live = live & (entries < self.form.vocab)
    return jnp.where(live, d, 0).astype(x.dtype)


class Rows(NamedTuple):
  """References to what is known of a block of rows, each `[1,R]`.

  Attributes:
    labels: Labels.
    lse: Log-sum-exp.
    g_nll: Cotangent of nll.
    g_sum: Cotangent of nll and that of lse, added.
  """

  labels: Any
  lse: Any
  g_nll: Any
  g_sum: Any


def forward_kernel(form: Form, states: Any, *refs: Any) -> None:
  """Takes one block of the vocabulary in for one block of rows."""
  del states
  labels, x, w, lse, picked, top, total, found = refs
  step = Step.of(form)

  @step.first
  def _start() -> None:
    top[...] = jnp.full_like(top, -jnp.inf)
    total[...] = jnp.zeros_like(total)
    found[...] = jnp.zeros_like(found)

  s = step.logits(x, w)
  entries = step.entries(s.shape)
  if form.vocab % form.tile.vocab:
    s = jnp.where(entries < form.vocab, s, -jnp.inf)
  new_top = jnp.maximum(top[...], s.max(0, keepdims=True))
  p = jnp.exp(s - new_top)
  scaled = total[...] * jnp.exp(top[...] - new_top)
  total[...] = scaled + p.sum(0, keepdims=True)
  top[...] = new_top
  hit = jnp.where(entries == labels[...], s, 0)
  found[...] += hit.sum(0, keepdims=True)

  @step.last
  def _end() -> None:
    lse[...] = top[...] + jnp.log(total[...])
    picked[...] = found[...]


def dx_kernel(form: Form, states: Any, *refs: Any) -> None:
  """Adds what one block of the vocabulary gives to one block of dx."""
  rows = Rows(*refs[:4])
  x, w, dx, acc = refs[4:]
  step = Step.of(form)

  @step.first
  def _start() -> None:
    acc[...] = jnp.zeros_like(acc)

  def add(overruns: bool) -> None:
    d = step.gradient(rows, x, w)
    for piece in _pieces(x.shape[1]):
      w_piece = w[:, piece].astype(x.dtype)
      if overruns:
        inside = step.entries(w_piece.shape) < form.vocab
        w_piece = jnp.where(inside, w_piece, 0)
      acc[:, piece] += _dot(d, w_piece, (0, 0))

  lives = states[step.i] != DEAD
  if form.vocab % form.tile.vocab:
    at_end = step.j == form.grid[1] - 1
    pl.when(lives & at_end)(lambda: add(True))
    lives &= jnp.logical_not(at_end)
  pl.when(lives)(lambda: add(False))

  @step.last
  def _end() -> None:
    dx[...] = acc[...].astype(dx.dtype)


def dw_kernel(form: Form, states: Any, *refs: Any) -> None:
  """Adds what one block of rows gives to one block of dw."""
  rows = Rows(*refs[:4])
  x, w, old, dw = refs[4:]
  step = Step.of(form)

  @step.first
  def _start() -> None:
    dw[...] = jnp.zeros_like(dw)

  def add(mixed: bool) -> None:
    d = step.gradient(rows, x, w)
    live = _column(step.live(rows)) != 0 if mixed else None
    for piece in _pieces(x.shape[1]):
      x_piece = x[:, piece]
      if live is not None:
        x_piece = jnp.where(live, x_piece, 0)
      dw[:, piece] += _dot(d, x_piece, (1, 0))

  pl.when(states[step.i] == MIXED)(lambda: add(True))
  pl.when(states[step.i] == FULL)(lambda: add(False))

  @step.last
  def _end() -> None:
    dw[...] += old[...]


def _column(row: Int[Array, "1 R"]) -> Int[Array, "R 1"]:
  """From lanes to sublanes, by a transpose of whole registers."""
  return jnp.broadcast_to(row, (LANES, row.shape[1])).T[:, :1]


def _pieces(width: int) -> list[slice]:
  return [
    slice(start, min(start + PIECE, width)) for start in range(0, width, PIECE)
  ]


def _dot(a: Array, b: Array, axes: tuple[int, int]) -> Array:
  """Product over one axis of each, in fp32."""
  return lax.dot_general(
    a,
    b,
    (((axes[0],), (axes[1],)), ((), ())),
    # A product of fp32 blocks is otherwise one of bf16.
    precision=lax.Precision.HIGHEST if a.dtype == jnp.float32 else None,
    preferred_element_type=jnp.float32,
  )
