"""The families compute what transformers computes."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk.interop.hugging_face import from_hugging_face
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.families import (
  PRESETS,
  gemma,
  gemma2,
  gemma3,
  llama2,
  llama3,
  mistral,
  qwen2,
  qwen3,
)
from jaxchunk.models.rope import (
  LinearScaling,
  Llama3Scaling,
  NtkScaling,
  Rope,
  YarnScaling,
  frequencies,
)

pytest.importorskip("torch")
pytest.importorskip("transformers")

from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from tests.models import hf

# Six times the window and two and a half times the first training's length.
_LENGTH, _WINDOW, _ORIGINAL = 96, 16, 40
# Of the range of the logits, or of a gradient: fp32 rounding over the layers.
_TOLERANCE = 2e-5


class Case(NamedTuple):
  family: str
  cfg: ModelConfig
  # What the configuration of transformers is told besides the sizes.
  fields: dict[str, Any]


def _sizes(**fields: Any) -> dict[str, Any]:
  sizes = {
    "vocab_size": 97,
    "d_model": 48,
    "num_layers": 3,
    "num_heads": 4,
    "num_kv_heads": 2,
    "head_dim": 32,
    "d_ff": 80,
  }
  return sizes | fields


def _rope(theta: float, kind: str = "default", **fields: Any) -> dict[str, Any]:
  parameters = {"rope_type": kind, "rope_theta": theta, **fields}
  return {"rope_parameters": parameters}


def _scaled_llama(scaling: Any, kind: str, **fields: Any) -> Case:
  cfg = llama2(**_sizes(rope=Rope(scaling=scaling)))
  return Case("llama", cfg, _rope(1e4, kind, **fields))


CASES = {
  "llama2": Case("llama", llama2(**_sizes(num_kv_heads=4)), _rope(1e4)),
  "llama3": Case("llama", llama3(**_sizes()), _rope(5e5)),
  "llama3.1": Case(
    "llama",
    llama3(
      **_sizes(tie_embeddings=True),
      rope=Rope(
        theta=5e5,
        scaling=Llama3Scaling(factor=8.0, original_length=_ORIGINAL),
      ),
    ),
    _rope(
      5e5,
      "llama3",
      factor=8.0,
      low_freq_factor=1.0,
      high_freq_factor=4.0,
      original_max_position_embeddings=_ORIGINAL,
    ),
  ),
  "linear": _scaled_llama(LinearScaling(factor=4.0), "linear", factor=4.0),
  "yarn": _scaled_llama(
    YarnScaling(factor=4.0, original_length=_ORIGINAL, beta_fast=4.0),
    "yarn",
    factor=4.0,
    original_max_position_embeddings=_ORIGINAL,
    beta_fast=4.0,
  ),
  # The dynamic base of transformers follows the length; ours is set once, to
  # what theirs is at this length.
  "ntk": Case(
    "llama",
    llama2(
      **_sizes(
        rope=Rope(scaling=NtkScaling(factor=2.0 * _LENGTH / _ORIGINAL - 1.0))
      )
    ),
    {"max_position_embeddings": _ORIGINAL} | _rope(1e4, "dynamic", factor=2.0),
  ),
  "qwen2": Case(
    "qwen2", qwen2(**_sizes(head_dim=12, tie_embeddings=True)), _rope(1e6)
  ),
  "qwen3": Case("qwen3", qwen3(**_sizes()), _rope(1e6)),
  "mistral": Case(
    "mistral",
    mistral(**_sizes(), window=_WINDOW),
    {"sliding_window": _WINDOW} | _rope(1e6),
  ),
  "gemma": Case("gemma", gemma(**_sizes(num_kv_heads=1)), {}),
  # Scores and logits are around 1: caps of 2 and 1.5 bend them.
  "gemma2": Case(
    "gemma2",
    gemma2(
      **_sizes(),
      window=_WINDOW,
      attention_softcap=2.0,
      logit_softcap=1.5,
      attention_scale=24**-0.5,
    ),
    {
      "sliding_window": _WINDOW,
      "attn_logit_softcapping": 2.0,
      "final_logit_softcapping": 1.5,
      "query_pre_attn_scalar": 24,
    },
  ),
  "gemma3": Case(
    "gemma3",
    gemma3(
      **_sizes(num_layers=7),
      window=_WINDOW,
      rope=Rope(theta=1e6, scaling=LinearScaling(factor=8.0)),
    ),
    {
      "sliding_window": _WINDOW,
      "query_pre_attn_scalar": 32,
      "rope_parameters": {
        "full_attention": _rope(1e6, "linear", factor=8.0)["rope_parameters"],
        "sliding_attention": _rope(1e4)["rope_parameters"],
      },
    },
  ),
}


def _tokens(seed: int) -> np.ndarray:
  return np.random.default_rng(seed).integers(0, 97, (2, _LENGTH), np.int32)


@pytest.mark.parametrize("name", CASES)
def test_logits_are_those_of_transformers(name):
  family, cfg, fields = CASES[name]
  theirs = hf.random_model(family, cfg, **fields)
  want = hf.logits(theirs, _tokens(0))
  ours = from_hugging_face(hf.weights(theirs), cfg)
  got = jax.jit(lambda model: model(_tokens(0)))(ours)
  error = np.abs(np.asarray(got) - want).max() / np.ptp(want)
  assert error <= _TOLERANCE


def test_gradients_are_those_of_transformers():
  # Of the families the one with the most to go wrong.
  family, cfg, fields = CASES["gemma2"]
  theirs = hf.random_model(family, cfg, **fields)
  want_loss, grads = hf.loss_and_gradients(theirs, _tokens(0), _tokens(1))

  @jax.jit
  @jax.value_and_grad
  def loss_and_gradients(model):
    scores = jax.nn.log_softmax(model(_tokens(0)))
    picked = jnp.take_along_axis(scores, _tokens(1)[..., None], axis=-1)
    return -jnp.mean(picked)

  loss, got = loss_and_gradients(from_hugging_face(hf.weights(theirs), cfg))
  np.testing.assert_allclose(loss, want_loss, rtol=1e-6)
  want = from_hugging_face(grads, cfg)
  for (path, g), w in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    error = np.abs(np.asarray(g) - np.asarray(w)).max() / np.ptp(w)
    assert error <= _TOLERANCE, jax.tree_util.keystr(path)


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
  config = hf.transformers.LlamaConfig(
    hidden_size=cfg.d_model,
    max_position_embeddings=131_072,
    num_attention_heads=cfg.num_heads,
    head_dim=cfg.head_width,
    **_rope(rope.theta, kind, **fields),
  )
  want, want_factor = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
  got, factor = frequencies(cfg.head_width, rope)
  assert factor == pytest.approx(want_factor)
  # Theirs are computed in fp32, in about ten steps; ours in fp64.
  np.testing.assert_allclose(got, want.numpy(), rtol=10 * 2**-24)
