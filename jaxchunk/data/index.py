"""The length of every document, known before any is read again.

Which documents make a batch follows from the lengths alone, so every host plans
from this index and reads only what it needs. The tokens are kept beside it.
"""

import contextlib
import dataclasses
import functools
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tqdm
from absl import logging
from jaxtyping import Int64, UInt32, UInt64

from jaxchunk.data.cache import Arrays, atomic_write, cached_arrays
from jaxchunk.data.files import hash_parts
from jaxchunk.data.sources import Source
from jaxchunk.data.split import text_hash
from jaxchunk.data.tokenizers import Tokenizer

_VERSION = "1"
_DOCUMENTS_AT_ONCE = 256
_CHARACTERS_AT_ONCE = 4 << 20
_QUIET_SECONDS = 3.0
_ARRAYS = {
  "lengths": np.int64,
  "byte_lengths": np.int64,
  "hashes": np.uint64,
  "checksums": np.uint32,
}


@dataclasses.dataclass(frozen=True)
class _Layout:
  """How the tokens of a document are laid out; `None` puts nothing there."""

  bos_id: int | None
  eos_id: int | None
  dtype: str


@dataclasses.dataclass(frozen=True)
class LengthIndex:
  """What is known of every document without reading it.

  Attributes:
    lengths: Tokens, BOS and EOS included, `[documents]`.
    byte_lengths: Bytes of the text as UTF-8, `[documents]`.
    hashes: `split.text_hash` of the text, `[documents]`.
    checksums: CRC-32 of the tokens as cached, `[documents]`.
    layout: What encloses a document, and its type on disk.
    tokens_path: Where the tokens are cached, or `None`.
  """

  lengths: Int64[np.ndarray, " documents"]
  byte_lengths: Int64[np.ndarray, " documents"]
  hashes: UInt64[np.ndarray, " documents"]
  checksums: UInt32[np.ndarray, " documents"]
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

  Raises:
    ValueError: The tokenizer has no BOS or EOS token, or a document cannot be
      read.
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
    dtype="<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4",
  )
  key = hash_parts(
    _VERSION,
    source.fingerprint,
    tokenizer.fingerprint,
    repr(layout),
    str(cache_tokens),
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
    lambda: _build(source, tokenizer, layout, tokens_path),
    valid=valid,
  )
  return LengthIndex(layout=layout, tokens_path=tokens_path, **arrays)


def read_tokens(
  index: LengthIndex, source: Source, tokenizer: Tokenizer, document: int
) -> np.ndarray:
  """The tokens of one document, BOS and EOS included, `[T]` int32.

  From the cache; where that is missing or corrupt, from the text.

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
      return stored.astype(np.int32)
    logging.log_first_n(
      logging.WARNING,
      "%s is damaged (document %d): tokenising again; delete it to rebuild it",
      1,
      index.tokens_path,
      document,
    )
  text = source[document]
  if text_hash(text) != index.hashes[document]:
    raise ValueError(
      f"{source.name(document)} is not what it was when the index was built:"
      " the data has changed during the run; start it again"
    )
  return _enclose(tokenizer.encode(text), index.layout)


def _enclose(ids: np.ndarray, layout: _Layout) -> np.ndarray:
  before = [] if layout.bos_id is None else [layout.bos_id]
  after = [] if layout.eos_id is None else [layout.eos_id]
  return np.concatenate([before, ids, after]).astype(np.int32)


def _build(
  source: Source,
  tokenizer: Tokenizer,
  layout: _Layout,
  tokens_path: Path | None,
) -> Arrays:
  """Tokenises everything once, writing the tokens as it goes."""
  logging.info("Building the length index of %d documents", len(source))
  rows: list[tuple[int, int, int, int]] = []
  with contextlib.ExitStack() as stack:
    file = tokens_path and stack.enter_context(atomic_write(tokens_path))
    # Shows itself only when the wait is long enough to wonder.
    progress = stack.enter_context(
      tqdm.tqdm(
        total=len(source), desc="tokenising", unit="doc", delay=_QUIET_SECONDS
      )
    )
    for texts in _grouped(source):
      for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        stored = _enclose(ids, layout).astype(layout.dtype).tobytes()
        length = len(stored) // np.dtype(layout.dtype).itemsize
        rows.append(
          (length, len(text.encode()), text_hash(text), zlib.crc32(stored))
        )
        if file:
          file.write(stored)
      progress.update(len(texts))
  columns = zip(*rows, strict=True)
  return {
    name: np.asarray(column, dtype)
    for (name, dtype), column in zip(_ARRAYS.items(), columns, strict=True)
  }


def _grouped(source: Source) -> Iterator[list[str]]:
  """The texts in order, in groups that keep every core busy."""
  group: list[str] = []
  size = 0
  for document in range(len(source)):
    text = source[document]
    group.append(text)
    size += len(text)
    if len(group) >= _DOCUMENTS_AT_ONCE or size >= _CHARACTERS_AT_ONCE:
      yield group
      group, size = [], 0
  if group:
    yield group
