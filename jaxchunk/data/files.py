"""Reading files of text: hashes, line offsets and errors with a remedy."""

import contextlib
import hashlib
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from jaxchunk.data.cache import Arrays, cached_arrays

_RACY_SECONDS = 2.0


def to_text(raw: bytes | str, *, errors: str, name: str) -> str:
  """Text that can be written as UTF-8.

  Args:
    raw: Bytes in UTF-8, or a string (JSON can hold lone surrogates).
    errors: `"strict"` or `"replace"`.
    name: What to call the document in the error.

  Raises:
    ValueError: It is not UTF-8 and `errors` is `"strict"`.
  """
  try:
    if isinstance(raw, bytes):
      return raw.decode("utf-8", errors)
    if raw.isascii():
      return raw
    pairs = raw.encode("utf-16-le", "surrogatepass")
    return pairs.decode("utf-16-le", errors)
  except UnicodeDecodeError as error:
    raise ValueError(
      f"{name} is not valid UTF-8 ({error.reason} at byte {error.start}); mend"
      " it, or set data.errors='replace'"
    ) from None


@contextlib.contextmanager
def opening(path: Path) -> Iterator[None]:
  """Turns the errors of reading a file into one that names the remedy."""
  try:
    yield
  except FileNotFoundError:
    raise FileNotFoundError(
      f"{path} has gone; restore it or start again without it"
    ) from None
  except pa.ArrowInvalid as error:
    raise ValueError(
      f"{path} is not a readable parquet file ({error}); write it anew"
    ) from None
  except OSError as error:
    raise ValueError(
      f"cannot read {path} ({error.strerror or error}); check its permissions"
    ) from None


def hash_parts(*parts: str) -> str:
  """A short hash of some strings, in this order."""
  return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def _stamp(paths: Sequence[Path]) -> tuple[str, bool]:
  """Names the files as they are now; and whether that name can be trusted.

  A file written a moment ago may be written again within the resolution of its
  time stamp (git calls such files racy), so it is hashed every time.
  """
  entries, newest = [], 0.0
  for path in paths:
    with opening(path):
      stat = path.stat()
    newest = max(newest, stat.st_mtime)
    entries.append(f"{path.absolute()}:{stat.st_size}:{stat.st_mtime_ns}")
  return hash_parts(*entries), newest < time.time() - _RACY_SECONDS


def hash_files(paths: Sequence[Path], cache_dir: Path) -> list[str]:
  """Content hash of every file; read again only when a file has changed."""

  def build() -> Arrays:
    digests = []
    for path in paths:
      with opening(path), path.open("rb") as file:
        digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return {"digests": np.asarray(digests)}

  stamp, settled = _stamp(paths)
  path = cache_dir / f"digests-{stamp}.npz"
  arrays = (
    cached_arrays(path, build, valid=lambda a: len(a["digests"]) == len(paths))
    if settled
    else build()
  )
  return [str(digest) for digest in arrays["digests"]]


def scan_lines(path: Path, cache_dir: Path) -> Arrays:
  """Offset, size and number of every line that is not blank, and the hash."""

  def build() -> Arrays:
    offsets, sizes, lines = [], [], []
    position, digest = 0, hashlib.sha256()
    with opening(path), path.open("rb") as file:
      for number, line in enumerate(file, 1):
        digest.update(line)
        if not line.isspace():
          offsets.append(position)
          sizes.append(len(line))
          lines.append(number)
        position += len(line)
    return {
      "offsets": np.asarray(offsets, np.int64),
      "sizes": np.asarray(sizes, np.int64),
      "lines": np.asarray(lines, np.int64),
      "digest": np.asarray(digest.hexdigest()),
    }

  stamp, settled = _stamp([path])
  if not settled:
    return build()
  return cached_arrays(
    cache_dir / f"lines-{stamp}.npz",
    build,
    valid=lambda arrays: (
      len(arrays["offsets"]) == len(arrays["sizes"]) == len(arrays["lines"])
      and arrays["digest"].size == 1
    ),
  )
