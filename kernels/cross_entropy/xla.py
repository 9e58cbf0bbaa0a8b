"""Cross-entropy of a linear head in plain XLA, by tiles of rows and vocabulary.

A block of rows of `x` meets one tile of `w` at a time, and the log-sum-exp is
kept online over the tiles as flash attention keeps its own. The gradient
recomputes each tile's logits from the saved `lse`; where the cotangents are
known beforehand (`linear_cross_entropy_with_grad`), a row block keeps its
logits until the gradient has used them.

A last block that would overrun its axis is moved back instead of padded, so
nothing is copied; what it covers a second time is masked.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxchunk.kernels.vma import (
  match_primal,
  vary,
  vary_like,
  varying_axes,
)

AxisName = str | tuple[str, ...]
"""A mesh axis, or several from the slowest to the fastest."""


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """How the logits are cut.

  Attributes:
    rows: Tokens in a tile.
    vocab: Vocabulary entries in a tile.
    keep: Whether a row block keeps its tiles between value and gradient.
  """

  rows: int
  vocab: int
  keep: bool = False


# One tile of logits. Rows beyond a thousand no longer make the matrix products
# more efficient.
_TILE_BYTES = 16 << 20
_MAX_ROWS = 1024
# Keeping logits saves one matrix product of four, but fewer rows than this are
# bound by the memory traffic of w and its gradient.
_MIN_KEPT_ROWS = 256


def choose_blocks(num_rows: int, vocab: int, itemsize: int = 4) -> BlockSizes:
  """The blocks where each tile of logits is used and dropped."""
  rows = _even_block(num_rows, _MAX_ROWS, 8)
  limit = max(128, _TILE_BYTES // (itemsize * max(rows, 1)))
  return BlockSizes(rows, _even_block(vocab, limit, 128))


def choose_grad_blocks(
  num_rows: int, vocab: int, width: int, itemsize: int = 4
) -> BlockSizes:
  """The blocks of `linear_cross_entropy_with_grad`.

  Kept logits take at most a tile's bytes, or an eighth of those of the
  gradient of `w` if that is more. Where this leaves too few rows to pay for
  passing over `w` and its gradient, the logits are computed twice instead.
  """
  budget = max(_TILE_BYTES, itemsize * vocab * width // 8)
  limit = min(_MAX_ROWS, budget // (itemsize * vocab))
  if limit < min(_MIN_KEPT_ROWS, num_rows):
    return choose_blocks(num_rows, vocab, itemsize)
  rows = _even_block(num_rows, limit, 8)
  limit = max(128, _TILE_BYTES // (itemsize * max(rows, width)))
  return BlockSizes(rows, _even_block(vocab, limit, 128), keep=True)


def _even_block(size: int, limit: int, multiple: int) -> int:
  """A block <= `limit` that cuts `size` evenly, rounded to `multiple`."""
  if size <= limit:
    return size
  block = -(-size // math.ceil(size / limit))
  return min(size, -(-block // multiple) * multiple)


def linear_cross_entropy(
  x: Float[Array, "*B T D"],
  w: Float[Array, "V D"],
  labels: Int[Array, "*B T"],
  *,
  softcap: float | None = None,
  blocks: BlockSizes | None = None,
) -> tuple[Float[Array, "*B T"], Float[Array, "*B T"]]:
  """See `api.linear_cross_entropy`."""
  rows = labels.size
  blocks = blocks or choose_blocks(rows, w.shape[0], _wide(x).itemsize)
  nll, lse = _cross_entropy(
    softcap, blocks, x.reshape(rows, x.shape[-1]), w, labels.reshape(rows)
  )
  return nll.reshape(labels.shape), lse.reshape(labels.shape)


def linear_cross_entropy_with_grad(
  x: Float[Array, "*B T D"],
  w: Float[Array, "V D"],
  labels: Int[Array, "*B T"],
  weights: Float[Array, "*B T"],
  *,
  softcap: float | None = None,
  dw_init: Float[Array, "V D"] | None,
  axis: AxisName | None = None,
  blocks: BlockSizes | None = None,
) -> tuple[
  Float[Array, "*B T"],
  Float[Array, "*B T"],
  Float[Array, "*B T D"],
  Float[Array, "V D"] | None,
]:
  """See `api.linear_cross_entropy_with_grad`."""
  rows, width, wide = labels.size, x.shape[-1], _wide(x)
  blocks = blocks or choose_grad_blocks(rows, w.shape[0], width, wide.itemsize)
  x_TD, labels_T = x.reshape(rows, width), labels.reshape(rows)
  weights_T = weights.reshape(rows).astype(wide)

  def body(i: Array, carry: tuple) -> tuple:
    nll_T, lse_T, dx_TD, dw_VD = carry
    start, fresh = _place(i, blocks.rows, rows)
    x_RD, labels_R, g_R = (
      lax.dynamic_slice_in_dim(a, start, blocks.rows)
      for a in (x_TD, labels_T, weights_T)
    )
    if axis is not None:
      labels_R, here_R = own_labels(labels_R, w.shape[0], axis)
    nll_R, lse_R, tiles = _forward_rows(
      softcap, blocks.vocab, x_RD, w, labels_R, keep=blocks.keep
    )
    g_nll_R, g_lse_R = g_R, jnp.zeros_like(g_R)
    if axis is not None:
      nll_R, lse_R = over_parts(nll_R, lse_R, here_R, axis)
      # Rows whose label is elsewhere still take their share of the softmax.
      g_nll_R, g_lse_R = jnp.where(here_R, g_R, 0), jnp.where(here_R, 0, g_R)
    dx_RD, dw_VD = _backward_rows(
      softcap,
      blocks.vocab,
      (x_RD, w, labels_R, lse_R, tiles),
      (g_nll_R, g_lse_R),
      fresh,
      dw_VD,
    )
    if axis is not None:
      dx_RD = lax.psum(dx_RD, axis)
    dx_RD = dx_RD.astype(x.dtype)
    return (
      lax.dynamic_update_slice_in_dim(nll_T, nll_R, start, 0),
      lax.dynamic_update_slice_in_dim(lse_T, lse_R, start, 0),
      lax.dynamic_update_slice_in_dim(dx_TD, dx_RD, start, 0),
      dw_VD,
    )

  nll = lse = jnp.zeros(rows, wide)
  axes = varying_axes(x, w, labels, weights)
  names = {axis} if isinstance(axis, str) else set(axis or ())
  carry = (
    *vary((nll, lse, jnp.zeros_like(x_TD)), axes - names),
    vary(dw_init, axes),
  )
  nll, lse, dx, dw = _for_blocks(blocks.rows, rows, body, carry)
  shape = labels.shape
  return nll.reshape(shape), lse.reshape(shape), dx.reshape(x.shape), dw


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _cross_entropy(
  softcap: float | None,
  blocks: BlockSizes,
  x: Float[Array, "T D"],
  w: Float[Array, "V D"],
  labels: Int[Array, " T"],
) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
  return _cross_entropy_fwd(softcap, blocks, x, w, labels)[0]


def _cross_entropy_fwd(
  softcap: float | None,
  blocks: BlockSizes,
  x: Float[Array, "T D"],
  w: Float[Array, "V D"],
  labels: Int[Array, " T"],
) -> tuple[tuple[Array, Array], tuple[Array, ...]]:
  def body(i: Array, carry: tuple) -> tuple:
    nll_T, lse_T = carry
    start, _ = _place(i, blocks.rows, len(labels))
    x_RD, labels_R = (
      lax.dynamic_slice_in_dim(a, start, blocks.rows) for a in (x, labels)
    )
    nll_R, lse_R, _ = _forward_rows(
      softcap, blocks.vocab, x_RD, w, labels_R, keep=False
    )
    return (
      lax.dynamic_update_slice_in_dim(nll_T, nll_R, start, 0),
      lax.dynamic_update_slice_in_dim(lse_T, lse_R, start, 0),
    )

  empty = vary_like(jnp.zeros(len(labels), _wide(x)), x, w, labels)
  nll, lse = _for_blocks(blocks.rows, len(labels), body, (empty, empty))
  return (nll, lse), (x, w, labels, lse)


def _cross_entropy_bwd(
  softcap: float | None,
  blocks: BlockSizes,
  residuals: tuple[Array, ...],
  cotangents: tuple[Array, Array],
) -> tuple[Array, Array, None]:
  x, w, labels, lse = residuals
  arrays = (x, labels, lse, *cotangents)

  def body(i: Array, carry: tuple) -> tuple:
    dx_TD, dw_VD = carry
    start, fresh = _place(i, blocks.rows, len(labels))
    x_RD, labels_R, lse_R, g_nll_R, g_lse_R = (
      lax.dynamic_slice_in_dim(a, start, blocks.rows) for a in arrays
    )
    dx_RD, dw_VD = _backward_rows(
      softcap,
      blocks.vocab,
      (x_RD, w, labels_R, lse_R, None),
      (g_nll_R, g_lse_R),
      fresh,
      dw_VD,
    )
    dx_RD = dx_RD.astype(x.dtype)
    return lax.dynamic_update_slice_in_dim(dx_TD, dx_RD, start, 0), dw_VD

  empty = (jnp.zeros_like(x), jnp.zeros(w.shape, _wide(x)))
  carry = vary_like(empty, w, *arrays)
  dx, dw = _for_blocks(blocks.rows, len(labels), body, carry)
  return match_primal(dx, x), match_primal(dw, w).astype(w.dtype), None


_cross_entropy.defvjp(_cross_entropy_fwd, _cross_entropy_bwd)


def _forward_rows(
  softcap: float | None,
  block: int,
  x: Float[Array, "R D"],
  w: Float[Array, "V D"],
  labels: Int[Array, " R"],
  *,
  keep: bool,
) -> tuple[Array, Array, Float[Array, "tiles R block"] | None]:
  """Returns nll and lse of a row block, and its tiles of logits to keep."""
  vocab = w.shape[0]

  def body(carry: tuple, i: Array) -> tuple[tuple, Array | None]:
    top_R, total_R, picked_R = carry
    start, fresh = _place(i, block, vocab)
    logits = _logits(softcap, x, lax.dynamic_slice_in_dim(w, start, block))
    column_R = labels - start
    here_R = (column_R >= 0) & (column_R < block)
    column_R = jnp.where(here_R, column_R, 0)
    label_R = jnp.take_along_axis(logits, column_R[:, None], axis=1)[:, 0]
    counted = logits
    if fresh is not None:
      counted = jnp.where(fresh[None], logits, -jnp.inf)
    new_top_R = jnp.maximum(top_R, counted.max(axis=1))
    total_R = total_R * jnp.exp(top_R - new_top_R)
    total_R += jnp.exp(counted - new_top_R[:, None]).sum(axis=1)
    carry = new_top_R, total_R, jnp.where(here_R, label_R, picked_R)
    return carry, logits if keep else None

  fill = functools.partial(jnp.full, len(labels), dtype=_wide(x))
  # A label found in no tile is out of range, and stays NaN.
  carry = vary_like((fill(-jnp.inf), fill(0), fill(jnp.nan)), x, w, labels)
  tiles = jnp.arange(math.ceil(vocab / block))
  (top_R, total_R, picked_R), kept = lax.scan(body, carry, tiles)
  lse_R = top_R + jnp.log(total_R)
  return lse_R - picked_R, lse_R, kept


def _backward_rows(
  softcap: float | None,
  block: int,
  residuals: tuple[Array, Array, Array, Array, Array | None],
  cotangents: tuple[Float[Array, " R"], Float[Array, " R"]],
  fresh: Bool[Array, " R"] | None,
  dw: Float[Array, "V D"] | None,
) -> tuple[Float[Array, "R D"], Float[Array, "V D"] | None]:
  """Returns dx of a row block in fp32, and `dw` with its share added."""
  x, w, labels, lse, kept = residuals
  g_nll, g_lse = cotangents
  vocab = w.shape[0]
  live = ((g_nll != 0) | (g_lse != 0))[:, None]
  known = (labels >= 0) & (labels < vocab)
  g_nll = jnp.where(known | (g_nll == 0), g_nll, jnp.nan)
  # Dead rows may hold anything, and 0 times infinity is not 0.
  x = jnp.where(live, x, 0)
  # Repeated rows get their dx again, but must not add to dw again.
  new_x = x if fresh is None else jnp.where(fresh[:, None], x, 0)

  def body(carry: tuple, tile: tuple) -> tuple[tuple, None]:
    i, logits = tile
    dx_RD, dw_VD = carry
    start, new = _place(i, block, vocab)
    w_tile = lax.dynamic_slice_in_dim(w, start, block)
    if logits is None:
      logits = _logits(softcap, x, w_tile)
    p = jnp.exp(logits - lse[:, None])
    hit = jnp.arange(block)[None] == (labels - start)[:, None]
    d = (g_nll + g_lse)[:, None] * p - jnp.where(hit, g_nll[:, None], 0)
    if softcap is not None:
      d *= 1 - jnp.square(logits / softcap)
    kept_d = live if new is None else live & new[None]
    d = jnp.where(kept_d, d, 0).astype(x.dtype)
    dx_RD += jnp.dot(
      d, w_tile.astype(x.dtype), preferred_element_type=dx_RD.dtype
    )
    if dw_VD is not None:
      share = jnp.einsum(
        "rv,rd->vd", d, new_x, preferred_element_type=lse.dtype
      )
      old = lax.dynamic_slice_in_dim(dw_VD, start, block)
      dw_VD = lax.dynamic_update_slice_in_dim(
        dw_VD, old + share.astype(old.dtype), start, 0
      )
    return (dx_RD, dw_VD), None

  dx = vary_like(jnp.zeros(x.shape, lse.dtype), x, w, lse, g_nll, g_lse)
  tiles = jnp.arange(math.ceil(vocab / block))
  (dx, dw), _ = lax.scan(body, (dx, dw), (tiles, kept))
  return dx, dw


def own_labels(
  labels: Int[Array, "*B T"], vocab: int, axis: AxisName
) -> tuple[Int[Array, "*B T"], Bool[Array, "*B T"]]:
  """Labels as rows of this device's part of a head, and which are in it.

  Args:
    labels: Of the whole vocabulary.
    vocab: Entries of each part.
    axis: Of the mesh, along which the parts lie in order; of several the
      last is the fastest.

  Returns:
    Rows in [0, vocab), 0 where the label is elsewhere, and whether it is here.
  """
  own = labels - lax.axis_index(axis) * vocab
  here = (own >= 0) & (own < vocab)
  return jnp.where(here, own, 0), here


def over_parts(
  nll: Float[Array, "*B T"],
  lse: Float[Array, "*B T"],
  here: Bool[Array, "*B T"],
  axis: AxisName,
) -> tuple[Float[Array, "*B T"], Float[Array, "*B T"]]:
  """The nll and lse over all parts of a head, from those of each.

  Args:
    nll: Of the rows of `own_labels` in this part.
    lse: Over this part of the vocabulary.
    here: Whether the label is in this part.
    axis: As in `own_labels`.

  Returns:
    The same on every device of the axis; nll is NaN where no part has the
    label.
  """
  top = lax.pmax(lax.stop_gradient(lse), axis)
  whole = top + jnp.log(lax.psum(jnp.exp(lse - top), axis))
  picked = lax.psum(jnp.where(here, lse - nll, 0), axis)
  known = lax.psum(here.astype(jnp.int32), axis) == 1
  return jnp.where(known, whole - picked, jnp.nan), whole


def _logits(
  softcap: float | None, x: Float[Array, "R D"], w: Float[Array, "block D"]
) -> Float[Array, "R block"]:
  logits = jnp.einsum(
    "rd,vd->rv", x, w.astype(x.dtype), preferred_element_type=_wide(x)
  )
  return logits if softcap is None else softcap * jnp.tanh(logits / softcap)


def _for_blocks(
  block: int, size: int, body: Callable[[Array, tuple], tuple], carry: tuple
) -> tuple:
  if size == 0:
    return carry
  return lax.fori_loop(0, math.ceil(size / block), body, carry)


def _place(i: Array, block: int, size: int) -> tuple[Array, Array | None]:
  """Start of block `i`, moved back to fit, and which of it is not a repeat."""
  start = jnp.minimum(i * block, size - block)
  if size % block == 0:
    return start, None
  return start, start + jnp.arange(block) >= i * block


def _wide(x: Array) -> jnp.dtype:
  """The accumulation dtype: at least fp32."""
  return jnp.promote_types(x.dtype, jnp.float32)
