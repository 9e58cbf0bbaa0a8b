"""The length of every document, known before any is read again.

Which documents make a batch follows from the lengths alone, so every host plans
from this index and reads only what it needs. The tokens are kept beside it.
"""

import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tqdm
from absl import logging
from jaxtyping import Int8, Int64, UInt32, UInt64

from jaxchunk.data.accounting import PROBLEMS
from jaxchunk.data.cache import Arrays, atomic_write, cached_arrays
from jaxchunk.data.chat import Document, RecordError
from jaxchunk.data.files import hash_parts
from jaxchunk.data.sources import Source
from jaxchunk.data.split import text_hash
from jaxchunk.data.tokenizers import Tokenizer

_VERSION = "2"
_DOCUMENTS_AT_ONCE = 256
_CHARACTERS_AT_ONCE = 4 << 20
_QUIET_SECONDS = 3.0
_ARRAYS = {
  "lengths": np.int64,
  "byte_lengths": np.int64,
  "hashes": np.uint64,
  "checksums": np.uint32,
  "targets": np.int64,
  "problems": np.int8,
}
_NO_PROBLEM = -1
# In a cached token: that it is trained on.
_TRAINED = np.uint32(1 << 31)


@dataclasses.dataclass(frozen=True)
class _Layout:
  """How the tokens of a document are laid out; `None` puts nothing there.

  Where `masked`, special tokens are read out of the text, and every token on
  disk says whether it is trained on.
  """

  bos_id: int | None
  eos_id: int | None
  dtype: str
  masked: bool = False


@dataclasses.dataclass(frozen=True)
class LengthIndex:
  """What is known of every document without reading it.

  Attributes:
    lengths: Tokens, BOS and EOS included, `[documents]`.
    byte_lengths: Bytes, as UTF-8, of the text that is trained on,
      `[documents]`.
    hashes: `split.text_hash` of the text, `[documents]`.
    checksums: CRC-32 of the tokens as cached, `[documents]`.
    targets: Tokens that are trained on, `[documents]`; the first never is.
    problems: Index into `accounting.PROBLEMS` of why a record has no tokens,
      `[documents]`; -1 is none.
    layout: What encloses a document, and its type on disk.
    tokens_path: Where the tokens are cached, or `None`.
  """

  lengths: Int64[np.ndarray, " documents"]
  byte_lengths: Int64[np.ndarray, " documents"]
  hashes: UInt64[np.ndarray, " documents"]
  checksums: UInt32[np.ndarray, " documents"]
  targets: Int64[np.ndarray, " documents"]
  problems: Int8[np.ndarray, " documents"]
  layout: _Layout
  tokens_path: Path | None

  def __len__(self) -> int:
    return len(self.lengths)

  @functools.cached_property
  def offsets(self) -> Int64[np.ndarray, " documents_and_1"]:
    """Where each document begins among all tokens, and their number."""
    return np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)


def load_index(
  source: Source,
  tokenizer: Tokenizer,
  *,
  bos: bool,
  eos: bool,
  cache_dir: Path,
  cache_tokens: bool = True,
  masked: bool = False,
  skip_bad: bool = False,
) -> LengthIndex:
  """Reads the index of these documents under this tokenizer, or builds it.

  Args:
    source: The documents.
    tokenizer: What splits them.
    bos: Whether each begins with the BOS token.
    eos: Whether each ends with the EOS token.
    cache_dir: Where the index is kept. A corrupt one is rebuilt, with a
      warning in the log.
    cache_tokens: Keep the tokens as well.
    masked: Documents come from records, and parts may not be trained on.
    skip_bad: Leave out records that cannot be laid out.

  Raises:
    ValueError: The tokenizer has no BOS or EOS token, or a document cannot be
      read or laid out.
  """
  ids = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
  wanted = {"bos": bos, "eos": eos}
  for kind, id in ids.items():
    if wanted[kind] and id is None:
      raise ValueError(
        f"the tokenizer has no {kind.upper()} token; set data.{kind}=False"
      )
  layout = _Layout(
    bos_id=tokenizer.bos_id if bos else None,
    eos_id=tokenizer.eos_id if eos else None,
    dtype="<u4" if masked or tokenizer.vocab_size > 1 << 16 else "<u2",
    masked=masked,
  )
  key = hash_parts(
    _VERSION,
    source.fingerprint,
    tokenizer.fingerprint,
    repr(layout),
    str(cache_tokens),
    str(skip_bad),
  )
  tokens_path = cache_dir / f"tokens-{key}.bin" if cache_tokens else None

  def valid(arrays: Arrays) -> bool:
    if {len(arrays[name]) for name in _ARRAYS} != {len(source)}:
      return False
    if tokens_path is None:
      return True
    size = int(arrays["lengths"].sum()) * np.dtype(layout.dtype).itemsize
    return tokens_path.exists() and tokens_path.stat().st_size == size

  arrays = cached_arrays(
    cache_dir / f"index-{key}.npz",
    lambda: _build(source, tokenizer, layout, tokens_path, skip_bad),
    valid=valid,
  )
  return LengthIndex(layout=layout, tokens_path=tokens_path, **arrays)


