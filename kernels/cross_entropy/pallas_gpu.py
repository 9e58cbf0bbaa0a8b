"""Cross-entropy of a linear head for Hopper GPUs, in Pallas (Mosaic GPU).

One kernel, the product x w^T by tiles, with two ends. In the forward pass a
tile leaves the maximum of its logits, the sum of their exponentials and the
label's logit for every row, which XLA merges; in the backward pass it leaves
the cotangent of its logits in x's dtype, for a block of rows and vocabulary at
a time, of which two plain products of XLA make dx, and dw, added to the
caller's buffer in a loop carry. That is 4 matrix products, 3 for a frozen
head. A block of cotangents takes at most 64 MiB, and so do the sums beside it.

A program has three warpgroups. One fetches (TMA): 64 columns of 128 rows and
of 256 vocabulary entries at a time, into a ring in shared memory. Two multiply
(wgmma), 64 rows each. There are no more programs than processors; each walks
its tiles, and the next tile is fetched while the last one is finished. Tiles
go by groups of 16 blocks of rows, so that what is fetched at a time is shared.

A last block that would overrun its axis is moved back, as in `xla.py`.

The interpreter has no wgmma for a transposed operand: with `interpret` the
products are `dot_general`; all else is what is compiled.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxchunk.kernels.attention.softmax import LOWEST
from jaxchunk.kernels.cross_entropy import passes
from jaxchunk.kernels.cross_entropy.hopper.tiles import (
  DEPTH,
  EIGHT,
  TILE_ROWS,
  Inputs,
  Problem,
  finish_backward,
  finish_forward,
  run,
)
from jaxchunk.kernels.vma import vary_like

# Of an H100 SXM and an H200. Any number gives the same results.
_PROCESSORS = 132
_BLOCK_BYTES = 64 << 20
_MAX_ROWS = 8192


@dataclasses.dataclass(frozen=True)
class GpuBlocks:
  """How the logits are cut.

  Attributes:
    rows: Rows of a block, a multiple of 128.
    vocab: Vocabulary entries of a block, a multiple of `tile`.
    tile: Vocabulary entries of a tile.
    stages: Steps in shared memory.
    programs: How many there are at most.
  """

  rows: int
  vocab: int
  tile: int = 256
  stages: int = 3
  programs: int = _PROCESSORS


def choose_blocks(num_rows: int, vocab: int, width: int) -> GpuBlocks:
  """Blocks of which cotangents, and sums in fp32, take up to 64 MiB each."""
  vocab = _even(vocab, _BLOCK_BYTES // (4 * width), GpuBlocks.tile)
  most = min(_MAX_ROWS, _BLOCK_BYTES // max(2 * vocab, 4 * width))
  return GpuBlocks(
    _even(max(num_rows, TILE_ROWS), most, TILE_ROWS),
    vocab,
  )


def _even(size: int, most: int, multiple: int) -> int:
  """A multiple, at most `size` and `most`, that cuts `size` evenly.

  It is one `multiple` at least, which `size` must be.
  """
  most = max(most // multiple * multiple, multiple)
  count = math.ceil(size / most)
  while True:
    block = math.ceil(size / count / multiple) * multiple
    if block <= size:
      return block
    count += 1


def unsupported(
  x: Float[Array, "*B T D"], w: Float[Array, "V D"], *, tile: int = 256
) -> str | None:
  """Why this kernel cannot serve the arguments; `None` if it can.

  Args:
    x: Hidden states, like the head an array or a shape and dtype.
    w: The head, of any floating dtype.
    tile: See `GpuBlocks`.

  Returns:
    The reason, as the end of a sentence.
  """
  if x.dtype not in (jnp.bfloat16, jnp.float16):
    return f"x has dtype {x.dtype}, not bfloat16 or float16"
  V, D = w.shape
  if D % DEPTH:
    return f"the width D={D} is not a multiple of {DEPTH}"
  if tile > V:
    return f"the vocabulary V={V} is smaller than a tile, {tile}"
  return None


def linear_cross_entropy(
  x: Float[Array, "*B T D"],
  w: Float[Array, "V D"],
  labels: Int[Array, "*B T"],
  *,
  softcap: float | None = None,
  blocks: GpuBlocks | None = None,
  interpret: Any = False,
) -> tuple[Float[Array, "*B T"], Float[Array, "*B T"]]:
  """See `api.linear_cross_entropy`.

  Args:
    x: Hidden states, bf16 or fp16.
    w: The head; cast to the dtype of x block by block.
    labels: Of every row.
    softcap: Bounds the logits.
    blocks: By default `choose_blocks`.
    interpret: `InterpretGPUParams` to run on a CPU.

  Returns:
    nll and lse.

  Raises:
    NotImplementedError: See `unsupported`.
  """
  kernel = _Kernel(softcap, blocks, interpret)
  return passes.linear_cross_entropy(kernel, x, w, labels)


def linear_cross_entropy_with_grad(
  x: Float[Array, "*B T D"],
  w: Float[Array, "V D"],
  labels: Int[Array, "*B T"],
  weights: Float[Array, "*B T"],
  *,
  softcap: float | None = None,
  dw_init: Float[Array, "V D"] | None,
  blocks: GpuBlocks | None = None,
  interpret: Any = False,
) -> tuple[
  Float[Array, "*B T"],
  Float[Array, "*B T"],
  Float[Array, "*B T D"],
  Float[Array, "V D"] | None,
]:
  """See `api.linear_cross_entropy_with_grad`, and `linear_cross_entropy`."""
  kernel = _Kernel(softcap, blocks, interpret)
  return passes.linear_cross_entropy_with_grad(
    kernel, x, w, labels, weights, dw_init
  )


@dataclasses.dataclass(frozen=True)
class _Kernel:
  """`passes.Passes` for Hopper GPUs."""

  softcap: float | None
  blocks: GpuBlocks | None
  interpret: Any

  def unsupported(self, x: Array, w: Array, dw: Array | None) -> str | None:
    del dw
    return unsupported(x, w, tile=(self.blocks or GpuBlocks).tile)

  def forward(
    self, x: Float[Array, "T D"], w: Float[Array, "V D"], labels: Array
  ) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    T, (x, labels) = len(x), _padded(x, labels)
    P = self._problem(x, w)

    def rows(i: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
      start = _start(i, P.rows, len(x))
      x_R, labels_R = (_slice(a, start, P.rows) for a in (x, labels))

      def columns(c: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        top, total, picked = carry
        first = _start(c, P.vocab, P.whole)
        # Of a repeated entry the block before has the logit.
        index = jnp.where(labels_R < c * P.vocab, -1, labels_R - first)
        inputs = Inputs(*_operands(P, x_R, w, first, c), index)
        tops, totals, found = run(P, finish_forward, inputs, "forward")
        new = jnp.maximum(top, tops.max(0))
        total = total * jnp.exp(top - new)
        total += (totals * jnp.exp(tops - new[None])).sum(0)
        return new, total, picked + found.sum(0)

      fill = functools.partial(jnp.full, P.rows, dtype=jnp.float32)
      start_values = vary_like((fill(LOWEST), fill(0), fill(0)), x)
      blocks = math.ceil(P.whole / P.vocab)
      top, total, picked = lax.fori_loop(0, blocks, columns, start_values)
      lse, label = carry
      return (
        _update(lse, top + jnp.log(total), start),
        _update(label, picked, start),
      )

    empty = vary_like(jnp.zeros(len(x), jnp.float32), x)
    blocks = math.ceil(len(x) / P.rows)
    lse, picked = lax.fori_loop(0, blocks, rows, (empty, empty))
    return lse[:T], picked[:T]

  def backward(
    self,
    residuals: tuple[Array, Array, Array, Array],
    cotangents: tuple[Float[Array, " T"], Float[Array, " T"]],
    dw: Float[Array, "V D"] | None,
  ) -> tuple[Float[Array, "T D"], Float[Array, "V D"] | None]:
    x, w, *of_rows = residuals
    T, arrays = len(x), _padded(x, *of_rows, *cotangents)
    P = self._problem(arrays[0], w)
    size = len(arrays[0])

    def rows(i: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
      dx, dw = carry
      start = _start(i, P.rows, size)
      block = _Block.of(*(_slice(a, start, P.rows) for a in arrays))
      # Repeated rows get their dx again, but must not add to dw again.
      fresh = start + jnp.arange(P.rows) >= i * P.rows
      x_new = block.x
      if size % P.rows:
        x_new = jnp.where(fresh[:, None], block.x, 0)

      def columns(c: Array, carry: tuple[Array, Any]) -> tuple[Array, Any]:
        return _add_block(P, block, x_new, w, c, *carry)

      dx_R = vary_like(jnp.zeros(block.x.shape, jnp.float32), x)
      blocks = math.ceil(P.whole / P.vocab)
      dx_R, dw = lax.fori_loop(0, blocks, columns, (dx_R, dw))
      dx_R = dx_R.astype(dx.dtype)
      return _update(dx, dx_R, start), dw

    empty = vary_like(jnp.zeros_like(arrays[0]), x)
    dx, dw = lax.fori_loop(0, math.ceil(size / P.rows), rows, (empty, dw))
    return dx[:T], dw

  def _problem(self, x: Array, w: Array) -> "Problem":
    (V, D), blocks = w.shape, self.blocks
    blocks = blocks or choose_blocks(len(x), V, D)
    return Problem(
      *(blocks.rows, blocks.vocab, D, V),
      *(blocks.tile, blocks.stages, blocks.programs),
      x.dtype,
      self.softcap,
      self.interpret,
    )


def _padded(x: Array, *of_rows: Array) -> tuple[Array, ...]:
  """At least a tile of rows; those added have no cotangent."""
  missing = max(0, TILE_ROWS - len(x))
  return tuple(
    jnp.pad(a, ((0, missing), *((0, 0),) * (a.ndim - 1))) for a in (x, *of_rows)
  )


def _start(i: Array, block: int, size: int) -> Array:
  """Where block i starts, moved back to fit."""
  return jnp.minimum(i * block, size - block)


def _slice(a: Array, start: Array, size: int) -> Array:
  return lax.dynamic_slice_in_dim(a, start, size)


def _update(a: Array, block: Array, start: Array) -> Array:
  return lax.dynamic_update_slice_in_dim(a, block, start, 0)


def _operands(
  P: Problem, x: Array, w: Array, first: Array, c: Array
) -> tuple[Array, Array, Array]:
  """The first fields of `Inputs`, for block c of the vocabulary."""
  fresh = c * P.vocab - first
  if w.dtype != P.dtype or len(w) % EIGHT:
    w, first = _slice(w, first, P.vocab).astype(P.dtype), jnp.zeros_like(first)
  numbers = jnp.stack([first // EIGHT, fresh]).astype(jnp.int32)
  return (*vary_like((x, w, numbers), x),)


class _Block(NamedTuple):
  """A block of rows, backward; a row without a cotangent is zero throughout.

  Its p is then 1 / V, and p times its cotangents is 0.
  """

  x: Array
  labels: Array
  lse: Array
  g_nll: Array
  g_sum: Array

  @classmethod
  def of(
    cls, x: Array, labels: Array, lse: Array, g_nll: Array, g_lse: Array
  ) -> "_Block":
    """From slices of what the backward pass is given."""
    live = (g_nll != 0) | (g_lse != 0)
    x = jnp.where(live[:, None], x, 0)
    return cls(x, labels, jnp.where(live, lse, 0), g_nll, g_nll + g_lse)


def _add_block(
  P: Problem,
  block: _Block,
  x_new: Array,
  w: Array,
  c: Array,
  dx: Array,
  dw: Array | None,
) -> tuple[Array, Array | None]:
  """Adds what block c of the vocabulary gives."""
  first = _start(c, P.vocab, P.whole)
  inputs = Inputs(
    *_operands(P, block.x, w, first, c),
    block.labels - first,
    *block[2:],
  )
  (d,) = run(P, finish_backward, inputs, "backward")
  wide = {"preferred_element_type": jnp.float32}
  dx = dx + jnp.dot(d, _slice(w, first, P.vocab).astype(d.dtype), **wide)
  if dw is not None:
    share = jnp.einsum("rv,rd->vd", d, x_new, **wide)
    new = _slice(dw, first, P.vocab) + share.astype(dw.dtype)
    dw = _update(dw, new, first)
  return dx, dw
