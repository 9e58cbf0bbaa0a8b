"""Processes that watch each other, because a collective waits for ever.

Every process tells the key-value store of process 0 that it lives and which
step it has begun. Process 0 looks for one that is silent or that the others
wait for, and writes a verdict; the others wait for that, and for process 0
itself. Then all end with a line that names the process. jax's own heartbeat
comes later, and sees neither a main thread that hangs nor which process it is.
"""

import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

import jax

from jaxchunk.training import distributed
from jaxchunk.training.config import ProcessesConfig
from jaxchunk.training.last_words import LastWords

_NOBODY = ""
_DAY = 86_400
_MS = 3_600_000
_RESUME = (
  "start all processes again with the same command: the run goes on from its "
  "last checkpoint"
)


@dataclasses.dataclass
class Peer:
  """What one process knows of another.

  Attributes:
    place: Its host and process id there.
    step: The one it has begun; 0 before the first.
    ended: Whether it is done, and waits for the others.
    heard: When its last sign of life came, on this process's clock.
    moved: When it began its step, likewise.
    beats: How many signs of life it has given.
  """

  place: Mapping[str, Any]
  step: int
  ended: bool
  heard: float
  moved: float
  beats: int = -1

  def update(self, values: Mapping[str, Any], now: float) -> None:
    """Takes in what it last said."""
    if values["beats"] != self.beats:
      self.beats, self.heard = values["beats"], now
    if (values["step"], values["ended"]) != (self.step, self.ended):
      self.step, self.ended, self.moved = values["step"], values["ended"], now
    self.place = values


def judge(
  peers: Mapping[int, Peer], now: float, options: ProcessesConfig
) -> str | None:
  """Which process holds up the others, if one does, and why.

  Args:
    peers: All processes that have been heard of.
    now: On the clock of `heard` and `moved`.
    options: How long each may take.
  """
  for number, peer in sorted(peers.items()):
    silent = now - peer.heard
    if silent > options.silence_timeout and not peer.ended:
      return (
        f"{distributed.describe(number, peer.place)} has given no sign of life "
        f"for {silent:.0f} s, at step {peer.step}: it died, hangs, or cannot "
        "be reached"
      )
  running = {n: p for n, p in peers.items() if not p.ended}
  if not running:
    return None
  number, last = min(running.items(), key=lambda item: item[1].step)
  ahead = [p for p in running.values() if p.step > last.step]
  if not ahead:
    return None
  # Compiling before the first step may take any time, and longer on one.
  patience = options.stall_timeout if last.step else options.startup_timeout
  waited = now - max(last.moved, min(p.moved for p in ahead))
  if waited < patience:
    return None
  return (
    f"{distributed.describe(number, last.place)} hangs: it lives, and has been "
    f"at step {last.step} for {now - last.moved:.0f} s while others wait for "
    "it in a later one"
  )


