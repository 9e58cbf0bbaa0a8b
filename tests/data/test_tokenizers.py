import json

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import given
from hypothesis import strategies as st

from jaxchunk.data import bpe
from jaxchunk.data.sources import load_source
from jaxchunk.data.tokenizers import (
  ByteTokenizer,
  JsonTokenizer,
  StreamDecoder,
  load_tokenizer,
  token_bytes,
)

_BYTE = ByteTokenizer()


class _Texts:
  fingerprint = "texts"

  def __init__(self, *texts):
    self._texts = texts

  def __len__(self):
    return len(self._texts)

  def __getitem__(self, index):
    return self._texts[index]

  def name(self, index):
    return f"text {index}"


_SOURCE = _Texts(
  *(f"the naïve 日本 chunk {i} returns 🙂 self" for i in range(50))
)
_BPE = load_tokenizer("bpe:300", _SOURCE)


def _stream(tokenizer, ids) -> list[str]:
  decoder = StreamDecoder(tokenizer)
  return [*(decoder.push(i) for i in ids), decoder.flush()]


@pytest.mark.fast
@pytest.mark.parametrize("tokenizer", [_BYTE, _BPE], ids=["byte", "bpe"])
@given(text=st.text())
def test_round_trip_and_stream(tokenizer, text):
  ids = tokenizer.encode(text)
  assert ids.dtype == np.int32
  assert tokenizer.decode(ids) == text
  assert all(0 <= i < tokenizer.vocab_size for i in ids)
  np.testing.assert_array_equal(tokenizer.encode_batch([text])[0], ids)
  pieces = _stream(tokenizer, ids)
  assert "".join(pieces) == text
  if "\ufffd" not in text:
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("tokenizer", [_BYTE, _BPE], ids=["byte", "bpe"])
@given(ids=st.lists(st.integers(0, 310), max_size=40))
def test_stream_of_any_ids_joins_to_their_decode(tokenizer, ids):
  assert "".join(_stream(tokenizer, ids)) == tokenizer.decode(ids)


@pytest.mark.fast
@pytest.mark.parametrize("tokenizer", [_BYTE, _BPE], ids=["byte", "bpe"])
@given(text=st.text())
def test_bytes_of_tokens_are_those_of_the_text(tokenizer, text):
  ids = tokenizer.encode(text).tolist()
  parts = [token_bytes(tokenizer, i) for i in ids]
  assert b"".join(parts) == text.encode()


@pytest.mark.fast
def test_bytes_of_words_with_their_space_and_of_fallbacks():
  vocabulary = {"<unk>": 0, "\u2581the": 1, "s": 2, "<0xC3>": 3, "<0xA9>": 4}
  model = hf.models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True)
  backend = hf.Tokenizer(model)
  backend.decoder = hf.decoders.Sequence(
    [
      hf.decoders.Replace("\u2581", " "),
      hf.decoders.ByteFallback(),
      hf.decoders.Fuse(),
      hf.decoders.Strip(" ", 1, 0),
    ]
  )
  backend.add_special_tokens(["</s>"])
  tokenizer = JsonTokenizer(backend.to_str(), eos="</s>")
  parts = [token_bytes(tokenizer, i) for i in (1, 2, 3, 4, 5, 99)]
  assert parts == [b" the", b"s", b"\xc3", b"\xa9", b"</s>", b""]


@pytest.mark.fast
def test_half_a_character_is_held_back():
  pieces = _stream(_BYTE, _BYTE.encode("a🙂é!"))
  assert pieces == ["a", "", "", "", "🙂", "", "é", "!", ""]
  assert _stream(_BYTE, _BYTE.encode("🙂")[:3]) == ["", "", "", "\ufffd"]


@pytest.mark.parametrize("tokenizer", [_BYTE, _BPE], ids=["byte", "bpe"])
def test_specials_decode_to_nothing_and_are_not_read_from_text(tokenizer):
  ids = [tokenizer.bos_id, *tokenizer.encode("hi"), tokenizer.eos_id]
  assert tokenizer.decode([*ids, tokenizer.pad_id, 10**6, -1]) == "hi"
  encoded = tokenizer.encode("<|eos|>")
  assert tokenizer.eos_id not in encoded
  assert tokenizer.decode(encoded) == "<|eos|>"


def test_special_text_can_be_parsed_on_request():
  parsing = load_tokenizer("bpe:300", _SOURCE, parse_special=True)
  assert parsing.encode("a<|eos|>")[-1] == parsing.eos_id
  assert parsing.fingerprint != _BPE.fingerprint


