"""Schedulers on traces without a device, and what a step costs the host.

  python benchmarks/scheduling.py [--requests=2000] [--seed=0]

`part=host` runs the engine with 64 requests under way and a model that does
nothing: seconds of planning, writing down a step and taking in its tokens.
`part=traces` serves requests that come at random and are shorter than they
ask for, with fewer pages than all would need, by the computed clock of
`jaxchunk.inference.simulate`.
"""

import sys
import time

import numpy as np
from absl import app, flags
from common import report, rounded

from jaxchunk.inference.core import EngineCore, Request
from jaxchunk.inference.cost import LinearCost
from jaxchunk.inference.engine import EngineConfig, step_shapes
from jaxchunk.inference.params import SamplingParams
from jaxchunk.inference.runner import Assembler
from jaxchunk.inference.scheduler import SCHEDULERS, Limits
from jaxchunk.inference.simulate import (
  Arrival,
  SimulatedRunner,
  simulate,
)
from jaxchunk.kv.pool import PagePool

_REQUESTS = flags.DEFINE_integer("requests", 2000, "Of a trace.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of the traces.")
_PART = flags.DEFINE_enum("part", "all", ("all", "host", "traces"), "Which.")
_RUNNING = flags.DEFINE_integer("running", 64, "Requests of part=host.")

_PAGE, _LENGTH = 64, 4096
# About an 8B in bf16 on an H100: weights at 3 TB/s, products at 400 TFLOP/s.
_COST = LinearCost(step=5.5e-3, token=4e-5, key=1e-9)


def host_seconds(running: int, steps: int = 400) -> dict[str, float]:
  """Of a step with so many requests under way, all drawing, one prompt."""
  config = EngineConfig(
    max_sequences=running + 1, step_tokens=max(512, 2 * running)
  )
  shapes = step_shapes(config, _LENGTH)
  limits = Limits(
    tokens=config.step_tokens,
    sequences=config.max_sequences,
    prompts=4,
    shapes=tuple(shape.tokens for shape in shapes),
  )
  pages = config.max_sequences * _LENGTH // _PAGE
  by_tokens = {shape.tokens: shape for shape in shapes}
  lengths = {str(n): _LENGTH for n in range(running)}
  runner = SimulatedRunner(_COST, lengths, Assembler(by_tokens, _PAGE, pages))
  core = EngineCore(
    runner,
    SCHEDULERS["stall_free"](limits, PagePool(pages, _PAGE)),
    vocab_size=32000,
    max_length=_LENGTH,
  )
  rng = np.random.default_rng(_SEED.value)
  params = SamplingParams(max_tokens=steps + 200)
  for name in lengths:
    size = int(rng.integers(100, 2000))
    prompt = tuple(rng.integers(1, 32000, size).tolist())
    core.add(Request(request_id=name, prompt=prompt, params=params))
  while any(s.remaining > 1 for s in core.scheduler.running) or (
    core.scheduler.num_waiting
  ):
    core.step()
  times = []
  for _ in range(steps):
    began = time.perf_counter()
    core.step()
    times.append(time.perf_counter() - began)
  return {
    "running": running,
    "median_ms": 1e3 * float(np.median(times)),
    "p99_ms": 1e3 * float(np.percentile(times, 99)),
  }


def draw_trace(requests: int, rate: float, seed: int) -> list[Arrival]:
  """Requests at random times; half begin with one of a few long texts."""
  rng = np.random.default_rng(seed)
  times = np.cumsum(rng.exponential(1 / rate, requests))
  common = [rng.integers(1, 32000, 1024).tolist() for _ in range(8)]
  trace = []
  for at in times:
    own = rng.integers(1, 32000, int(np.clip(rng.lognormal(5, 1), 8, 2000)))
    shared = common[rng.integers(8)] if rng.random() < 0.5 else []
    tokens = int(np.clip(rng.lognormal(5, 0.8), 4, 1000))
    trace.append(Arrival(float(at), (*shared, *own.tolist()), tokens, 1000))
  return trace


def traces() -> dict[str, dict[str, float]]:
  limits = Limits(
    tokens=512, sequences=128, prompts=4, shapes=(1, 8, 64, 128, 256, 512)
  )
  found = {}
  for rate in (25, 50):
    trace = draw_trace(_REQUESTS.value, rate, _SEED.value)
    for scheduler in SCHEDULERS:
      result = simulate(
        trace,
        scheduler=scheduler,
        limits=limits,
        num_pages=500,
        page_size=_PAGE,
        cost=_COST,
        max_length=_LENGTH,
      )
      name = f"{scheduler}, {rate} a second"
      found[name] = result.figures()
      print(name, rounded(found[name]), file=sys.stderr, flush=True)
  return found


def main(_: list[str]) -> None:
  found = {}
  if _PART.value in ("all", "host"):
    found["host"] = host_seconds(_RUNNING.value)
  if _PART.value in ("all", "traces"):
    found["traces"] = traces()
  report("scheduling", **rounded(found))


if __name__ == "__main__":
  app.run(main)
