"""Synthetic long-context tasks of any length, with known answers.

After RULER (Hsieh et al., arXiv 2404.06654): retrieval of one needle and of one
among several, variable tracking, and aggregation (common and frequent words).
All are texts to complete, so that a model needs no instructions. Unlike there
each sample has one answer, which is also ranked against others: a small model
can be better than chance long before it writes the answer out.
"""

import dataclasses
import zlib
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from jaxchunk.data.corpus import Corpus, heldout_examples
from jaxchunk.data.tokenizers import Ids, Tokenizer
from jaxchunk.evaluation.text import begin_ids, encode_pairs

NEEDLE_TASKS = ("needle", "multi_needle")
TASKS = (*NEEDLE_TASKS, "variable_tracking", "common_words", "frequent_words")

_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"
_MULTI_NEEDLES = 4
_DISTRACTORS = 7
_CHAINS, _HOPS = 4, 3
_COMMON, _RARE = 12, 3
_FREQUENT_WORDS = 24
# Text read for each token: no usual vocabulary has more of it on average.
_CHARACTERS = 16
# A sample is filled up to this many tokens below its length, if its units are
# as small as that.
_SLACK = 4
_PROBES = 32


@dataclasses.dataclass(frozen=True)
class Sample:
  """One prompt, its answer, and what the answer is ranked against.

  Attributes:
    task: One of `TASKS`.
    length: Most tokens of the prompt with any candidate.
    depth: Where the needle is, from 0 (begin) to 1 (end); `None` for tasks
      without.
    text: The prompt.
    answer: What completes it.
    prompt: Ids of the prompt, BOS first if the corpus's documents begin so.
    candidates: Ids of the answer, then of the others.
  """

  task: str
  length: int
  depth: float | None
  text: str
  answer: str
  prompt: Ids
  candidates: tuple[Ids, ...]

  @property
  def chance(self) -> float:
    """How often a model that knows nothing ranks the answer first."""
    return 1 / len(self.candidates)

  @property
  def tokens(self) -> int:
    """Tokens of the prompt with its longest candidate."""
    return len(self.prompt) + max(map(len, self.candidates))


@dataclasses.dataclass(frozen=True)
class Haystack:
  """Text to hide needles in, from a corpus.

  Attributes:
    corpus: Where it comes from.
    documents: Which of its documents; those held out, if there are any.
  """

  corpus: Corpus
  documents: tuple[int, ...]

  @classmethod
  def of(cls, corpus: Corpus) -> "Haystack":
    """The held-out documents, or all that have any text if none are."""
    chosen = [e.document_id for e in heldout_examples(corpus)]
    if not chosen:
      chosen = np.flatnonzero(corpus.index.byte_lengths > 0).tolist()
    return cls(corpus, tuple(chosen))

  def read(self, characters: int, rng: np.random.Generator) -> str:
    """Documents in random order; again from the first when they run out."""
    order = rng.permutation(len(self.documents))
    parts: list[str] = []
    missing = characters
    while missing > 0:
      before = missing
      for place in order:
        text = self.corpus.source[self.documents[place]]
        parts.append(text)
        missing -= len(text) + 1
        if missing <= 0:
          break
      if missing == before:
        raise ValueError("the documents for the haystack have no text")
    return "\n".join(parts)[:characters]


def make_samples(
  task: str,
  *,
  length: int,
  count: int,
  tokenizer: Tokenizer,
  haystack: Haystack,
  depth: float | None = None,
  seed: int = 0,
) -> Iterator[Sample]:
  """Samples of a task; equal arguments give equal samples.

  Args:
    task: One of `TASKS`.
    length: Most tokens of a prompt with its longest candidate.
    count: How many.
    tokenizer: The model's.
    haystack: Text around the needles.
    depth: Of the needle, 0 to 1; for `NEEDLE_TASKS` alone.
    seed: Another one gives other samples.

  Yields:
    Samples that fill `length` but for a few tokens (or one word of a list).

  Raises:
    ValueError: The task is unknown, a number is out of range, or the length
      has no room for the task.
  """
  if task not in TASKS:
    raise ValueError(f"task {task!r} is not one of {list(TASKS)}")
  if (task in NEEDLE_TASKS) != (depth is not None):
    raise ValueError(
      f"depth={depth} for task {task!r}: {list(NEEDLE_TASKS)} need a depth, "
      "0 to 1, and the others take none"
    )
  if depth is not None and not 0 <= depth <= 1:
    raise ValueError(f"depth={depth} must be from 0 (begin) to 1 (end)")
  for name, value in (("length", length), ("count", count)):
    if value < 1:
      raise ValueError(f"{name}={value} must be at least 1")
  if seed < 0:
    raise ValueError(f"seed={seed} must not be negative")
  bos = haystack.corpus.config.bos
  place = [] if depth is None else [round(1e6 * depth)]
  for number in range(count):
    key = [seed, zlib.crc32(task.encode()), length, number, *place]
    rng = np.random.default_rng(key)
    if task in _HIDDEN:
      text = haystack.read(_CHARACTERS * length, rng)
      draft = _HIDDEN[task](rng, text, depth or 0.0)
    else:
      draft = _LISTS[task](rng, length)
    yield _fill(draft, task, length, depth, tokenizer, bos)


