"""A thread that runs the engine, and coroutines that wait for its events.

Everything that touches the engine happens in the thread: others leave word in
an inbox, which it looks into between steps and sleeps on when there is nothing
to do. What the engine brings goes back to the event loop in one call a step.
"""

import asyncio
import dataclasses
import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any, Literal, Protocol

from jaxchunk.inference.core import CoreStats, EngineCore, Request
from jaxchunk.inference.engine import Engine
from jaxchunk.inference.output import Event
from jaxchunk.inference.replicas import Replicas, add_stats
from jaxchunk.inference.server import errors
from jaxchunk.inference.server.errors import ApiError

State = Literal["running", "draining", "failed", "stopped"]

# How often at most the engine's state is written down, in seconds.
_PUBLISH = 0.1
# Over how many seconds a speed is taken.
_WINDOW = 5.0


@dataclasses.dataclass(frozen=True)
class Row:
  """A sequence that runs.

  Attributes:
    request_id: Of its request.
    index: Which of the request's continuations.
    prompt_tokens: Of its prompt.
    computed: Tokens whose keys are known.
    new_tokens: So far.
    pages: That it holds.
    adapter: Its number, -1 for none.
    preemptions: How often it lost its pages.
  """

  request_id: str
  index: int
  prompt_tokens: int
  computed: int
  new_tokens: int
  pages: int
  adapter: int
  preemptions: int


@dataclasses.dataclass(frozen=True)
class Snapshot:
  """The engine at a moment.

  Attributes:
    time: When, by `time.monotonic`.
    rows: Sequences that run.
    waiting: Sequences that wait for room.
    pages_held: That somebody holds.
    pages_total: That there are.
    page_size: Tokens in each.
    pages_asked: Full pages of prompts that were looked for so far.
    pages_found: Of these, those that were known.
    stats: Of the core.
  """

  time: float
  rows: tuple[Row, ...]
  waiting: int
  pages_held: int
  pages_total: int
  page_size: int
  pages_asked: int
  pages_found: int
  stats: CoreStats


def take_snapshot(cores: Sequence[EngineCore]) -> Snapshot:
  """Writes down how an engine stands; for the thread that runs it.

  Args:
    cores: Of its copies of the model.
  """
  pools = [core.scheduler.pool for core in cores]
  rows = tuple(
    Row(
      request_id=s.request_id,
      index=s.index,
      prompt_tokens=s.prompt_length,
      computed=s.computed,
      new_tokens=s.generated,
      pages=len(s.pages),
      adapter=s.adapter,
      preemptions=s.preemptions,
    )
    for core in cores
    for s in core.scheduler.running
  )
  return Snapshot(
    time=time.monotonic(),
    rows=rows,
    waiting=sum(core.scheduler.num_waiting for core in cores),
    pages_held=sum(pool.held for pool in pools),
    pages_total=sum(pool.num_pages for pool in pools),
    page_size=pools[0].page_size,
    pages_asked=sum(pool.stats.asked for pool in pools),
    pages_found=sum(pool.stats.found for pool in pools),
    stats=add_stats(core.stats for core in cores),
  )


class Watch(Protocol):
  """Told how long things take, in seconds."""

  def first_token(self, seconds: float) -> None:
    """From a request to the first token of a continuation."""

  def next_token(self, seconds: float) -> None:
    """From a token to the next of the same continuation."""


class Stream:
  """Events of requests that were handed in together; closing it cancels them.

  async with stream:
    async for event in stream:
      ...

  It ends when all continuations have. Made by `EngineService.submit`.
  """

  def __init__(self, service: "EngineService", requests: Sequence[Request]):
    self.requests = tuple(requests)
    self.began = time.monotonic()
    self.left = sum(request.params.n for request in requests)
    self.accepted = asyncio.get_running_loop().create_future()
    self._service = service
    self._events: asyncio.Queue[Event | ApiError] = asyncio.Queue()
    self._last: dict[tuple[str, int], float] = {}
    self._finished = 0
    self._number = self.left

  def put(self, item: Event | ApiError) -> None:
    """Hands on an event; for the service."""
    self._events.put_nowait(item)

  def seconds_since(self, event: Event, now: float) -> tuple[bool, float]:
    """Whether it is a continuation's first, and the time since the last."""
    key = event.sequence.request_id, event.sequence.index
    last = self._last.get(key)
    self._last[key] = now
    return last is None, now - (self.began if last is None else last)

  def __aiter__(self) -> "Stream":
    return self

  async def __anext__(self) -> Event:
    if self._finished == self._number:
      raise StopAsyncIteration
    item = await self._events.get()
    if isinstance(item, ApiError):
      raise item
    if item.finish_reason is not None:
      self._finished += 1
    return item

  async def __aenter__(self) -> "Stream":
    return self

  async def __aexit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    trace: TracebackType | None,
  ) -> None:
    self.close()

  def close(self) -> None:
    """Cancels what still runs."""
    if self.left:
      self._service.cancel(self)


