import dataclasses

import numpy as np
import pytest

from jaxchunk.data import index as index_module
from jaxchunk.data.index import load_index, read_tokens
from jaxchunk.data.sources import load_source
from jaxchunk.data.tokenizers import ByteTokenizer

_TOKENIZER = ByteTokenizer()


@pytest.fixture
def load(text_folder, cache_dir):
  def load(*, bos=True, eos=True, cache_tokens=True):
    source = load_source(str(text_folder), cache_dir=cache_dir)
    return source, load_index(
      source,
      _TOKENIZER,
      bos=bos,
      eos=eos,
      cache_dir=cache_dir,
      cache_tokens=cache_tokens,
    )

  return load


@pytest.fixture
def built(monkeypatch):
  """Counts how often an index is built."""
  calls = []
  build = index_module._build
  monkeypatch.setattr(
    index_module, "_build", lambda *args: calls.append(args) or build(*args)
  )
  return calls


@pytest.mark.fast
@pytest.mark.parametrize("cache_tokens", [True, False])
@pytest.mark.parametrize(("bos", "eos"), [(True, True), (False, True), (0, 0)])
def test_lengths_and_tokens_are_those_of_the_text(load, bos, eos, cache_tokens):
  source, index = load(bos=bos, eos=eos, cache_tokens=cache_tokens)
  for i in range(len(source)):
    raw = source[i].encode()
    expected = [257] * bos + list(raw) + [258] * eos
    tokens, trained = read_tokens(index, source, _TOKENIZER, i)
    assert trained.all() and index.targets[i] == max(len(tokens) - 1, 0)
    assert tokens.dtype == np.int32
    assert tokens.tolist() == expected
    assert index.lengths[i] == len(expected)
    assert index.byte_lengths[i] == len(raw)


def test_built_once_in_groups_of_any_size(load, built, monkeypatch):
  _, whole = load()
  load()
  assert len(built) == 1
  monkeypatch.setattr(index_module, "_DOCUMENTS_AT_ONCE", 3)
  _, grouped = load(cache_tokens=False)
  assert len(built) == 2
  np.testing.assert_array_equal(whole.lengths, grouped.lengths)
  np.testing.assert_array_equal(whole.checksums, grouped.checksums)


def _damage_bytes(path):
  raw = bytearray(path.read_bytes())
  raw[len(raw) // 2] ^= 0xFF
  path.write_bytes(raw)


@pytest.mark.parametrize(
  "damage",
  [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:-50]),
    lambda path: path.write_bytes(b"not a zip"),
    lambda path: np.savez(path, lengths=np.zeros(3)),
  ],
)
def test_corrupt_index_is_rebuilt_with_a_warning(
  load, built, cache_dir, caplog, damage
):
  _, before = load()
  (path,) = cache_dir.glob("index-*.npz")
  damage(path)
  _, after = load()
  assert len(built) == 2
  assert "Rebuilding the cache file" in caplog.text
  np.testing.assert_array_equal(before.lengths, after.lengths)
  load()
  assert len(built) == 2


def test_no_flipped_bit_of_the_index_gets_through(load, cache_dir):
  _, before = load()
  (path,) = cache_dir.glob("index-*.npz")
  whole = path.read_bytes()
  for place in range(0, len(whole), 9):
    damaged = bytearray(whole)
    damaged[place] ^= 1 << place % 8
    path.write_bytes(damaged)
    _, after = load()
    # Some bytes of a zip file carry nothing; the others lead to a rebuild.
    for name in ("lengths", "byte_lengths", "hashes", "checksums"):
      np.testing.assert_array_equal(
        getattr(before, name), getattr(after, name), strict=True
      )


def test_missing_or_short_token_file_is_rebuilt(load, built, cache_dir):
  load()
  (path,) = cache_dir.glob("tokens-*.bin")
  path.write_bytes(path.read_bytes()[:-2])
  load()
  path.unlink()
  load()
  assert len(built) == 3


def test_damaged_tokens_are_noticed_and_made_again(load, cache_dir, caplog):
  source, index = load()
  expected = [read_tokens(index, source, _TOKENIZER, i) for i in range(40)]
  (path,) = cache_dir.glob("tokens-*.bin")
  _damage_bytes(path)
  for i in range(40):
    np.testing.assert_array_equal(
      read_tokens(index, source, _TOKENIZER, i), expected[i]
    )
  assert "is damaged" in caplog.text


def test_document_that_changes_during_the_run_is_an_error(load, text_folder):
  source, index = load(cache_tokens=False)
  text = source[0]
  (text_folder / "00.txt").write_text(text[::-1], encoding="utf-8")
  with pytest.raises(ValueError, match=r"00.txt is not what it was"):
    read_tokens(index, source, _TOKENIZER, 0)


def test_failed_build_leaves_nothing_behind(load, text_folder, cache_dir):
  (text_folder / "39.txt").write_bytes(b"\xff")
  with pytest.raises(ValueError, match=r"39.txt is not valid UTF-8"):
    load()
  assert not list(cache_dir.iterdir())


def test_tokenizer_without_bos_says_what_to_set(load, cache_dir):
  tokenizer = dataclasses.replace(_TOKENIZER, bos_id=None)
  source, _ = load()
  with pytest.raises(ValueError, match=r"no BOS token; set data.bos=False"):
    load_index(source, tokenizer, bos=True, eos=True, cache_dir=cache_dir)
