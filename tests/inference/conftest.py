import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxchunk.models.config import ModelConfig
from jaxchunk.models.rope import Rope
from jaxchunk.models.transformer import Transformer


@functools.cache
def make_model(pattern=(5,), num_layers=2, **fields):
  """A small model with grouped heads; filled on the host, which is quicker."""
  cfg = ModelConfig(
    vocab_size=61,
    d_model=32,
    num_layers=num_layers,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    d_ff=48,
    window_pattern=pattern,
    rope=Rope(theta=1e3),
    local_rope=Rope(theta=1e2),
    **fields,
  )
  return random_model(cfg)


def random_model(cfg):
  """Far from its start, so that no two tokens are alike."""
  rng = np.random.default_rng(0)

  def fill(path, leaf):
    values = rng.standard_normal(leaf.shape)
    if "kernel" in jax.tree_util.keystr(path):
      values *= leaf.shape[-2] ** -0.5
    elif "scale" in jax.tree_util.keystr(path):
      values = 1 + 0.3 * values
    return jnp.asarray(values, leaf.dtype)

  abstract = jax.eval_shape(lambda: Transformer(cfg, rngs=nnx.Rngs(0)))
  return jax.tree_util.tree_map_with_path(fill, abstract)


@pytest.fixture(scope="session")
def model():
  return make_model()


@pytest.fixture(scope="session")
def tokens():
  """Two rows of 64 tokens."""
  return np.random.default_rng(0).integers(0, 61, (2, 64)).astype(np.int32)