@dataclasses.dataclass(frozen=True)
class _Draft:
  """A sample whose length is still open.

  Attributes:
    render: The prompt with so many units of filling.
    units: Most units there are.
    answer: What completes it.
    others: What does not, ranked with it.
  """

  render: Callable[[int], str]
  units: int
  answer: str
  others: Sequence[str]


def _fill(
  draft: _Draft,
  task: str,
  length: int,
  depth: float | None,
  tokenizer: Tokenizer,
  bos: bool,
) -> Sample:
  """The sample with as much filling as fits; never more than `length`."""

  def sample(units: int) -> Sample:
    text = draft.render(units)
    prompt, *rest = _encode(tokenizer, text, [draft.answer, *draft.others], bos)
    return Sample(task, length, depth, text, draft.answer, prompt, tuple(rest))

  empty = sample(0)
  if empty.tokens > length:
    raise ValueError(
      f"length={length} is too short for task {task!r}: with this tokenizer "
      f"it takes {empty.tokens} tokens even without filling"
    )
  longest = max([draft.answer, *draft.others], key=lambda a: len(a.encode()))
  base = len(tokenizer.encode(f"{empty.text} {longest}"))

  def count(units: int) -> int:
    whole = tokenizer.encode(f"{draft.render(units)} {longest}")
    return empty.tokens + len(whole) - base

  units = _most_units(count, draft.units, empty.tokens, length)
  best = sample(units)
  # Rarely: where the texts meet, another candidate takes a token more.
  while best.tokens > length:
    units = max(units - (best.tokens - length), 0)
    best = sample(units)
  return best


def _most_units(
  count: Callable[[int], int], most: int, tokens: int, length: int
) -> int:
  """How many units fit, by secants within a bracket.

  Args:
    count: Tokens with so many units.
    most: Units.
    tokens: With none.
    length: Most tokens.
  """
  low, high, rate = 0, most + 1, 1.0
  for _ in range(_PROBES):
    if length - tokens <= _SLACK or high - low <= 1:
      break
    # Tokens grow almost evenly with units.
    step = round((length - tokens) / rate) if rate > 0 else high
    units = min(max(low + step, low + 1), high - 1)
    found = count(units)
    rate = (found - tokens) / (units - low)
    if found <= length:
      low, tokens = units, found
    else:
      high = units
  return low


def _encode(
  tokenizer: Tokenizer, text: str, answers: Sequence[str], bos: bool
) -> list[Ids]:
  """Ids of the prompt and of each answer behind it."""
  pairs = encode_pairs(tokenizer, text, [f" {answer}" for answer in answers])
  if len({prompt.tobytes() for prompt, _ in pairs}) > 1:
    # A token joins text and answer: cut before it, in all of them.
    shared = min(len(prompt) for prompt, _ in pairs)
    pairs = [
      (p[:shared], np.concatenate([p[shared:], rest])) for p, rest in pairs
    ]
  prompt = np.concatenate([begin_ids(tokenizer, bos), pairs[0][0]])
  return [prompt, *(rest for _, rest in pairs)]


def _needle(
  rng: np.random.Generator, text: str, depth: float, *, needles: int = 1
) -> _Draft:
  """One needle is asked for, at the depth; others lie anywhere."""
  keys = _words(rng, needles, syllables=4)
  # Without other needles the answer is ranked against numbers of nowhere.
  count = needles if needles > 1 else 1 + _DISTRACTORS
  values = _numbers(rng, count, text)
  lines = [
    f"The special number of {key} is {value}."
    for key, value in zip(keys, values[:needles], strict=True)
  ]
  depths = [depth, *rng.random(needles - 1)]
  head = "Remember the special numbers in this text.\n\n"
  tail = f"\n\nThe special number of {keys[0]} is"
  return _hidden(text, lines, depths, head, tail, values)


def _multi_needle(rng: np.random.Generator, text: str, depth: float) -> _Draft:
  """Several needles, whose values are ranked against each other."""
  return _needle(rng, text, depth, needles=_MULTI_NEEDLES)


def _variable_tracking(
  rng: np.random.Generator, text: str, depth: float
) -> _Draft:
  """Chains of assignments; the value that one chain's end has come to.

  (RULER asks for all names of a chain, where this asks for their value.)
  """
  del depth
  names = [w.upper() for w in _words(rng, _CHAINS * (_HOPS + 1), syllables=2)]
  values = _numbers(rng, _CHAINS, text)
  chains = [names[c::_CHAINS] for c in range(_CHAINS)]
  lines: list[str] = []
  depths: list[float] = []
  for chain, value in zip(chains, values, strict=True):
    assigned = [value, *chain[:-1]]
    lines += [
      f"VAR {name} = {source}"
      for name, source in zip(chain, assigned, strict=True)
    ]
    # In order, or a variable would be read before it is set.
    depths += np.sort(rng.random(len(chain))).tolist()
  head = "Keep track of the variables in this text.\n\n"
  tail = f"\n\nThe value of VAR {chains[0][-1]} is"
  return _hidden(text, lines, depths, head, tail, values)


