"""Peak memory grows by the sequence state alone, by the compiler's account."""

import dataclasses

import pytest
from flax import nnx

import jaxchunk as jc
from jaxchunk.chunking.memory import state_bytes_per_token

CFG = jc.ModelConfig(
  vocab_size=64,
  d_model=64,
  num_layers=4,
  num_heads=4,
  num_kv_heads=2,
  head_dim=32,
  d_ff=96,
)


def abstract(cfg: jc.ModelConfig) -> jc.Transformer:
  return nnx.eval_shape(lambda: jc.Transformer(cfg, rngs=nnx.Rngs(0)))


def slope(cfg: jc.ModelConfig, short: int, long: int, **options) -> float:
  """Temporary bytes per further token of capacity."""

  def temporaries(capacity: int) -> int:
    lowered = jc.lower_chunked(
      abstract(cfg), capacity=capacity, chunk_size=512, **options
    )
    return lowered.compile().memory_analysis().temp_size_in_bytes

  return (temporaries(long) - temporaries(short)) / (long - short)


@pytest.mark.parametrize("pattern", [(None,), (512, None)])
@pytest.mark.parametrize("live", [1, 4])
def test_chunk_outer(pattern, live):
  cfg = dataclasses.replace(CFG, window_pattern=pattern)
  measured = slope(cfg, 8192, 131072, live_chunks=live, strategy="chunk_outer")
  assert measured <= 1.02 * state_bytes_per_token(cfg, "chunk_outer")


@pytest.mark.parametrize("pattern", [(None,), (512, None), (512, 512, None)])
def test_layer_outer(pattern):
  cfg = dataclasses.replace(CFG, window_pattern=pattern)
  measured = slope(cfg, 8192, 131072, strategy="layer_outer")
  assert measured <= 1.02 * state_bytes_per_token(cfg, "layer_outer")


def test_smaller_state_is_chosen():
  def chosen(**change) -> float:
    return slope(dataclasses.replace(CFG, **change), 8192, 32768)

  # Many query heads per key head: keys are small beside layer inputs.
  few_keys = {"num_kv_heads": 1, "d_model": 256}
  many_keys = {"num_kv_heads": 4}
  for change in (few_keys, many_keys):
    cfg = dataclasses.replace(CFG, **change)
    best = min(
      state_bytes_per_token(cfg, s) for s in ("chunk_outer", "layer_outer")
    )
    assert chosen(**change) <= 1.02 * best
