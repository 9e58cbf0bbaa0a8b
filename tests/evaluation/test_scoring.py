"""A model's scores against the plain forward pass."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchunk.evaluation.lengths import check_lengths, position_limit
from jaxchunk.evaluation.scoring import (
  begins_with,
  model_scorer,
  outcome,
  score_cell,
)
from jaxchunk.evaluation.tasks import Haystack, Sample, make_samples
from jaxchunk.inference.generate import generate
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.rope import Llama3Scaling, Rope, YarnScaling

whole_row = jax.jit(lambda model, tokens: jax.nn.log_softmax(model(tokens)))


@pytest.fixture(scope="module")
def samples(corpus):
  return list(
    make_samples(
      "multi_needle",
      length=512,
      count=2,
      tokenizer=corpus.tokenizer,
      haystack=Haystack.of(corpus),
      depth=0.3,
    )
  )


def test_candidates_score_as_in_the_whole_row(model, corpus, samples):
  scorer = model_scorer(model, corpus.tokenizer, chunk_size=64)
  for sample in samples:
    found, text = scorer(sample)
    for ids, value in zip(sample.candidates, found, strict=True):
      row = np.zeros((1, 512), np.int32)
      both = np.concatenate([sample.prompt, ids])
      row[0, : len(both)] = both
      logprobs = np.asarray(whole_row(model, jnp.asarray(row)))[0]
      places = np.arange(len(sample.prompt), len(both))
      truth = logprobs[places - 1, both[places]].sum()
      assert value == pytest.approx(truth, rel=1e-4)
    written = generate(
      model, sample.prompt, max_new_tokens=10, chunk_size=64, eos_id=258
    )
    assert text == corpus.tokenizer.decode(list(written))


def make_sample(candidates=3):
  ids = tuple(np.asarray([n], np.int32) for n in range(candidates))
  prompt = np.zeros(4, np.int32)
  return Sample("needle", 8, 0.5, "text", "123", prompt, ids)


@pytest.mark.fast
def test_a_tie_is_no_success():
  sample = make_sample()
  assert outcome(sample, np.asarray([-1.0, -2, -3]), "").ranked_first
  assert not outcome(sample, np.asarray([-1.0, -1, -3]), "").ranked_first
  assert not outcome(sample, np.asarray([-2.0, -1, -3]), "").ranked_first


@pytest.mark.fast
def test_a_diverged_model_is_an_error():
  with pytest.raises(ValueError, match=r"task 'needle', length 8.*diverged"):
    outcome(make_sample(), np.asarray([np.nan, 0, 0]), "")
  with pytest.raises(ValueError, match="2 log-likelihoods for 3"):
    outcome(make_sample(), np.zeros(2), "")


@pytest.mark.fast
@pytest.mark.parametrize(
  ("text", "right"),
  [
    ("123", True),
    (" 123.", True),
    ("\n123 and", True),
    ("1234", False),
    ("x123", False),
    ("12", False),
  ],
)
def test_exact_match_is_of_the_whole_word(text, right):
  assert begins_with(text, "123") == right


@pytest.mark.fast
def test_a_cell_is_the_mean_of_its_samples():
  given = iter([([0, -1, -2], "123"), ([-3, -1, -2], "123"), ([0, 1, 0], "")])

  def scorer(sample):
    logprobs, text = next(given)
    return np.asarray(logprobs, float), text

  passed = []
  cell = score_cell([make_sample()] * 3, scorer, progress=passed.append)
  assert cell.ranked_first == pytest.approx(1 / 3)
  assert cell.exact_match == pytest.approx(2 / 3)
  assert cell.logprob == pytest.approx(-1)
  assert passed == [5, 5, 5]
  with pytest.raises(ValueError, match="no samples"):
    score_cell([], scorer)


def make_config(**fields):
  return ModelConfig(
    vocab_size=9, d_model=8, num_layers=2, num_heads=1, d_ff=8, **fields
  ).frozen()


YARN = Rope(scaling=YarnScaling(factor=4.0, original_length=32_768))


@pytest.mark.fast
def test_only_yarn_names_a_limit():
  assert position_limit(make_config()) is None
  assert position_limit(make_config(rope=YARN)) == 131_072
  llama = Rope(scaling=Llama3Scaling(factor=8.0))
  assert position_limit(make_config(rope=llama)) is None
  # Unused where no layer has a window.
  assert position_limit(make_config(local_rope=YARN)) is None
  both = make_config(local_rope=YARN, window_pattern=(4, None))
  assert position_limit(both) == 131_072


@pytest.mark.fast
def test_lengths_beyond_the_positions():
  cfg = make_config(rope=YARN)
  assert check_lengths([1024, 131_072], cfg) == []
  with pytest.raises(ValueError, match=r"131073 is beyond .* 131072 positions"):
    check_lengths([1024, 131_073], cfg)
  assert check_lengths([1024, 131_073], cfg, extrapolate=True) == [131_073]
  assert check_lengths([1024, 2048], cfg, trained_length=1500) == [2048]
  assert check_lengths([9], make_config()) == []
  with pytest.raises(ValueError, match="length=0 must be"):
    check_lengths([0], cfg)
