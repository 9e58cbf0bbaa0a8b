"""Names process 0 where jax ends a process before that can do it itself.

When process 0 dies, jax aborts the others in the moment it learns of it, with a
message that names nobody; no thread of Python is sure to come first. So each
starts this script, which holds a line to process 0 of its own and speaks if
its starter is gone without a word and that line is cut. It imports nothing of
jaxchunk: it has to start at once, and stay small.
"""

import contextlib
import os
import select
import socket
import subprocess
import sys

_PATIENCE = 2.0
"""Seconds for news of two deaths that are one event."""


class LastWords:
  """The script beside this process, until it is dismissed.

  Args:
    host: Of process 0.
    port: Where it takes calls.
    words: The line for stderr.
  """

  def __init__(self, host: str, port: int, words: str):
    self._process = subprocess.Popen(
      # Isolated, as its own folder has modules with common names.
      [sys.executable, "-I", "-S", __file__, host, str(port), words],
      stdin=subprocess.PIPE,
      stdout=subprocess.DEVNULL,
      # An interrupt from a terminal is not for it.
      start_new_session=True,
    )

  def dismiss(self) -> None:
    """Ends it, as this process can speak for itself or has nothing to say."""
    self._process.kill()
    self._process.communicate()


def _main() -> None:
  host, port, words = sys.argv[1:]
  with socket.create_connection((host, int(port)), timeout=10) as line:
    select.select([sys.stdin], [], [])
    if select.select([line], [], [], _PATIENCE)[0]:
      os.write(2, f"{words}\n".encode())


if __name__ == "__main__":
  # Without a line, as through a firewall, there is nothing to tell.
  with contextlib.suppress(OSError):
    _main()
