"""Small models and long-tailed batches for the tests of chunking."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import jaxchunk as jc

PLAIN = jc.ModelConfig(
  vocab_size=61,
  d_model=32,
  num_layers=3,
  num_heads=4,
  num_kv_heads=2,
  head_dim=8,
  d_ff=48,
)
# Everything that a model of the family may have, at once; five layers in a
# pattern of two leave one behind the last whole period.
RICH = dataclasses.replace(
  PLAIN,
  num_layers=5,
  window_pattern=(9, None),
  qk_norm=True,
  post_norms=True,
  qkv_bias=True,
  tie_embeddings=True,
  attention_softcap=5.0,
  logit_softcap=4.0,
  scale_embeddings=True,
  unit_offset_norm=True,
)
# In chunks of 16 the two long ones share a lane of seven; the rest is packed.
# Rows end in padding. Few lengths, for few programs to compile.
LENGTHS = ((75, 9, 1), (37, 14))


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def build(cfg: jc.ModelConfig, dtype: str = "float64") -> jc.Transformer:
  """A model whose norms and biases are not at their trivial start."""
  cfg = dataclasses.replace(cfg, dtype=dtype, param_dtype=dtype)
  model = jc.Transformer(cfg, rngs=nnx.Rngs(0))
  keys = iter(jax.random.split(jax.random.key(1), 99))

  def stir(a: jax.Array) -> jax.Array:
    return a + 0.1 * jax.random.normal(next(keys), a.shape, a.dtype)

  return jax.tree.map(stir, model)


def make_batch(
  lengths: tuple[tuple[int, ...], ...] = LENGTHS, seed: int = 0
) -> dict[str, Any]:
  """Rows of packed sequences, with masked tokens and uneven weights."""
  rng = np.random.default_rng(seed)
  width = max(map(sum, lengths)) + 3
  segments = np.zeros((len(lengths), width), np.int32)
  for row, sizes in enumerate(lengths):
    ids = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    segments[row, : len(ids)] = ids
  weights = rng.random(segments.shape) * (rng.random(segments.shape) > 0.2)
  return {
    "tokens": rng.integers(0, PLAIN.vocab_size, segments.shape),
    "targets": rng.integers(0, PLAIN.vocab_size, segments.shape),
    "weights": weights,
    "segment_ids": segments,
  }


def worst(grads: nnx.State, reference: nnx.State) -> float:
  """Largest norm-relative error of any parameter's gradient."""
  assert jax.tree.structure(grads) == jax.tree.structure(reference)
  errors = [
    np.linalg.norm(np.asarray(a) - np.asarray(b)) / np.linalg.norm(b)
    for a, b in zip(
      jax.tree.leaves(grads), jax.tree.leaves(reference), strict=True
    )
  ]
  return float(np.max(errors))  # A NaN is the largest.