class EngineService:
  """Serves an engine to many coroutines of one event loop.

  Args:
    engine: Nobody else may use it from now on.
    max_queue: Continuations that may wait beside those that run.
    watch: Told of times.
  """

  def __init__(
    self, engine: Engine, *, max_queue: int = 256, watch: Watch | None = None
  ):
    if max_queue < 0:
      raise ValueError(f"max_queue={max_queue} must not be negative")
    self.engine, self.max_queue = engine, max_queue
    self.capacity = max_queue + engine.config.max_sequences
    self.state: State = "running"
    self.snapshot = take_snapshot(engine.cores)
    self._watch = watch
    self._inbox: queue.SimpleQueue[Callable[[], None] | None] = (
      queue.SimpleQueue()
    )
    self._open: set[Stream] = set()
    self._empty = asyncio.Event()
    self._empty.set()
    # By request, and how many of its continuations run; only the thread's.
    self._streams: dict[str, Stream] = {}
    self._left: dict[str, int] = {}
    self._speeds: tuple[tuple[float, int], ...] = ()
    self._loop: asyncio.AbstractEventLoop | None = None
    self._thread = threading.Thread(
      target=self._main, name="jaxchunk-engine", daemon=True
    )

  def start(self) -> None:
    """Starts the thread; events go to the loop that runs now."""
    self._loop = asyncio.get_running_loop()
    self._thread.start()

  @property
  def num_open(self) -> int:
    """Continuations that were taken and have not ended."""
    return sum(stream.left for stream in self._open)

  async def submit(self, requests: Request | Sequence[Request]) -> Stream:
    """Takes requests; all of them or none.

    Returns:
      Their events. It has to be closed.

    Raises:
      RequestError: One cannot be served as it is; says why.
      ApiError: The engine has no room, goes down, or has failed.
    """
    if isinstance(requests, Request):
      requests = [requests]
    number = sum(request.params.n for request in requests)
    if self.state == "failed":
      raise errors.failed()
    if self.state != "running":
      raise errors.draining()
    if number > self.capacity:
      raise errors.invalid(
        f"the request asks for {number} continuations at once; at most "
        f"{self.capacity} are taken",
        "n",
      )
    if self.num_open + number > self.capacity:
      raise errors.overloaded(self.max_queue)
    stream = Stream(self, requests)
    self._open.add(stream)
    self._empty.clear()
    self._inbox.put(lambda: self._add(stream))
    try:
      await stream.accepted
    except asyncio.CancelledError:
      stream.close()
      raise
    return stream

  def cancel(self, stream: Stream) -> None:
    """Ends what a stream still waits for."""
    self._inbox.put(lambda: self._cancel(stream))

  def abort(self) -> None:
    """Ends all that runs or waits."""
    for stream in tuple(self._open):
      self.cancel(stream)

  async def drain(self, grace: float) -> bool:
    """Takes nothing new, lets the rest finish, and then ends it.

    Args:
      grace: How many seconds the rest has.

    Returns:
      Whether all of it finished.
    """
    if self.state == "running":
      self.state = "draining"
    if await self._emptied(grace):
      return True
    self.abort()
    await self._emptied(grace=30.0)
    return False

  async def _emptied(self, grace: float) -> bool:
    try:
      await asyncio.wait_for(self._empty.wait(), max(grace, 0.0))
    except TimeoutError:
      return self._empty.is_set()
    return True

  async def stop(self) -> None:
    """Ends all that runs, and the thread."""
    if self.state != "failed":
      self.state = "stopped"
    self.abort()
    self._inbox.put(None)
    await asyncio.to_thread(self._thread.join)
    # What the thread left for this loop.
    await asyncio.sleep(0)

  def tokens_per_second(self) -> float:
    """New tokens of the last seconds."""
    now = time.monotonic()
    speeds = [pair for pair in self._speeds if now - pair[0] <= _WINDOW]
    return sum(tokens for _, tokens in speeds) / _WINDOW

  def _main(self) -> None:
    try:
      while self._look_into_inbox():
        self._step()
      for name in self._streams:
        self._core.cancel(name)
      while self._core.has_work:
        self._step()
    except BaseException:
      logging.getLogger("jaxchunk").exception("the engine has failed")
      self._call(self._fail)

  @property
  def _core(self) -> EngineCore | Replicas:
    return self.engine.core

  def _step(self) -> None:
    if self._core.has_work:
      self._deliver(self._core.step())
    self._publish()

  def _look_into_inbox(self) -> bool:
    """Does what was asked for; sleeps while there is nothing at all to do."""
    while True:
      try:
        word = self._inbox.get(block=not self._core.has_work)
      except queue.Empty:
        return True
      if word is None:
        return False
      word()

  def _add(self, stream: Stream) -> None:
    taken: list[str] = []
    try:
      for request in stream.requests:
        self._core.check(request)
      for request in stream.requests:
        self._core.add(request)
        taken.append(request.request_id)
    except Exception as error:
      # Nothing has changed for the others, whatever it is.
      for name in taken:
        self._core.cancel(name)
      self._call(self._refuse, stream, error)
      return
    for request in stream.requests:
      self._streams[request.request_id] = stream
      self._left[request.request_id] = request.params.n
    self._call(self._accept, stream)

  def _cancel(self, stream: Stream) -> None:
    for request in stream.requests:
      if self._streams.get(request.request_id) is stream:
        self._core.cancel(request.request_id)

  def _deliver(self, events: list[Event]) -> None:
    found = []
    for event in events:
      name = event.sequence.request_id
      stream = self._streams.get(name)
      # Of requests that were refused together there may be a last word.
      if stream is None:
        continue
      found.append((stream, event))
      if event.finish_reason is not None:
        self._left[name] -= 1
        if not self._left[name]:
          del self._left[name], self._streams[name]
    if found:
      self._call(self._receive, found)

  def _publish(self) -> None:
    now = time.monotonic()
    before = self.snapshot
    if self._core.has_work and now - before.time < _PUBLISH:
      return
    after = take_snapshot(self.engine.cores)
    new = after.stats.new_tokens - before.stats.new_tokens
    recent = (pair for pair in self._speeds if now - pair[0] <= _WINDOW)
    self._speeds = (*recent, (now, new))
    self.snapshot = after

  def _call(self, function: Callable[..., Any], *arguments: Any) -> None:
    """Runs something in the event loop, if it still runs."""
    assert self._loop is not None
    try:
      self._loop.call_soon_threadsafe(function, *arguments)
    except RuntimeError:
      # The loop was closed: nobody waits any more.
      self._inbox.put(None)

  def _accept(self, stream: Stream) -> None:
    if not stream.accepted.done():
      stream.accepted.set_result(None)

  def _refuse(self, stream: Stream, error: Exception) -> None:
    stream.left = 0
    self._close(stream)
    if not stream.accepted.done():
      stream.accepted.set_exception(error)

  def _receive(self, found: list[tuple[Stream, Event]]) -> None:
    now = time.monotonic()
    for stream, event in found:
      if event.tokens and self._watch is not None:
        first, seconds = stream.seconds_since(event, now)
        if first:
          self._watch.first_token(seconds)
        else:
          self._watch.next_token(seconds)
      stream.put(event)
      if event.finish_reason is not None:
        stream.left -= 1
        if not stream.left:
          self._close(stream)

  def _close(self, stream: Stream) -> None:
    self._open.discard(stream)
    if not self._open:
      self._empty.set()

  def _fail(self) -> None:
    self.state = "failed"
    for stream in tuple(self._open):
      stream.left = 0
      if not stream.accepted.done():
        stream.accepted.set_exception(errors.failed())
      stream.put(errors.failed())
      self._close(stream)
