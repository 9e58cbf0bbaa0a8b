"""The script that speaks for a process which jax has ended."""

import contextlib
import socket
import subprocess
import sys
import time

import pytest

from jaxchunk.training import last_words

WORDS = "train.py: process 0 died"


@pytest.fixture
def leader():
  with socket.create_server(("127.0.0.1", 0)) as server:
    server.settimeout(20)
    yield server


@contextlib.contextmanager
def start(leader):
  port = str(leader.getsockname()[1])
  process = subprocess.Popen(
    [sys.executable, "-I", last_words.__file__, "127.0.0.1", port, WORDS],
    stdin=subprocess.PIPE,
    stderr=subprocess.PIPE,
  )
  with process, leader.accept()[0] as line:
    yield process, line


@pytest.mark.fast
@pytest.mark.parametrize("first", ["starter", "leader"])
def test_speaks_when_both_are_gone(leader, first):
  with start(leader) as (process, line):
    ends = [process.stdin.close, line.close]
    for end in ends if first == "starter" else reversed(ends):
      end()
      time.sleep(0.1)
    assert process.stderr.read().decode() == f"{WORDS}\n"
    assert process.wait(20) == 0


@pytest.mark.fast
def test_is_silent_while_process_0_lives(leader):
  with start(leader) as (process, _):
    process.stdin.close()
    assert process.stderr.read() == b""
    assert process.wait(20) == 0


@pytest.mark.fast
def test_is_silent_when_dismissed(leader, capfd):
  port = leader.getsockname()[1]
  words = last_words.LastWords("127.0.0.1", port, WORDS)
  with leader.accept()[0]:
    words.dismiss()
  assert words._process.returncode < 0
  assert capfd.readouterr().err == ""
