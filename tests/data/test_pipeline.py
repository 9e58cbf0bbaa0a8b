import dataclasses
import json
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxchunk.data.accounting import KEPT, Accounting
from jaxchunk.data.config import DataConfig, validate
from jaxchunk.data.corpus import describe, heldout_examples, open_corpus
from jaxchunk.data.pipeline import BatchIterator, training_batches
from jaxchunk.data.tokenizers import load_tokenizer


@pytest.fixture
def corpus(config):
  return open_corpus(config)


def _same(first, second):
  """Whether two lists of batches agree in every token and count."""
  assert len(first) == len(second)
  for a, b in zip(first, second, strict=True):
    assert (a.epoch, a.last_of_epoch) == (b.epoch, b.last_of_epoch)
    assert (a.accounting, a.epoch_accounting, a.total) == (
      b.accounting,
      b.epoch_accounting,
      b.total,
    )
    for x, y in zip(a.examples, b.examples, strict=True):
      assert x.document_id == y.document_id
      np.testing.assert_array_equal(x.tokens, y.tokens)
      np.testing.assert_array_equal(x.targets, y.targets)
      np.testing.assert_array_equal(x.weights, y.weights)


@pytest.mark.fast
def test_examples_are_the_shifted_tokens_of_their_document(corpus):
  batch = next(iter(BatchIterator(corpus)))
  for example in batch.examples:
    raw = corpus.source[example.document_id].encode()
    assert example.tokens.tolist() == [257, *raw]
    assert example.targets.tolist() == [*raw, 258]
    assert example.weights.tolist() == [1.0] * len(example)
    assert example.tokens.dtype == example.targets.dtype == np.int32
    assert example.weights.dtype == np.float32


def test_epochs_cover_the_corpus_in_new_orders(corpus):
  batches = list(BatchIterator(corpus))
  kept = np.flatnonzero(corpus.reasons == KEPT).tolist()
  orders = [
    [e.document_id for b in batches if b.epoch == epoch for e in b.examples]
    for epoch in range(3)
  ]
  assert [sorted(order) for order in orders] == [kept] * 3
  assert orders[0] != orders[1] != orders[2]
  assert sum(b.last_of_epoch for b in batches) == 3


def test_budget_holds_and_the_long_document_goes_alone(corpus):
  batches = list(BatchIterator(corpus))
  longest = int(np.argmax(corpus.index.lengths))
  assert corpus.reasons[longest] == KEPT
  seen = 0
  for batch in batches:
    positions = sum(map(len, batch.examples))
    if any(e.document_id == longest for e in batch.examples):
      seen += 1
      assert len(batch.examples) == 1
      assert positions == corpus.index.lengths[longest] - 1 > 500
    else:
      assert positions <= 500 or len(batch.examples) == 1
  assert seen == 3


