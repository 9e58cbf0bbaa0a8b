"""Rotary frequencies of published models are those of transformers.

Their logits and gradients: tests/interop/test_parity.py.
"""

import dataclasses

import numpy as np
import pytest

from jaxchunk.models.families import PRESETS
from jaxchunk.models.rope import YarnScaling, frequencies

pytest.importorskip("torch")
pytest.importorskip("transformers")

import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

_YARN = YarnScaling(factor=4.0, original_length=32_768)


@pytest.mark.parametrize(
  "name, kind, scaling",
  [
    ("llama3.1-8b", "llama3", PRESETS["llama3.1-8b"].rope.scaling),
    ("llama3.2-1b", "llama3", PRESETS["llama3.2-1b"].rope.scaling),
    ("gemma3-27b", "linear", PRESETS["gemma3-27b"].rope.scaling),
    ("qwen2.5-7b", "yarn", _YARN),
    ("qwen2.5-7b", "yarn", dataclasses.replace(_YARN, truncate=False)),
    ("qwen2.5-7b", "yarn", dataclasses.replace(_YARN, attention_factor=1.5)),
  ],
)
def test_published_frequencies_are_those_of_transformers(name, kind, scaling):
  cfg = PRESETS[name]
  rope = dataclasses.replace(cfg.rope, scaling=scaling)
  fields = dataclasses.asdict(scaling)
  if "original_length" in fields:
    fields["original_max_position_embeddings"] = fields.pop("original_length")
  config = transformers.LlamaConfig(
    hidden_size=cfg.d_model,
    max_position_embeddings=131_072,
    num_attention_heads=cfg.num_heads,
    head_dim=cfg.head_width,
    rope_parameters={"rope_type": kind, "rope_theta": rope.theta, **fields},
  )
  want, want_factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
  got, factor = frequencies(cfg.head_width, rope)
  assert factor == pytest.approx(want_factor)
  # Theirs are computed in fp32, in about ten steps; ours in fp64.
  np.testing.assert_allclose(got, want.numpy(), rtol=10 * 2**-24)
