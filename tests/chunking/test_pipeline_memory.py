"""What pipeline programs keep, by the compiler's account of CPU devices."""

import functools

import jax
import pytest
from flax import nnx

import jaxchunk as jc
from jaxchunk.chunking import executor
from jaxchunk.chunking.traces import trace_stages
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.pipeline.slots import sizes_of
from jaxchunk.sharding.pipeline.table import Lanes
from jaxchunk.sharding.pipeline.tables import Pipeline

_STAGES, _CHUNK = 8, 128
_CFG = jc.ModelConfig(
  vocab_size=64,
  d_model=64,
  num_layers=16,
  num_heads=4,
  num_kv_heads=2,
  head_dim=16,
  d_ff=192,
).frozen()


@functools.cache
def temporary(schedule: str, sizes: tuple[int, ...]) -> int:
  """Bytes of a device's temporaries, with K = 1."""
  model = nnx.eval_shape(lambda: jc.Transformer(_CFG, rngs=nnx.Rngs(0)))
  layout = Layout(stage=_STAGES, pipeline=Pipeline(schedule=schedule))
  options = executor.make_options(
    model, chunk_size=_CHUNK, strategy="chunk_outer"
  )
  mesh = layout.mesh(jax.devices()[:_STAGES])
  traced = trace_stages(layout, model, sizes, options, mesh=mesh)
  return traced.lower().compile().memory_analysis().temp_size_in_bytes


def test_what_schedules_keep():
  microbatches = (1,) * 16
  half = temporary("v_half", microbatches)
  assert half < temporary("1f1b", microbatches)
  assert temporary("1f1b", microbatches) < temporary("gpipe", microbatches)


def test_memory_grows_by_keys_values_gradients_and_an_input():
  """Per chunk of a lane: its state, and the input of a dropped chunk."""
  short, long = (8, 1, 1, 1), (32, 1, 1, 1)
  grown = temporary("1f1b", long) - temporary("1f1b", short)
  sizes = [
    sizes_of(Pipeline().table(_STAGES, Lanes(lanes, 1)))
    for lanes in (short, long)
  ]
  layers = _CFG.num_layers // _STAGES
  token = 4 * 2 * _CFG.kv_heads * _CFG.head_width * layers
  more = [b - a for a, b in zip(*sizes, strict=True)]
  state = (more[3] + more[4]) * _CHUNK * token
  inputs = more[0] * _CHUNK * 4 * _CFG.d_model
  assert more[1] == 0
  # Tokens and the table itself are small beside that.
  assert grown == pytest.approx(state + inputs, rel=0.05)


def test_one_program_whatever_the_number_of_microbatches():
  """Slots, and so memory, are those of the stages."""
  few, many = temporary("1f1b", (1,) * 16), temporary("1f1b", (1,) * 256)
  assert many == pytest.approx(few, rel=0.02)
