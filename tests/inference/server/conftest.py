import asyncio
import contextlib
import dataclasses
import threading
import time
import types

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from flax import nnx

from jaxchunk.data.chat import ChatTemplate
from jaxchunk.data.tokenizers import ByteTokenizer
from jaxchunk.inference.core import EngineCore
from jaxchunk.inference.draw import Drawn
from jaxchunk.inference.engine import Engine, EngineConfig
from jaxchunk.inference.scheduler import Limits, StallFree
from jaxchunk.inference.server.app import Server
from jaxchunk.inference.server.metrics import Metrics
from jaxchunk.inference.server.served import Served
from jaxchunk.inference.server.service import EngineService
from jaxchunk.kv.pool import PagePool
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.transformer import Transformer

TEMPLATE = ChatTemplate(
  "{% if tools %}{{ tools | tojson }}{% endif %}"
  "{% for m in messages %}{{ m.role }}:{{ m.content }}\n{% endfor %}"
  "{% if add_generation_prompt %}assistant:{% endif %}"
)
EOS = 258


@dataclasses.dataclass
class FakeTicket:
  works: list
  tokens: list

  def result(self):
    number = len(self.works)
    if not number:
      return None
    tops = np.tile(np.arange(20), (number, 1))
    return Drawn(
      np.asarray(self.tokens),
      np.full(number, -0.5),
      tops,
      np.tile(-1.0 - np.arange(20), (number, 1)),
    )


class FakeRunner:
  """Says a text again and again; EOS is "$"."""

  def __init__(self, text="hello "):
    self.text, self.seconds, self.error = text, 0.0, None
    self.plans = []

  def dispatch(self, plan):
    time.sleep(self.seconds)
    if self.error is not None:
      raise self.error
    self.plans.append(plan.tokens)
    works = [work for work in plan.works if work.draws]
    return FakeTicket(works, [self._next(work.sequence) for work in works])

  def _next(self, sequence):
    data = self.text.encode()
    byte = data[(sequence.length - 1 - sequence.prompt_length) % len(data)]
    return EOS if byte == ord("$") else byte

  def now(self):
    return time.monotonic()


def fake_engine(text="hello ", *, sequences=4, pages=64, length=256):
  """An engine whose model is not there."""
  runner, tokenizer = FakeRunner(text), ByteTokenizer()
  limits = Limits(
    tokens=16, sequences=sequences, prompts=4, shapes=(1, 2, 4, 8, 16)
  )
  core = EngineCore(
    runner,
    StallFree(limits, PagePool(pages, 16)),
    vocab_size=259,
    max_length=length,
    tokenizer=tokenizer,
    ends=(EOS,),
    adapters={"poems": 0},
  )
  return types.SimpleNamespace(
    core=core,
    cores=[core],
    runner=runner,
    tokenizer=tokenizer,
    max_length=core.max_length,
    config=EngineConfig(max_sequences=sequences, step_tokens=16),
  )


def fake_served(text="hello ", **sizes):
  adapters = ("poems",)
  return Served(
    engine=fake_engine(text, **sizes),
    name="tiny",
    adapters=adapters,
    template=TEMPLATE,
  )


@contextlib.asynccontextmanager
async def serving(served, *, max_queue=8, **options):
  """A server in this loop: a client's session, and the service."""
  metrics = Metrics()
  service = EngineService(served.engine, max_queue=max_queue, watch=metrics)
  metrics.read(service)
  server = Server(served, service, metrics, **options)
  runner = server.runner(send_seconds=1.0)
  await runner.setup()
  await web.TCPSite(runner, "127.0.0.1", 0).start()
  service.start()
  host, port = runner.addresses[0][:2]
  try:
    async with aiohttp.ClientSession(f"http://{host}:{port}") as session:
      yield session, service
  finally:
    await runner.cleanup()
    await service.stop()


class Background:
  """A server in a thread of its own, for clients that wait."""

  def __init__(self, served, **options):
    self._served, self._options = served, options
    self._up = threading.Event()
    self._thread = threading.Thread(target=asyncio.run, args=(self._main(),))

  async def _main(self):
    self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
    async with serving(self._served, **self._options) as (session, service):
      self.service = service
      self.address = str(session._base_url).rstrip("/")
      self._up.set()
      await self._stop.wait()

  def __enter__(self):
    self._thread.start()
    assert self._up.wait(30)
    return self

  def __exit__(self, *_):
    self._loop.call_soon_threadsafe(self._stop.set)
    self._thread.join()


@pytest.fixture(scope="session")
def real_engine():
  """A random model of bytes."""
  cfg = ModelConfig(
    vocab_size=259,
    d_model=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=16,
    d_ff=32,
  )
  return Engine(
    Transformer(cfg, rngs=nnx.Rngs(0)),
    ByteTokenizer(),
    max_length=256,
    max_sequences=4,
    step_tokens=4,
    num_pages=64,
    page_size=16,
    query_block=16,
  )


async def idle(service, seconds=10.0):
  """Waits until nothing runs; pages held must be none then."""
  async with asyncio.timeout(seconds):
    while service.num_open or service.snapshot.pages_held:
      await asyncio.sleep(0.01)
