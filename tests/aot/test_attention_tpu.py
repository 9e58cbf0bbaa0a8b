"""The TPU kernels, compiled for each generation without having one."""

import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchunk import targets
from jaxchunk.kernels.attention.mask import AttentionMask
from jaxchunk.kernels.attention.pallas_tpu import tpu_backward, tpu_forward

SLICES = ("v5e:2x2", "v5p:2x2x1", "v6e:2x2", "tpu7x:2x2x1")
# Queries, keys, layers, key heads, query heads of each.
PREFIX = (2048, 32768, 2, 2, 4)
DENSE = (8192, 8192, 1, 2, 4)
array = jax.ShapeDtypeStruct


def _shapes(form, H, dtype=jnp.bfloat16, B=1):
  T, S, L, K, G = form
  q, lse = array((B, K, G, T, H), dtype), array((B, K, G, T), jnp.float32)
  k = array((L, B, K, S, H), dtype)
  grad = array(k.shape, jnp.float32)
  ids = array((B, T), jnp.int32), array((B, S), jnp.int32)
  return (q, k, k), (q, lse, q), (grad, grad), ids


def _mask(form, offset, ids):
  mask = AttentionMask.causal(offset if form == PREFIX else None)
  return mask & AttentionMask.segments(*ids) if form == PREFIX else mask


def forward(form, qkv, offset, layer, ids, **options):
  layer = layer if form == PREFIX else 0
  mask = _mask(form, offset, ids)
  return tpu_forward(*qkv, mask, layer=layer, scale=0.1, **options)


def backward(form, qkv, saved, grads, offset, layer, ids, **options):
  layer = layer if form == PREFIX else 0
  mask = _mask(form, offset, ids)
  options |= {"layer": layer, "scale": 0.1}
  return tpu_backward(*qkv, mask, *saved, *grads, **options)


def _compile(device, name, form, H, *, dtype=jnp.bfloat16, **options):
  qkv, saved, grads, ids = _shapes(form, H, dtype)
  number = array((), jnp.int32)
  if name == "forward":
    function = functools.partial(forward, form, **options)
    lowered = targets.lower_on(device, function, qkv, number, number, ids)
  else:
    function = functools.partial(backward, form, **options)
    arguments = (qkv, saved, grads, number, number, ids)
    lowered = targets.lower_on(
      device, function, *arguments, donate_argnums=(2,)
    )
  return lowered.compile()


def moved(text, at_least):
  """Copies and transposes of arrays of at least so many elements."""
  found = []
  for line in text.splitlines():
    match = re.search(
      r" = (\(?\w+\[([\d,]+)\].*) (copy|copy-start|transpose)\(", line
    )
    if match is None:
      continue
    # S(1) is vector memory, which XLA fills ahead of use where there is room.
    if match[3] == "copy-start" and "S(1)" in match[1]:
      continue
    if math.prod(map(int, match[2].split(","))) >= at_least:
      found.append(line.strip()[:120])
  return found


def check(compiled, form, H):
  T, S, _, K, G = form
  text, memory = compiled.as_text(), compiled.memory_analysis()
  assert not moved(text, K * min(S, G * T) * H)
  # Beside arguments and results: lse, delta and the mask by token in fp32, and
  # the lists of blocks. `peak_memory_in_bytes` is no measure of that: on some
  # generations it counts what XLA puts into vector memory ahead of use.
  assert memory.temp_size_in_bytes <= 8 * 4 * K * G * T + 2**21
  return text.count('custom_call_target="tpu_custom_call"')


