"""The work folder of a run: writable, held by one run alone, still there.

The lock is the kernel's (`flock`): it goes with the process that holds it,
however that ends, so no stale lock file has ever to be removed by hand.
"""

import contextlib
import datetime
import fcntl
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from absl import logging

from jaxchunk.training.checkpoint import CheckpointError

LOCK = ".lock"


class Workdir:
  """An open work folder.

  Attributes:
    path: Where it was when it was opened.
  """

  def __init__(self, path: Path, descriptor: int):
    self.path = path
    self._descriptor = descriptor

  def check(self) -> None:
    """Makes sure that the folder was not removed, moved or replaced.

    An open file can be written long after its folder has gone, and a new
    folder would be made for the next checkpoint, both without an error.

    Raises:
      CheckpointError: It was.
    """
    try:
      same = os.path.samestat(os.fstat(self._descriptor), self.path.stat())
    except OSError:
      same = False
    if not same:
      raise CheckpointError(
        f"--workdir={self.path} was removed, moved or replaced while the run "
        "was writing to it; nothing more was written. Put it back (or name "
        "where it is now) and run the same command again: the run goes on "
        "from its last checkpoint"
      )


@contextlib.contextmanager
def open_workdir(path: Path) -> Iterator[Workdir]:
  """Makes the folder, makes sure that one can write into it, and locks it.

  With several processes the first one holds the lock.

  Raises:
    CheckpointError: One cannot write, or another run holds the folder.
  """
  prepare(path)
  with contextlib.ExitStack() as stack:
    descriptor = os.open(path, os.O_RDONLY)
    stack.callback(os.close, descriptor)
    if jax.process_index() == 0:
      stack.callback(os.close, _lock(path))
    yield Workdir(path, descriptor)


def prepare(path: Path) -> None:
  """Makes the folder, and makes sure that one can write into it.

  Raises:
    CheckpointError: One cannot.
  """
  with write_errors(path):
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path) as file:
      # A disk may be so full that a file has a name and no content.
      file.write(b"\0" * 4096)


@contextlib.contextmanager
def write_errors(path: Path) -> Iterator[None]:
  """Turns the system's errors into one that says what to do.

  Raises:
    CheckpointError: What is done inside raised an `OSError`.
  """
  try:
    yield
  except OSError as error:
    raise CheckpointError(
      f"cannot write into --workdir={path} ({error.strerror or error}); what "
      "was saved before is untouched. Free some space, mend the permissions, "
      "or name a folder of yours on a disk with space, and run the same "
      "command again"
    ) from error


def _lock(path: Path) -> int:
  """The descriptor of the lock file, which holds the lock until closed."""
  with write_errors(path):
    descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
  try:
    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    holder = os.pread(descriptor, 1000, 0)
    os.close(descriptor)
    raise CheckpointError(
      f"--workdir={path} is in use by {_describe(holder)}; wait for it, stop "
      "it (SIGTERM saves first), or name another --workdir"
    ) from error
  except OSError as error:
    # Some network file systems have no locks at all.
    logging.warning(
      "%s cannot be locked (%s); make sure that one run alone writes to it",
      path,
      error.strerror,
    )
    return descriptor
  since = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
  holder = json.dumps(
    {"pid": os.getpid(), "host": socket.gethostname(), "since": since}
  ).encode()
  try:
    with write_errors(path):
      os.pwrite(descriptor, holder, 0)
      os.ftruncate(descriptor, len(holder))
  except CheckpointError:
    os.close(descriptor)
    raise
  return descriptor


def _describe(holder: bytes) -> str:
  try:
    values = json.loads(holder)
    return (
      f"process {values['pid']} on {values['host']} since {values['since']}"
    )
  except (ValueError, KeyError, TypeError):
    # It has the lock and has not written who it is, or could not.
    return "another process"
