"""Cross-entropy of a linear head as Pallas kernels for TPU.

Three kernels, each of which walks tiles of rows and vocabulary and computes
their logits anew:

- forward: a block of rows stays, the vocabulary passes by, the log-sum-exp is
  kept online, and the label's logit is picked where its tile comes;
- dx: the same walk, the sum over the vocabulary stays in vector memory;
- dw: a block of the vocabulary stays, the rows pass by, and the sum is added
  to the caller's buffer once, in place.

That is 5 matrix products (3 for a frozen head) against the 4 of `xla.py`: one
kernel for both gradients would have to read and write the fp32 gradient of w
once for each block of rows, or hold all of dx. Neither logits nor their
gradient leave vector memory, no sum depends on the order of programs, and
every array is read where it lies: a head of another dtype is cast by tiles.

Tiles are [vocabulary, rows]: what is known of a row then lies along the lanes
and is broadcast for free. The width D is not cut, so a tile of x and one of w
must fit: the wider, the smaller the tiles. A last block that overruns its axis
is filled with anything, NaN too, so it is masked in logits and, where it is
summed over, in products; so are rows without a cotangent. Blocks that need no
such mask run without one, and blocks of rows without any cotangent not at all.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float, Int

from jaxchunk.kernels.cross_entropy import passes
from jaxchunk.kernels.cross_entropy.tpu.bodies import (
  DEAD,
  FULL,
  LANES,
  MIXED,
  PIECE,
  Form,
  Tile,
  dw_kernel,
  dx_kernel,
  forward_kernel,
)
from jaxchunk.kernels.vma import output


@dataclasses.dataclass(frozen=True)
class TpuBlocks:
  """The tiles of the three kernels."""

  forward: Tile
  dx: Tile
  dw: Tile


# What stays and what passes by, best first: each element that passes by is
# multiplied once for each that stays, and must be read from memory meanwhile.
# More than 256 that pass by would only make programs longer, as would more than
# 256 that stay in fp32, whose products take six of bf16.
_TILES = (
  (1024, 256),
  (512, 256),
  (256, 256),
  (256, 128),
  (128, 128),
)
# Vector memory of a core by kind of device, where it is not 64 MiB.
_MEMORY = {
  "TPU v4": 16 << 20,
  "TPU v5 lite": 128 << 20,
  "TPU v6 lite": 128 << 20,
}


def _memory() -> int:
  """Vector memory of the device that the program is made for."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  kind = (device or jax.devices()[0]).device_kind
  return _MEMORY.get(kind, 64 << 20)


def choose_blocks(
  num_rows: int, vocab: int, width: int, *, x_dtype: Any, w_dtype: Any
) -> TpuBlocks | None:
  """The tiles for x `[num_rows,width]` and w; `None` if none fits.

  They fill 3/4 of the vector memory by this count: blocks twice, as one is
  fetched while the other is used, and some tiles in fp32.
  """
  bx, bw = jnp.dtype(x_dtype).itemsize, jnp.dtype(w_dtype).itemsize
  # Bytes for each element of x and of w that a step has.
  costs = {"forward": (2 * bx, 2 * bw), "dx": (4 * bx + 4, 2 * bw)}
  costs["dw"] = (2 * bx, 2 * bw + 16)
  chosen = {}
  for name, (of_x, of_w) in costs.items():
    for stays, passes_by in _TILES[2 if bx == 4 else 0 :]:
      rows, entries = stays, passes_by
      if name == "dw":
        rows, entries = passes_by, stays
      tile = Tile(_even(num_rows, rows), _even(vocab, entries))
      pieces = min(width, PIECE) * (tile.rows + tile.vocab)
      size = width * (tile.rows * of_x + tile.vocab * of_w)
      size += 4 * pieces + 24 * tile.rows * tile.vocab
      if size <= _memory() * 3 // 4:
        chosen[name] = tile
        break
    else:
      return None
  return TpuBlocks(**chosen)


