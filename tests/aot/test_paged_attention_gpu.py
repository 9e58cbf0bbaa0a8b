"""What the compiler makes of the GPU kernel for pages, for an H200."""

import re

import jax
import jax.numpy as jnp
import pytest

from jaxchunk import targets
from jaxchunk.kernels.paged_attention.pages import KVPages, PageView
from jaxchunk.kernels.paged_attention.pallas_gpu import gpu_paged_forward

L, K, G, S = 2, 8, 8, 2**17
# Bytes of registers that may be spilled, by head width and dtype of the pages.
SPILLS = {
  (64, "bfloat16"): 0,
  (64, "int8"): 0,
  (128, "bfloat16"): 0,
  (128, "int8"): 0,
  (256, "bfloat16"): 0,
  (256, "int8"): 96,
}


def _compile(B, width, dtype, *, T=1, Z=64, beside=(), **options):
  """For rows of S keys; they do not share pages."""
  q = jax.ShapeDtypeStruct((B, K, G, T, width), jnp.bfloat16)
  layers = L if B == 1 else 1
  cache = jax.ShapeDtypeStruct((layers, K, B * S // Z, Z, width), dtype)
  number = jax.ShapeDtypeStruct(cache.shape[:4], jnp.float32)
  fields = {name: number for name in beside}
  if dtype != "bfloat16":
    fields |= {"k_scale": number, "v_scale": number}
  if "positions" in fields:
    fields["positions"] = jax.ShapeDtypeStruct(number.shape, jnp.int32)
  pages = KVPages(cache, cache, **fields)
  table = jax.ShapeDtypeStruct((B, K, S // Z), jnp.int32)
  lengths = jax.ShapeDtypeStruct((B, K), jnp.int32)
  positions = jax.ShapeDtypeStruct((B, T), jnp.int32)
  layer = jax.ShapeDtypeStruct((), jnp.int32)

  def call(q, pages, view, positions, layer):
    return gpu_paged_forward(
      *(q, pages, view, positions),
      layer=layer,
      scale=width**-0.5,
      **options,
    )

  arguments = (q, pages, PageView(table, lengths), positions, layer)
  return targets.lower_on(targets.gpu("h200")[0], call, *arguments).compile()


def _check(compiled, printed, spills, B, T, width):
  """One kernel, few spills, and temporaries that do not grow with the keys."""
  # ptxas says this where products wait for each other.
  assert "wgmma" not in printed, printed
  found = re.findall(r"(\d+) bytes spill stores", printed)
  assert found, printed
  assert max(map(int, found)) <= spills, printed
  assert len(re.findall(r"custom-call\(.*mosaic_gpu", compiled.as_text())) == 1
  # Two fp32 parts of the output for each program, of which there are no more
  # than processors if rows are split; the queries and a few numbers a row.
  rows = B * K * G * T
  parts = 2 * max(132 * min(64, G * T), rows) * (width + 1) * 4
  memory = compiled.memory_analysis()
  assert memory.temp_size_in_bytes <= parts + 4 * rows * width + 2**16


@pytest.mark.parametrize("B", [1, 64])
@pytest.mark.parametrize("width, dtype", SPILLS)
def test_decoding_compiles_for_an_h200(B, width, dtype, monkeypatch, capfd):
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
  compiled = _compile(B, width, dtype)
  captured = capfd.readouterr()
  printed = captured.out + captured.err
  _check(compiled, printed, SPILLS[width, dtype], B, 1, width)


@pytest.mark.parametrize(
  "width, dtype, Z, beside, options, spills",
  [
    (64, "bfloat16", 16, (), {}, 0),
    (128, "float8_e4m3fn", 32, ("log_weights",), {"softcap": 30.0}, 0),
    (256, "float8_e5m2", 256, ("positions",), {"window": 4096}, 96),
  ],
)
def test_several_queries_compile_for_an_h200(
  width, dtype, Z, beside, options, spills, monkeypatch, capfd
):
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
  T = 16
  compiled = _compile(1, width, dtype, T=T, Z=Z, beside=beside, **options)
  captured = capfd.readouterr()
  printed = captured.out + captured.err
  _check(compiled, printed, spills, 1, T, width)
