"""How much of the hardware's tokens is useful under three ways of batching.

Prints one JSON line with two sets of documents: the training corpus of the
standard library, in the order and the global batches of the first epoch, and
lengths drawn from a lognormal distribution (median 2k, 99th percentile 31k).

- `jaxchunk`: `chunk_plan` of each batch;
- `pad_to_longest`: one document a row, rows padded to the batch's longest;
- `grain_first_fit`: grain's packing into bins of one chunk. A document longer
  than a bin must be split for it and loses the context before the cut, and
  bins are filled across batches.

    python benchmarks/padding.py
"""

import importlib.metadata
import json
from collections.abc import Sequence
from typing import Any

import grain
import numpy as np

from jaxchunk.chunking.plan import chunk_plan
from jaxchunk.data.accounting import KEPT
from jaxchunk.data.config import DataConfig
from jaxchunk.data.corpus import Corpus, open_corpus
from jaxchunk.data.plan import (
  EpochPlan,
  batch_documents,
  batch_end,
  plan_epoch,
)

CHUNK_SIZE = 2048
BATCH_TOKENS = 131_072


def main() -> None:
  corpus = open_corpus(
    DataConfig(batch_tokens=BATCH_TOKENS, heldout_fraction=0.0)
  )
  stdlib = measure(first_epoch(corpus))
  result = {
    "benchmark": "padding",
    "chunk_size": CHUNK_SIZE,
    "batch_tokens": BATCH_TOKENS,
    "exact": {
      "jaxchunk": True,
      "pad_to_longest": True,
      "grain_first_fit": "no: splits documents longer than a chunk",
    },
    "stdlib": {
      "tokenizer": corpus.config.tokenizer,
      **stdlib,
    },
    "lognormal": measure(lognormal_batches()),
    "grain": importlib.metadata.version("grain"),
    "ok": stdlib["useful_percent"]["jaxchunk"] >= 98,
  }
  print(json.dumps(result))


def measure(batches: list[np.ndarray]) -> dict[str, Any]:
  """What the documents of these batches, given by length, take up."""
  lengths = np.concatenate(batches)
  tokens = int(lengths.sum())
  plans = [chunk_plan(batch, CHUNK_SIZE) for batch in batches]
  longs = [
    sum(plan.lengths[n] > CHUNK_SIZE for n, _ in lane.sequences)
    for plan in plans
    for lane in plan.lanes
  ]
  chunks = sum(plan.num_chunks for plan in plans)
  capacity = {
    "jaxchunk": CHUNK_SIZE * chunks,
    "pad_to_longest": sum(len(batch) * int(batch.max()) for batch in batches),
    "grain_first_fit": CHUNK_SIZE * grain_bins(lengths),
    "at_most": CHUNK_SIZE
    * sum(-(-int(b.sum()) // CHUNK_SIZE) for b in batches),
  }
  return {
    "documents": len(lengths),
    "tokens": tokens,
    "median": float(np.median(lengths)),
    "percentile_99": round(float(np.percentile(lengths, 99))),
    "longest": int(lengths.max()),
    "batches": len(batches),
    "useful_percent": {
      name: round(100 * tokens / size, 2) for name, size in capacity.items()
    },
    "chunks": chunks,
    "lanes": len(longs),
    # All but the last of a lane, with one live chunk (K = 1).
    "chunks_run_forward_again": chunks - len(longs),
    "longs_joined_to_others": sum(max(n - 1, 0) for n in longs),
    "documents_longer_than_a_chunk": int((lengths > CHUNK_SIZE).sum()),
  }


def first_epoch(corpus: Corpus) -> list[np.ndarray]:
  """The positions of every document, batch by batch."""
  plan = plan_epoch(
    corpus.index.lengths,
    corpus.reasons == KEPT,
    seed=corpus.config.seed,
    epoch=0,
  )
  batches, start = [], 0
  while start < len(plan.order):
    end = batch_end(plan, start, corpus.config.batch_tokens)
    documents = batch_documents(plan, start, end)
    if len(documents):
      batches.append(corpus.index.lengths[documents] - 1)
    start = end
  return batches


def lognormal_batches() -> list[np.ndarray]:
  """Drawn lengths, in batches that are filled as the corpus's are."""
  drawn = np.random.default_rng(0).normal(np.log(2000), 1.178, 4000)
  lengths = np.exp(drawn).astype(np.int64) + 1
  ends = np.concatenate([[0], np.cumsum(lengths)])
  everything = np.ones(len(lengths), bool)
  plan = EpochPlan(0, np.arange(len(lengths)), everything, ends)
  batches, start = [], 0
  while start < len(lengths):
    end = batch_end(plan, start, BATCH_TOKENS)
    batches.append(lengths[start:end])
    start = end
  return batches


def pieces(length: int) -> list[int]:
  """The lengths a document is split into so that each fits a bin."""
  whole, rest = divmod(length, CHUNK_SIZE)
  return [CHUNK_SIZE] * whole + [rest] * (rest > 0)


def grain_bins(lengths: Sequence[int] | np.ndarray) -> int:
  """Bins that grain fills, with as many open at once as a batch has."""
  elements = [
    {"tokens": np.ones(n, np.int32)}
    for length in lengths
    for n in pieces(int(length))
  ]
  packed = grain.experimental.FirstFitPackIterDataset(
    grain.MapDataset.source(elements).to_iter_dataset(),
    length_struct={"tokens": CHUNK_SIZE},
    num_packing_bins=BATCH_TOKENS // CHUNK_SIZE,
    shuffle_bins=False,
  )
  bins = tokens = 0
  for element in packed:
    bins += 1
    tokens += int((element["tokens_segment_ids"] > 0).sum())
  if tokens != sum(lengths):
    raise RuntimeError(f"grain packed {tokens} of {sum(lengths)} tokens")
  return bins


if __name__ == "__main__":
  main()
