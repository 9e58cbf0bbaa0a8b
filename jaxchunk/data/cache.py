"""Files that can be rebuilt: written whole or not at all, checked when read."""

import contextlib
import json
import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from absl import logging

Arrays = dict[str, np.ndarray]


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
  """The folder for cached files, created if need be.

  Args:
    cache_dir: The folder, or `None` for `$JAXCHUNK_CACHE`, or else
      `~/.cache/jaxchunk`.

  Raises:
    ValueError: It cannot be written.
  """
  chosen = cache_dir or os.environ.get("JAXCHUNK_CACHE")
  folder = Path(chosen or "~/.cache/jaxchunk").expanduser()
  try:
    folder.mkdir(parents=True, exist_ok=True)
    writable = os.access(folder, os.W_OK | os.X_OK)
  except OSError:
    writable = False
  if not writable:
    raise ValueError(
      f"cannot write to the cache folder {folder}; set data.cache_dir or"
      " $JAXCHUNK_CACHE to one that is writable"
    )
  return folder


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[BinaryIO]:
  """Opens a file that takes its name only once it is complete.

  So a killed run, or two runs at once, never leave half a file behind.
  """
  path.parent.mkdir(parents=True, exist_ok=True)
  temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
  try:
    with temporary.open("xb") as file:
      yield file
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def read_json(path: Path) -> dict[str, Any]:
  """The JSON object in a file.

  Raises:
    ValueError: It is none; names the file.
  """
  try:
    values = json.loads(path.read_text(encoding="utf-8"))
  except ValueError as error:
    raise ValueError(f"{path} is not JSON ({error})") from None
  if not isinstance(values, dict):
    raise ValueError(f"{path} is not a JSON object")
  return values


def write_json(path: Path, values: Mapping[str, Any]) -> None:
  """Writes a JSON object that people can read."""
  with atomic_write(path) as file:
    file.write((json.dumps(values, indent=2) + "\n").encode())


def cached_arrays(
  path: Path,
  build: Callable[[], Arrays],
  *,
  valid: Callable[[Arrays], bool] = lambda arrays: True,
) -> Arrays:
  """Reads arrays from `path`; builds and writes them where that fails.

  Args:
    path: An `.npz` file.
    build: Makes the arrays.
    valid: Whether arrays that were read can be used.

  Returns:
    The arrays. A corrupt file is rebuilt, with a warning in the log.
  """
  if path.exists():
    # A missing array is a KeyError inside `valid`: an older format.
    try:
      # Opened here, because `np.load` leaks the file it opens if it is no zip.
      with (
        path.open("rb") as file,
        np.load(file, allow_pickle=False) as stored,
      ):
        arrays = dict(stored)
      if valid(arrays):
        return arrays
      problem = "its contents do not fit"
    except Exception as error:  # A torn zip file raises all sorts.
      problem = f"{type(error).__name__}: {error}"
    logging.warning("Rebuilding the cache file %s (%s)", path, problem)
  arrays = build()
  # NumPy's own type for the keywords admits no arrays.
  savez: Callable[..., None] = np.savez
  with atomic_write(path) as new:
    savez(new, **arrays)
  return arrays
