"""Who has come to a run that has not begun.

Until all processes are there they cannot talk through jax, which then ends
each with a message that names none. So they leave files in the work folder,
written again every second: what changes while one looks is there.
"""

import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from jax._src import distributed as jax_distributed

FOLDER = ".processes"
_SECONDS = 1.0


class Attendance:
  """Ends the process, with the names of those missing, if not all come.

  To be entered while `jax.distributed.initialize` is called.

  Args:
    workdir: A folder that all processes share.
    timeout: Seconds to wait for the others.
    leave: Called with what to say; does not return.
  """

  def __init__(
    self, workdir: Path, timeout: float, leave: Callable[[str], Any]
  ):
    self._folder = workdir / FOLDER
    self._timeout, self._leave = timeout, leave
    self._complete = threading.Event()
    self._thread = threading.Thread(
      target=self._watch, name="attendance", daemon=True
    )

  def __enter__(self) -> Self:
    # Whether one can write there is found out later, with a better message.
    with contextlib.suppress(OSError):
      self._folder.mkdir(parents=True, exist_ok=True)
    self._thread.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self._complete.set()
    self._thread.join()
    with contextlib.suppress(OSError):
      self._file().unlink()
      self._folder.rmdir()

  def _file(self) -> Path:
    return self._folder / str(jax_distributed.global_state.process_id)

  def _watch(self) -> None:
    deadline = time.monotonic() + self._timeout
    first = self._read()
    beats = 0
    while not self._complete.wait(_SECONDS):
      beats += 1
      if jax_distributed.global_state.num_processes > 1:
        self._write(beats)
      if time.monotonic() > deadline:
        present = {
          number: text
          for number, text in self._read().items()
          if text != first.get(number)
        }
        self._leave(self._missing(present))

  def _write(self, beats: int) -> None:
    values = {
      "host": socket.gethostname(),
      "pid": os.getpid(),
      "processes": jax_distributed.global_state.num_processes,
      "beats": beats,
    }
    with contextlib.suppress(OSError):
      self._file().write_text(json.dumps(values))

  def _read(self) -> dict[int, str]:
    found = {}
    with contextlib.suppress(OSError):
      for path in self._folder.iterdir():
        if path.name.isdigit():
          found[int(path.name)] = path.read_text()
    return found

  def _missing(self, present: dict[int, str]) -> str:
    """Who is not there, and who says that there are more or fewer."""
    state = jax_distributed.global_state
    count, me = state.num_processes, state.process_id
    absent = [n for n in range(count) if n not in present and n != me]
    places = []
    for number, text in sorted(present.items()):
      with contextlib.suppress(ValueError, KeyError):
        values = json.loads(text)
        say = f"{number} on {values['host']}"
        if values["processes"] != count:
          say += f", which says that there are {values['processes']}"
        places.append(say)
    return (
      f"process {me}: of {count} processes {absent or 'none'} did not come "
      f"within {self._timeout:.0f} s to {state.coordinator_address} (there "
      f"are: {'; '.join(places)}); start those, or raise "
      "processes.startup_timeout"
    )
