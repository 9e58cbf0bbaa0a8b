"""What the compiler makes of the GPU kernels for an H200, without one."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxchunk import targets
from jaxchunk.kernels.attention.mask import AttentionMask
from jaxchunk.kernels.attention.pallas_gpu import gpu_backward, gpu_forward

B, K, G, L = 1, 2, 4, 2
# Queries and keys: a whole sequence, and a chunk after a prefix.
FORMS = {"causal": (16384, 16384), "prefix": (2048, 32768)}
# Bytes of registers that may be spilled, by head width: forward, dq, and dk
# with dv; ptxas also has to fit the mask, at most once for each kernel.
SPILLS = {64: (0, 0, 0), 128: (0, 0, 64), 256: (0, 1056, 1056)}


def _compile(width, form, passes, softcap=None):
  T, S = FORMS[form]
  bf16 = jax.ShapeDtypeStruct((B, K, G, T, width), jnp.bfloat16)
  cache = jax.ShapeDtypeStruct((L, B, K, S, width), jnp.bfloat16)
  sums = jax.ShapeDtypeStruct(cache.shape, jnp.float32)
  rows = jax.ShapeDtypeStruct((B, K, G, T), jnp.float32)
  number = jax.ShapeDtypeStruct((), jnp.int32)
  ids = jax.ShapeDtypeStruct((B, S), jnp.int32)

  def mask(offset, ids):
    q_ids = jax.lax.dynamic_slice_in_dim(ids, offset, T, 1)
    return AttentionMask.causal(offset) & AttentionMask.segments(q_ids, ids)

  def forward(q, k, v, layer, offset, ids):
    options = {"layer": layer, "scale": width**-0.5, "softcap": softcap}
    return gpu_forward(q, k, v, mask(offset, ids), **options)

  def backward(q, k, v, layer, offset, ids, o, lse, do, dk, dv):
    options = {"layer": layer, "scale": width**-0.5, "softcap": softcap}
    seen = mask(offset, ids)
    return gpu_backward(q, k, v, seen, o, lse, do, dk, dv, **options)

  inputs = (bf16, cache, cache, number, number, ids)
  device = targets.gpu("h200")[0]
  if passes == "forward":
    return targets.lower_on(device, forward, *inputs).compile()
  more = (bf16, rows, bf16, sums, sums)
  donate = {"donate_argnums": (9, 10)}
  return targets.lower_on(device, backward, *inputs, *more, **donate).compile()


def _spilled(printed):
  """Bytes stored, by kernel."""
  found = re.findall(
    r"Function properties for (\w+)\n.* (\d+) bytes spill stores", printed
  )
  assert found, printed
  return [(name, int(stores)) for name, stores in found]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", SPILLS)
@pytest.mark.parametrize("passes", ["forward", "backward"])
def test_kernels_compile_for_an_h200(width, form, passes, monkeypatch, capfd):
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
  compiled = _compile(width, form, passes)
  captured = capfd.readouterr()
  printed = captured.out + captured.err
  # ptxas says this where products wait for each other.
  assert "wgmma" not in printed, printed
  forward, dq, dkv = SPILLS[width]
  for name, stores in _spilled(printed):
    allowed = dq if "dq" in name else forward if "forward" in name else dkv
    assert stores <= allowed, printed
  calls = re.findall(r"custom-call\(.*mosaic_gpu", compiled.as_text())
  wide = width > 128
  assert len(calls) == (1 if passes == "forward" else 3 if wide else 2)
  # Beyond arguments and results: for each query and head the lse and delta,
  # for each pair of blocks of 64 tokens a few numbers; no scores, no copy.
  T, S = FORMS[form]
  memory = compiled.memory_analysis()
  limit = 16 * B * K * G * T + 32 * (T // 64) * (S // 64) + 2**20
  assert memory.temp_size_in_bytes <= limit
  if passes == "backward":
    assert memory.alias_size_in_bytes == 2 * 4 * L * B * K * S * width