@pytest.mark.parametrize(
  ("form", "H"),
  [*((PREFIX, H) for H in (64, 80, 96, 128, 256)), (DENSE, 64), (DENSE, 128)],
  ids=lambda value: {PREFIX: "prefix", DENSE: "dense"}.get(value, str(value)),
)
@pytest.mark.parametrize("name", SLICES)
def test_both_passes_compile_and_move_nothing(name, H, form):
  device = targets.tpu(name)[0]
  compiled = _compile(device, "forward", form, H)
  assert check(compiled, form, H) == 1
  compiled = _compile(device, "backward", form, H)
  assert check(compiled, form, H) == 2
  # dk and dv in place.
  _, S, L, K, _ = form
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes == 2 * 4 * L * K * S * H


@pytest.mark.parametrize("heads", [(8, 1), (1, 8), (1, 32)])
@pytest.mark.parametrize("name", ["v5e:2x2", "v6e:2x2"])
def test_any_group_of_query_heads_fits(name, heads):
  form = (1024, 4096, 1, *heads)
  device = targets.tpu(name)[0]
  assert check(_compile(device, "forward", form, 128), form, 128) == 1
  assert check(_compile(device, "backward", form, 128), form, 128) == 2


@pytest.mark.parametrize("H", [64, 256])
def test_fp32_fits(H):
  form, device = (1024, 4096, 1, 1, 8), targets.tpu("v5e:2x2")[0]
  for name, kernels in (("forward", 1), ("backward", 2)):
    compiled = _compile(device, name, form, H, dtype=jnp.float32, softcap=30.0)
    assert check(compiled, form, H) == kernels


@pytest.mark.parametrize("name", SLICES)
def test_every_kind_of_mask_compiles(name):
  B, (T, S, L, K, G) = 2, (1024, 2048, 1, 2, 2)
  qkv, saved, grads, ids = _shapes((T, S, L, K, G), 128, B=B)
  number, table = array((), jnp.int32), array((B, K, T // 256, 3), jnp.int32)

  def passes(qkv, saved, grads, offset, length, ids, table, start):
    mask = AttentionMask.causal(offset) & AttentionMask.valid_keys(length)
    mask &= AttentionMask.window(700, sinks=4) & AttentionMask.segments(*ids)
    mask &= AttentionMask.blocks(table, q_block=256, kv_block=512)
    o = tpu_forward(*qkv, mask, scale=0.1, softcap=20.0)
    options = {"scale": 0.1, "softcap": 20.0, "dkv_start": start}
    return o, tpu_backward(*qkv, mask, *saved, *grads, **options)

  grads = [array((L, B, K, 1024, 128), jnp.float32)] * 2
  arguments = (qkv, saved, grads, number, number, ids, table, number)
  device = targets.tpu(name)[0]
  compiled = targets.lower_on(device, passes, *arguments).compile()
  assert compiled.as_text().count("tpu_custom_call") >= 3


def test_it_compiles_in_a_checked_shard_map():
  mesh = Mesh(np.array(targets.tpu("v5e:2x2")), ("d",))
  form = (1024, 4096, 1, 2, 2)
  qkv, saved, grads, ids = _shapes(form, 128, B=4)

  def passes(qkv, saved, grads, ids):
    mask = AttentionMask.causal(3072) & AttentionMask.segments(*ids)
    o = tpu_forward(*qkv, mask, scale=0.1)
    return o, tpu_backward(*qkv, mask, *saved, *grads, scale=0.1)

  by_batch, by_layer = P("d"), P(None, "d")
  caches = (by_layer, by_layer)
  specs = ((by_batch, *caches), (by_batch,) * 3, caches, (by_batch,) * 2)
  split = jax.shard_map(
    passes,
    mesh=mesh,
    in_specs=specs,
    out_specs=((by_batch, by_batch), (by_batch, *caches)),
  )
  arguments = jax.tree.map(
    lambda a, spec: array(a.shape, a.dtype, sharding=NamedSharding(mesh, spec)),
    (qkv, saved, grads, ids),
    specs,
  )
  lowered = jax.jit(split, donate_argnums=(2,)).lower(*arguments)
  compiled = lowered.compile()
  assert check(compiled, form, 128) == 3
  assert "all-" not in compiled.as_text()
