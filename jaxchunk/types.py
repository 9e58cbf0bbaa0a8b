"""The shape letters of the project and the types that its parts exchange.

Every einsum, every jaxtyping annotation and every shape suffix uses this key:

  B  batch (rows)            D  model width
  T  query positions         F  feed-forward width
  S  key positions           V  vocabulary
  N  query heads             L  layers
  K  key/value heads         C  chunk (tokens)
  G  query heads per key     P  pipeline stages
     head, N / K
  H  head width

Inside the library attention runs on `q [B,K,G,T,H]` and on caches
`k, v [L,B,K,S,H]`; the public `jaxchunk.attention` takes `[B,T,N,H]` and
`[B,S,K,H]`.
"""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int32

_FIELDS = (
  "tokens",
  "targets",
  "weights",
  "segment_ids",
  "positions",
  "document_ids",
)

_LARGEST = np.iinfo(np.int32).max


@dataclasses.dataclass(frozen=True)
class Example:
  """One sequence to train on, already shifted; any length from one token.

  Attributes:
    tokens: Inputs, `[T]` int32.
    targets: The token to predict at each position, `[T]` int32.
    weights: Loss weight of each target, `[T]` float32 (or float64, for models
      in float64); 0 masks it.
    document_id: Names the sequence; dropout is keyed by it.
    positions: Rotary positions, `[T]` int32; `None` counts from 0.
  """

  tokens: Int32[np.ndarray, " T"]
  targets: Int32[np.ndarray, " T"]
  weights: Float[np.ndarray, " T"]
  document_id: int = 0
  positions: Int32[np.ndarray, " T"] | None = None

  def __post_init__(self) -> None:
    for name in ("targets", "weights", "positions"):
      value = getattr(self, name)
      if value is not None and len(value) != len(self.tokens):
        raise ValueError(
          f"an Example has {len(self.tokens)} tokens but {len(value)} {name}"
        )
    if not np.isfinite(self.weights).all():
      raise ValueError("the weights of an Example must be finite")

  def __len__(self) -> int:
    return len(self.tokens)


@dataclasses.dataclass(frozen=True)
class Batch:
  """Rows of packed sequences on the host: the batch contract of the library.

  Attributes:
    tokens: Inputs, `[B,T]` int32.
    targets: The token to predict at each position, `[B,T]` int32.
    weights: Loss weights, `[B,T]` float32 (or float64, for models in float64);
      the loss is `sum(weights * nll) / sum(weights)` over the whole batch.
    segment_ids: `[B,T]` int32. 0 is padding; a positive id marks one sequence,
      is unique in its row, and ids do not decrease along a row.
    positions: Rotary positions, `[B,T]` int32, from 0 in every segment unless
      given.
    document_ids: `[B,T]` int32 names of the sequences, for dropout. By default
      a sequence is named after its place in the batch.
  """

  tokens: Int32[np.ndarray, "B T"]
  targets: Int32[np.ndarray, "B T"]
  weights: Float[np.ndarray, "B T"]
  segment_ids: Int32[np.ndarray, "B T"]
  positions: Int32[np.ndarray, "B T"]
  document_ids: Int32[np.ndarray, "B T"]

  @classmethod
  def of(cls, batch: "Batch | Mapping[str, Any]") -> "Batch":
    """Checks a batch and fills in what was left out.

    Args:
      batch: A `Batch`, or a mapping with `tokens` and `targets` and, at will,
        `weights` (default 1), `segment_ids` (default one segment a row),
        `positions` and `document_ids`.

    Returns:
      The complete batch, as NumPy arrays.

    Raises:
      ValueError: A name is missing or unknown, shapes differ, segments
        decrease or repeat, or the weights are negative or sum to 0.
    """
    if isinstance(batch, Batch):
      batch = {name: getattr(batch, name) for name in _FIELDS}
    given = {k: np.asarray(v) for k, v in batch.items() if v is not None}
    if unknown := sorted(set(given) - set(_FIELDS)):
      raise ValueError(
        f"batch has unknown entries {unknown}; it may have {list(_FIELDS)}"
      )
    if missing := sorted({"tokens", "targets"} - set(given)):
      raise ValueError(f"batch lacks {missing}")
    shape = given["tokens"].shape
    if len(shape) != 2:
      raise ValueError(f"batch tokens must be [B,T], got shape {shape}")
    for name, value in given.items():
      if value.shape != shape:
        raise ValueError(
          f"batch {name} has shape {value.shape}, not that of tokens, {shape}"
        )
    for name in set(given) - {"weights"}:
      if not np.issubdtype(given[name].dtype, np.integer):
        raise ValueError(
          f"batch {name} must be integers, got {given[name].dtype}"
        )
      if given[name].size and np.abs(given[name]).max() > _LARGEST:
        raise ValueError(f"batch {name} has values that are not int32")
    ints = {k: v.astype(np.int32) for k, v in given.items() if k != "weights"}
    segments = ints.get("segment_ids", np.ones(shape, np.int32))
    starts = _segment_starts(segments)
    weights = np.asarray(given.get("weights", np.ones(shape, np.float32)))
    if weights.dtype != np.float64:
      weights = weights.astype(np.float32)
    weights = np.where(segments > 0, weights, weights.dtype.type(0))
    if not (np.isfinite(weights).all() and (weights >= 0).all()):
      raise ValueError("batch weights must be finite and not negative")
    if weights.sum(dtype=np.float64) == 0:
      raise ValueError("batch weights sum to 0: there is nothing to train on")
    column = np.arange(shape[1], dtype=np.int32)[None]
    return cls(
      tokens=ints["tokens"],
      targets=ints["targets"],
      weights=weights,
      segment_ids=segments,
      positions=ints.get("positions", column - starts),
      document_ids=ints.get("document_ids", _numbers(segments)),
    )

  def examples(self) -> list[Example]:
    """The sequences of the batch, row by row, without its padding."""
    examples = []
    for row in range(self.tokens.shape[0]):
      segments = self.segment_ids[row]
      cuts = np.flatnonzero(np.diff(segments, prepend=-1, append=-1))
      for start, stop in itertools.pairwise(cuts):
        if segments[start] > 0:
          examples.append(
            Example(
              self.tokens[row, start:stop],
              self.targets[row, start:stop],
              self.weights[row, start:stop],
              int(self.document_ids[row, start]),
              self.positions[row, start:stop],
            )
          )
    return examples


