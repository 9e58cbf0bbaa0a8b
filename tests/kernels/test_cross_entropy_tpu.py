"""The TPU kernels, interpreted on CPU, against fp64 truth; and lowered.

What every implementation must do is in test_cross_entropy.py.
"""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec

from jaxchunk.kernels.cross_entropy import pallas_tpu, xla
from jaxchunk.kernels.cross_entropy.api import (
  linear_cross_entropy,
  linear_cross_entropy_with_grad,
)
from jaxchunk.kernels.cross_entropy.pallas_tpu import TpuBlocks
from jaxchunk.kernels.cross_entropy.tpu.bodies import Tile
from tests.kernels.test_cross_entropy import (
  TPU,
  assert_errs_at_most_twice_as_much,
  fused,
  make,
  make_cotangents,
  plain,
  truth,
  value_and_grad,
)

array = jax.ShapeDtypeStruct


def assert_true(function, shape, vocab, width, dtype, softcap):
  """Errors against fp64, compared with those of `xla` with like blocks."""
  x, w, labels = make(shape, vocab, width=width, dtype=dtype)
  cotangents = make_cotangents(shape, np.float32)
  options = {"softcap": softcap}
  peer = functools.partial(
    xla.linear_cross_entropy,
    blocks=xla.BlockSizes(min(16, labels.size), min(16, vocab)),
    **options,
  )
  got, peer = (
    value_and_grad(functools.partial(f, **options), x, w, labels, cotangents)
    for f in (function, peer)
  )
  assert [a.dtype for a in got] == [a.dtype for a in peer]
  want = truth(x, w, labels, cotangents, softcap)
  assert_errs_at_most_twice_as_much(got, peer, want)


@pytest.mark.parametrize(
  ("rows", "vocab", "softcap", "dtype", "tile"),
  [
    (48, 96, None, "float32", Tile(16, 16)),  # whole tiles
    (61, 101, 3.0, "float32", None),
    (61, 101, 3.0, "bfloat16", None),
    (5, 7, None, "bfloat16", None),  # less than a tile
  ],
)
def test_errs_at_most_twice_as_much_as_xla(rows, vocab, softcap, dtype, tile):
  function = plain("pallas_tpu")
  if tile is not None:
    # One shape for all passes: scores of the backward pass must have the
    # forward's rounding, or they err apart from the lse. A TPU sums over D
    # alike for every tile; a CPU with AVX2, which interprets, does not.
    function = functools.partial(function, blocks=TpuBlocks(tile, tile, tile))
  assert_true(function, (rows,), vocab, 40, jnp.dtype(dtype), softcap)


def test_chosen_tiles_and_a_width_in_pieces():
  blocks = pallas_tpu.choose_blocks(
    *(300, 700, 1100), x_dtype=jnp.float32, w_dtype=jnp.float32
  )
  assert blocks.forward == Tile(256, 256)  # overruns both axes
  function = functools.partial(pallas_tpu.linear_cross_entropy, interpret=True)
  assert_true(function, (3, 100), 700, 1100, jnp.dtype("float32"), 5.0)


def test_a_wide_head_is_cast_by_tiles():
  x, w, labels = make((37,), 61, width=40, dtype=np.float32)
  x = x.astype(jnp.bfloat16)
  cotangents = make_cotangents((37,), np.float32)
  function, narrow = plain("pallas_tpu"), w.astype(jnp.bfloat16)
  *got, dw = value_and_grad(function, x, w, labels, cotangents)
  *want, narrow_dw = value_and_grad(function, x, narrow, labels, cotangents)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)
  assert (dw.dtype, narrow_dw.dtype) == (jnp.float32, jnp.bfloat16)
  np.testing.assert_array_equal(dw.astype(jnp.bfloat16), narrow_dw)


