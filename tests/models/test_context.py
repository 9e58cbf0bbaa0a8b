"""Rotary embeddings stretched to longer contexts."""

import dataclasses

import numpy as np
import pytest

from jaxchunk.interop.configs import config_from_hf, config_to_hf
from jaxchunk.models.context import extend_context
from jaxchunk.models.families import gemma2, llama3, qwen2
from jaxchunk.models.rope import Rope, frequencies

pytestmark = pytest.mark.fast

_SIZES = {
  "vocab_size": 24,
  "d_model": 64,
  "num_layers": 2,
  "num_heads": 2,
  "num_kv_heads": 1,
  "head_dim": 32,
  "d_ff": 24,
}
_PLAIN = qwen2(**_SIZES, context_length=1024)


@pytest.mark.parametrize("method", ["yarn", "linear", "theta"])
def test_the_lowest_frequency_is_divided_by_the_factor(method):
  longer = extend_context(_PLAIN, 8192, method=method)
  assert longer.context_length == 8192
  old, _ = frequencies(32, _PLAIN.rope)
  new, _ = frequencies(32, longer.rope)
  np.testing.assert_allclose(old[-1] / new[-1], 8, rtol=1e-12)
  # What turns often in the old context turns as before, but for "linear".
  np.testing.assert_allclose(old[0] / new[0], 8 if method == "linear" else 1)


@pytest.mark.parametrize("method", ["yarn", "linear", "theta"])
def test_transformers_can_be_told(method):
  longer = extend_context(_PLAIN, 4096, method=method)
  again = config_from_hf(config_to_hf(longer.frozen()))
  for got, want in zip(
    frequencies(32, again.rope), frequencies(32, longer.rope), strict=True
  ):
    np.testing.assert_allclose(got, want, rtol=1e-12)
  assert again.context_length == 4096


@pytest.mark.parametrize("method", ["yarn", "linear", "theta"])
def test_twice_by_two_is_once_by_four(method):
  twice = extend_context(
    extend_context(_PLAIN, 2048, method=method), 4096, method=method
  )
  once = extend_context(_PLAIN, 4096, method=method)
  for got, want in zip(
    frequencies(32, twice.rope), frequencies(32, once.rope), strict=True
  ):
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_layers_with_a_window_keep_their_embedding():
  cfg = gemma2(**_SIZES, window=16, context_length=64)
  longer = extend_context(cfg, 256)
  assert longer.rope_of(16) == cfg.rope
  assert longer.rope_of(None) != cfg.rope
  own = dataclasses.replace(cfg, local_rope=Rope(theta=50.0))
  assert extend_context(own, 256).local_rope == Rope(theta=50.0)


def test_what_cannot_be_stretched_is_named():
  with pytest.raises(ValueError, match="context_length is None"):
    extend_context(qwen2(**_SIZES), 100)
  with pytest.raises(ValueError, match=r"no longer than .*length=1024"):
    extend_context(_PLAIN, 1024)
  with pytest.raises(ValueError, match="method='ntk'"):
    extend_context(_PLAIN, 2048, method="ntk")
  scaled = llama3(**_SIZES, context_length=131_072)
  if scaled.rope.scaling is not None:
    with pytest.raises(ValueError, match="scaled already"):
      extend_context(scaled, 262_144)
  longer = extend_context(scaled, 262_144, method="theta")
  assert longer.rope.scaling == scaled.rope.scaling
