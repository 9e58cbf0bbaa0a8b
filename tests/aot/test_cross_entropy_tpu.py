"""The TPU kernels of cross-entropy, compiled without having a TPU."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchunk import targets
from jaxchunk.kernels.cross_entropy.api import (
  linear_cross_entropy,
  linear_cross_entropy_with_grad,
)

SLICES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
array = jax.ShapeDtypeStruct


def shapes(rows, vocab, width, x_dtype, w_dtype):
  x, w = array((rows, width), x_dtype), array((vocab, width), w_dtype)
  labels, weights = array((rows,), jnp.int32), array((rows,), jnp.float32)
  return x, w, labels, weights, array(w.shape, jnp.float32)


def one_pass(x, w, labels, weights, dw, **options):
  call = functools.partial(linear_cross_entropy_with_grad, **options)
  return call(x, w, labels, weights, dw_init=dw, implementation="pallas_tpu")


def check(compiled, rows, kernels):
  text, memory = compiled.as_text(), compiled.memory_analysis()
  assert text.count('custom_call_target="tpu_custom_call"') == kernels
  # A few numbers for each row; no logits, no copy of x, w or dw.
  assert memory.temp_size_in_bytes <= 64 * rows + 2**19
  return memory


@pytest.mark.parametrize(
  ("name", "rows", "vocab", "width", "softcap"),
  [
    ("v5e:2x2", 1000, 50257, 768, 30.0),
    ("v5p:2x2x1", 8192, 32000, 4096, None),
    ("v6e:2x2", 8192, 262144, 2048, 30.0),
    ("tpu7x:2x2x1", 8192, 151936, 8192, None),
  ],
)
def test_it_compiles_and_holds_no_logits(name, rows, vocab, width, softcap):
  arguments = shapes(rows, vocab, width, jnp.bfloat16, jnp.bfloat16)
  compiled = targets.lower_on(
    targets.tpu(name)[0],
    functools.partial(one_pass, softcap=softcap),
    *arguments,
    donate_argnums=4,
  ).compile()
  memory = check(compiled, rows, 3)
  # dw in place; its rows are rounded up to 8.
  assert memory.alias_size_in_bytes == 4 * -(-vocab // 8) * 8 * width


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_fp32_head_fits(dtype):
  arguments = shapes(2048, 32000, 1024, dtype, jnp.float32)
  compiled = targets.lower_on(
    targets.tpu("v5e:2x2")[0], one_pass, *arguments, donate_argnums=4
  ).compile()
  check(compiled, 2048, 3)


def test_it_compiles_in_a_checked_shard_map():
  mesh = Mesh(np.array(targets.tpu("v5e:2x2")), ("d",))
  x, w, labels, weights, _ = shapes(4096, 4096, 512, jnp.bfloat16, jnp.bfloat16)

  def local(x, w, labels, weights):
    def loss(x, w):
      call = functools.partial(linear_cross_entropy, softcap=30.0)
      nll, lse = call(x, w, labels, implementation="pallas_tpu")
      return jax.lax.psum(jnp.sum(weights * nll + jnp.square(lse)), "d")

    return jax.value_and_grad(loss, (0, 1))(x, w)

  by_row = P("d"), P(), P("d"), P("d")
  split = jax.shard_map(
    local, mesh=mesh, in_specs=by_row, out_specs=(P(), (P("d"), P()))
  )
  arguments = [
    array(a.shape, a.dtype, sharding=NamedSharding(mesh, spec))
    for a, spec in zip((x, w, labels, weights), by_row, strict=True)
  ]
  text = jax.jit(split).lower(*arguments).compile().as_text()
  assert text.count('custom_call_target="tpu_custom_call"') == 3
  assert "all-reduce" in text  # of the gradient of w, and of the loss