def test_accounting_counts_every_token_of_every_epoch(corpus):
  batches = list(training_batches(corpus))
  for batch in batches:
    weights = sum(int((e.weights > 0).sum()) for e in batch.examples)
    assert batch.accounting.check().trained == weights
    assert batch.accounting.masked == len(batch.examples)
  everything = int(corpus.index.lengths.sum())
  for batch in batches:
    if batch.last_of_epoch:
      assert batch.epoch_accounting.read == everything
      assert batch.epoch_accounting.documents == len(corpus.source)
  total = sum((b.accounting for b in batches), Accounting())
  assert total == batches[-1].total
  assert total.read == 3 * everything
  assert total.excluded_documents["empty"] == 3 * 2
  assert str(total.read // 1000) in str(total)


@pytest.mark.fast
@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_resume_is_exact_wherever_it_was_stopped(config, prefetch):
  config.prefetch = prefetch
  corpus = open_corpus(config)
  reference = list(BatchIterator(corpus))
  assert len(reference) > 12
  running = training_batches(corpus)
  states = [running.get_state()]
  delivered = []
  for batch in running:
    delivered.append(batch)
    states.append(json.loads(json.dumps(running.get_state())))
  _same(delivered, reference)
  assert max(len(json.dumps(state)) for state in states) < 1024
  running.close()
  fresh = training_batches(corpus)
  for stop in (0, 1, 5, len(reference) - 1, len(reference)):
    fresh.set_state(states[stop])
    _same(list(fresh), reference[stop:])
  fresh.close()


def test_state_is_what_was_delivered_not_what_was_read_ahead(config):
  config.prefetch = 8
  corpus = open_corpus(config)
  running = training_batches(corpus)
  plain = BatchIterator(corpus)
  assert running.get_state() == plain.get_state()
  for _ in range(3):
    next(running)
    next(plain)
    time.sleep(0.05)
    assert running.get_state() == plain.get_state()
  running.close()


@settings(
  max_examples=15,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(stop=st.integers(0, 10), budget=st.integers(1, 3000))
def test_budget_may_change_at_a_cursor(corpus, stop, budget):
  before = BatchIterator(corpus)
  head = [next(before).examples for _ in range(stop)]
  config = dataclasses.replace(corpus.config, batch_tokens=budget)
  after = BatchIterator(dataclasses.replace(corpus, config=config))
  after.set_state(before.get_state())
  tail = list(after)
  ids = [e.document_id for part in head for e in part]
  ids += [e.document_id for batch in tail for e in batch.examples]
  whole = [e.document_id for b in BatchIterator(corpus) for e in b.examples]
  assert ids == whole
  assert tail[-1].total.read == 3 * corpus.index.lengths.sum()


def test_determinism_across_caches_and_processes(config, tmp_path):
  code = """
import sys, json
from jaxchunk.data.config import DataConfig
from jaxchunk.data.corpus import open_corpus
from jaxchunk.data.pipeline import BatchIterator
config = DataConfig(**json.loads(sys.argv[1]))
batches = BatchIterator(open_corpus(config))
print(json.dumps([[e.document_id, e.tokens.tolist()]
                  for b in batches for e in b.examples]))
"""
  config.tokenizer = "bpe:320"
  here = [
    [e.document_id, e.tokens.tolist()]
    for batch in BatchIterator(open_corpus(config))
    for e in batch.examples
  ]
  config.cache_dir = str(tmp_path / "another cache")
  arguments = json.dumps(dataclasses.asdict(config))
  there = subprocess.run(
    [sys.executable, "-c", code, arguments],
    check=True,
    capture_output=True,
    text=True,
  )
  assert json.loads(there.stdout) == here


def test_iterator_left_open_makes_no_noise_at_exit(config):
  code = """
import sys, json
from jaxchunk.data.config import DataConfig
from jaxchunk.data.corpus import open_corpus
from jaxchunk.data.pipeline import training_batches
batches = training_batches(open_corpus(DataConfig(**json.loads(sys.argv[1]))))
next(batches)
"""
  arguments = json.dumps(dataclasses.asdict(config))
  done = subprocess.run(
    [sys.executable, "-c", code, arguments], capture_output=True, text=True
  )
  assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("seed", 4),
    ("bos", False),
    ("heldout_fraction", 0.2),
    ("tokenizer", "bpe:300"),
  ],
)
def test_cursor_of_other_data_is_refused(config, corpus, field, value):
  state = BatchIterator(corpus).get_state()
  other = open_corpus(dataclasses.replace(config, **{field: value}))
  with pytest.raises(ValueError, match=f"belongs to other data: .*{field} was"):
    training_batches(other).set_state(state)


def test_damaged_cursor_is_refused(corpus):
  batches = BatchIterator(corpus)
  with pytest.raises(ValueError, match="version None"):
    batches.set_state({})
  with pytest.raises(ValueError, match="place 99 of 40 documents"):
    batches.set_state({**batches.get_state(), "place": 99})


def test_exclusions_are_counted_by_reason_and_never_truncated(config):
  config.bos = config.eos = False
  config.heldout_fraction = 0.0
  config.max_document_tokens = 300
  config.num_epochs = 1
  corpus = open_corpus(config)
  batches = list(BatchIterator(corpus))
  total = batches[-1].epoch_accounting
  lengths = corpus.index.lengths
  assert total.excluded_documents == {
    "empty": 2,
    "too_short": 1,
    "too_long": int((lengths > 300).sum()),
  }
  assert total.excluded["too_long"] == lengths[lengths > 300].sum() > 0
  delivered = [len(e) + 1 for b in batches for e in b.examples]
  assert sorted(delivered) == sorted(
    n for n in lengths.tolist() if 2 <= n <= 300
  )


