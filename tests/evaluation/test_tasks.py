"""Samples: their lengths, their answers, and that they can be made again."""

import collections
import dataclasses
import re

import numpy as np
import pytest

from jaxchunk.data.corpus import open_corpus
from jaxchunk.data.tokenizers import JsonTokenizer, load_tokenizer
from jaxchunk.evaluation.scoring import score_cell
from jaxchunk.evaluation.tasks import (
  NEEDLE_TASKS,
  TASKS,
  Haystack,
  make_samples,
)
from jaxchunk.evaluation.text import encode_pairs

ASK_NEEDLE = re.compile(r"The special number of (\w+) is$")
ASK_VARIABLE = re.compile(r"The value of VAR (\w+) is$")


@pytest.fixture(scope="session", params=["byte", "bpe:400"])
def haystack(request, config):
  data = dataclasses.replace(config.data, tokenizer=request.param)
  return Haystack.of(open_corpus(data))


def samples_of(task, haystack, *, length=1500, count=3, depth=0.5, seed=0):
  return list(
    make_samples(
      task,
      length=length,
      count=count,
      tokenizer=haystack.corpus.tokenizer,
      haystack=haystack,
      depth=depth if task in NEEDLE_TASKS else None,
      seed=seed,
    )
  )


def solve(task, text):
  """The answer, from nothing but the prompt."""
  if task in NEEDLE_TASKS:
    key = ASK_NEEDLE.search(text)[1]
    [number] = re.findall(rf"The special number of {key} is (\d+)\.\n", text)
    return number
  if task == "variable_tracking":
    lines = text.splitlines()[:-1]
    known = {}
    for line in lines:
      if assigned := re.fullmatch(r"VAR (\w+) = (\w+)", line):
        name, source = assigned.groups()
        known[name] = known.get(source, source)
    return known[ASK_VARIABLE.search(text)[1]]
  [words] = re.findall(r"list\.\n\n(.*)\n\nThe most", text, re.DOTALL)
  (word, most), (_, second) = collections.Counter(words.split()).most_common(2)
  assert most > second
  return word


@pytest.mark.fast
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [900, 2400])
def test_samples_fill_their_length_and_never_exceed_it(task, length, haystack):
  tokenizer = haystack.corpus.tokenizer
  for depth in (0.0, 0.3, 1.0):
    for sample in samples_of(
      task, haystack, length=length, depth=depth, count=2
    ):
      assert length - 40 <= sample.tokens <= length
      assert sample.prompt[0] == tokenizer.bos_id
      for number, ids in enumerate(sample.candidates):
        whole = np.concatenate([sample.prompt[1:], ids])
        text = tokenizer.decode(whole)
        assert text.startswith(sample.text + " ")
        assert (text == f"{sample.text} {sample.answer}") == (number == 0)
        # As a document of training would be.
        np.testing.assert_array_equal(tokenizer.encode(text), whole)
      assert len({ids.tobytes() for ids in sample.candidates}) == len(
        sample.candidates
      )


@pytest.mark.fast
@pytest.mark.parametrize("task", TASKS)
def test_who_reads_the_prompt_scores_one(task, haystack):
  tokenizer = haystack.corpus.tokenizer

  def oracle(sample):
    answer = solve(task, sample.text)
    texts = [tokenizer.decode(ids).strip() for ids in sample.candidates]
    return np.asarray([float(t == answer) for t in texts]), f" {answer} and"

  cell = score_cell(samples_of(task, haystack, count=12), oracle)
  assert (cell.ranked_first, cell.exact_match) == (1, 1)
  assert (cell.task, cell.length, cell.samples) == (task, 1500, 12)


@pytest.mark.fast
@pytest.mark.parametrize("task", TASKS)
def test_who_guesses_scores_about_chance(task, config):
  haystack = Haystack.of(open_corpus(config.data))
  rng = np.random.default_rng(0)

  def guess(sample):
    return rng.random(len(sample.candidates)), "1234567"

  cell = score_cell(samples_of(task, haystack, length=900, count=200), guess)
  spread = np.sqrt(cell.chance * (1 - cell.chance) / 200)
  assert abs(cell.ranked_first - cell.chance) < 4 * spread
  assert cell.chance == (
    0.25 if task in ("multi_needle", "variable_tracking") else 0.125
  )
  assert cell.exact_match == 0


