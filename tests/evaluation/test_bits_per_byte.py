"""Buckets of bits per byte: what they hold, and that they add up."""

import dataclasses
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxchunk.data.corpus import heldout_examples, open_corpus, read_examples
from jaxchunk.evaluation.bits_per_byte import (
  Scored,
  bits_per_byte,
  score_documents,
  token_bytes,
)
from jaxchunk.training.loop import heldout_bits_per_byte


def make_documents(lengths, seed=0):
  rng = np.random.default_rng(seed)
  return [
    Scored(rng.random(n - 1) * 3, rng.integers(0, 5, n - 1)) for n in lengths
  ]


@pytest.mark.fast
@given(
  lengths=st.lists(st.integers(2, 3000), min_size=1, max_size=12),
  seed=st.integers(0, 99),
)
def test_buckets_add_up_to_the_whole(lengths, seed):
  documents = make_documents(lengths, seed)
  found = bits_per_byte(documents)
  bits = sum(d.nats.sum() for d in documents) / math.log(2)
  assert found.whole.bits == pytest.approx(bits, rel=1e-12)
  assert found.whole.bytes == sum(d.bytes.sum() for d in documents)
  assert found.whole.documents == len(documents)
  for buckets in (found.by_length, found.by_position):
    assert sum(b.bits for b in buckets) == pytest.approx(bits, rel=1e-9)
    assert sum(b.bytes for b in buckets) == found.whole.bytes
    assert sum(b.tokens for b in buckets) == sum(lengths) - len(lengths)
    assert all(b.tokens for b in buckets)
  assert sum(b.documents for b in found.by_length) == len(documents)
  assert np.shape(found.by_both) == (
    len(found.by_length),
    len(found.by_position),
  )


@pytest.mark.fast
def test_buckets_by_hand():
  """Targets 1, 2, 3 of one document and 1 to 5 of another; borders at 4."""
  documents = [
    Scored(np.asarray([1.0, 2, 3]), np.asarray([1, 1, 0])),
    Scored(np.asarray([1.0, 1, 1, 4, 5]), np.asarray([0, 1, 1, 2, 3])),
  ]
  found = bits_per_byte(documents, edges=[4, 5])
  assert [(b.start, b.stop, b.tokens) for b in found.by_position] == [
    (0, 4, 6),
    (4, 5, 1),
    (5, 7, 1),
  ]
  ratios = [b.bits_per_byte * math.log(2) for b in found.by_position]
  assert ratios == pytest.approx([9 / 4, 2, 5 / 3])


@pytest.mark.fast
def test_lengths_by_hand():
  """A document of 4 tokens belongs to the bucket that starts at 4."""
  found = bits_per_byte(make_documents([3, 4, 9]), edges=[4])
  assert [b.documents for b in found.by_length] == [1, 2]
  assert [b.tokens for b in found.by_length] == [2, 11]


@pytest.mark.fast
def test_empty_buckets_are_counted_or_an_error():
  documents = make_documents([5, 2000])
  found = bits_per_byte(documents)
  # Powers of two from 64: [0, 64) and [1024, 2048) hold a document.
  assert [b.start for b in found.by_length] == [0, 1024]
  assert found.empty == {"length": 4, "position": 0}
  with pytest.raises(ValueError, match=r"64 to 127 tokens is empty.*5 to 2000"):
    bits_per_byte(documents, edges=[64, 128])
  with pytest.raises(ValueError, match=r"from 4096 .* is empty"):
    bits_per_byte(documents, edges=[4096])


@pytest.mark.fast
@pytest.mark.parametrize("edges", [[4, 4], [8, 4], [0], [-3]])
def test_edges_must_ascend(edges):
  with pytest.raises(ValueError, match="positive and ascend"):
    bits_per_byte(make_documents([5]), edges=edges)


@pytest.mark.fast
def test_no_documents():
  with pytest.raises(ValueError, match="no documents"):
    bits_per_byte([])


@pytest.mark.fast
def test_standard_error_is_that_of_repeated_draws():
  """Bits per byte of many samples scatter as their errors say."""
  rng = np.random.default_rng(0)
  ratios, errors = [], []
  for _ in range(400):
    documents = []
    for _ in range(60):
      size = int(rng.integers(3, 40))
      level = rng.gamma(4, 0.5)
      documents.append(Scored(np.full(size, level), rng.integers(1, 4, size)))
    whole = bits_per_byte(documents).whole
    ratios.append(whole.bits_per_byte)
    errors.append(whole.standard_error)
  assert np.mean(errors) == pytest.approx(np.std(ratios), rel=0.1)


@pytest.mark.fast
def test_a_single_document_has_no_error():
  assert bits_per_byte(make_documents([9])).whole.standard_error is None


@pytest.mark.parametrize("tokenizer", ["byte", "bpe:300"])
@pytest.mark.parametrize("bos", [True, False])
def test_bytes_of_targets_are_the_documents_bytes(config, tokenizer, bos):
  data = dataclasses.replace(
    config.data, tokenizer=tokenizer, bos=bos, heldout_fraction=0.0
  )
  corpus = open_corpus(data)
  examples = read_examples(corpus, range(len(corpus.index)))
  for example in examples:
    sizes = token_bytes(corpus, example)
    assert len(sizes) == len(example)
    text = corpus.source[example.document_id]
    assert sizes.sum() == len(text.encode())
    assert sizes[-1] == 0  # EOS.
    decoded = corpus.tokenizer.decode(example.targets[: len(sizes) // 2])
    if decoded.isascii() and bos:
      assert sizes[: len(sizes) // 2].sum() == len(decoded)


def test_a_changed_document_is_an_error(corpus):
  [example] = read_examples(corpus, [0])
  wrong = dataclasses.replace(example, targets=example.targets[::-1].copy())
  with pytest.raises(ValueError, match=r"00\.txt has changed"):
    token_bytes(corpus, wrong)


def test_the_whole_is_what_training_reports(config, corpus, model):
  """The loop's own number, from the sum of losses, on the same documents."""
  heldout = heldout_examples(corpus)
  assert len(heldout) > 3

  class Run:
    pass

  run = Run()
  run.model, run.config = model, config
  run.heldout, run.corpus = heldout, corpus
  reported = heldout_bits_per_byte(run)
  passed = []
  for budget in (1, 10**6):
    scored = score_documents(
      model,
      corpus,
      heldout,
      chunk_size=64,
      batch_tokens=budget,
      progress=passed.append,
    )
    found = bits_per_byte(scored, edges=[64])
    assert found.whole.bits_per_byte == pytest.approx(reported, rel=1e-5)
  assert sum(passed) == 2 * sum(map(len, heldout))