def test_bpe_is_deterministic_cached_and_survives_corruption(
  cache_dir, monkeypatch
):
  def load():
    return load_tokenizer("bpe:300", _SOURCE, cache_dir=cache_dir)

  assert load().fingerprint == _BPE.fingerprint
  (cached,) = cache_dir.iterdir()
  train = bpe.train_bpe
  monkeypatch.setattr(bpe, "train_bpe", None)
  assert load().fingerprint == _BPE.fingerprint
  monkeypatch.setattr(bpe, "train_bpe", train)
  for torn in (b"{", b"\xff", b""):
    cached.write_bytes(torn)
    assert load().fingerprint == _BPE.fingerprint
  assert json.loads(cached.read_text())


def test_bpe_never_sees_what_is_held_out():
  texts = [f"{chr(0x4E00 + i)}" * 8 for i in range(40)]
  whole = bpe._texts(_Texts(*texts), 0.0)
  part = list(bpe._texts(_Texts(*texts), 0.5))
  assert list(whole) == texts
  assert 0 < len(part) < 40


def test_save_and_reload_without_the_source(tmp_path):
  for name, tokenizer in (("byte", _BYTE), ("bpe", _BPE)):
    tokenizer.save(tmp_path / name)
    again = load_tokenizer(str(tmp_path / name))
    assert type(again) is type(tokenizer)
    for field in ("fingerprint", "vocab_size", "bos_id", "eos_id", "pad_id"):
      assert getattr(again, field) == getattr(tokenizer, field)
  backend = hf.Tokenizer.from_file(str(tmp_path / "bpe" / "tokenizer.json"))
  assert backend.encode("chunk").ids == _BPE.encode("chunk").tolist()


def test_json_file_of_another_library(tmp_path):
  backend = hf.Tokenizer(hf.models.WordLevel({"[UNK]": 0, "a": 7}, "[UNK]"))
  backend.pre_tokenizer = hf.pre_tokenizers.Whitespace()
  backend.add_special_tokens(["<s>", "</s>"])
  backend.enable_truncation(2)
  backend.enable_padding(length=9)
  path = tmp_path / "tokenizer.json"
  backend.save(str(path))
  tokenizer = load_tokenizer(str(path))
  # Truncation and padding of the file are off, and ids may have holes.
  assert tokenizer.encode("a a a a").tolist() == [7] * 4
  assert tokenizer.vocab_size == max(backend.get_vocab().values()) + 1
  assert tokenizer.bos_id == backend.token_to_id("<s>")
  assert tokenizer.pad_id == tokenizer.eos_id == backend.token_to_id("</s>")
  (tmp_path / "tokenizer_config.json").write_text(
    json.dumps({"bos_token": None, "eos_token": {"content": "a"}})
  )
  tokenizer = load_tokenizer(str(tmp_path))
  assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 7)
  with pytest.raises(ValueError, match="no token '<x>', its eos_token"):
    JsonTokenizer(path.read_text(), eos="<x>")


@pytest.mark.parametrize(
  ("spec", "error", "message"),
  [
    ("bpe:", ValueError, r"gives no vocabulary size; it is 'byte', 'bpe:"),
    ("bpe:4k", ValueError, "gives no vocabulary size"),
    ("bpe:100", ValueError, "256 bytes and 3 special tokens make 259"),
    (
      "bytes",
      FileNotFoundError,
      r"'bytes' does not exist; it is 'byte', 'bpe:",
    ),
    ("FOLDER", FileNotFoundError, "has no tokenizer.json"),
    ("FOLDER/a.json", ValueError, "is not a file of the `tokenizers` library"),
  ],
)
def test_bad_spec(tmp_path, spec, error, message):
  (tmp_path / "a.json").write_text("{}")
  with pytest.raises(error, match=message):
    load_tokenizer(spec.replace("FOLDER", str(tmp_path)), _SOURCE)


def test_bpe_without_documents_says_where_to_get_one():
  with pytest.raises(ValueError, match="there is no source; name the folder"):
    load_tokenizer("bpe:4096")


def test_bpe_of_real_text_compresses(text_folder, cache_dir):
  source = load_source(str(text_folder), cache_dir=cache_dir)
  tokenizer = load_tokenizer("bpe:400", source, cache_dir=cache_dir)
  text = source[8]
  assert len(tokenizer.encode(text)) < len(text.encode()) / 2