class Watchdog:
  """Ends this process when another died, hangs or failed; names that one.

  To be entered by the main thread of each process, around all that they do
  together. Alone it does nothing.

  Args:
    options: How long to wait for what.
  """

  def __init__(self, options: ProcessesConfig):
    self._options = options
    folder = distributed.new_folder()
    self._beats, self._verdict = f"{folder}/beats", f"{folder}/verdict"
    self._leader = "process 0"
    self._interval = max(0.2, options.silence_timeout / 15)
    self._step = 0
    self._ended = self._failing = False
    self._sent = time.monotonic()
    self._stop = threading.Event()
    self._threads = [
      threading.Thread(target=work, name=work.__name__, daemon=True)
      for work in (self._beat, self._listen, self._watch, self._hold)
    ]
    self._line: socket.socket | None = None
    self._last_words: LastWords | None = None

  def begins(self, step: int) -> None:
    """Tells that this process is about to dispatch a step."""
    self._step = step

  def __enter__(self) -> Self:
    if distributed.count() > 1:
      if distributed.leads():
        # Without one the heartbeats are left.
        with contextlib.suppress(OSError):
          self._line = socket.create_server((distributed.leader_host(), 0))
      for thread in self._threads:
        thread.start()
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    if distributed.count() == 1:
      return
    if error is not None:
      self._fail(error)
      self._stop.set()
      return
    self._ended = True
    self._dismiss()
    # Process 0 holds the store, and must not leave first.
    distributed.gather("end of the run", None, timeout=_DAY)
    self._stop.set()
    if distributed.leads():
      self._accuse(_NOBODY)
      self._hang_up()
    for thread in self._threads:
      thread.join()

  def _fail(self, error: BaseException) -> None:
    """Tells the others, unless another process is the cause."""
    if _is_consequence(error):
      # Long enough that its silence is noticed; then this does not return.
      time.sleep(self._options.silence_timeout + 3 * self._interval)
    self._failing = True
    self._dismiss()
    text = (str(error).splitlines() or [""])[0][:300]
    self._accuse(
      f"{distributed.describe(distributed.index(), distributed.here())} ended "
      f"with {type(error).__name__}: {text}"
    )
    if distributed.leads():
      # Until they have read it.
      time.sleep(2 * self._interval)

  def _accuse(self, verdict: str) -> None:
    # The first one counts.
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      distributed.client().key_value_set(self._verdict, verdict)

  def _beat(self) -> None:
    """Tells that this process lives."""
    key, beats = f"{self._beats}/{distributed.index()}", 0
    place = distributed.here()
    place["port"] = self._line and self._line.getsockname()[1]
    while not self._stop.wait(self._interval if beats else 0):
      beats += 1
      values = {"step": self._step, "ended": self._ended, "beats": beats}
      with contextlib.suppress(jax.errors.JaxRuntimeError):
        distributed.client().key_value_set(
          key, json.dumps({**place, **values}), allow_overwrite=True
        )
        self._sent = time.monotonic()

  def _listen(self) -> None:
    """Waits for a verdict, or for the end of process 0."""
    store, verdict = distributed.client(), None
    while verdict is None and not self._stop.is_set():
      try:
        verdict = store.blocking_key_value_get(self._verdict, _MS)
      except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
          # jax is about to end this process; its message names none.
          verdict = f"{self._leader} died, or cannot be reached"
    if verdict:
      self._obey(verdict)

  def _hold(self) -> None:
    """Keeps a line to process 0, which the system cuts when that ends.

    jax, too, ends this process then: at once, in the thread that would tell
    `_listen`, and with a message that names nobody. It may even come first.
    """
    if distributed.leads():
      self._answer()
      return
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      text = distributed.client().blocking_key_value_get(
        f"{self._beats}/0", _MS
      )
      first = json.loads(text)
      self._leader = distributed.describe(0, first)
      address = (distributed.leader_host(), first["port"])
      if first["port"]:
        self._prepare(address)
      held = 0
      while first["port"] and _held(address):
        held += 1
      # A line that never was, as through a firewall, says nothing.
      if held and not self._ended:
        self._obey(f"{self._leader} died")

  def _prepare(self, address: tuple[str, int]) -> None:
    verdict = distributed.as_line(self._message(f"{self._leader} died"))
    # Where no process may be started the rest does what it can.
    with contextlib.suppress(OSError):
      self._last_words = LastWords(*address, verdict)
    if self._ended or self._failing:
      self._dismiss()

  def _answer(self) -> None:
    """Takes the calls of the others, and holds the lines until the end."""
    lines = []
    # Until it is shut down.
    with contextlib.suppress(OSError):
      while self._line is not None:
        lines.append(self._line.accept()[0])
    for line in lines:
      line.close()

  def _hang_up(self) -> None:
    """Ends `_hold` of process 0, and so those of the others."""
    if self._line is not None:
      self._line.shutdown(socket.SHUT_RDWR)
      self._line.close()

  def _watch(self) -> None:
    """Looks for a process that holds up the others."""
    peers: dict[int, Peer] = {}
    looked = time.monotonic()
    while not self._stop.wait(self._interval):
      now = time.monotonic()
      if now - looked > self._options.silence_timeout / 2:
        # This one was stopped itself, and cannot blame others for silence.
        peers, self._sent = {}, now
      looked = now
      if not distributed.leads():
        silent = now - self._sent
        if silent > self._options.silence_timeout:
          self._obey(f"{self._leader} has not answered for {silent:.0f} s")
        continue
      self._read(peers, now)
      if verdict := judge(peers, now, self._options):
        self._accuse(verdict)

  def _read(self, peers: dict[int, Peer], now: float) -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      for key, text in distributed.client().key_value_dir_get(self._beats):
        values = json.loads(text)
        number = int(key.rsplit("/", 1)[1])
        new = Peer(values, values["step"], values["ended"], now, now)
        peers.setdefault(number, new).update(values, now)

  def _obey(self, verdict: str) -> None:
    if self._failing or self._stop.is_set():
      return
    if distributed.leads():
      # The others read it from this process.
      time.sleep(2 * self._interval)
    self._dismiss()
    distributed.leave(self._message(verdict))

  def _message(self, verdict: str) -> str:
    index = distributed.index()
    return f"{verdict}. Process {index} ends because of it; {_RESUME}"

  def _dismiss(self) -> None:
    if self._last_words is not None:
      self._last_words.dismiss()


def _held(address: tuple[str, int]) -> bool:
  """Whether a line to an address came about; returns when it is cut."""
  try:
    with socket.create_connection(address, timeout=10) as line:
      line.settimeout(None)
      with contextlib.suppress(ConnectionError):
        line.recv(1)
  except OSError:
    return False
  return True


def _is_consequence(error: BaseException | None) -> bool:
  """Whether jax raised it, as it does when a peer of a collective dies."""
  while error is not None:
    if isinstance(error, jax.errors.JaxRuntimeError):
      return not str(error).startswith(("RESOURCE_EXHAUSTED", "INVALID"))
    error = error.__cause__ or error.__context__
  return False
