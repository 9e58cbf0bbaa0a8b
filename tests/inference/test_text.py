"""Prompts, whole characters, the clock."""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest

from jaxchunk.data.tokenizers import ByteTokenizer
from jaxchunk.inference import text
from jaxchunk.inference.prompt import encode_prompt
from jaxchunk.inference.sampling import Sampler

BYTES = ByteTokenizer()


@pytest.mark.fast
def test_a_prompt_begins_as_a_document_does():
  ids = encode_prompt(BYTES, "ab")
  assert ids.tolist() == [BYTES.bos_id, 97, 98]
  assert ids.dtype == np.int32
  assert encode_prompt(BYTES, "").tolist() == [BYTES.bos_id]
  assert encode_prompt(BYTES, "ab", bos=False).tolist() == [97, 98]
  plain = ByteTokenizer(bos_id=None)
  assert encode_prompt(plain, "ab").tolist() == [97, 98]
  with pytest.raises(ValueError, match="empty and the tokenizer has no BOS"):
    encode_prompt(plain, "")
  with pytest.raises(ValueError, match="told to leave out BOS"):
    encode_prompt(BYTES, "", bos=False)


@pytest.mark.fast
def test_no_piece_ends_inside_a_character():
  whole = "a\N{LATIN SMALL LETTER E WITH ACUTE}\N{GRINNING FACE}z"
  pieces = list(text.stream_text(whole.encode(), BYTES))
  assert pieces == list(whole)


@pytest.mark.fast
def test_bytes_that_are_no_text_come_out_at_the_end():
  ids = [*b"ab", 0xF0, 0x9F]
  pieces = list(text.stream_text(ids, BYTES))
  assert "".join(pieces) == BYTES.decode(ids)
  assert pieces[:2] == ["a", "b"]


@pytest.mark.fast
def test_a_token_is_asked_for_after_the_text_before_it():
  asked = []
  tokens = (asked.append(n) or n for n in b"xyz")
  pieces = text.stream_text(tokens, BYTES)
  assert next(pieces) == "x"
  assert asked == [ord("x")]


@pytest.mark.fast
def test_the_clock_tells_prefill_from_decoding(monkeypatch):
  times = itertools.chain([10.0, 12.0], itertools.count(13.0, 0.5))
  monkeypatch.setattr(text.time, "perf_counter", lambda: next(times))
  clock = text.Clock(prompt_tokens=4000)
  events = [SimpleNamespace(tokens=(n,)) for n in range(5)]
  assert list(clock.watch(events)) == events
  assert str(clock) == (
    "prefill: 4,000 tokens in 2.00 s (2,000 tokens/s), "
    "decode: 4 tokens in 2.50 s (2 tokens/s)"
  )


def test_the_clock_of_no_token_and_of_one(monkeypatch):
  monkeypatch.setattr(text.time, "perf_counter", itertools.count(0.0).__next__)
  for events in ([], [SimpleNamespace(tokens=(7,))]):
    clock = text.Clock(prompt_tokens=3)
    assert list(clock.watch(events)) == events
    assert str(clock) == (
      "prefill: 3 tokens in 1.00 s (3 tokens/s), decode: 0 tokens in 0.00 s"
    )


@pytest.mark.fast
@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"max_new_tokens": 0}, "max_new_tokens=0 must be"),
    ({"prompt": "", "bos": False}, "prompt is empty"),
    # A model of 61 tokens, and bytes.
    ({}, "token 257 is not below vocab_size=61"),
  ],
)
def test_a_mistake_is_named_before_anything_compiles(model, change, message):
  options = {"prompt": "ab", "max_new_tokens": 3, "chunk_size": 8} | change
  if "max_new_tokens" in change:
    options |= {"prompt": "\1", "bos": False}
  prompt = options.pop("prompt")
  with pytest.raises(ValueError, match=message):
    text.continue_text(model, BYTES, prompt, sampler=Sampler(), **options)