def test_no_races_on_two_cores(capfd):
  # The interpreter of races (0.10.2) cannot alias an array with a tail.
  x, w, labels = make((40,), 48, width=16, dtype=np.float32)
  weights, _ = make_cotangents((40,), np.float32)
  weights = weights.at[20:].set(0)
  params = pltpu.InterpretParams(detect_races=True, num_cores_or_threads=2)
  blocks = TpuBlocks(Tile(16, 16), Tile(16, 16), Tile(16, 16))
  call = jax.jit(
    functools.partial(
      pallas_tpu.linear_cross_entropy_with_grad, softcap=3.0, blocks=blocks
    ),
    static_argnames="interpret",
  )
  init = jnp.ones(w.shape)
  arguments = (x, w, labels, weights)
  got = call(*arguments, dw_init=init, interpret=params)
  jax.block_until_ready(got)
  # The interpreter reports a race by printing it.
  assert "RACE" not in "".join(capfd.readouterr())
  want = call(*arguments, dw_init=init, interpret=True)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def test_it_runs_in_shard_map():
  mesh = jax.make_mesh((2,), ("d",), axis_types=(AxisType.Auto,))
  by_row, whole = PartitionSpec("d"), PartitionSpec()
  x, w, labels = make((2, 128), 256, width=128, dtype=np.float32)
  weights, _ = make_cotangents((2, 128), np.float32)

  def split(check_vma, **options):
    def local(x, w, labels, weights):
      def loss(x, w):
        call = functools.partial(pallas_tpu.linear_cross_entropy, **options)
        nll, lse = call(x, w, labels)
        return jax.lax.psum(jnp.sum(weights * nll + jnp.square(lse)), "d")

      call = pallas_tpu.linear_cross_entropy_with_grad
      init = jax.lax.pcast(jnp.zeros(w.shape), "d", to="varying")
      *own, dw = call(x, w, labels, weights, dw_init=init, **options)
      return jax.grad(loss, (0, 1))(x, w), own, jax.lax.psum(dw, "d")

    return jax.jit(
      jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(by_row, whole, by_row, by_row),
        out_specs=((by_row, whole), by_row, whole),
        check_vma=check_vma,
      )
    )

  arguments = (x, w, labels, weights)
  text = split(True).trace(*arguments).lower(lowering_platforms=("tpu",))
  # Each of the two functions has three kernels.
  assert text.as_text().count("tpu_custom_call") == 6
  # The interpreter itself (jax 0.10.2) does not pass the check; without it no
  # gradient is summed over the mesh.
  _, own, dw = split(False, **TPU)(*arguments)
  *want, want_dw = fused("pallas_tpu")(*arguments, dw_init=jnp.zeros(w.shape))
  for a, b in zip(own, want, strict=True):
    np.testing.assert_array_equal(a, b)
  np.testing.assert_allclose(dw, want_dw, rtol=0, atol=1e-5)


def test_it_runs_with_64_bit_integers():
  x, w, labels = make((21,), 31, dtype=np.float32)
  cotangents = make_cotangents((21,), np.float32)
  want = value_and_grad(plain("pallas_tpu"), x, w, labels, cotangents)
  with jax.enable_x64(True):
    labels = jnp.asarray(labels, jnp.int64)
    got = value_and_grad(plain("pallas_tpu"), x, w, labels, cotangents)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.fast
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [128, 4096])
def test_it_lowers_for_tpu(width, dtype):
  x, w = array((2, 300, width), dtype), array((50257, width), dtype)
  labels, weights = array((2, 300), jnp.int32), array((2, 300), jnp.float32)
  dw = array(w.shape, jnp.float32)
  options = {"softcap": 30.0, "implementation": "pallas_tpu"}

  def value(x, w, labels):
    nll, lse = linear_cross_entropy(x, w, labels, **options)
    return nll.sum() + jnp.square(lse).sum()

  def one_pass(x, w, labels, weights, dw):
    call = functools.partial(linear_cross_entropy_with_grad, **options)
    return call(x, w, labels, weights, dw_init=dw)

  frozen = functools.partial(one_pass, dw=None)
  for function, arguments, kernels in (
    (value, (), 1),
    (jax.grad(value, (0, 1)), (), 3),
    (one_pass, (weights, dw), 3),
    (frozen, (weights,), 2),
  ):
    traced = jax.jit(function).trace(x, w, labels, *arguments)
    text = traced.lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") == kernels


@pytest.mark.fast
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"x": jnp.float16}, "x has dtype float16, not float32 or bfloat16"),
    ({"w": jnp.float16}, "w has dtype float16, not float32 or bfloat16"),
    ({"dw": jnp.float64}, "dw_init has dtype float64, not float32"),
    ({"width": 100}, "width D=100 is not a multiple of 128"),
    ({"width": 2**16}, "width D=65536 in bfloat16 and bfloat16 do not fit"),
  ],
)
def test_what_is_not_supported_is_named(changes, message):
  of = {"x": jnp.bfloat16, "w": jnp.bfloat16, "dw": jnp.float32, "width": 128}
  of |= changes
  x, w = (array((500, of["width"]), of[name]) for name in ("x", "w"))
  rows = array((500,), jnp.int32), array((500,), jnp.float32)
  with jax.enable_x64(True):
    dw = array(w.shape, of["dw"])
    assert re.search(message, pallas_tpu.unsupported(x, w, dw))
    with pytest.raises(NotImplementedError, match=f'{message}.*"xla" can'):
      jax.eval_shape(
        lambda x, w, labels, weights, dw: linear_cross_entropy_with_grad(
          x, w, labels, weights, dw_init=dw, implementation="pallas_tpu"
        ),
        *(x, w, *rows, dw),
      )


@pytest.mark.fast
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("width", [128, 1152, 4096, 8192])
def test_widths_of_models_are_supported(width, dtype):
  x, w = array((4096, width), dtype), array((262144, width), dtype)
  assert pallas_tpu.unsupported(x, w) is None
  blocks = pallas_tpu.choose_blocks(
    *(4096, 262144, width), x_dtype=dtype, w_dtype=dtype
  )
  for tile in (blocks.forward, blocks.dx, blocks.dw):
    assert tile.rows % 128 == 0 and tile.vocab % 128 == 0
