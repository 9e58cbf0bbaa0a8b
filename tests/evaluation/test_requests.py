"""Requests of a harness against the plain forward pass."""

import importlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk.data.tokenizers import ByteTokenizer
from jaxchunk.evaluation.requests import (
  generate_until,
  loglikelihood,
  loglikelihood_rolling,
  until_stop,
)
from jaxchunk.inference.generate import generate

BYTE = ByteTokenizer()
OPTIONS = {"chunk_size": 32, "batch_tokens": 200}
PAIRS = [
  ("the self", " of chunk"),
  ("", "def"),
  ("naïve ", "日本"),
  ("the " * 40, "end"),
  ("nothing", ""),
  ("a", "b" * 90),
]
whole_row = jax.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)))


def truth_of(model, context, continuation):
  """Sum of log-softmax of one whole row, and whether all are its maxima."""
  ids = [BYTE.bos_id, *(context + continuation).encode()]
  row = np.zeros((1, 256), np.int32)
  row[0, : len(ids)] = ids
  logprobs = np.asarray(whole_row(model, jnp.asarray(row)))[0]
  places = range(1 + len(context.encode()), len(ids))
  best = [int(logprobs[p - 1].argmax()) == ids[p] for p in places]
  return sum(float(logprobs[p - 1, ids[p]]) for p in places), all(best)


def test_loglikelihood_is_that_of_the_whole_row(model):
  passed = []
  found = loglikelihood(model, BYTE, PAIRS, progress=passed.append, **OPTIONS)
  for pair, (total, greedy) in zip(PAIRS, found, strict=True):
    truth, best = truth_of(model, *pair)
    assert total == pytest.approx(truth, rel=1e-4, abs=1e-6)
    assert greedy == best
  assert sum(passed) == len(PAIRS)
  assert len(passed) > 1  # In groups.


def test_a_greedy_continuation_is_found_so(model):
  """After the first letters behind which the likeliest byte is ASCII."""

  def likeliest(context):
    prompt = [BYTE.bos_id, *context.encode()]
    [token] = generate(model, prompt, max_new_tokens=1, chunk_size=32)
    return token

  found = ((c, likeliest(c)) for c in "abcdefghijklmnopqrstuvwxyz")
  context, token = next((c, t) for c, t in found if t < 128)
  pairs = [(context, chr(token)), (context, chr((token + 1) % 128))]
  scores = loglikelihood(model, BYTE, pairs, **OPTIONS)
  assert [greedy for _, greedy in scores] == [True, False]


def test_rolling_has_the_whole_text_as_context(model):
  texts = ["the self of " * 16, "x", ""]
  found = loglikelihood_rolling(model, BYTE, texts, **OPTIONS)
  truth = [truth_of(model, "", text)[0] for text in texts]
  assert found == pytest.approx(truth, rel=1e-4)


@pytest.mark.fast
def test_nothing_to_predict_from():
  bare = ByteTokenizer(bos_id=None, eos_id=None)
  with pytest.raises(ValueError, match="neither BOS nor EOS"):
    loglikelihood(None, bare, [("", "text")], **OPTIONS)


def test_generation_stops(model):
  def run(**given):
    given = {"max_gen_toks": 30, **given}
    [text] = generate_until(model, BYTE, [("self", given)], chunk_size=32)
    return text

  text = run()
  assert len(text) > 8
  stop = text[4:6]
  assert run(until=stop) == text[: text.index(stop)]
  assert run(until=["", "not there", stop]) == text[: text.index(stop)]
  tokens = generate(
    model, [BYTE.bos_id, *b"self"], max_new_tokens=9, chunk_size=32
  )
  nine = BYTE.decode(list(tokens))
  assert run(max_gen_toks=None, max_new_tokens=9) == nine != text
  assert run(do_sample=False, temperature=0.7) == text
  sampled = run(do_sample=True, temperature=3.0)
  assert sampled == run(do_sample=True, temperature=3.0)
  assert sampled != text


@pytest.mark.fast
def test_a_stop_string_may_span_pieces_and_no_more_is_asked_for():
  asked = []

  def pieces():
    for piece in ("one ", "tw", "o thr", "ee"):
      asked.append(piece)
      yield piece

  assert until_stop(pieces(), ["two"]) == "one "
  assert asked == ["one ", "tw", "o thr"]
  assert until_stop(iter(["a.b", "c"]), ["c", "."]) == "a"
  assert until_stop(iter(["a", "b"]), []) == "ab"


@pytest.mark.fast
def test_unknown_generation_arguments_are_named():
  requests = [("self", {"num_beams": 4})]
  with pytest.raises(ValueError, match=r"\['num_beams'\] are unknown"):
    list(generate_until(None, BYTE, requests, chunk_size=32))
  with pytest.raises(ValueError, match="must be strings"):
    list(generate_until(None, BYTE, [("a", {"until": [3]})], chunk_size=32))


@pytest.mark.fast
def test_without_the_package_the_adapter_says_what_to_install(monkeypatch):
  monkeypatch.setitem(sys.modules, "lm_eval", None)
  monkeypatch.delitem(sys.modules, "jaxchunk.evaluation.harness", False)
  with pytest.raises(ImportError, match=r"pip install 'jaxchunk\[eval\]'"):
    importlib.import_module("jaxchunk.evaluation.harness")
