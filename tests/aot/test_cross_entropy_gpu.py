"""What the compiler makes of the GPU kernel for an H200, without one."""

import functools
import re

import jax
import jax.numpy as jnp
import pytest

from jaxchunk import targets
from jaxchunk.kernels.cross_entropy.api import linear_cross_entropy_with_grad

# Bytes of registers that may be spilled without and with a soft-cap, which
# needs the logits twice.
SPILLS = {None: (0, 0), 30.0: (160, 256)}


@pytest.mark.parametrize(
  ("rows", "vocab", "width", "head", "softcap"),
  [
    (8192, 128256, 4096, "bfloat16", None),
    (8192, 262144, 2048, "bfloat16", 30.0),
    (4096, 151936, 8192, "bfloat16", None),
    (4000, 32000, 4096, "float32", 30.0),
    (1000, 50257, 768, "bfloat16", None),
    (37, 4096, 256, "bfloat16", None),
  ],
)
def test_it_compiles_for_an_h200(
  rows, vocab, width, head, softcap, monkeypatch, capfd
):
  monkeypatch.setenv("MOSAIC_GPU_DUMP_PTXAS", "1")
  array = jax.ShapeDtypeStruct
  x, w = array((rows, width), jnp.bfloat16), array((vocab, width), head)
  labels, weights = array((rows,), jnp.int32), array((rows,), jnp.float32)

  def one_pass(x, w, labels, weights, dw):
    call = functools.partial(
      linear_cross_entropy_with_grad, implementation="pallas_gpu"
    )
    return call(x, w, labels, weights, softcap=softcap, dw_init=dw)

  compiled = targets.lower_on(
    targets.gpu("h200")[0],
    one_pass,
    *(x, w, labels, weights, array(w.shape, jnp.float32)),
    donate_argnums=4,
  ).compile()
  captured = capfd.readouterr()
  printed = captured.out + captured.err
  # ptxas says this where products wait for each other.
  assert "wgmma" not in printed, printed
  found = re.findall(
    r"properties for cross_entropy_(\w+?)_.*\n.* (\d+) bytes spill stores",
    printed,
  )
  assert {name for name, _ in found} == {"forward", "backward"}, printed
  allowed = dict(zip(("forward", "backward"), SPILLS[softcap], strict=True))
  for name, stores in found:
    assert int(stores) <= allowed[name], printed
  calls = re.findall(r"custom-call\(.*mosaic_gpu", compiled.as_text())
  assert len(calls) == 2
  memory = compiled.memory_analysis()
  assert memory.alias_size_in_bytes == 4 * vocab * width
  # Four blocks at most: cotangents, the sum of dx, a share of it or of dw,
  # and a part of the head; beside that copies of x for a tile or a tail.
  limit = 4 * 2**26 + 8 * max(rows, 128) * width + 2**20
  assert memory.temp_size_in_bytes <= limit