def split_by_tokens(
  examples: Sequence[Example], max_tokens: int
) -> list[list[Example]]:
  """Consecutive groups of sequences that are evaluated together.

  Args:
    examples: Sequences of any length.
    max_tokens: Most tokens in a group; a longer sequence is a group alone.

  Returns:
    The groups, none empty; joined, they are the sequences in order.

  Raises:
    ValueError: `max_tokens` is less than 1.
  """
  if max_tokens < 1:
    raise ValueError(f"max_tokens={max_tokens} must be at least 1")
  groups: list[list[Example]] = []
  room = 0
  for example in examples:
    if not groups or len(example) > room:
      groups.append([])
      room = max_tokens
    groups[-1].append(example)
    room -= len(example)
  return groups


def check_vocabulary(examples: Sequence[Example], vocab_size: int) -> None:
  """Checks that every token, and every target with a weight, is in [0, V).

  Raises:
    ValueError: Names the sequence, the value and the vocabulary.
  """
  for number, example in enumerate(examples):
    wanted = example.targets[example.weights != 0]
    for name, ids in (("token", example.tokens), ("target", wanted)):
      if ids.size and (ids.min() < 0 or ids.max() >= vocab_size):
        bad = ids[(ids < 0) | (ids >= vocab_size)][0]
        raise ValueError(
          f"sequence {number} has {name} {bad}, outside the model's vocabulary "
          f"of {vocab_size}; give targets to be left out the weight 0"
        )


def _numbers(segments: np.ndarray) -> np.ndarray:
  """Which sequence of the batch each token belongs to, from 1; 0 is padding."""
  starts = (np.diff(segments, axis=1, prepend=0) != 0) & (segments > 0)
  numbers = np.cumsum(starts).reshape(segments.shape)
  return np.where(segments > 0, numbers, 0).astype(np.int32)


def _segment_starts(segments: np.ndarray) -> np.ndarray:
  """Where each token's segment begins; raises on ids out of order."""
  if (segments < 0).any():
    raise ValueError("batch segment_ids must not be negative (0 is padding)")
  for row, ids in enumerate(segments):
    used = ids[ids > 0]
    changes = used[np.flatnonzero(np.diff(used, prepend=0))]
    runs = ids[np.flatnonzero(np.diff(ids, prepend=0))]
    runs = runs[runs > 0]
    if (np.diff(used) < 0).any() or len(runs) != len(changes):
      raise ValueError(
        f"batch segment_ids of row {row} decrease or come in two pieces; each "
        "sequence must be one run of a new, larger id"
      )
  change = np.diff(segments, axis=1, prepend=-1) != 0
  column = np.broadcast_to(np.arange(segments.shape[1]), segments.shape)
  return np.maximum.accumulate(np.where(change, column, 0), axis=1).astype(
    np.int32
  )
