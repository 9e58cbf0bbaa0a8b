"""The GPU kernel: interpreted on the CPU, and lowered for CUDA.

What every implementation must do is in test_cross_entropy.py; what the
compiler for a Hopper says, in tests/aot/test_cross_entropy_gpu.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.interpret_pallas_call import get_races
from jax.sharding import AxisType, PartitionSpec

from jaxchunk.kernels.cross_entropy import pallas_gpu, xla
from jaxchunk.kernels.cross_entropy.api import (
  linear_cross_entropy,
  linear_cross_entropy_with_grad,
)
from jaxchunk.kernels.cross_entropy.hopper.tiles import Problem
from jaxchunk.kernels.cross_entropy.pallas_gpu import GpuBlocks
from tests.kernels.test_cross_entropy import (
  GPU,
  InterpretGPUParams,
  assert_errs_at_most_twice_as_much,
  make,
  make_cotangents,
  truth,
  value_and_grad,
)

array = jax.ShapeDtypeStruct
# Rows, vocabulary, soft-cap, dtype, blocks. Each program of each run takes the
# interpreter a second or more.
CASES = {
  # Several tiles for each program.
  "whole blocks": (
    *(256, 128, None, "bfloat16"),
    GpuBlocks(256, 128, 64, programs=2),
  ),
  # The last block of rows is moved back.
  "a tail of rows": (
    *(200, 64, 3.0, "float16"),
    GpuBlocks(128, 64, 64, stages=2),
  ),
}


@pytest.mark.parametrize("name", CASES)
def test_errs_at_most_twice_as_much_as_xla(name):
  rows, vocab, softcap, dtype, blocks = CASES[name]
  x, w, labels = make((rows,), vocab, width=128, dtype=jnp.dtype(dtype))
  cotangents = make_cotangents((rows,), np.float32)
  kernel = functools.partial(
    pallas_gpu.linear_cross_entropy,
    softcap=softcap,
    blocks=blocks,
    interpret=InterpretGPUParams(detect_races=True),
  )
  tiled = functools.partial(
    xla.linear_cross_entropy,
    softcap=softcap,
    blocks=xla.BlockSizes(min(rows, 64), 32),
  )
  got, peer = (
    value_and_grad(function, x, w, labels, cotangents)
    for function in (kernel, tiled)
  )
  jax.block_until_ready(got)
  assert not get_races().races_found
  assert [a.dtype for a in got] == [a.dtype for a in peer]
  want = truth(x, w, labels, cotangents, softcap)
  assert_errs_at_most_twice_as_much(got, peer, want)


def test_a_wide_head_with_a_tail_and_rows_without_weight():
  # The last block of the vocabulary is moved back, the head is cast by blocks,
  # and rows are added to make a tile.
  x, w, labels = make((3, 11), 70, width=64, dtype=np.float32)
  x = x.astype(jnp.bfloat16)
  dead = jnp.asarray(np.arange(33).reshape(3, 11) % 3 == 0)
  weights = jnp.where(dead, 0, make_cotangents((3, 11), np.float32)[0])
  dirty = x.at[0, 0].set(jnp.inf).at[1, 1].set(jnp.nan)
  init = np.random.default_rng(2).integers(-9, 9, w.shape)
  init = jnp.asarray(init, jnp.float32)

  def run(function, x, **options):
    call = jax.jit(functools.partial(function, softcap=3.0, **options))
    return call(x, w, labels.at[0, 3].set(70), weights, dw_init=init)

  got = run(pallas_gpu.linear_cross_entropy_with_grad, dirty, **GPU)
  peer = run(xla.linear_cross_entropy_with_grad, dirty)
  for a, b in zip(got[:2], peer[:2], strict=True):
    assert a.dtype == b.dtype and np.isnan(a).sum() in (2, 3)
    np.testing.assert_allclose(a, b, rtol=1e-5)
  assert not got[2][dead].any()
  *_, dx, dw = truth(x, w, labels, (weights, 0 * weights), 3.0)
  want = dx.astype(np.float64), init + dw
  for ours, theirs, true in zip(got[2:], peer[2:], want, strict=True):
    assert ours.dtype == theirs.dtype
    errors = [
      np.linalg.norm(np.asarray(a, np.float64) - true) for a in (ours, theirs)
    ]
    assert errors[0] <= 2 * errors[1], errors


@pytest.mark.parametrize("programs", [1, 5])
@pytest.mark.parametrize("tiles", [(1, 1), (16, 3), (19, 5), (40, 2)])
def test_every_tile_has_one_program(tiles, programs):
  rows, vocab = tiles
  problem = Problem(
    *(rows * 128, vocab * 32, 64, vocab * 32, 32, 2, programs),
    *(jnp.bfloat16, None, False),
  )
  places = [
    tuple(map(int, problem.place(jnp.int32(p), jnp.int32(n))))
    for p in range(problem.started())
    for n in range(int(problem.count(jnp.int32(p))))
  ]
  want = [(r * 128, v * 32) for r in range(rows) for v in range(vocab)]
  assert sorted(places) == want


@pytest.mark.parametrize("rows", [1, 128, 1000, 8192, 100_000])
@pytest.mark.parametrize("vocab", [256, 4096, 32000, 50257, 128256, 262144])
@pytest.mark.parametrize("width", [64, 1024, 8192])
def test_chosen_blocks_are_bounded(rows, vocab, width):
  blocks = pallas_gpu.choose_blocks(rows, vocab, width)
  assert blocks.rows % 128 == 0 and blocks.vocab % blocks.tile == 0
  assert blocks.rows <= max(rows, 128) and blocks.vocab <= vocab
  for count in (
    2 * blocks.rows * blocks.vocab,
    4 * blocks.rows * width,
    4 * blocks.vocab * width,
  ):
    assert count <= 1.1 * pallas_gpu._BLOCK_BYTES
  # What is computed twice because a last block is moved back.
  for size, block in ((max(rows, 128), blocks.rows), (vocab, blocks.vocab)):
    assert -(-size // block) * block < max(2 * size, size + 8 * 256)


def functions(**options):
  def value(x, w, labels):
    nll, lse = linear_cross_entropy(x, w, labels, **options)
    return nll.sum() + jnp.square(lse).sum()

  def one_pass(x, w, labels, weights, dw):
    call = functools.partial(linear_cross_entropy_with_grad, **options)
    return call(x, w, labels, weights, dw_init=dw)

  return value, one_pass


@pytest.mark.fast
@pytest.mark.parametrize("head", ["float32", "bfloat16"])
def test_it_lowers_for_cuda(head):
  x, w = array((2, 300, 1024), jnp.bfloat16), array((50257, 1024), head)
  labels, weights = array((2, 300), jnp.int32), array((2, 300), jnp.float32)
  dw = array(w.shape, jnp.float32)
  value, one_pass = functions(softcap=30.0, implementation="pallas_gpu")
  function, arguments = jax.grad(value, (0, 1)), (x, w, labels)
  if head == "float32":
    function, arguments = one_pass, (*arguments, weights, dw)
  traced = jax.jit(function).trace(*arguments)
  text = traced.lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("mosaic_gpu_v2") == 2


def test_outputs_vary_over_the_mesh_axes_of_the_inputs():
  mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
  x, w = array((4, 64, 128), jnp.bfloat16), array((512, 128), jnp.bfloat16)
  labels, weights = array((4, 64), jnp.int32), array((4, 64), jnp.float32)
  value, one_pass = functions(implementation="pallas_gpu")

  def local(x, w, labels, weights):
    def loss(x, w):
      return jax.lax.psum(value(x, w, labels), "d")

    dw = jnp.zeros(w.shape)
    *own, dw = one_pass(x, w, labels, weights, dw)
    return jax.grad(loss, (0, 1))(x, w), own, jax.lax.psum(dw, "d")

  by_row, whole = PartitionSpec("d"), PartitionSpec()
  sharded = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(by_row, whole, by_row, by_row),
    out_specs=((by_row, whole), by_row, whole),
  )
  (dx, dw), own, _ = jax.eval_shape(sharded, x, w, labels, weights)
  assert (dx.shape, dw.shape, own[2].shape) == (x.shape, w.shape, x.shape)


@pytest.mark.fast
@pytest.mark.parametrize(
  ("shape", "vocab", "dtype", "message"),
  [
    ((8, 128), 512, "float32", "x has dtype float32, not bfloat16 or float16"),
    ((8, 96), 512, "bfloat16", "the width D=96 is not a multiple of 64"),
    ((8, 128), 200, "bfloat16", "V=200 is smaller than a tile, 256"),
  ],
)
def test_what_is_not_supported_is_named(shape, vocab, dtype, message):
  x, w = array(shape, dtype), array((vocab, shape[1]), dtype)
  labels = array(shape[:1], jnp.int32)
  value, _ = functions(implementation="pallas_gpu")
  with pytest.raises(NotImplementedError, match=f'{message}.*"xla" can'):
    jax.eval_shape(value, x, w, labels)
