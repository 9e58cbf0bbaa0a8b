"""A small corpus with a long tail, and a cache that is never the user's."""

import random
from pathlib import Path

import pytest

from jaxchunk.data.config import DataConfig

_WORDS = ("def", "return", "chunk", "naïve", "日本", "🙂", "self", "0", "\n  ")


@pytest.fixture(autouse=True)
def no_user_cache(tmp_path, monkeypatch):
  monkeypatch.setenv("JAXCHUNK_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def cache_dir(tmp_path) -> Path:
  folder = tmp_path / "cache"
  folder.mkdir(exist_ok=True)
  return folder


@pytest.fixture
def text_folder(tmp_path) -> Path:
  """Forty documents: two empty, one of a byte, one far longer than the rest."""
  folder = tmp_path / "texts"
  folder.mkdir()
  rng = random.Random(0)
  for i in range(40):
    words = rng.choices(_WORDS, k=rng.randint(3, 60))
    (folder / f"{i:02}.txt").write_text(" ".join(words), encoding="utf-8")
  (folder / "05.txt").write_text("")
  (folder / "06.txt").write_text("")
  (folder / "07.txt").write_text("x")
  (folder / "08.txt").write_text(" ".join(rng.choices(_WORDS, k=900)))
  return folder


@pytest.fixture
def config(text_folder) -> DataConfig:
  return DataConfig(
    source=str(text_folder),
    tokenizer="byte",
    batch_tokens=500,
    heldout_fraction=0.1,
    seed=3,
    num_epochs=3,
  )
