"""A server under good, broken and interrupted requests, killed meanwhile.

  python benchmarks/server_faults.py [--requests=10000] [--seed=0] [--kills=3]

A tiny random model behind scripts/serve.py, on this machine alone. Clients
send a seeded mix: completions and streams, some given up or cut off on the way,
and bodies that are no JSON, no UTF-8, too large or absurd. During the first
part the server is killed and started again; a request that was lost by that is
sent again. Every greedy answer that was completed has to be the engine's own,
every broken body has to be refused by a JSON error, and nothing may hang. At
the end no page may be held, and SIGTERM has to end the server by itself.
"""

import asyncio
import collections
import contextlib
import dataclasses
import io
import json
import os
import pathlib
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import aiohttp
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from common import report, rounded
from flax import nnx

from jaxchunk.data.config import DataConfig
from jaxchunk.data.tokenizers import ByteTokenizer
from jaxchunk.inference.engine import EngineConfig
from jaxchunk.inference.params import SamplingParams
from jaxchunk.inference.server.load import load_served
from jaxchunk.models.config import ModelConfig
from jaxchunk.training import checkpoint
from jaxchunk.training.config import Config, to_json
from jaxchunk.training.initial import abstract_model

_REQUESTS = flags.DEFINE_integer("requests", 10_000, "How many.", 1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the mix.")
_KILLS = flags.DEFINE_integer("kills", 3, "How often it is killed.", 0)
_CLIENTS = flags.DEFINE_integer("clients", 16, "At a time.", 1)

SERVE = pathlib.Path(__file__).parents[1] / "scripts" / "serve.py"
_BODY_BYTES = 2**18
# A request that takes longer hangs.
_PATIENCE = 60.0
# Of the requests, the part during which the server is killed.
_ROUGH = 0.3
_MIX = {
  "answer": 38,
  "stream": 22,
  "given up": 8,
  "cut off": 10,
  "no JSON": 6,
  "no UTF-8": 4,
  "too large": 3,
  "absurd": 9,
}
_NO_JSON = (
  b"",
  b"{",
  b"[1, 2",
  b'{"prompt": NaN}',
  b"[" * 5000,
  b"null",
  b"'a'",
)
_ABSURD: tuple[dict[str, Any], ...] = (
  {"temperature": -1},
  {"temperature": "hot"},
  {"temperature": 10**400},
  {"top_p": 2},
  {"n": 10**6},
  {"n": 100, "prompt": ["a"] * 100},
  {"max_tokens": 10**9},
  {"max_tokens": -1},
  {"logit_bias": {"-1": 5}},
  {"logit_bias": {"9999": 5}},
  {"prompt": []},
  {"prompt": [[-5]]},
  {"prompt": [2**63]},
  {"prompt": [258, 259]},
  {"prompt": {"a": 1}},
  {"prompt": "a" * 5000},
  {"stop": [""]},
  {"stop": ["a"] * 99},
  {"seed": "x"},
  {"model": "nothing"},
  {"tempreature": 1},
  {"response_format": {"type": "poem"}},
  {"stream_options": {"include_usage": True}},
)


@dataclasses.dataclass(frozen=True)
class Question:
  """A prompt, and what the engine says to it without a server."""

  prompt: str
  max_tokens: int
  text: str


class Failure(Exception):
  """The server did what it must not."""


def make_run(folder: pathlib.Path) -> None:
  """The workdir of a run whose weights are random."""
  cfg = ModelConfig(
    vocab_size=259, d_model=64, num_layers=2, num_heads=4, d_ff=64
  )
  config = Config(model=cfg, data=DataConfig(tokenizer="byte"))
  _, state, _ = abstract_model(cfg)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(0.2 * rng.standard_normal(leaf.shape), leaf.dtype),
    nnx.to_pure_dict(state),
  )
  with checkpoint.open_manager(folder, config.checkpoint) as manager:
    checkpoint.write(
      manager,
      1,
      arrays={
        "params": params,
        "optimizer": {"count": jnp.zeros((), jnp.int32)},
      },
      meta={"config": to_json(config)},
    )
  ByteTokenizer().save(folder / checkpoint.TOKENIZER)


