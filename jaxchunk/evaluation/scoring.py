"""Scores a model on samples: the answer's rank, and what it writes itself."""

import dataclasses
import re
from collections.abc import Callable, Iterable
from typing import Protocol

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxchunk.chunking.executor import data_sharding
from jaxchunk.data.tokenizers import Ids, Tokenizer
from jaxchunk.evaluation.tasks import Sample
from jaxchunk.inference.generate import (
  Cache,
  cache_capacity,
  decode,
  decode_step,
  prefill,
)
from jaxchunk.models.transformer import Transformer

_EXTRA_TOKENS = 2


class Scorer(Protocol):
  """What samples are put to: a model, or one that is made up in a test."""

  def __call__(self, sample: Sample) -> tuple[np.ndarray, str]:
    """Log-likelihood of each candidate, and the text that it goes on with."""
    ...


@dataclasses.dataclass(frozen=True)
class Outcome:
  """What came of one sample.

  Attributes:
    ranked_first: Whether no other candidate was as likely as the answer.
    exact: Whether the greedy text began with the answer.
    logprob: Of the answer, in nats.
    tokens: Of the prompt with its longest candidate.
  """

  ranked_first: bool
  exact: bool
  logprob: float
  tokens: int


def model_scorer(
  model: Transformer, tokenizer: Tokenizer, *, chunk_size: int
) -> Scorer:
  """Scores by one prefill of the prompt, by chunks.

  Every candidate, and the greedy text last, goes on from the same cache,
  which is wound back to the prompt's length in between.

  Args:
    model: The model.
    tokenizer: Its tokenizer.
    chunk_size: C.
  """

  def score(sample: Sample) -> tuple[np.ndarray, str]:
    longest = max(map(len, sample.candidates)) + _EXTRA_TOKENS
    size = len(sample.prompt)
    cache, first = prefill(
      model,
      sample.prompt[None],
      capacity=cache_capacity(size, longest, chunk_size),
      chunk_size=chunk_size,
    )
    sums = []
    for candidate in sample.candidates:
      cache, logprob = _continuation(model, cache, first, candidate)
      # What lies behind the length has no meaning, so this winds back.
      cache = Cache(cache.states, _place(model, size))
      sums.append(logprob)
    written = decode(
      model,
      cache,
      first,
      max_new_tokens=len(sample.candidates[0]) + _EXTRA_TOKENS,
      eos_id=tokenizer.eos_id,
    )
    text = tokenizer.decode(list(written))
    return np.asarray(jax.device_get(sums), np.float64), text

  return score


def _continuation(
  model: Transformer, cache: Cache, logits: Float[Array, "1 V"], ids: Ids
) -> tuple[Cache, Float[Array, ""]]:
  """Log-likelihood of tokens behind a cache; nothing waits for the device."""
  total = _place(model, 0.0)
  for number, token in enumerate(ids):
    where = _place(model, np.asarray([token], np.int32))
    total = _add_logprob(total, logits, where)
    if number + 1 < len(ids):
      cache, logits = decode_step(model, cache, where)
  return cache, total


@jax.jit
def _add_logprob(
  total: Float[Array, ""], logits: Float[Array, "1 V"], token: Int[Array, " 1"]
) -> Float[Array, ""]:
  return total + jax.nn.log_softmax(logits[0])[token[0]]


def _place(model: Transformer, value: float | int | np.ndarray) -> Array:
  kind = np.float32 if isinstance(value, float) else np.int32
  return jax.device_put(np.asarray(value, kind), data_sharding(model))


def outcome(sample: Sample, logprobs: np.ndarray, text: str) -> Outcome:
  """Judges what a scorer gave.

  Args:
    sample: What it was given.
    logprobs: Of each candidate, the answer's first.
    text: What it went on with.

  Raises:
    ValueError: A log-likelihood is not finite, or there are not as many as
      candidates.
  """
  if len(logprobs) != len(sample.candidates):
    raise ValueError(
      f"{len(logprobs)} log-likelihoods for {len(sample.candidates)} candidates"
    )
  if not np.isfinite(logprobs).all():
    raise ValueError(
      f"the model gives log-likelihoods {logprobs.tolist()} on a sample of "
      f"task {sample.task!r}, length {sample.length}: it has diverged"
    )
  return Outcome(
    # A tie is no success: a constant model must not score 1.
    ranked_first=bool(logprobs[0] > max(logprobs[1:], default=-np.inf)),
    exact=begins_with(text, sample.answer),
    logprob=float(logprobs[0]),
    tokens=sample.tokens,
  )


def begins_with(text: str, answer: str) -> bool:
  """Whether a text, but for leading space, begins with this whole word."""
  return re.match(rf"\s*{re.escape(answer)}(?!\w)", text) is not None


@dataclasses.dataclass(frozen=True)
class Cell:
  """Results of the samples of one task, length and depth.

  Attributes:
    task: One of `tasks.TASKS`.
    length: Most tokens of a sample.
    depth: Of the needle; `None` for tasks without.
    samples: How many.
    tokens: Of the prompts with their longest candidate, on average.
    ranked_first: Share of samples whose answer was likelier than all others.
    exact_match: Share of samples whose greedy text began with the answer.
    chance: What `ranked_first` would be by chance.
    logprob: Mean log-likelihood of the answer, in nats.
    extrapolated: Whether the length is beyond what the model was trained on.
  """

  task: str
  length: int
  depth: float | None
  samples: int
  tokens: float
  ranked_first: float
  exact_match: float
  chance: float
  logprob: float
  extrapolated: bool = False


def score_cell(
  samples: Iterable[Sample],
  scorer: Scorer,
  *,
  extrapolated: bool = False,
  progress: Callable[[int], object] = lambda tokens: None,
) -> Cell:
  """Scores samples of one task, length and depth.

  Args:
    samples: At least one.
    scorer: The model.
    extrapolated: Goes into the cell.
    progress: Called with the tokens of each sample when it is done.

  Raises:
    ValueError: There are no samples.
  """
  done: list[Outcome] = []
  sample = None
  for sample in samples:
    done.append(outcome(sample, *scorer(sample)))
    progress(done[-1].tokens)
  if sample is None:
    raise ValueError("there are no samples to score")

  def mean(name: str) -> float:
    return float(np.mean([getattr(o, name) for o in done]))

  return Cell(
    task=sample.task,
    length=sample.length,
    depth=sample.depth,
    samples=len(done),
    tokens=mean("tokens"),
    ranked_first=mean("ranked_first"),
    exact_match=mean("exact"),
    chance=sample.chance,
    logprob=mean("logprob"),
    extrapolated=extrapolated,
  )
