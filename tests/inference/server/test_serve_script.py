"""scripts/serve.py: from a checkpoint to answers, its end, and its errors."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import aiohttp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxchunk.data.config import DataConfig
from jaxchunk.data.tokenizers import ByteTokenizer
from jaxchunk.inference.server.load import parse_adapters
from jaxchunk.models.config import ModelConfig
from jaxchunk.training import checkpoint
from jaxchunk.training.config import Config, to_json
from jaxchunk.training.initial import abstract_model

SCRIPT = Path(__file__).parents[3] / "scripts" / "serve.py"


@pytest.fixture(name="workdir", scope="module")
def fixture_workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("run")
  cfg = ModelConfig(
    vocab_size=259, d_model=32, num_layers=1, num_heads=2, d_ff=32
  )
  config = Config(model=cfg, data=DataConfig(tokenizer="byte"))
  _, state, _ = abstract_model(cfg)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype),
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
  return folder


def command(**flags):
  flags = [f"--{name}={value}" for name, value in flags.items()]
  return [sys.executable, str(SCRIPT), *flags]


ENVIRONMENT = {
  **os.environ,
  "JAX_PLATFORMS": "cpu",
  "XLA_FLAGS": "--xla_backend_optimization_level=0",
}


@contextlib.contextmanager
def started(workdir):
  """A server of one sequence, and its address."""
  process = subprocess.Popen(
    command(
      workdir=workdir,
      port=0,
      max_sequences=1,
      step_tokens=1,
      kv_gib=0.01,
      max_length=4096,
      served_model_name="tiny",
    ),
    env=ENVIRONMENT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  killer = threading.Timer(120, process.kill)
  killer.start()
  try:
    line = process.stdout.readline()
    assert line.startswith("tiny at http://127.0.0.1:"), process.stderr.read()
    yield process, line.split()[2]
  finally:
    killer.cancel()
    process.kill()
    process.communicate()


async def begin(session, tokens):
  """A stream whose first piece has come."""
  response = await session.post(
    "/v1/completions",
    json={
      "prompt": "a",
      "max_tokens": tokens,
      "stream": True,
      "ignore_eos": True,
    },
  )
  assert response.status == 200
  await response.content.readuntil(b"\n\n")
  return response


async def finish_one(process, address):
  """What a request that runs and a new one are told after SIGTERM."""
  async with asyncio.timeout(60), aiohttp.ClientSession(address) as session:
    response = await begin(session, 3000)
    process.send_signal(signal.SIGTERM)
    state = "running"
    while state == "running":
      async with session.get("/health") as health:
        state = (await health.json())["status"]
    async with session.post("/v1/completions", json={"prompt": "b"}) as other:
      refused = other.status, other.headers.get("Retry-After")
    lines = (await response.text()).strip().split("\n\n")
  return state, refused, lines


def drain(workdir):
  with started(workdir) as (process, address):
    told = asyncio.run(finish_one(process, address))
    code = process.wait(30)
    return *told, code, process.stdout.read()


async def begin_and_signal(process, address):
  async with asyncio.timeout(60), aiohttp.ClientSession(address) as session:
    response = await begin(session, 4000)
    for number in (signal.SIGTERM, signal.SIGINT):
      process.send_signal(number)
      await asyncio.sleep(0.2)
    code = await asyncio.to_thread(process.wait, 5)
    response.close()
  return code


def end_at_once(workdir):
  with started(workdir) as (process, address):
    return asyncio.run(begin_and_signal(process, address))


CASES = {
  "open to all": ({"host": "0.0.0.0"}, "is open to other machines; set"),
  "no run": ({"workdir": "nowhere"}, "/nowhere has no folder 'checkpoints'"),
  "no size": ({"workdir": "x", "step_tokens": 1}, "step_tokens=1 must be at"),
}


def mistake(flags):
  return subprocess.run(
    command(**flags),
    env=ENVIRONMENT,
    capture_output=True,
    text=True,
    timeout=100,
  )


@pytest.fixture(name="results", scope="module")
def fixture_results(workdir):
  """What came of every run, two at a time."""
  with ThreadPoolExecutor(2) as pool:
    runs = {
      "drain": pool.submit(drain, workdir),
      "at once": pool.submit(end_at_once, workdir),
    }
    for name, (flags, _) in CASES.items():
      runs[name] = pool.submit(mistake, flags)
    return {name: run.result() for name, run in runs.items()}


def test_what_runs_is_finished_and_nothing_new_is_taken(results):
  state, (status, retry_after), lines, code, _ = results["drain"]
  assert state == "draining" and status == 503 and int(retry_after) > 0
  assert lines[-1] == "data: [DONE]"
  last = json.loads(lines[-2].removeprefix("data: "))
  assert last["choices"][0]["finish_reason"] == "length"
  assert code == 0


def test_a_command_to_try_is_printed(results):
  printed = results["drain"][-1]
  assert printed.startswith("curl http://127.0.0.1:")
  body = printed.split("-d ")[1].strip().strip("'")
  assert json.loads(body)["model"] == "tiny"


def test_a_second_signal_ends_it_at_once(results):
  assert results["at once"] == 128 + signal.SIGINT


@pytest.mark.parametrize("case", CASES)
def test_a_mistake_is_answered_in_a_line(results, case):
  done, message = results[case], CASES[case][1]
  assert (done.stdout, done.returncode) == ("", 1)
  assert done.stderr.startswith("serve.py: ") and message in done.stderr
  assert done.stderr.count("\n") == 1


@pytest.mark.fast
def test_adapters_are_named():
  assert parse_adapters(["a=b", "c=d=e"]) == {"a": "b", "c": "d=e"}
  for wrong, message in (
    (["a"], "must be name=path"),
    (["=b"], "must be name=path"),
    (["a=b", "a=c"], "two adapters"),
  ):
    with pytest.raises(ValueError, match=message):
      parse_adapters(wrong)