def read_tokens(
  index: LengthIndex, source: Source, tokenizer: Tokenizer, document: int
) -> tuple[np.ndarray, np.ndarray]:
  """The tokens of one document, BOS and EOS included, and which are trained.

  From the cache; where that is missing or corrupt, from the text.

  Returns:
    `[T]` int32 and `[T]` bool.

  Raises:
    ValueError: The document has changed since the index was built.
  """
  length = int(index.lengths[document])
  if index.tokens_path is not None:
    dtype = np.dtype(index.layout.dtype)
    try:
      stored = np.fromfile(
        index.tokens_path,
        dtype=dtype,
        count=length,
        offset=int(index.offsets[document]) * dtype.itemsize,
      )
    except OSError:
      stored = np.zeros(0, dtype)
    if zlib.crc32(stored.tobytes()) == index.checksums[document]:
      return _unpacked(stored, index.layout)
    logging.log_first_n(
      logging.WARNING,
      "%s is damaged (document %d): tokenising again; delete it to rebuild it",
      1,
      index.tokens_path,
      document,
    )
  read = source.document(document)
  if text_hash(read.text) != index.hashes[document]:
    raise ValueError(
      f"{source.name(document)} is not what it was when the index was built:"
      " the data has changed during the run; start it again"
    )
  packed = next(_packed([read], tokenizer, index.layout))
  return _unpacked(packed, index.layout)


def _packed(
  documents: Sequence[Document], tokenizer: Tokenizer, layout: _Layout
) -> Iterator[np.ndarray]:
  """The tokens of documents as they are on disk."""
  if not layout.masked:
    before, after = _around(layout, True)
    for ids in tokenizer.encode_batch([d.text for d in documents]):
      yield np.concatenate([before, ids, after]).astype(layout.dtype)
    return
  encoded = tokenizer.encode_documents(documents)
  for document, (ids, mask) in zip(documents, encoded, strict=True):
    before, after = _around(layout, document.enclosed)
    tokens = np.concatenate([before, ids, after]).astype(np.uint32)
    # What ends a document is learnt where it follows what is learnt.
    ends = mask[-1:].repeat(len(after))
    trained = np.concatenate([np.zeros(len(before), bool), mask, ends])
    yield np.where(trained, tokens | _TRAINED, tokens).astype(layout.dtype)


def _around(layout: _Layout, enclosed: bool) -> tuple[list[int], list[int]]:
  """The ids before and behind a document."""
  ids = (layout.bos_id, layout.eos_id) if enclosed else (None, None)
  before, after = ([] if n is None else [n] for n in ids)
  return before, after


def _unpacked(
  stored: np.ndarray, layout: _Layout
) -> tuple[np.ndarray, np.ndarray]:
  if not layout.masked:
    return stored.astype(np.int32), np.ones(len(stored), bool)
  trained = (stored & _TRAINED) > 0
  return (stored & ~_TRAINED).astype(np.int32), trained


def _build(
  source: Source,
  tokenizer: Tokenizer,
  layout: _Layout,
  tokens_path: Path | None,
  skip_bad: bool,
) -> Arrays:
  """Tokenises everything once, writing the tokens as it goes."""
  logging.info("Building the length index of %d documents", len(source))
  rows: list[tuple[int, ...]] = []
  with contextlib.ExitStack() as stack:
    file = tokens_path and stack.enter_context(atomic_write(tokens_path))
    # Shows itself only when the wait is long enough to wonder.
    progress = stack.enter_context(
      tqdm.tqdm(
        total=len(source), desc="tokenising", unit="doc", delay=_QUIET_SECONDS
      )
    )
    for group in _grouped(source, skip_bad):
      good = [item for item in group if isinstance(item, Document)]
      packed = _packed(good, tokenizer, layout)
      for item in group:
        if isinstance(item, RecordError):
          logging.log_first_n(logging.WARNING, "Skipped: %s", 10, item)
          rows.append((0, 0, 0, 0, 0, PROBLEMS.index(item.problem)))
          continue
        stored = next(packed)
        _, trained = _unpacked(stored, layout)
        raw = stored.tobytes()
        rows.append(
          (
            len(stored),
            _trained_bytes(item),
            text_hash(item.text),
            zlib.crc32(raw),
            int(trained[1:].sum()),
            _NO_PROBLEM,
          )
        )
        if file:
          file.write(raw)
      progress.update(len(group))
  columns = zip(*rows, strict=True)
  return {
    name: np.asarray(column, dtype)
    for (name, dtype), column in zip(_ARRAYS.items(), columns, strict=True)
  }


def _trained_bytes(document: Document) -> int:
  text, spans = document.text, document.trained
  if spans is None:
    return len(text.encode())
  return sum(len(text[start:stop].encode()) for start, stop in spans)


def _grouped(
  source: Source, skip_bad: bool
) -> Iterator[list[Document | RecordError]]:
  """The documents in order, in groups that keep every core busy."""
  group: list[Document | RecordError] = []
  size = 0
  for number in range(len(source)):
    try:
      document = source.document(number)
      group.append(document)
      size += len(document.text)
    except RecordError as error:
      if not skip_bad:
        raise RecordError(
          error.problem,
          f"{error} (data.bad_records='skip' leaves such records out)",
        ) from error
      group.append(error)
    if len(group) >= _DOCUMENTS_AT_ONCE or size >= _CHARACTERS_AT_ONCE:
      yield group
      group, size = [], 0
  if group:
    yield group
