"""What `benchmarks/chat_tail.py` draws and concludes; nothing is run here."""

import pathlib
import sys

import numpy as np
import pytest

import jaxchunk as jc

sys.path.insert(0, str(pathlib.Path(jc.__file__).parents[1] / "benchmarks"))

import chat_tail_data
import chat_tail_table
import peers_table


def _draw(seed=0, **changes):
  sizes = dict(steps=5, conversations=64, bound=512, longest=8192) | changes
  return chat_tail_data.draw_lengths(np.random.default_rng(seed), **sizes)


def test_lengths_are_as_said():
  steps = _draw()
  lengths = np.concatenate(steps)
  assert [len(step) for step in steps] == [64] * 5
  tail = lengths[lengths >= 512]
  # 1% of 320; by even steps of the logarithm.
  assert sorted(tail) == [1290, 3251, 8192]
  assert lengths.min() >= 1
  # The body's median is the bound over exp(2.33), its mean about 0.16 of it.
  assert np.median(lengths) == pytest.approx(50, rel=0.15)
  assert lengths[lengths < 512].mean() == pytest.approx(80, rel=0.15)


def test_lengths_follow_the_seed():
  assert _draw(3) == _draw(3)
  assert _draw(3) != _draw(4)


def test_the_tail_is_dealt_from_the_last_step_on():
  steps = _draw(steps=5)
  assert [sum(n >= 512 for n in step) for step in steps] == [0, 0, 1, 1, 1]


def test_a_tail_has_at_least_one_conversation():
  steps = _draw(steps=2, conversations=4)
  assert max(map(max, steps)) == 8192


def test_a_bound_above_the_longest_is_named():
  with pytest.raises(ValueError, match=r"bound=512 .* longest=512"):
    _draw(longest=512)


def test_documents_have_a_token_more_than_targets():
  text = np.arange(10)
  steps = [[3, 12], [1]]
  rng = np.random.default_rng(0)
  documents = chat_tail_data.cut_documents(rng, text, steps)
  assert [[len(d) for d in step] for step in documents] == [[4, 13], [2]]
  long = documents[0][1]
  np.testing.assert_array_equal(np.diff(long) % 10, 1)


def test_rows_are_cut_between_documents_until_steps_have_as_many():
  steps = [[[9], [4, 3, 2]], [[1, 1, 1, 1]], [[5], [6], [7]]]
  parts = chat_tail_data.even_rows(steps)
  assert [sum(map(len, rows)) for rows in parts] == [3, 3, 3]
  for rows, cut in zip(steps, parts, strict=True):
    assert [[n for part in row for n in part] for row in cut] == rows
  # Rows with the most documents are cut, in the middle.
  assert parts[0] == [[[9]], [[4], [3, 2]]]


def test_too_few_documents_for_rows_are_named():
  with pytest.raises(ValueError, match="1 documents cannot be 2 rows"):
    chat_tail_data.even_rows([[[5]], [[5], [5]]])


def test_padding_is_to_the_longest_of_a_batch():
  assert chat_tail_data.padded_tokens([1, 5, 2, 3, 7], 2) == 10 + 6 + 7


def test_useful_tokens_by_way():
  figures = chat_tail_table.useful([[1, 7, 1, 7]], [4], 8, 2)
  assert figures["jaxchunk"] == pytest.approx(50)
  assert figures["padded"] == pytest.approx(100 * 16 / 28)
  assert figures["padded by length"] == pytest.approx(100)


def test_all_steps_but_the_first_count_together():
  result = {"seconds": [9.0, 1.0, 3.0]}
  assert peers_table.rate_of_steps(result, [7, 100, 300]) == 100


def test_ratios_and_goals():
  speed = {
    "jaxchunk, a": {"tokens_per_sec": 90.0},
    "TRL SFTTrainer, rows": {"tokens_per_sec": 60.0},
  }
  longest = {
    "jaxchunk, a": {"fits": 4096, "line": 8000.0, "slope": 10.0},
    "TRL SFTTrainer, rows": {"fits": 512, "line": 1000.0, "slope": 45.0},
  }
  over = chat_tail_table.compare(speed, longest)
  assert over["tokens_per_sec"] == pytest.approx(1.5)
  assert over["longest_by_line"] == pytest.approx(8)
  assert over["longest_by_slopes"] == pytest.approx(4.5)
  # Bytes that do not grow say nothing.
  flat = longest | {"jaxchunk, a": {"fits": 4096, "slope": -1.0}}
  assert "longest_by_slopes" not in chat_tail_table.compare(speed, flat)
  targets = {"tokens_per_sec": 2.0, "longest_by_line": 8.0}
  met = chat_tail_table.verdicts((1e-5, "x"), over, 1e-4, targets)
  assert met == {
    "losses": True,
    "tokens_per_sec": False,
    "longest_by_line": True,
  }
  none = dict.fromkeys(met)
  assert chat_tail_table.verdicts(None, {}, 1e-4, targets) == none


def test_what_was_only_compiled_counts_as_compiled():
  rows = {"a": {"compiled": {"fits": 8}}, "b": {"fits": 4, "compiled": {}}}
  longest = chat_tail_table.by_compiler(rows)
  assert longest["a"]["fits"] == 8
  assert longest["b"]["fits"] == 4


def test_the_table_lists_what_did_not_run_with_the_reason():
  speed = {"a": {"tokens_per_sec": 123.0, "threads": 2, "policy": "active"}}
  text = chat_tail_table.table(["a", "b"], speed, {}, {"b": "no module"})
  lines = text.splitlines()
  assert "123" in lines[1]
  assert "2 active" in lines[1]
  assert lines[2].endswith("not measured: no module")
