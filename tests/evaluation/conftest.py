"""A corpus of prose-like documents, a small model, and their configuration."""

import numpy as np
import pytest

from jaxchunk.data.config import DataConfig
from jaxchunk.data.corpus import open_corpus
from jaxchunk.models.config import ModelConfig
from jaxchunk.training.config import Config, TrainConfig
from tests.inference.conftest import random_model

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


@pytest.fixture(scope="session")
def model(config):
  return random_model(config.model.frozen())
