"""The three requests that evaluation harnesses make of a language model.

Log-likelihoods run by chunks: many short texts are packed together, and a long
one is split, exactly and with all that precedes each token as its context. So
a rolling log-likelihood needs no windows.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from jaxchunk.chunking.executor import token_scores
from jaxchunk.data.tokenizers import Ids, Tokenizer
from jaxchunk.evaluation.lengths import check_lengths
from jaxchunk.evaluation.text import begin_ids, encode_pairs
from jaxchunk.inference.generate import generate
from jaxchunk.inference.prompt import encode_prompt
from jaxchunk.inference.sampling import Sampler
from jaxchunk.inference.text import stream_text
from jaxchunk.models.transformer import Transformer
from jaxchunk.types import Example, split_by_tokens

DEFAULT_NEW_TOKENS = 256
_COUNT_NAMES = (
  "max_gen_toks",
  "max_new_tokens",
  "max_tokens",
  "max_completion_tokens",
)
_KNOWN = {*_COUNT_NAMES, "until", "do_sample", "temperature", "top_k", "top_p"}


def loglikelihood(
  model: Transformer,
  tokenizer: Tokenizer,
  pairs: Sequence[tuple[str, str]],
  *,
  chunk_size: int,
  batch_tokens: int,
  bos: bool = True,
  extrapolate: bool = False,
  progress: Callable[[int], object] = lambda count: None,
) -> list[tuple[float, bool]]:
  """Log-likelihood of continuations behind their contexts.

  Args:
    model: The model.
    tokenizer: Its tokenizer.
    pairs: Contexts, which may be empty, and continuations.
    chunk_size: C.
    batch_tokens: Most tokens under way at a time; a longer text runs alone.
    bos: Begin with BOS, if the tokenizer has one, as in training.
    extrapolate: Allow texts beyond the model's positions.
    progress: Called with how many pairs are done.

  Returns:
    For each pair the sum over the continuation's tokens in nats, and whether
    each of them is the likeliest. (An empty one has 0 and true.)

  Raises:
    ValueError: Nothing stands before a continuation to predict it from, or a
      text is beyond the model's positions.
  """
  begin = begin_ids(tokenizer, bos)
  examples = []
  for context, continuation in pairs:
    [(ids, rest)] = encode_pairs(tokenizer, context, [continuation])
    examples.append(_example(np.concatenate([begin, ids]), rest, tokenizer))
  check_lengths(
    [len(e) + 1 for e in examples], model.cfg, extrapolate=extrapolate
  )
  results = []
  for group in split_by_tokens(examples, batch_tokens):
    for example, scores in zip(
      group, token_scores(model, group, chunk_size=chunk_size), strict=True
    ):
      scored = example.weights > 0
      total = -scores.nll[scored].astype(np.float64).sum()
      results.append((float(total), bool(scores.greedy[scored].all())))
    progress(len(group))
  return results


def loglikelihood_rolling(
  model: Transformer,
  tokenizer: Tokenizer,
  texts: Sequence[str],
  **options: Any,
) -> list[float]:
  """Log-likelihood of whole texts of any length, by chunks.

  Each token has the whole text before it as context, behind BOS (or EOS where
  the tokenizer has no BOS): no windows, nothing is cut off.

  Args:
    model: The model.
    tokenizer: Its tokenizer.
    texts: The texts.
    **options: As for `loglikelihood`.
  """
  pairs = [("", text) for text in texts]
  found = loglikelihood(model, tokenizer, pairs, **options)
  return [total for total, _ in found]


def generate_until(
  model: Transformer,
  tokenizer: Tokenizer,
  requests: Sequence[tuple[str, Mapping[str, Any]]],
  *,
  chunk_size: int,
  bos: bool = True,
  seed: int = 0,
  extrapolate: bool = False,
) -> Iterator[str]:
  """Continues contexts up to a stop string.

  Args:
    model: The model.
    tokenizer: Its tokenizer.
    requests: Contexts, and for each: `until`, one stop string or several;
      `max_gen_toks`; `do_sample`, `temperature`, `top_k`, `top_p`. Greedy
      unless `do_sample` is true or a temperature is given alone.
    chunk_size: C.
    bos: Begin with BOS, if the tokenizer has one.
    seed: Of the sampler.
    extrapolate: Allow texts beyond the model's positions.

  Yields:
    For each request the text up to the first stop string, EOS or the last
    token, without the stop string.

  Raises:
    ValueError: A name is unknown or a value out of range.
  """
  for context, given in requests:
    count, stops, sampler = _generation(given)
    ids = encode_prompt(tokenizer, context, bos=bos)
    check_lengths([len(ids) + count], model.cfg, extrapolate=extrapolate)
    tokens = generate(
      model,
      ids,
      max_new_tokens=count,
      sampler=sampler,
      chunk_size=chunk_size,
      seed=seed,
      eos_id=tokenizer.eos_id,
    )
    yield until_stop(stream_text(tokens, tokenizer), stops)


def until_stop(pieces: Iterator[str], stops: Sequence[str]) -> str:
  """Joined pieces of text up to the first stop string, which may span some.

  No piece is asked for behind the one that completes a stop string.
  """
  text = ""
  for piece in pieces:
    text += piece
    ends = [text.find(stop) for stop in stops]
    if any(end >= 0 for end in ends):
      return text[: min(end for end in ends if end >= 0)]
  return text


def _example(context: Ids, rest: Ids, tokenizer: Tokenizer) -> Example:
  """A sequence of which only the continuation has weight."""
  if not len(context):
    if tokenizer.eos_id is None:
      raise ValueError(
        "nothing stands before the text to predict its first token from: the "
        "context is empty and the tokenizer has neither BOS nor EOS; give a "
        "context"
      )
    context = np.asarray([tokenizer.eos_id], np.int32)
  if not len(rest):
    # A target of weight 0, so that there is a sequence at all.
    return Example(context[-1:], context[-1:], np.zeros(1, np.float32))
  tokens = np.concatenate([context, rest])
  weights = np.zeros(len(tokens) - 1, np.float32)
  weights[len(context) - 1 :] = 1
  return Example(tokens[:-1], tokens[1:], weights)


def _generation(
  given: Mapping[str, Any],
) -> tuple[int, list[str], Sampler]:
  """How many tokens, stop strings and sampler of a request."""
  if unknown := sorted(set(given) - _KNOWN):
    raise ValueError(
      f"generation arguments {unknown} are unknown; known are {sorted(_KNOWN)}"
    )
  counts = (given[name] for name in _COUNT_NAMES if given.get(name) is not None)
  count = next(itertools.chain(counts, [DEFAULT_NEW_TOKENS]))
  stops = given.get("until") or []
  stops = [stops] if isinstance(stops, str) else list(stops)
  if not all(isinstance(stop, str) for stop in stops):
    raise ValueError(f"until={stops!r} must be strings")
  temperature = given.get("temperature")
  sampled = given.get("do_sample", bool(temperature))
  if not sampled:
    return int(count), [s for s in stops if s], Sampler(temperature=0)
  sampler = Sampler(
    temperature=1.0 if temperature is None else float(temperature),
    top_k=given.get("top_k"),
    top_p=given.get("top_p"),
  )
  return int(count), [s for s in stops if s], sampler