def _even(size: int, most: int) -> int:
  """A block of whole lanes, at most `most`, that cuts `size` evenly."""
  block = math.ceil(size / math.ceil(size / most))
  return -(-block // LANES) * LANES


def unsupported(
  x: Float[Array, "*B T D"],
  w: Float[Array, "V D"],
  dw: Float[Array, "V D"] | None = None,
) -> str | None:
  """Why these kernels cannot serve the arguments; `None` if they can.

  Args:
    x: Hidden states, like the others an array or a shape and dtype.
    w: The head.
    dw: What the gradient of w is added to, if anything.

  Returns:
    The reason, as the end of a sentence.
  """
  for name, a in (("x", x), ("w", w)):
    if a.dtype not in (jnp.float32, jnp.bfloat16):
      return f"{name} has dtype {a.dtype}, not float32 or bfloat16"
  if dw is not None and dw.dtype != jnp.float32:
    return f"dw_init has dtype {dw.dtype}, not float32"
  D = x.shape[-1]
  if D % LANES:
    return f"the width D={D} is not a multiple of {LANES}"
  rows = math.prod(x.shape[:-1]) or 1
  if not choose_blocks(rows, w.shape[0], D, x_dtype=x.dtype, w_dtype=w.dtype):
    return (
      f"tiles of width D={D} in {x.dtype} and {w.dtype} do not fit the "
      f"{_memory() >> 20} MiB of vector memory"
    )
  return None


def linear_cross_entropy(
  x: Float[Array, "*B T D"],
  w: Float[Array, "V D"],
  labels: Int[Array, "*B T"],
  *,
  softcap: float | None = None,
  blocks: TpuBlocks | None = None,
  interpret: Any = False,
) -> tuple[Float[Array, "*B T"], Float[Array, "*B T"]]:
  """See `api.linear_cross_entropy`.

  Args:
    x: Hidden states, bf16 or fp32.
    w: The head, bf16 or fp32.
    labels: Of every row.
    softcap: Bounds the logits.
    blocks: Tiles; by default `choose_blocks`.
    interpret: As in `pallas_call`; widths and tiles may then be anything.

  Returns:
    nll and lse.

  Raises:
    NotImplementedError: See `unsupported`.
  """
  kernels = _Kernels(softcap, blocks, interpret)
  return passes.linear_cross_entropy(kernels, x, w, labels)


def linear_cross_entropy_with_grad(
  x: Float[Array, "*B T D"],
  w: Float[Array, "V D"],
  labels: Int[Array, "*B T"],
  weights: Float[Array, "*B T"],
  *,
  softcap: float | None = None,
  dw_init: Float[Array, "V D"] | None,
  blocks: TpuBlocks | None = None,
  interpret: Any = False,
) -> tuple[
  Float[Array, "*B T"],
  Float[Array, "*B T"],
  Float[Array, "*B T D"],
  Float[Array, "V D"] | None,
]:
  """See `api.linear_cross_entropy_with_grad`, and `linear_cross_entropy`."""
  kernels = _Kernels(softcap, blocks, interpret)
  return passes.linear_cross_entropy_with_grad(
    kernels, x, w, labels, weights, dw_init
  )


@dataclasses.dataclass(frozen=True)
class _Kernels:
  """`passes.Passes` for TPU."""

  softcap: float | None
  blocks: TpuBlocks | None
  interpret: Any

  def unsupported(self, x: Array, w: Array, dw: Array | None) -> str | None:
    return None if self.interpret else unsupported(x, w, dw)

  def forward(
    self, x: Float[Array, "T D"], w: Float[Array, "V D"], labels: Array
  ) -> tuple[Float[Array, " T"], Float[Array, " T"]]:
    call = self._call("forward", x, w)
    row = pltpu.VMEM((1, call.tile.rows), jnp.float32)
    lse, picked = call.run(
      forward_kernel,
      [(labels[None], call.of_rows())],
      [((1, len(x)), jnp.float32, call.of_rows())] * 2,
      [row] * 3,
      products=1,
    )
    return lse[0], picked[0]

  def backward(
    self,
    residuals: tuple[Array, Array, Array, Array],
    cotangents: tuple[Float[Array, " T"], Float[Array, " T"]],
    dw: Float[Array, "V D"] | None,
  ) -> tuple[Float[Array, "T D"], Float[Array, "V D"] | None]:
    x, w, labels, lse = residuals
    g_nll, g_lse = cotangents
    live = (g_nll != 0) | (g_lse != 0)
    rows = [a[None] for a in (labels, lse, g_nll, g_nll + g_lse)]

    call = self._call("dx", x, w, live)
    (dx,) = call.run(
      dx_kernel,
      [(a, call.of_rows()) for a in rows],
      [(x.shape, x.dtype, call.of_x())],
      [pltpu.VMEM((call.tile.rows, x.shape[1]), jnp.float32)],
      products=2,
    )
    if dw is None:
      return dx, None
    call = self._call("dw", x, w, live, by_vocab=True)
    (dw,) = call.run(
      dw_kernel,
      [(a, call.of_rows()) for a in rows],
      [(dw.shape, dw.dtype, call.of_w())],
      [],
      products=2,
      old=dw,
    )
    return dx, dw

  def _call(
    self,
    name: str,
    x: Array,
    w: Array,
    live: Array | None = None,
    *,
    by_vocab: bool = False,
  ) -> "_Call":
    blocks = self.blocks or choose_blocks(
      len(x), *w.shape, x_dtype=x.dtype, w_dtype=w.dtype
    )
    # Only the interpreter comes here with a width that does not fit.
    tile = Tile(*_TILES[-1]) if blocks is None else getattr(blocks, name)
    return _Call(x, w, live, tile, self.softcap, by_vocab, self.interpret)


class _Call(NamedTuple):
  """One run of a kernel."""

  x: Array
  w: Array
  live: Array | None
  tile: Tile
  softcap: float | None
  by_vocab: bool
  interpret: Any

  @property
  def form(self) -> Form:
    return Form(
      self.tile, len(self.x), len(self.w), self.softcap, self.by_vocab
    )

  def of_rows(self) -> pl.BlockSpec:
    """A block of `[1,T]`."""
    return self._spec((1, self.tile.rows), lambda i, j: (0, i))

  def of_x(self) -> pl.BlockSpec:
    """A block of `[T,D]`."""
    return self._spec((self.tile.rows, self.x.shape[1]), lambda i, j: (i, 0))

  def of_w(self) -> pl.BlockSpec:
    """A block of `[V,D]`."""
    return self._spec((self.tile.vocab, self.w.shape[1]), lambda i, j: (j, 0))

  def _spec(self, shape: tuple[int, int], place: Any) -> pl.BlockSpec:
    form = self.form
    return pl.BlockSpec(shape, lambda a, b, _: place(*form.place(a, b)))

  def states(self) -> Int[Array, " I"]:
    """What the blocks of rows need; all of them without `live`."""
    blocks = pl.cdiv(len(self.x), self.tile.rows)
    if self.live is None:
      return jnp.full(blocks, FULL, jnp.int32)
    padding = blocks * self.tile.rows - len(self.live)
    live = jnp.pad(self.live, (0, padding)).reshape(blocks, self.tile.rows)
    state = jnp.where(live.all(1), FULL, jnp.where(live.any(1), MIXED, DEAD))
    return state.astype(jnp.int32)

  def run(
    self,
    kernel: Any,
    rows: list[tuple[Array, pl.BlockSpec]],
    outputs: list[tuple[tuple[int, ...], Any, pl.BlockSpec]],
    scratch: list[Any],
    *,
    products: int,
    old: Array | None = None,
  ) -> list[Array]:
    """Runs a kernel over all tiles.

    Args:
      kernel: Takes the form, the states of blocks of rows, and all references.
      rows: Arrays `[1,T]` and their blocks.
      outputs: Shapes, dtypes and blocks.
      scratch: What the kernel holds.
      products: Matrix products per tile.
      old: A last input, updated in place: the only output.

    Returns:
      The outputs.
    """
    (T, D), V = self.x.shape, len(self.w)
    inputs = [*rows, (self.x, self.of_x()), (self.w, self.of_w())]
    if old is not None:
      inputs.append((old, outputs[0][2]))
    arrays, in_specs = zip(*inputs, strict=True)
    passing = self.x if self.by_vocab else self.w
    traffic = self.form.grid[0] * passing.size * passing.dtype.itemsize
    return pl.pallas_call(
      functools.partial(kernel, self.form),
      grid_spec=pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=1,
        grid=self.form.grid,
        in_specs=in_specs,
        out_specs=[spec for *_, spec in outputs],
        scratch_shapes=scratch,
      ),
      out_shape=[output(shape, dtype, self.x) for shape, dtype, _ in outputs],
      input_output_aliases={} if old is None else {len(inputs): 0},
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "arbitrary"),
        vmem_limit_bytes=_memory() * 7 // 8,
      ),
      cost_estimate=pl.CostEstimate(
        flops=2 * products * T * V * D,
        transcendentals=T * V,
        bytes_accessed=traffic,
      ),
      interpret=self.interpret,
      name="cross_entropy_" + kernel.__name__.removesuffix("_kernel"),
    )(self.states(), *arrays)
