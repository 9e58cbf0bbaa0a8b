"""A corpus of prose-like documents, a small model, and their configuration."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxchunk.data.config import DataConfig
from jaxchunk.data.corpus import open_corpus
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.transformer import Transformer
from jaxchunk.training.config import Config, TrainConfig

WORDS = ("def", "return", "chunk", "naïve", "日本", "🙂", "self", "of", "the")


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
  """Thirty documents of 2 to 14 lines of words, some beyond ASCII."""
  folder = tmp_path_factory.mktemp("corpus")
  rng = np.random.default_rng(0)
  for number in range(30):
    lines = [
      " ".join(rng.choice(WORDS, int(rng.integers(1, 9))))
      for _ in range(int(rng.integers(2, 14)))
    ]
    text = "\n".join(lines) + f"\nEnd of text {number}.\n"
    (folder / f"{number:02}.txt").write_text(text, encoding="utf-8")
  return folder


@pytest.fixture(scope="session")
def config(corpus_folder, tmp_path_factory) -> Config:
  """Of a small model of bytes."""
  return Config(
    model=ModelConfig(
      vocab_size=259,
      d_model=16,
      num_layers=2,
      num_heads=2,
      num_kv_heads=1,
      head_dim=8,
      d_ff=16,
      window_pattern=(9, None),
      tie_embeddings=True,
    ),
    data=DataConfig(
      source=str(corpus_folder),
      tokenizer="byte",
      batch_tokens=400,
      heldout_fraction=0.3,
      cache_dir=str(tmp_path_factory.mktemp("cache")),
    ),
    train=TrainConfig(num_steps=8, chunk_size=64, warmup_steps=2),
  )


@pytest.fixture(scope="session")
def corpus(config):
  return open_corpus(config.data)


@functools.cache
def random_model(cfg):
  """Far from its start, so that no two tokens are alike; filled on the host."""
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
def model(config):
  return random_model(config.model.frozen())
