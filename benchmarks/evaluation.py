"""What an evaluation costs, and that its numbers agree with plain ones.

  python benchmarks/evaluation.py [--workdir=RUN] [--longest=16384]

Evaluates the run, or without one the quickstart's model at random: bits per
byte by position of held-out documents, and needles at lengths from 1k on. A
sample is scored from one prefill; beside it the time of running every
candidate as a sequence of its own, and the largest difference of the two.
"""

import pathlib
import runpy
import time
from typing import Any

import numpy as np
from absl import app, flags
from common import report, rounded
from flax import nnx

import jaxchunk as jc
from jaxchunk.chunking.executor import token_nll
from jaxchunk.data.corpus import heldout_examples, open_corpus
from jaxchunk.data.tokenizers import load_tokenizer
from jaxchunk.evaluation.bits_per_byte import bits_per_byte, score_documents
from jaxchunk.evaluation.scoring import model_scorer
from jaxchunk.evaluation.tasks import Haystack, Sample, make_samples
from jaxchunk.training.checkpoint import load_for_inference
from jaxchunk.types import Example

_WORKDIR = flags.DEFINE_string("workdir", None, "Of a run of the quickstart.")
_LONGEST = flags.DEFINE_integer("longest", 16_384, "Tokens of a sample.")

_ROOT = pathlib.Path(__file__).parents[1]


def by_sequences(model: Any, sample: Sample, size: int) -> np.ndarray:
  """Log-likelihood of each candidate, each with its own prompt."""
  examples = []
  for ids in sample.candidates:
    tokens = np.concatenate([sample.prompt, ids])
    weights = np.ones(len(tokens) - 1, np.float32)
    examples.append(Example(tokens[:-1], tokens[1:], weights))
  rows = token_nll(model, examples, chunk_size=size)
  start = len(sample.prompt) - 1
  return np.asarray([-row[start:].astype(np.float64).sum() for row in rows])


def timed(function: Any, *args: Any) -> tuple[float, Any]:
  """Seconds of the second call, and its result."""
  function(*args)
  start = time.perf_counter()
  result = function(*args)
  return time.perf_counter() - start, result


def main(_: list[str]) -> None:
  config = runpy.run_path(str(_ROOT / "configs/quickstart.py"))["get_config"]()
  size, tokenizer = config.train.chunk_size, None
  if _WORKDIR.value:
    model, folder, _ = load_for_inference(_WORKDIR.value)
    tokenizer = load_tokenizer(folder)
  else:
    model = jc.Transformer(config.model, rngs=nnx.Rngs(0))
  corpus = open_corpus(config.data, tokenizer=tokenizer)
  examples = heldout_examples(corpus, max_tokens=config.train.eval_tokens)
  options = {"chunk_size": size, "batch_tokens": config.data.batch_tokens}
  start = time.perf_counter()
  scored = score_documents(model, corpus, examples, **options)
  seconds = time.perf_counter() - start
  found = bits_per_byte(scored)
  scorer = model_scorer(model, corpus.tokenizer, chunk_size=size)
  needles, length = {}, 1024
  while length <= _LONGEST.value:
    [sample] = make_samples(
      "needle",
      length=length,
      count=1,
      tokenizer=corpus.tokenizer,
      haystack=Haystack.of(corpus),
      depth=0.5,
    )
    once, (logprobs, _text) = timed(scorer, sample)
    each, truth = timed(by_sequences, model, sample, size)
    error = np.abs(logprobs - truth).max() / np.abs(truth).max()
    needles[str(length)] = {
      "tokens": sample.tokens,
      "one_prefill_seconds": once,
      "each_candidate_seconds": each,
      "relative_difference": float(error),
    }
    length *= 4
  report(
    "evaluation",
    trained=_WORKDIR.value is not None,
    bits_per_byte=rounded(found.whole.bits_per_byte),
    standard_error=rounded(found.whole.standard_error),
    by_position={
      str(b.start): rounded(b.bits_per_byte) for b in found.by_position
    },
    seconds_with_compilation=rounded(seconds),
    tokens=found.whole.tokens,
    needles=rounded(needles),
    ok=max(n["relative_difference"] for n in needles.values()) < 1e-4,
  )


if __name__ == "__main__":
  app.run(main)
