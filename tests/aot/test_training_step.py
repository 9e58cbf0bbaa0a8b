"""The chunk-wise training step with the Pallas kernels inside, compiled."""

import dataclasses
import re

import pytest
from flax import nnx

import jaxchunk as jc
from jaxchunk import targets
from jaxchunk.chunking.cost import layer_flops_per_token
from jaxchunk.chunking.memory import state_bytes_per_token
from jaxchunk.models.lora import LoRA
from jaxchunk.models.quantized import Quantization

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
DEVICES = {
  "v5e": ("pallas_tpu", lambda: targets.tpu("v5e:2x2")[0]),
  "v5p": ("pallas_tpu", lambda: targets.tpu("v5p:2x2x1")[0]),
  "h200": ("pallas_gpu", lambda: targets.gpu("h200")[0]),
}
# Names of the kernels: forward when chunks pass first and again, and backward.
KERNELS = {"pallas_tpu": "tpu_custom_call", "pallas_gpu": "mosaic_gpu_v2"}


def compiled(name, capacity, cfg=CFG, **options):
  implementation, device = DEVICES[name]
  device = device()
  model = nnx.eval_shape(lambda: jc.Transformer(cfg, rngs=nnx.Rngs(0)))
  with targets.tracing_for(device):
    lowered = jc.lower_chunked(
      targets.place_on(device, model),
      capacity=capacity,
      chunk_size=1024,
      implementation=implementation,
      **options,
    )
  return lowered.compile()


@pytest.mark.parametrize("name", ["v5e", "h200"])
@pytest.mark.parametrize("strategy", ["chunk_outer", "layer_outer"])
def test_the_step_compiles_with_the_kernels_inside(name, strategy):
  program = compiled(name, 8192, strategy=strategy).as_text()
  calls = re.findall(r'custom_call_target="([^"]+)"', program)
  assert KERNELS[DEVICES[name][0]] in calls, sorted(set(calls))


def test_memory_grows_by_the_sequence_state():
  # On TPU it grows by 1.41 of it, still: docs/ROADMAP.md.
  short, long = (
    compiled("h200", n, strategy="chunk_outer").memory_analysis()
    for n in (8192, 32768)
  )
  grown = long.temp_size_in_bytes - short.temp_size_in_bytes
  assert grown <= 1.02 * 24576 * state_bytes_per_token(CFG, "chunk_outer")


@pytest.mark.parametrize("name", ["v5p", "h200"])
def test_on_the_host_the_state_takes_no_device_memory(name):
  short, long = (
    compiled(name, n, kv_memory="host").memory_analysis()
    for n in (16 * 1024, 256 * 1024)
  )
  assert long.temp_size_in_bytes <= 1.05 * short.temp_size_in_bytes
  state = 256 * 1024 * state_bytes_per_token(CFG, "chunk_outer")
  # The TPU's compiler leaves gaps between the host's buffers.
  most = {"v5p": 1.34, "h200": 1.0}[name]
  assert state <= long.host_temp_size_in_bytes <= most * state


@pytest.mark.parametrize(
  ("name", "strategy"),
  [
    ("v5e", "chunk_outer"),
    ("h200", "chunk_outer"),
    ("h200", "layer_outer"),
  ],
)
def test_quantized_matrices_are_widened_a_layer_at_a_time(name, strategy):
  """Four bits a number, and beside them what some layers take, not all 32."""
  plain = dataclasses.replace(CFG, num_layers=32, lora=LoRA(rank=2))
  held = dataclasses.replace(plain, quantization=Quantization())
  memory = {}
  for cfg in (plain, held):
    program = compiled(
      name, 4096, cfg, strategy=strategy, trainable=nnx.LoRAParam
    )
    memory[cfg is held] = program.memory_analysis()
  layer = layer_flops_per_token(dataclasses.replace(CFG, num_layers=1)) // 2
  saved = (
    memory[False].argument_size_in_bytes - memory[True].argument_size_in_bytes
  )
  # Of 4 bytes a number: 4.25 bits are left.
  assert saved == pytest.approx(32 * layer * (4 - 4.25 / 8), rel=1e-3)
  more = memory[True].temp_size_in_bytes - memory[False].temp_size_in_bytes
  # In fp32 and bf16, forward and backward. All of them in bytes would be 32 a
  # number of a layer, in bf16 64.
  assert more <= 16 * layer