@pytest.mark.fast
@pytest.mark.parametrize("task", NEEDLE_TASKS)
def test_a_needle_lies_at_its_depth(task, haystack):
  for depth in (0.0, 0.25, 1.0):
    for sample in samples_of(task, haystack, length=3000, depth=depth):
      needle = sample.text.index(f"{sample.answer}.")
      assert abs(needle / len(sample.text) - depth) < 0.1
  first = samples_of(task, haystack, depth=0.0)[0].text.splitlines()
  assert len([line for line in first[:4] if "special number of" in line]) >= 1


@pytest.mark.fast
@pytest.mark.parametrize("task", TASKS)
def test_a_seed_makes_the_same_samples_again(task, haystack):
  def texts(**options):
    return [s.text for s in samples_of(task, haystack, **options)]

  once = texts()
  assert texts() == once
  assert texts(count=5)[:3] == once
  assert len(set(once)) == 3
  assert not set(texts(seed=1)) & set(once)


@pytest.mark.fast
def test_answers_are_not_in_the_haystack(config, tmp_path):
  """Of the numbers that a text has no other sample asks for one."""
  haystack = Haystack.of(open_corpus(config.data))
  for sample in samples_of("needle", haystack, count=20):
    assert sample.text.count(sample.answer) == 1


@pytest.mark.fast
def test_the_haystack_is_held_out_text(corpus):
  haystack = Haystack.of(corpus)
  kept = {n for n, reason in enumerate(corpus.reasons) if reason == -1}
  assert haystack.documents
  assert not kept & set(haystack.documents)
  rng = np.random.default_rng(0)
  text = haystack.read(100_000, rng)
  assert len(text) == 100_000  # The documents come again.


BAD = {
  "task": ({"task": "nedle"}, "'nedle' is not one of"),
  "no depth": ({"depth": None}, "depth=None for task 'needle'"),
  "depth": ({"depth": 1.5}, "depth=1.5 must be from 0"),
  "depth of a list": ({"task": "common_words"}, "the others take none"),
  "length": ({"length": 0}, "length=0 must be at least 1"),
  "count": ({"count": 0}, "count=0 must be at least 1"),
  "seed": ({"seed": -1}, "seed=-1 must not be negative"),
  "short": (
    {"length": 60},
    r"length=60 is too short for task 'needle'.* 1\d\d",
  ),
}


@pytest.mark.fast
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_named(case, corpus):
  change, message = BAD[case]
  given = {"task": "needle", "length": 900, "count": 1, "depth": 0.5, **change}
  with pytest.raises(ValueError, match=message):
    list(
      make_samples(
        tokenizer=corpus.tokenizer, haystack=Haystack.of(corpus), **given
      )
    )


@pytest.mark.fast
def test_a_pair_is_cut_where_the_continuation_begins(haystack):
  tokenizer = haystack.corpus.tokenizer
  for context, rest in (("the self of", " chunk"), ("", "the"), ("the", "")):
    [(ids, more)] = encode_pairs(tokenizer, context, [rest])
    assert tokenizer.decode(ids) == context
    assert tokenizer.decode(more) == rest


@pytest.mark.fast
def test_a_token_over_the_border_is_the_continuations():
  definition = load_tokenizer("bpe:259", _Texts()).definition
  joined = JsonTokenizer(
    definition.replace('"merges":[]', '"merges":[["a","b"]]').replace(
      '"vocab":{', '"vocab":{"ab":259,'
    )
  )
  assert joined.encode("ab").tolist() == [259]
  [(ids, rest)] = encode_pairs(joined, "xa", ["bc"])
  assert (joined.decode(ids), joined.decode(rest)) == ("x", "abc")


class _Texts:
  fingerprint = "texts"

  def __len__(self):
    return 1

  def __getitem__(self, index):
    return "ab"

  def name(self, index):
    return "text"
