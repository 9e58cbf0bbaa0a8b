"""The chunk-wise training step with the Pallas kernels inside, compiled."""

import re

import pytest
from flax import nnx

import jaxchunk as jc
from jaxchunk import targets
from jaxchunk.chunking.memory import state_bytes_per_token

CFG = jc.ModelConfig(
  vocab_size=4096,
  d_model=512,
  num_layers=4,
  num_heads=8,
  num_kv_heads=2,
  head_dim=128,
  d_ff=1024,
  dtype="bfloat16",
)
TARGETS = {
  "pallas_tpu": lambda: targets.tpu("v5e:2x2")[0],
  "pallas_gpu": lambda: targets.gpu("h200")[0],
}
# Names of the kernels: forward when chunks pass first and again, and backward.
KERNELS = {"pallas_tpu": "tpu_custom_call", "pallas_gpu": "mosaic_gpu_v2"}


def compiled(implementation, capacity, **options):
  device = TARGETS[implementation]()
  model = nnx.eval_shape(lambda: jc.Transformer(CFG, rngs=nnx.Rngs(0)))
  with targets.tracing_for(device):
    lowered = jc.lower_chunked(
      targets.place_on(device, model),
      capacity=capacity,
      chunk_size=1024,
      implementation=implementation,
      **options,
    )
  return lowered.compile()


@pytest.mark.parametrize("implementation", list(TARGETS))
@pytest.mark.parametrize("strategy", ["chunk_outer", "layer_outer"])
def test_the_step_compiles_with_the_kernels_inside(implementation, strategy):
  program = compiled(implementation, 8192, strategy=strategy).as_text()
  calls = re.findall(r'custom_call_target="([^"]+)"', program)
  assert KERNELS[implementation] in calls, sorted(set(calls))


def test_memory_grows_by_the_sequence_state():
  # On TPU it grows by 1.41 of it, still: docs/ROADMAP.md.
  short, long = (
    compiled("pallas_gpu", n, strategy="chunk_outer").memory_analysis()
    for n in (8192, 32768)
  )
  grown = long.temp_size_in_bytes - short.temp_size_in_bytes
  assert grown <= 1.02 * 24576 * state_bytes_per_token(CFG, "chunk_outer")
