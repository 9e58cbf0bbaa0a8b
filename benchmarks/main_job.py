"""The README's main command, timed, and what the model has learnt.

  python benchmarks/main_job.py [--workdir=DIR]

Runs `scripts/train.py --config=configs/quickstart.py` with the network off
(where the system allows a namespace without one), then checks the held-out
bits per byte against a bigram model of bytes on the same texts, the
accounting, and whether the prefix helps: the loss on chunks after the first
of the longest held-out documents, with their prefix and with it cut off, on
the same tokens.
"""

import json
import math
import pathlib
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from typing import Any

import numpy as np
from absl import app, flags
from common import report, rounded

from jaxchunk.chunking.executor import token_nll
from jaxchunk.data import corpus as corpus_lib
from jaxchunk.data.accounting import KEPT
from jaxchunk.data.tokenizers import load_tokenizer
from jaxchunk.training.checkpoint import load_for_inference
from jaxchunk.types import Example

_WORKDIR = flags.DEFINE_string("workdir", None, "Keep the run here.")
_CONFIG = flags.DEFINE_string(
  "config", "configs/quickstart.py", "Relative to the project."
)

_NEAR = 64
_ROOT = pathlib.Path(__file__).parents[1]


def train(workdir: pathlib.Path) -> tuple[float, bool]:
  """Seconds of the main command, and whether it had no network."""
  command = [
    sys.executable,
    "scripts/train.py",
    f"--config={_CONFIG.value}",
    f"--workdir={workdir}",
  ]
  offline = ["unshare", "--net", "--map-root-user"]
  isolated = (
    shutil.which("unshare") is not None
    and subprocess.run([*offline, "true"], capture_output=True).returncode == 0
  )
  start = time.perf_counter()
  subprocess.run(
    [*offline, *command] if isolated else command, cwd=_ROOT, check=True
  )
  return time.perf_counter() - start, isolated


def load_config() -> Any:
  """What `get_config()` of the configuration's file returns."""
  return runpy.run_path(str(_ROOT / _CONFIG.value))["get_config"]()


def bigram_bits_per_byte(corpus: Any, texts: list[str]) -> float:
  """Bits per byte of texts, by bigram counts of the training texts' bytes."""
  counts = np.full((256, 256), 0.1)
  heldout = [np.frombuffer(text.encode(), np.uint8) for text in texts]
  for number, reason in enumerate(corpus.reasons):
    text = corpus.source[number]
    data = np.frombuffer(
      text.encode() if isinstance(text, str) else text, np.uint8
    )
    if reason == KEPT:
      np.add.at(counts, (data[:-1], data[1:]), 1)
  bits = -np.log2(counts / counts.sum(1, keepdims=True))
  total = sum(bits[d[:-1], d[1:]].sum() + 8 for d in heldout)
  return float(total / sum(map(len, heldout)))


def prefix_gain(
  model: Any, examples: list[Example], size: int
) -> dict[str, float]:
  """Mean nll, in nats a token, with and without what precedes a chunk."""
  whole, cut = [], []
  for example in examples:
    starts = range(size, len(example), size)
    whole.append(example)
    cut += [
      Example(
        example.tokens[s : s + size],
        example.targets[s : s + size],
        example.weights[s : s + size],
      )
      for s in starts
    ]
  with_prefix = np.concatenate(
    [nll[size:] for nll in token_nll(model, whole, chunk_size=size)]
  )
  without = np.concatenate(token_nll(model, cut, chunk_size=size))
  difference = without - with_prefix
  cuts = np.cumsum([len(example) for example in cut])[:-1]
  chunks = np.split(difference, cuts)
  # The first tokens of a chunk lose the few that stand just before them; what
  # is left tells of the rest of the prefix.
  means = [d.mean() for d in chunks]
  later = [d[_NEAR:].mean() for d in chunks if len(d) > _NEAR]
  return {
    "with_prefix": float(with_prefix.mean()),
    "cut_off": float(without.mean()),
    "difference": float(difference.mean()),
    "standard_error": float(np.std(means) / math.sqrt(len(means))),
    "after_64_tokens": float(np.mean(later)),
    "after_64_standard_error": float(np.std(later) / math.sqrt(len(later))),
    "chunks": float(len(chunks)),
    "tokens": float(len(difference)),
  }


def main(_: list[str]) -> None:
  scratch = tempfile.TemporaryDirectory()
  workdir = pathlib.Path(_WORKDIR.value or scratch.name)
  if workdir.is_dir() and any(workdir.iterdir()):
    raise app.UsageError(f"{workdir} holds a run; name a new folder")
  with scratch:
    seconds, isolated = train(workdir)
    model, tokenizer, _ = load_for_inference(workdir)
    config = load_config()
    corpus = corpus_lib.open_corpus(
      config.data, tokenizer=load_tokenizer(tokenizer)
    )
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line) for line in lines]
    heldout = [
      m["heldout_bits_per_byte"]
      for m in metrics
      if m.get("heldout_bits_per_byte") is not None
    ][-1]
    decode = load_tokenizer(tokenizer).decode
    scored = corpus_lib.heldout_examples(
      corpus, max_tokens=config.train.eval_tokens
    )
    bigram = bigram_bits_per_byte(
      corpus, [decode(example.tokens) for example in scored]
    )
    size = config.train.chunk_size
    documents = corpus_lib.heldout_examples(corpus, max_tokens=60_000)
    long = [e for e in documents if len(e) > size]
    gain = prefix_gain(model, long, size)
  report(
    "main_job",
    seconds=rounded(seconds),
    network_off=isolated,
    steps=metrics[-1]["step"],
    heldout_bits_per_byte=rounded(heldout),
    bigram_bits_per_byte=rounded(bigram),
    prefix=rounded(gain),
    ok=seconds < 300
    and heldout < bigram
    and gain["difference"] > 2 * gain["standard_error"],
  )


if __name__ == "__main__":
  app.run(main)
