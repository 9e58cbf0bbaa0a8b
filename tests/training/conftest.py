import dataclasses
from pathlib import Path

import numpy as np
import pytest

from jaxchunk.data.config import DataConfig
from jaxchunk.models.config import ModelConfig
from jaxchunk.training.config import CheckpointConfig, Config, TrainConfig


@pytest.fixture(scope="session")
def corpus_folder(tmp_path_factory):
  """Forty documents of up to 126 bytes of two alternating letters."""
  folder = tmp_path_factory.mktemp("corpus")
  rng = np.random.default_rng(0)
  for number in range(40):
    size = int(rng.integers(3, 120))
    text = "".join("ab"[(i + number) % 2] for i in range(size))
    (folder / f"{number:02}.txt").write_text(f"{number} {text}")
  return folder


@pytest.fixture(scope="session")
def make_config(corpus_folder, tmp_path_factory):
  """Makes the configuration of eight steps, a little more than an epoch."""
  cache = tmp_path_factory.mktemp("cache")

  def make() -> Config:
    return Config(
      model=ModelConfig(
        vocab_size=259,
        d_model=16,
        num_layers=2,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        d_ff=16,
        tie_embeddings=True,
      ),
      data=DataConfig(
        source=str(corpus_folder),
        tokenizer="byte",
        batch_tokens=400,
        heldout_fraction=0.2,
        cache_dir=str(cache),
      ),
      train=TrainConfig(
        num_steps=8, chunk_size=64, warmup_steps=2, eval_every=4
      ),
      checkpoint=CheckpointConfig(save_every=3, keep_last=2),
    )

  return make


@pytest.fixture
def config(make_config) -> Config:
  """A configuration to change at will."""
  return make_config()


@pytest.fixture
def config_file(config, tmp_path) -> Path:
  """A file whose get_config() returns an equal configuration."""
  sections = ", ".join(
    f"{field.name}={getattr(config, field.name)!r}"
    for field in dataclasses.fields(config)
  )
  lines = [
    "from jaxchunk.data.config import DataConfig",
    "from jaxchunk.models.config import ModelConfig",
    "from jaxchunk.models.rope import Rope",
    "from jaxchunk.training.config import (",
    "  CheckpointConfig, Config, LayoutConfig, ProcessesConfig, TrainConfig)",
    "def get_config():",
    f"  return Config({sections})",
  ]
  path = tmp_path / "config.py"
  path.write_text("\n".join(lines))
  return path
