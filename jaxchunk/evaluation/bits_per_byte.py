"""Held-out bits per byte, by the length of documents and by position in them.

Each target has the bytes of the text that it stands for, so the bytes of all
buckets add up to the documents', and bits per byte of all buckets, weighted by
bytes, to those of the whole.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float, Int64

from jaxchunk.chunking.executor import token_nll
from jaxchunk.data.corpus import Corpus
from jaxchunk.models.transformer import Transformer
from jaxchunk.types import Example, split_by_tokens

FIRST_EDGE = 64
"""The first bucket ends here: what is shorter says little about length."""


@dataclasses.dataclass(frozen=True)
class Scored:
  """A document and what each of its targets cost.

  Attributes:
    nats: Negative log-likelihood of targets 1, 2, ... of the document, `[T]`.
    bytes: Bytes of text that each stands for, `[T]`; BOS and EOS have none.
  """

  nats: Float[np.ndarray, " T"]
  bytes: Int64[np.ndarray, " T"]

  @property
  def length(self) -> int:
    """Tokens of the document, the first of which is no target."""
    return len(self.nats) + 1


@dataclasses.dataclass(frozen=True)
class Bucket:
  """Bits per byte of some targets.

  Attributes:
    start: First length or position, in tokens.
    stop: Where the next bucket starts.
    documents: How many have targets in it.
    tokens: Targets.
    bytes: Of text.
    bits: Negative log-likelihood of the targets.
    bits_per_byte: Their ratio; `None` without a byte.
    standard_error: Of the ratio, by document; `None` for a single one.
  """

  start: int
  stop: int
  documents: int
  tokens: int
  bytes: int
  bits: float
  bits_per_byte: float | None
  standard_error: float | None


@dataclasses.dataclass(frozen=True)
class BitsPerByte:
  """Bits per byte of documents, as a whole and in buckets.

  Attributes:
    whole: Of all documents.
    by_length: Documents by their tokens, BOS and EOS included.
    by_position: Targets by the number of tokens before them.
    by_both: Bits per byte `[length bucket][position bucket]`; `None` where
      there is no byte.
    empty: Buckets without a target that were left out, by kind.
  """

  whole: Bucket
  by_length: list[Bucket]
  by_position: list[Bucket]
  by_both: list[list[float | None]]
  empty: dict[str, int]


def token_bytes(corpus: Corpus, example: Example) -> Int64[np.ndarray, " T"]:
  """Bytes of text behind each target of a whole document.

  Args:
    corpus: Where the document is.
    example: From `read_examples`.

  Returns:
    They sum to the document's bytes. Where a document has no BOS its first
    token is no target, and its bytes count for the first target.

  Raises:
    ValueError: The document is not what the corpus's index says.
  """
  number = example.document_id
  ids, sizes = corpus.tokenizer.encode_with_bytes(corpus.source[number])
  layout = corpus.index.layout
  begin = [] if layout.bos_id is None else [layout.bos_id]
  end = [] if layout.eos_id is None else [layout.eos_id]
  tokens = np.concatenate([begin, ids, end]).astype(np.int64)
  seen = np.concatenate([example.tokens[:1], example.targets])
  if not np.array_equal(tokens, seen):
    raise ValueError(
      f"document {corpus.source.name(number)} has changed since it was "
      "indexed; run again"
    )
  bytes_ = np.zeros(len(tokens), np.int64)
  bytes_[len(begin) : len(begin) + len(ids)] = sizes
  bytes_[1] += bytes_[0]
  return bytes_[1:]


def score_documents(
  model: Transformer,
  corpus: Corpus,
  examples: Sequence[Example],
  *,
  chunk_size: int,
  batch_tokens: int,
  progress: Callable[[int], object] = lambda tokens: None,
) -> list[Scored]:
  """Runs documents by chunks.

  Args:
    model: The model.
    corpus: Where the documents are.
    examples: From `read_examples` or `heldout_examples`.
    chunk_size: C.
    batch_tokens: Most tokens that are under way at a time; a longer document
      runs alone.
    progress: Called with the tokens of each group when it is done.

  Returns:
    The scores of each document.

  Raises:
    ValueError: A loss is not finite, or a document has changed.
  """
  scored = []
  for group in split_by_tokens(examples, batch_tokens):
    rows = token_nll(model, group, chunk_size=chunk_size)
    for example, nats in zip(group, rows, strict=True):
      if not np.isfinite(nats).all():
        name = corpus.source.name(example.document_id)
        raise ValueError(
          f"the model's loss on document {name} is not finite: it has diverged"
        )
      sizes = token_bytes(corpus, example)
      scored.append(Scored(nats.astype(np.float64), sizes))
    progress(sum(map(len, group)))
  return scored


def bits_per_byte(
  documents: Sequence[Scored], *, edges: Sequence[int] | None = None
) -> BitsPerByte:
  """Sums documents into buckets.

  Args:
    documents: At least one.
    edges: Inner borders of the buckets in tokens, ascending: `[1024, 4096]`
      asks for those from 1024 and from 4096 on, beside what is before them.
      `None` takes powers of two from 64 on and leaves out empty ones.

  Returns:
    The buckets; those of each kind add up to the whole.

  Raises:
    ValueError: There is no document, the edges do not ascend, or a bucket
      that was asked for is empty.
  """
  if not documents:
    raise ValueError("there are no documents to evaluate")
  lengths = np.asarray([document.length for document in documents])
  borders = _borders(int(lengths.max()), edges)
  # [documents, position buckets, (nats, bytes, targets)]
  table = np.stack([_by_position(d, borders) for d in documents])
  row = np.searchsorted(borders, lengths, "right") - 1
  count = len(borders) - 1
  spans = [(int(borders[n]), int(borders[n + 1])) for n in range(count)]
  by_length = [
    _bucket(span, table[row == n].sum(1)) for n, span in enumerate(spans)
  ]
  by_position = [_bucket(span, table[:, n]) for n, span in enumerate(spans)]
  if edges is not None:
    _check_full(by_length, "has that many tokens", lengths)
    _check_full(by_position, "has a target there", lengths)
  rows = [n for n in range(count) if by_length[n].tokens]
  columns = [n for n in range(count) if by_position[n].tokens]
  grid = [[_bucket((0, 0), table[row == i, j]) for j in columns] for i in rows]
  return BitsPerByte(
    whole=_bucket((0, int(borders[-1])), table.sum(1)),
    by_length=[by_length[n] for n in rows],
    by_position=[by_position[n] for n in columns],
    by_both=[[bucket.bits_per_byte for bucket in line] for line in grid],
    empty={"length": count - len(rows), "position": count - len(columns)},
  )


def _borders(longest: int, edges: Sequence[int] | None) -> np.ndarray:
  if edges is None:
    edges = []
    while (edge := FIRST_EDGE << len(edges)) < longest:
      edges.append(edge)
  borders = np.asarray([0, *edges], np.int64)
  if (np.diff(borders) <= 0).any():
    raise ValueError(
      f"edges={list(edges)} must be positive and ascend: they are the borders "
      "between buckets, in tokens"
    )
  return np.append(borders, max(longest, int(borders[-1])) + 1)


def _by_position(document: Scored, borders: np.ndarray) -> np.ndarray:
  """Nats, bytes and number of targets in each position bucket."""
  # Target t stands behind t + 1 tokens.
  starts = np.clip(borders - 1, 0, len(document.nats))
  columns = (document.nats, document.bytes, np.ones(len(document.nats)))
  sums = [np.concatenate([[0.0], np.cumsum(column)]) for column in columns]
  return np.stack([np.diff(total[starts]) for total in sums], axis=1)


def _bucket(span: tuple[int, int], sums: np.ndarray) -> Bucket:
  """A bucket from nats, bytes and targets of each document, `[documents, 3]`.

  The error of a ratio of sums, by linearisation: Cochran, Sampling Techniques,
  section 6.4.
  """
  here = sums[sums[:, 2] > 0]
  count = len(here)
  nats, size, targets = here.sum(0)
  bits = nats / math.log(2)
  ratio, error = None, None
  if size > 0:
    ratio = bits / size
    if count > 1:
      residuals = here[:, 0] / math.log(2) - ratio * here[:, 1]
      variance = (residuals**2).sum() * count / (count - 1)
      error = float(math.sqrt(variance) / size)
  return Bucket(
    start=span[0],
    stop=span[1],
    documents=count,
    tokens=int(targets),
    bytes=round(size),
    bits=float(bits),
    bits_per_byte=None if ratio is None else float(ratio),
    standard_error=error,
  )


def _check_full(
  buckets: Sequence[Bucket], what: str, lengths: np.ndarray
) -> None:
  for bucket in buckets:
    # No border was named for the start of the first.
    if bucket.start and not bucket.tokens:
      raise ValueError(
        f"the bucket from {bucket.start} to {bucket.stop - 1} tokens is empty: "
        f"none of {len(lengths)} documents, {lengths.min()} to "
        f"{lengths.max()} tokens long, {what}; choose other edges, or none "
        "for powers of two"
      )