def _hidden(
  text: str,
  lines: Sequence[str],
  depths: Sequence[float],
  head: str,
  tail: str,
  values: Sequence[str],
) -> _Draft:
  """Lines between the lines of a text, each at its depth; units: characters."""
  order = np.argsort(depths, kind="stable")

  def render(units: int) -> str:
    filling = text[:units]
    parts, start = [head], 0
    for place in order:
      stop = _line_end(filling, depths[place] * units, start)
      before = filling[start:stop]
      end = "" if not before or before.endswith("\n") else "\n"
      parts += [before, end, lines[place], "\n"]
      start = stop
    return "".join([*parts, filling[start:], tail])

  answer, *others = values
  return _Draft(render, len(text), answer, others)


def _line_end(text: str, near: float, least: int) -> int:
  """The end of the line that is nearest to a place; or the place itself.

  The ends are those of the text, so depth 0 is before all and 1 behind all of
  it, and a text without lines is cut in words' middle rather than not at all.
  """
  place = max(round(near), least)
  if place >= len(text):
    return len(text)
  before, after = text.rfind("\n", least, place), text.find("\n", place)
  ends = [end + 1 for end in (before, after) if end >= 0]
  if place == least:
    return least
  return min(ends, key=lambda end: abs(end - place), default=place)


def _common_words(rng: np.random.Generator, length: int) -> _Draft:
  """A list of words of which one is there more often; longer: more words."""
  rare = 1 + _DISTRACTORS + length // _RARE
  common, *words = _words(rng, 1 + rare, syllables=3)
  order = rng.permutation(_COMMON + _RARE * rare)

  def render(units: int) -> str:
    entries = [common] * _COMMON
    entries += [w for w in words[: _DISTRACTORS + units] for _ in range(_RARE)]
    return _list_of([entries[n] for n in order if n < len(entries)], "common")

  return _Draft(render, rare - _DISTRACTORS, common, words[:_DISTRACTORS])


def _frequent_words(rng: np.random.Generator, length: int) -> _Draft:
  """Draws from a few words, the first most often; longer: more draws."""
  words = _words(rng, _FREQUENT_WORDS, syllables=3)
  # Zipf's law with exponent 2, as in RULER: the first has 62%.
  shares = 1 / np.arange(1, _FREQUENT_WORDS + 1) ** 2
  draws = rng.choice(_FREQUENT_WORDS, size=length, p=shares / shares.sum())
  # All candidates occur, and the first word leads from the beginning.
  start = rng.permutation([0] * 6 + list(range(1 + _DISTRACTORS)))
  drawn = np.concatenate([start, draws])
  counts = np.cumsum(drawn[:, None] == np.arange(_FREQUENT_WORDS), axis=0)
  leads = counts[:, 0] > counts[:, 1:].max(1)

  def render(units: int) -> str:
    while not leads[len(start) + units - 1]:
      units -= 1
    entries = [words[n] for n in drawn[: len(start) + units]]
    return _list_of(entries, "frequent")

  return _Draft(render, len(draws), words[0], words[1 : 1 + _DISTRACTORS])


def _list_of(words: Sequence[str], kind: str) -> str:
  return (
    f"Count the words in this list.\n\n{' '.join(words)}\n\n"
    f"The most {kind} word in the list is"
  )


def _words(
  rng: np.random.Generator, count: int, *, syllables: int
) -> list[str]:
  """Different words that no language has, of so many syllables."""
  base = len(_CONSONANTS) * len(_VOWELS)
  if count > base**syllables // 2:
    syllables += 1
  words: dict[str, None] = {}
  while len(words) < count:
    numbers = rng.integers(0, base, (count, syllables))
    for row in numbers:
      parts = [
        _CONSONANTS[n // len(_VOWELS)] + _VOWELS[n % len(_VOWELS)] for n in row
      ]
      words["".join(parts)] = None
  return list(words)[:count]


def _numbers(rng: np.random.Generator, count: int, text: str) -> list[str]:
  """Different numbers of seven digits that are not in the text."""
  numbers: dict[str, None] = {}
  while len(numbers) < count:
    number = str(rng.integers(1_000_000, 10_000_000))
    if number not in text:
      numbers[number] = None
  return list(numbers)


_HIDDEN: dict[str, Callable[[np.random.Generator, str, float], _Draft]] = {
  "needle": _needle,
  "multi_needle": _multi_needle,
  "variable_tracking": _variable_tracking,
}
_LISTS: dict[str, Callable[[np.random.Generator, int], _Draft]] = {
  "common_words": _common_words,
  "frequent_words": _frequent_words,
}
