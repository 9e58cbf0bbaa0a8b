"""The adapter's thin class, where lm_eval is installed."""

import types

import pytest

pytest.importorskip("lm_eval")

from jaxchunk.data.tokenizers import ByteTokenizer
from jaxchunk.evaluation import harness
from jaxchunk.evaluation.requests import generate_until, loglikelihood


@pytest.fixture
def adapter(model, monkeypatch):
  monkeypatch.setattr(
    harness, "load_for_inference", lambda workdir: (model, "folder", 1)
  )
  monkeypatch.setattr(harness, "load_tokenizer", lambda folder: ByteTokenizer())
  return harness.JaxchunkLM("run", chunk_size=32)


def requests_of(*arguments):
  return [types.SimpleNamespace(args=args) for args in arguments]


def test_requests_are_passed_on(adapter, model):
  pairs = [("a", "bc"), ("the", " self")]
  found = adapter.loglikelihood(requests_of(*pairs), disable_tqdm=True)
  options = {"chunk_size": 32, "batch_tokens": 100}
  assert found == loglikelihood(model, ByteTokenizer(), pairs, **options)
  rolling = adapter.loglikelihood_rolling(requests_of(("abc",)))
  whole = loglikelihood(model, ByteTokenizer(), [("", "abc")], **options)
  assert rolling == [whole[0][0]]
  asked = [("a", {"max_gen_toks": 5}), ("b", {"max_gen_toks": 9})]
  texts = generate_until(model, ByteTokenizer(), asked, chunk_size=32)
  assert adapter.generate_until(requests_of(*asked)) == list(texts)


def test_unknown_arguments_are_named():
  with pytest.raises(ValueError, match=r"\['chunk_sise'\] are unknown"):
    harness.JaxchunkLM("run", chunk_sise=3)
