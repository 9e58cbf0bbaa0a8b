"""Which documents make which batch: a pure function of lengths and a seed.

No document is read here, so every host can make the whole plan and then read
its own documents. An epoch goes through *all* documents in a shuffled order;
those that are excluded are passed over, and counted, where they stand in it.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Bool, Int64

_MASK = (1 << 64) - 1


@dataclasses.dataclass(frozen=True)
class EpochPlan:
  """One epoch: the order, and how many positions lie before each place in it.

  Attributes:
    epoch: Its number, from 0.
    order: Document at every place, `[documents]`.
    kept: Whether the document at a place is trained on, `[documents]`.
    before: Positions (tokens - 1) of the kept documents before a place,
      `[documents + 1]`; the last is the epoch's total.
  """

  epoch: int
  order: Int64[np.ndarray, " documents"]
  kept: Bool[np.ndarray, " documents"]
  before: Int64[np.ndarray, " documents_and_1"]


def shuffled_order(
  documents: int, *, seed: int, epoch: int
) -> Int64[np.ndarray, " documents"]:
  """A permutation that depends on its arguments alone.

  Documents are sorted by a hash (splitmix64) of their number, so the order is
  the same under every version of NumPy, which its own generators do not
  promise.
  """
  key = _splitmix(_splitmix(seed & _MASK) ^ epoch)
  mixed = _splitmix_array(
    np.arange(documents, dtype=np.uint64) ^ np.uint64(key)
  )
  return np.argsort(mixed, kind="stable").astype(np.int64)


def plan_epoch(
  lengths: Int64[np.ndarray, " documents"],
  kept: Bool[np.ndarray, " documents"],
  *,
  seed: int,
  epoch: int,
  stages: Sequence[int] = (),
) -> EpochPlan:
  """Lays out one epoch.

  Args:
    lengths: Tokens of each document.
    kept: Which documents are trained on; each has 2 tokens or more.
    seed: Of the shuffle.
    epoch: Its number, from 0.
    stages: Bounds of lengths, as `DataConfig.length_stages`.
  """
  order = shuffled_order(len(lengths), seed=seed, epoch=epoch)
  order = order[np.argsort(stage_of(lengths[order], stages), kind="stable")]
  positions = np.where(kept, lengths - 1, 0)[order]
  before = np.concatenate([[0], np.cumsum(positions)]).astype(np.int64)
  return EpochPlan(epoch, order, kept[order], before)


def stage_of(
  lengths: Int64[np.ndarray, " documents"], stages: Sequence[int]
) -> Int64[np.ndarray, " documents"]:
  """The stage of each document, from 0: the first whose bound it keeps."""
  return np.searchsorted(np.asarray(stages, np.int64), lengths, "left")


def batch_end(plan: EpochPlan, start: int, batch_tokens: int) -> int:
  """Where in the order the batch that begins at `start` ends (exclusive).

  It takes documents while their positions stay within `batch_tokens`. One that
  is longer than that alone makes a batch of its own. Excluded documents on the
  way, and those up to the next kept one, belong to the batch.
  """
  before = plan.before
  end = int(np.searchsorted(before, before[start] + batch_tokens, "right")) - 1
  if before[end] == before[start]:
    # Not even the first fits: it goes alone.
    first = int(np.searchsorted(before, before[start], "right"))
    if first < len(before):
      end = int(np.searchsorted(before, before[first], "right")) - 1
  return end


def batch_documents(
  plan: EpochPlan, start: int, end: int
) -> Int64[np.ndarray, " batch"]:
  """The documents to train on among the places `start` to `end`."""
  return plan.order[start:end][plan.kept[start:end]]


def _splitmix(value: int) -> int:
  return int(_splitmix_array(np.asarray([value], np.uint64))[0])


def _splitmix_array(values: np.ndarray) -> np.ndarray:
  """The finaliser of splitmix64 (Steele, Lea and Flood, 2014)."""
  z = values + np.uint64(0x9E3779B97F4A7C15)
  z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
  z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
  return z ^ (z >> np.uint64(31))
