"""Histograms of lengths, and batches from them."""

import json

import pytest

from jaxchunk.planner.lengths import lengths_of, read_lengths

pytestmark = pytest.mark.fast
COUNTS = ((2000, 500), (8000, 100), (131072, 1))


def test_a_histogram_in_a_flag():
  lengths = read_lengths("8000:100,2000:500,131072:1")
  assert lengths.counts == COUNTS
  assert lengths.longest == 131072
  assert lengths.sequences == 601
  assert lengths.tokens == 2000 * 500 + 8000 * 100 + 131072
  # The same length twice is added up, and one alone is once.
  assert read_lengths("5:2,5:3,7").counts == ((5, 5), (7, 1))


@pytest.mark.parametrize(
  ("name", "text"),
  [
    ("a.json", json.dumps([3, 5, 3])),
    ("b.json", json.dumps({"5": 1, "3": 2})),
    ("c.csv", "tokens,sequences\n3,2\n5,1\n"),
    ("d.csv", "3\n5\n\n3\n"),
  ],
)
def test_files(tmp_path, name, text):
  path = tmp_path / name
  path.write_text(text)
  assert read_lengths(str(path)).counts == ((3, 2), (5, 1))


@pytest.mark.parametrize("text", ["", "nowhere.csv", "0:3", "5:-1", "5:1:2"])
def test_what_cannot_be_read_says_how_to_write_it(text):
  with pytest.raises(ValueError, match=r"lengths=.*2000:500,131072:1"):
    read_lengths(text)


def test_batches_hold_every_sequence_once_within_the_budget():
  lengths = lengths_of([10] * 50 + [40] * 5 + [200])
  batches = lengths.batches(100, most=1000)
  assert batches == lengths.batches(100, most=1000)
  for batch in batches:
    # Only a sequence that is longer than that is over it.
    assert sum(batch) <= 100 or len(batch) == 1
  taken = sorted(n for batch in batches for n in batch)
  everything = sorted([10] * 50 + [40] * 5 + [200])
  # A last batch that is not half full is left out.
  assert len(everything) - len(taken) <= 5
  assert set(taken) == {10, 40, 200}
  assert len(lengths.batches(100, most=3)) == 3


def test_very_many_sequences_are_drawn():
  batches = lengths_of({100: 10**9, 50: 10**9}).batches(10_000, most=8)
  assert len(batches) == 8
  share = sum(b.count(50) for b in batches) / sum(map(len, batches))
  assert 0.4 < share < 0.6