def make_questions(
  folder: pathlib.Path, config: EngineConfig, seed: int, number: int = 64
) -> list[Question]:
  """Prompts, some with equal beginnings, and the engine's own answers."""
  rng = random.Random(f"prompts-{seed}")
  letters = "abcdefghijklmnopqrstuvwxyz é"
  begins = ["".join(rng.choices(letters, k=64)) for _ in range(4)]
  prompts = [
    rng.choice([*begins, "", ""])
    + "".join(rng.choices(letters, k=rng.randint(1, 60)))
    for _ in range(number)
  ]
  lengths = [rng.randint(1, 32) for _ in prompts]
  engine = load_served(workdir=str(folder), config=config).engine
  answers = engine.generate(
    prompts, [SamplingParams(temperature=0, max_tokens=n) for n in lengths]
  )
  return [
    Question(prompt, length, answer.text)
    for prompt, length, answer in zip(prompts, lengths, answers, strict=True)
  ]


class Process:
  """scripts/serve.py as a process that may be killed."""

  def __init__(self, folder: pathlib.Path, config: EngineConfig):
    self._folder, self._config = folder, config
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      self.port = free.getsockname()[1]
    self.lives, self.start_seconds = 0, 0.0
    self.up = asyncio.Event()

  async def start(self) -> None:
    """Starts it, and waits until it listens."""
    began = time.perf_counter()
    path = self._folder / f"server-{self.lives}.log"
    with path.open("wb") as log:
      self._process = await self._spawn(log)
    assert self._process.stdout is not None
    if not await self._process.stdout.readline():
      raise RuntimeError(path.read_text()[-2000:])
    self.lives += 1
    self.start_seconds += time.perf_counter() - began
    self.up.set()

  async def _spawn(self, log: Any) -> asyncio.subprocess.Process:
    config = self._config
    return await asyncio.create_subprocess_exec(
      sys.executable,
      str(SERVE),
      f"--workdir={self._folder}",
      "--served_model_name=tiny",
      f"--port={self.port}",
      f"--max_sequences={config.max_sequences}",
      f"--step_tokens={config.step_tokens}",
      f"--max_length={config.max_length}",
      f"--page_size={config.page_size}",
      f"--kv_gib={config.kv_gib}",
      f"--max_body_mb={_BODY_BYTES / 2**20}",
      env={**os.environ, "PYTHONUNBUFFERED": "1"},
      stdout=subprocess.PIPE,
      stderr=log,
    )

  async def kill(self) -> None:
    """Ends it as a power failure would."""
    self.up.clear()
    with contextlib.suppress(ProcessLookupError):
      self._process.kill()
    await self._process.wait()

  async def stop(self) -> int:
    """Asks it to end; its exit code."""
    self.up.clear()
    self._process.send_signal(signal.SIGTERM)
    return await asyncio.wait_for(self._process.wait(), _PATIENCE)

  def resident_mb(self) -> float:
    """Memory that it has in use."""
    text = pathlib.Path(f"/proc/{self._process.pid}/status").read_text()
    line = next(s for s in text.splitlines() if s.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


class Clients:
  """Send requests and judge what comes back."""

  def __init__(
    self,
    process: Process,
    session: aiohttp.ClientSession,
    questions: list[Question],
    seed: int,
  ):
    self._process, self._session = process, session
    self._questions, self._seed = questions, seed
    self.outcomes: collections.Counter[str] = collections.Counter()
    self.failures: list[str] = []
    self.lost = self.done = 0

  async def send(self, number: int) -> None:
    """Sends a request until the server was there to answer it."""
    kind = random.Random(f"{self._seed}-{number}").choices(
      list(_MIX), list(_MIX.values())
    )[0]
    while True:
      await self._process.up.wait()
      life = self._process.lives
      rng = random.Random(f"{self._seed}-{number}-body")
      try:
        async with asyncio.timeout(_PATIENCE):
          outcome = await self._try(kind, rng)
        break
      except (aiohttp.ClientError, ConnectionError) as error:
        # Give the kill's own bookkeeping a moment.
        await asyncio.sleep(0.05)
        if self._process.up.is_set() and life == self._process.lives:
          self.failures.append(f"{number}, {kind}: {error!r}")
          outcome = "failed"
          break
        self.lost += 1
      except TimeoutError:
        self.failures.append(f"{number}, {kind}: hangs")
        outcome = "failed"
        break
      except Failure as error:
        self.failures.append(f"{number}, {kind}: {error}")
        outcome = "failed"
        break
    self.outcomes[f"{kind}: {outcome}"] += 1
    self.done += 1

  async def _try(self, kind: str, rng: random.Random) -> str:
    if kind in ("answer", "stream", "given up", "cut off"):
      question = rng.choice(self._questions)
      body = {
        "model": "tiny",
        "prompt": question.prompt,
        "max_tokens": question.max_tokens,
        "temperature": 0,
        "stream": kind in ("stream", "cut off"),
      }
      if kind == "given up":
        return await self._give_up(body, rng.uniform(0, 0.05))
      return await self._complete(body, question, kind, rng)
    if kind == "no JSON":
      return await self._refused(rng.choice(_NO_JSON), 400)
    if kind == "no UTF-8":
      return await self._refused(
        b'{"prompt": "' + rng.randbytes(9) + b'\xff"}', 400
      )
    if kind == "too large":
      size = _BODY_BYTES + rng.randint(1, 10**6)
      return await self._refused(b" " * size, 413)
    body = {"prompt": "a", "max_tokens": 4} | rng.choice(_ABSURD)
    return await self._refused(json.dumps(body).encode(), 400, 404)

  async def _give_up(self, body: dict[str, Any], seconds: float) -> str:
    try:
      async with asyncio.timeout(seconds):
        async with self._session.post("/v1/completions", json=body) as answer:
          await answer.read()
    except TimeoutError:
      return "given up"
    return "answered before"

  async def _complete(
    self,
    body: dict[str, Any],
    question: Question,
    kind: str,
    rng: random.Random,
  ) -> str:
    async with self._session.post("/v1/completions", json=body) as answer:
      if answer.status == 429:
        return "overloaded"
      if answer.status != 200:
        raise Failure(f"status {answer.status}: {await answer.text()}")
      if kind == "answer":
        text = (await answer.json())["choices"][0]["text"]
      else:
        most = rng.randint(0, 10) if kind == "cut off" else None
        text = await _read_stream(answer, most)
        if text is None:
          answer.close()
          return "cut off"
    if text != question.text:
      raise Failure(f"{question.prompt!r}: {text!r} is not {question.text!r}")
    return "right"

  async def _refused(self, body: bytes, *statuses: int) -> str:
    headers = {"Content-Type": "application/json"}
    async with self._session.post(
      "/v1/completions", data=io.BytesIO(body), headers=headers
    ) as answer:
      text = await answer.text()
      if answer.status not in statuses or "Traceback" in text:
        raise Failure(f"{body[:80]!r}: status {answer.status}: {text[:200]}")
      json.loads(text)["error"]["message"]
    return "refused"


async def _read_stream(
  answer: aiohttp.ClientResponse, most: int | None
) -> str | None:
  """The text of a stream; `None` if only so many pieces were read."""
  text, pieces = "", 0
  async for line in answer.content:
    data = line.removeprefix(b"data: ").strip()
    if data == b"[DONE]":
      return text
    if not data:
      continue
    if most is not None and pieces >= most:
      return None
    piece = json.loads(data)
    if "error" in piece:
      raise Failure(f"the stream says {piece['error']['message']}")
    text += piece["choices"][0]["text"]
    pieces += 1
  raise aiohttp.ClientPayloadError("the stream has no end")


async def run_all(
  folder: pathlib.Path,
  config: EngineConfig,
  questions: list[Question],
  *,
  requests: int,
  seed: int,
  kills: int,
  clients: int,
) -> dict[str, Any]:
  """Figures of a whole run."""
  process = Process(folder, config)
  await process.start()
  numbers = iter(range(requests))
  memory: list[float] = []
  warm = requests * (_ROUGH + 0.1)
  began = time.perf_counter()
  connector = aiohttp.TCPConnector(limit=0, force_close=True)
  async with aiohttp.ClientSession(
    f"http://127.0.0.1:{process.port}", connector=connector
  ) as session:
    crowd = Clients(process, session, questions, seed)

    async def client() -> None:
      for number in numbers:
        await crowd.send(number)
        if not memory and crowd.done >= warm:
          memory.append(process.resident_mb())

    async def killer() -> None:
      for turn in range(1, kills + 1):
        while crowd.done < _ROUGH * requests * turn / kills:
          await asyncio.sleep(0.01)
        await process.kill()
        await process.start()

    try:
      tasks = [client() for _ in range(clients)]
      await asyncio.gather(killer(), *tasks)
      seconds = time.perf_counter() - began
      batch = await _idle(session)
      memory.append(process.resident_mb())
      code = await process.stop()
    except BaseException:
      await process.kill()
      raise
  # Without the first start, which was before.
  down = process.start_seconds * (1 - 1 / process.lives)
  return {
    "requests": requests,
    "seconds": seconds,
    "requests_per_second": requests / (seconds - down),
    "outcomes": dict(sorted(crowd.outcomes.items())),
    "failures": len(crowd.failures),
    "first_failures": crowd.failures[:5],
    "lost_to_kills": crowd.lost,
    "kills": process.lives - 1,
    "start_seconds": process.start_seconds / process.lives,
    "pages_held": batch["pages"]["held"],
    "running": len(batch["running"]) + batch["waiting"],
    "preemptions": batch["preemptions"],
    "resident_mb": memory[-1],
    "resident_growth_mb": memory[-1] - memory[0],
    "exit_code": code,
  }


async def _idle(session: aiohttp.ClientSession) -> dict[str, Any]:
  """The batch when nothing runs any more, or after some seconds."""
  for _ in range(100):
    async with session.get("/batch") as answer:
      batch: dict[str, Any] = await answer.json()
    if not (batch["running"] or batch["waiting"] or batch["pages"]["held"]):
      break
    await asyncio.sleep(0.1)
  return batch


def measure(
  *,
  requests: int,
  seed: int,
  kills: int,
  clients: int = 16,
  sequences: int = 8,
) -> dict[str, Any]:
  """Makes the model, asks the engine, then the server."""
  # Pages of 16 KiB, less than what runs may come to need: some is preempted.
  pages = max(4 * sequences, 16)
  config = EngineConfig(
    max_length=256,
    max_sequences=sequences,
    step_tokens=2 * sequences,
    page_size=16,
    kv_gib=pages * 2.0**-16,
  )
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(name)
    make_run(folder)
    questions = make_questions(folder, config, seed)
    return asyncio.run(
      run_all(
        folder,
        config,
        questions,
        requests=requests,
        seed=seed,
        kills=kills,
        clients=clients,
      )
    )


def main(argv: list[str]) -> None:
  """Prints one line; fails if the server did."""
  del argv
  logging.set_verbosity(logging.WARNING)
  figures = measure(
    requests=_REQUESTS.value,
    seed=_SEED.value,
    kills=_KILLS.value,
    clients=_CLIENTS.value,
  )
  report("server_faults", seed=_SEED.value, **rounded(figures))
  if figures["failures"] or figures["pages_held"] or figures["exit_code"]:
    sys.exit("server_faults.py: the server failed")


if __name__ == "__main__":
  app.run(main)
