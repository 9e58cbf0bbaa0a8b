"""Device memory of the training step with keys and values on the host."""

import pytest
from flax import nnx

import jaxchunk as jc
from jaxchunk import targets
from jaxchunk.chunking.memory import state_bytes_per_token

CFG = jc.ModelConfig(
  vocab_size=4096,
  d_model=512,
  num_layers=2,
  num_heads=8,
  num_kv_heads=2,
  head_dim=128,
  d_ff=1024,
  dtype="bfloat16",
)
TARGETS = {
  "pallas_tpu": lambda: targets.tpu("v5p:2x2x1")[0],
  "pallas_gpu": lambda: targets.gpu("h200")[0],
}
SHORT, LONG = 16 * 1024, 256 * 1024


def memory(implementation, capacity):
  device = TARGETS[implementation]()
  model = nnx.eval_shape(lambda: jc.Transformer(CFG, rngs=nnx.Rngs(0)))
  with targets.tracing_for(device):
    lowered = jc.lower_chunked(
      targets.place_on(device, model),
      capacity=capacity,
      chunk_size=1024,
      implementation=implementation,
      kv_memory="host",
    )
  return lowered.compile().memory_analysis()


@pytest.mark.parametrize("implementation", list(TARGETS))
def test_device_memory_does_not_grow_with_the_sequence(implementation):
  short, long = (memory(implementation, n) for n in (SHORT, LONG))
  assert long.temp_size_in_bytes <= 1.05 * short.temp_size_in_bytes
  state = LONG * state_bytes_per_token(CFG, "chunk_outer")
  # The TPU's compiler leaves gaps between the host's buffers.
  most = {"pallas_tpu": 1.34, "pallas_gpu": 1.0}[implementation]
  assert state <= long.host_temp_size_in_bytes <= most * state
