"""Pipelines compiled for four devices, with the attention kernels inside."""

import pytest
from flax import nnx

import jaxchunk as jc
from jaxchunk import targets
from jaxchunk.chunking import executor
from jaxchunk.chunking.traces import trace_stages
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.pipeline.tables import Pipeline
from jaxchunk.sharding.rules import Rules

_KERNELS = {
  "v5e": ("pallas_tpu", "tpu_custom_call", lambda: targets.tpu("v5e:2x2")),
  "h200": ("pallas_gpu", "mosaic_gpu_v2", lambda: targets.gpu("h200", 4)),
}
_CFG = jc.ModelConfig(
  vocab_size=1024,
  d_model=512,
  num_layers=8,
  num_heads=4,
  num_kv_heads=2,
  head_dim=128,
  d_ff=1536,
  dtype="bfloat16",
  param_dtype="bfloat16",
).frozen()


def compiled(name, layout, sizes, live=1):
  implementation, _, devices = _KERNELS[name]
  devices = devices()
  model = nnx.eval_shape(lambda: jc.Transformer(_CFG, rngs=nnx.Rngs(0)))
  options = executor.make_options(
    model,
    chunk_size=1024,
    live_chunks=live,
    strategy="chunk_outer",
    implementation=implementation,
  )
  with targets.tracing_for(devices[0]):
    traced = trace_stages(
      layout, model, sizes, options, mesh=layout.mesh(devices)
    )
    return traced.lower().compile()


@pytest.mark.parametrize("name", _KERNELS)
@pytest.mark.parametrize(
  "layout",
  [
    Layout(stage=4),
    Layout(
      stage=2,
      tensor=2,
      rules=Rules({"vocab": ("stage", "tensor")}),
      pipeline=Pipeline(schedule="v_half"),
    ),
  ],
  ids=str,
)
def test_stages_compile_with_the_kernels(name, layout):
  program = compiled(name, layout, (4, 1, 1))
  text = program.as_text()
  assert _KERNELS[name][1] in text
  assert "collective-permute" in text
  assert program.memory_analysis().peak_memory_in_bytes > 0


@pytest.mark.parametrize("name", _KERNELS)
def test_memory_follows_the_state(name):
  """Between lanes of 8 and of 32 chunks: keys, values, gradients, inputs."""
  peaks = [
    compiled(name, Layout(stage=4), (size, 1, 1))
    .memory_analysis()
    .peak_memory_in_bytes
    for size in (8, 32)
  ]
  layers, keys = 2, 2 * 2 * 128
  token = layers * keys * (2 + 4) + 2 * _CFG.d_model
  assert peaks[1] - peaks[0] == pytest.approx(24 * 1024 * token, rel=0.1)
