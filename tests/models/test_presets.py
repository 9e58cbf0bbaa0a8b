"""The presets are what was published."""

import dataclasses

import jax
import pytest
from flax import nnx

from jaxchunk.models.families import (
  PRESETS,
  gemma2,
  gemma3,
  mistral,
  preset,
)
from jaxchunk.models.transformer import Transformer

# Parameters of the published checkpoints (their language model alone); a tied
# head counts once. Any slip in a shape shows here.
PARAMETERS = {
  "llama2-7b": 6_738_415_616,
  "llama2-13b": 13_015_864_320,
  "llama2-70b": 68_976_648_192,
  "llama3-8b": 8_030_261_248,
  "llama3-70b": 70_553_706_496,
  "llama3.1-8b": 8_030_261_248,
  "llama3.1-70b": 70_553_706_496,
  "llama3.1-405b": 405_853_388_800,
  "llama3.2-1b": 1_235_814_400,
  "llama3.2-3b": 3_212_749_824,
  "llama3.3-70b": 70_553_706_496,
  "qwen2-0.5b": 494_032_768,
  "qwen2-1.5b": 1_543_714_304,
  "qwen2-7b": 7_615_616_512,
  "qwen2.5-0.5b": 494_032_768,
  "qwen2.5-1.5b": 1_543_714_304,
  "qwen2.5-3b": 3_085_938_688,
  "qwen2.5-7b": 7_615_616_512,
  "qwen2.5-14b": 14_770_033_664,
  "qwen2.5-32b": 32_763_876_352,
  "qwen2.5-72b": 72_706_203_648,
  "qwen3-0.6b": 596_049_920,
  "qwen3-1.7b": 1_720_574_976,
  "qwen3-4b": 4_022_468_096,
  "qwen3-8b": 8_190_735_360,
  "qwen3-14b": 14_768_307_200,
  "qwen3-32b": 32_762_123_264,
  "mistral-7b-v0.1": 7_241_732_096,
  "mistral-7b-v0.2": 7_241_732_096,
  "mistral-7b-v0.3": 7_248_023_552,
  "mistral-nemo-12b": 12_247_782_400,
  "mixtral-8x7b": 46_702_792_704,
  "mixtral-8x22b": 140_620_634_112,
  "qwen3-30b-a3b": 30_532_122_624,
  "qwen3-235b-a22b": 235_093_634_560,
  "phi3-mini-4k": 3_821_079_552,
  "phi4-14b": 14_659_507_200,
  "smollm2-135m": 134_515_008,
  "smollm2-360m": 361_821_120,
  "smollm2-1.7b": 1_711_376_384,
  "olmo2-1b": 1_484_916_736,
  "olmo2-7b": 7_298_617_344,
  "olmo2-13b": 13_716_198_400,
  "olmo2-32b": 32_234_279_936,
  "gemma-2b": 2_506_172_416,
  "gemma-7b": 8_537_680_896,
  "gemma2-2b": 2_614_341_888,
  "gemma2-9b": 9_241_705_984,
  "gemma2-27b": 27_227_128_320,
  "gemma3-270m": 268_098_176,
  "gemma3-1b": 999_885_952,
  "gemma3-4b": 3_880_263_168,
  "gemma3-12b": 11_766_034_176,
  "gemma3-27b": 27_009_346_304,
}


def test_every_preset_has_the_published_number_of_parameters():
  got = {}
  for name, cfg in PRESETS.items():
    model = nnx.eval_shape(lambda cfg=cfg: Transformer(cfg, rngs=nnx.Rngs(0)))
    got[name] = sum(leaf.size for leaf in jax.tree.leaves(model))
  assert got == PARAMETERS


@pytest.mark.fast
def test_presets_are_frozen_and_preset_gives_a_copy_to_change():
  with pytest.raises(dataclasses.FrozenInstanceError, match="d_model"):
    PRESETS["llama3-8b"].d_model = 1
  cfg = preset("llama3-8b", dtype="bfloat16")
  cfg.num_layers = 2
  assert (cfg.dtype, cfg.num_layers, cfg.d_model) == ("bfloat16", 2, 4096)
  assert PRESETS["llama3-8b"].num_layers == 32


@pytest.mark.fast
def test_an_unknown_preset_names_the_nearest():
  with pytest.raises(ValueError, match=r"'llama3-7b'.*'llama3-8b'"):
    preset("llama3-7b")


@pytest.mark.fast
def test_families_take_overrides():
  sizes = {"d_model": 64, "num_layers": 4, "num_heads": 4, "d_ff": 128}
  cfg = gemma2(**sizes, window=8, logit_softcap=None, vocab_size=50)
  assert cfg.window_pattern == (8, None)
  assert (cfg.attention_softcap, cfg.logit_softcap) == (50.0, None)
  assert cfg.vocab_size == 50
  assert mistral(**sizes, window=8).window_pattern == (8,)
  # Four layers do not reach the full one.
  assert gemma3(**sizes, window=8).frozen().window_pattern == (8,) * 4
  full = gemma3(**sizes | {"num_layers": 6}, window=8).frozen()
  assert full.window_pattern == (*(8,) * 5, None)
  own = gemma3(**sizes, window_pattern=(None,))
  assert own.window_pattern == (None,)