def test_heldout_is_disjoint_stable_and_complete(config, corpus):
  held = heldout_examples(corpus)
  assert held
  ids = {e.document_id for e in held}
  trained = {e.document_id for b in BatchIterator(corpus) for e in b.examples}
  assert not ids & trained
  # The seed of the shuffle and the tokenizer leave the split alone.
  other = dataclasses.replace(config, seed=9, tokenizer="bpe:300")
  assert {e.document_id for e in heldout_examples(open_corpus(other))} == ids
  few = heldout_examples(corpus, max_tokens=len(held[0]))
  assert [e.document_id for e in few] == [held[0].document_id]


def test_equal_documents_fall_on_the_same_side(text_folder, config):
  for i in range(20):
    (text_folder / f"copy{i}.txt").write_text(f"twin {i // 2}")
  config.heldout_fraction = 0.5
  reasons = open_corpus(config).reasons[-20:].reshape(10, 2)
  assert (reasons[:, 0] == reasons[:, 1]).all()
  assert len(set(reasons[:, 0].tolist())) == 2


def test_run_resumes_with_the_tokenizer_it_saved(config, tmp_path):
  config.tokenizer = "bpe:320"
  first = open_corpus(config)
  first.tokenizer.save(tmp_path / "run")
  state = BatchIterator(first).get_state()
  config.cache_dir = str(tmp_path / "empty cache")
  saved = load_tokenizer(str(tmp_path / "run"))
  again = open_corpus(config, tokenizer=saved)
  BatchIterator(again).set_state(state)


def test_bad_document_names_itself_while_opening(config, text_folder):
  (text_folder / "bad.txt").write_bytes(b"ok \xff")
  with pytest.raises(ValueError, match=r"bad.txt is not valid UTF-8.*replace"):
    open_corpus(config)
  config.errors = "replace"
  assert len(open_corpus(config).source) == 41


def test_failure_while_reading_reaches_the_training_loop(config, text_folder):
  config.cache_tokens = False
  corpus = open_corpus(config)
  (text_folder / "01.txt").unlink()
  batches = training_batches(corpus)
  with pytest.raises(FileNotFoundError, match=r"01.txt has gone"):
    list(batches)
  batches.close()


def test_nothing_to_train_on(config):
  config.max_document_tokens = 2
  with pytest.raises(ValueError, match=r"leaves nothing to train on.*too_long"):
    open_corpus(config)


def test_unwritable_cache_says_what_to_set(config, tmp_path):
  (tmp_path / "file").write_text("")
  config.cache_dir = str(tmp_path / "file")
  with pytest.raises(ValueError, match="cannot write to the cache folder"):
    open_corpus(config)


def test_empty_heldout_set_is_a_warning(config, caplog):
  config.heldout_fraction = 1e-9
  open_corpus(config)
  assert "holds out none" in caplog.text


def test_describe(corpus):
  text = describe(corpus)
  assert "40 documents" in text
  assert f"longest {corpus.index.lengths.max():,}" in text


def test_forever_is_forever(config):
  config.num_epochs = None
  batches = BatchIterator(open_corpus(config))
  assert next(b for b in batches if b.epoch == 5)


@pytest.mark.fast
@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("batch_tokens", 0),
    ("max_document_tokens", 1),
    ("heldout_fraction", 1.0),
    ("heldout_fraction", -0.1),
    ("heldout_fraction", float("nan")),
    ("num_epochs", 0),
    ("prefetch", -1),
    ("seed", -1),
    ("errors", "ignore"),
  ],
)
def test_bad_config_names_the_field_and_value(field, value):
  with pytest.raises(ValueError, match=f"data.{field} is {value!r}"):
    validate(DataConfig(**{field: value}))


def test_flags_override_the_config():
  from absl import flags
  from ml_collections import config_flags

  arguments = ["prog", "--data.max_document_tokens=24576", "--nodata.bos"]
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_dataclass(
    "data", DataConfig(), flag_values=values, sys_argv=arguments
  )
  values(arguments)
  assert holder.value.max_document_tokens == 24576
  assert not holder.value.bos
