"""Tokens of the engine under any company, against one prompt at a time.

  python benchmarks/serving_exactness.py [--traces=200] [--seed=0]

Random traces: prompts that often begin alike arrive at random steps, with
priorities, several continuations, and cancellations of neighbours, on a random
model. Each trace is served with enough pages; by a prefix cache; with so few
pages that sequences lose theirs and compute again; parked in host memory
instead; and by the scheduler that looks ahead. All tokens must be those that
the prompt alone gets, by whole chunks over a contiguous cache; no page may be
held at the end, and nothing may be compiled on the way.

`chunks`: the log-probabilities behind prompts, prefilled by parts of 1 to 64
tokens, against one pass over the whole: the largest difference over the range.
"""

import functools
import itertools
import sys
from typing import Any

import jax
import numpy as np
from absl import app, flags
from common import Compilations, report, rounded
from flax import nnx

import jaxchunk as jc
from jaxchunk.inference.core import EngineCore, Request
from jaxchunk.inference.engine import EngineConfig, step_shapes
from jaxchunk.inference.generate import generate
from jaxchunk.inference.params import SamplingParams
from jaxchunk.inference.runner import DeviceRunner
from jaxchunk.inference.scheduler import SCHEDULERS, Limits
from jaxchunk.inference.swap import PageSwap
from jaxchunk.kv.paged import paged_states
from jaxchunk.kv.pool import PagePool
from jaxchunk.kv.tiers import HostTier

_TRACES = flags.DEFINE_integer("traces", 200, "Of each way.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Of model and traces.")
_REQUESTS = flags.DEFINE_integer("requests", 8, "Of a trace.", lower_bound=1)

_V, _PAGE, _PAGES, _LENGTH, _FEW = 211, 4, 160, 128, 36
_WAYS: dict[str, dict[str, Any]] = {
  "pages for all": {"caching": False},
  "prefixes known": {},
  "computed again": {"pages": _FEW, "caching": False},
  "computed again, prefixes known": {"pages": _FEW},
  "parked": {"pages": _FEW, "caching": False, "host": True},
  "parked, prefixes known": {"pages": _FEW, "host": True},
  "looking ahead": {"pages": _FEW, "scheduler": "past_future"},
}
_SIZES = EngineConfig(
  max_sequences=8, step_tokens=64, page_size=_PAGE, query_block=8
)


def make_model() -> jc.Transformer:
  """Random, with grouped heads and windows; no two tokens are alike."""
  cfg = jc.ModelConfig(
    vocab_size=_V,
    d_model=64,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    d_ff=96,
    window_pattern=(None, 32),
  )
  model = jc.Transformer(cfg, rngs=nnx.Rngs(_SEED.value))
  rng = np.random.default_rng(_SEED.value)
  # Far from its start, or all prompts would go on alike.
  wide = rng.standard_normal((_V, 64)).astype(np.float32)
  model.embed[...] = jax.numpy.asarray(wide)
  model.head[...] = jax.numpy.asarray(rng.permutation(wide))
  return model


def make_core(
  runner: DeviceRunner,
  *,
  pages: int = _PAGES,
  scheduler: str = "stall_free",
  caching: bool = True,
  tier: HostTier | None = None,
  step_tokens: int = 64,
) -> EngineCore:
  shapes = (shape.tokens for shape in step_shapes(_SIZES, _LENGTH))
  limits = Limits(
    tokens=step_tokens,
    sequences=min(8, step_tokens),
    prompts=4,
    shapes=tuple(tokens for tokens in shapes if tokens <= step_tokens),
  )
  swap = None
  if tier is not None:
    swap = PageSwap(
      runner, tier, page_size=_PAGE, num_pages=_PAGES, sharing=caching
    )
  pool = PagePool(pages, _PAGE, caching=caching)
  return EngineCore(
    runner,
    SCHEDULERS[scheduler](limits, pool, swap),
    vocab_size=_V,
    max_length=_LENGTH,
    swap=swap,
  )


def draw_requests(rng: np.random.Generator) -> list[Request]:
  common = [rng.integers(0, _V, 60).tolist() for _ in range(2)]
  requests = []
  for number in range(_REQUESTS.value):
    shared = common[rng.integers(2)][: rng.integers(0, 61)]
    own = rng.integers(0, _V, rng.integers(1, 30)).tolist()
    params = SamplingParams(
      temperature=0,
      max_tokens=int(rng.integers(1, 30)),
      n=int(rng.integers(1, 3)),
    )
    requests.append(
      Request(
        request_id=f"r{number}",
        prompt=tuple(shared + own),
        params=params,
        priority=int(rng.integers(2)),
      )
    )
  return requests


def serve(
  core: EngineCore, requests: list[Request], rng: np.random.Generator
) -> tuple[dict[Any, list[int]], set[Any]]:
  """Tokens of each continuation, and which were cancelled."""
  at: dict[int, list[Any]] = {}
  for request in requests:
    begin = int(rng.integers(0, 15))
    at.setdefault(begin, []).append(functools.partial(core.add, request))
    if rng.random() < 0.2:
      end = begin + int(rng.integers(1, 10))
      cancel = functools.partial(core.cancel, request.request_id)
      at.setdefault(end, []).append(cancel)
  tokens: dict[Any, list[int]] = {}
  cancelled = set()
  for step in itertools.count():
    for action in at.pop(step, ()):
      action()
    if not core.has_work and not at:
      return tokens, cancelled
    for event in core.step():
      key = event.sequence.request_id, event.sequence.index
      tokens.setdefault(key, []).extend(event.tokens)
      if event.finish_reason == "cancelled":
        cancelled.add(key)


def run_way(
  runner: DeviceRunner, alone: Any, options: dict[str, Any]
) -> dict[str, int]:
  found = dict.fromkeys(
    ("continuations", "tokens", "wrong", "cancelled", "leaked_pages"), 0
  )
  found |= {"preemptions": 0, "cached_tokens": 0, "resumed_tokens": 0}
  options = dict(options)
  host = options.pop("host", False)
  for number in range(_TRACES.value):
    rng = np.random.default_rng([_SEED.value, number])
    tier = HostTier(2**26) if host else None
    core = make_core(runner, tier=tier, **options)
    requests = draw_requests(rng)
    tokens, cancelled = serve(core, requests, rng)
    for request in requests:
      expected = alone(request.prompt, request.params.max_tokens)
      for index in range(request.params.n):
        key = request.request_id, index
        got = tokens.get(key, [])
        whole = expected[: len(got)] if key in cancelled else expected
        found["wrong"] += got != whole
        found["continuations"] += 1
        found["tokens"] += len(got)
    found["cancelled"] += len(cancelled)
    found["leaked_pages"] += core.scheduler.pool.held
    found["preemptions"] += core.stats.preemptions
    found["cached_tokens"] += core.stats.cached_tokens
    if tier is not None and core.swap is not None:
      found["resumed_tokens"] += core.swap.stats.resumed
      tier.close()
  return found


def chunk_difference(runner: DeviceRunner, model: jc.Transformer) -> float:
  """The largest, over the range of a prompt's log-probabilities."""
  worst = 0.0
  rng = np.random.default_rng(_SEED.value)
  for length in (5, 37, 90):
    prompt = tuple(rng.integers(0, _V, length).tolist())
    logits = np.asarray(model(np.asarray([prompt])), np.float64)[0, -1]
    log_p = logits - np.log(np.sum(np.exp(logits - logits.max())))
    log_p -= logits.max()
    for size in (1, 2, 4, 8, 16, 24, 32, 48, 64):
      core = make_core(runner, caching=False, step_tokens=size)
      params = SamplingParams(temperature=0, max_tokens=1, logprobs=20)
      core.add(Request(request_id="a", prompt=prompt, params=params))
      events = []
      while core.has_work:
        events += core.step()
      for token, value in events[0].logprobs[0].top:
        worst = max(worst, abs(value - log_p[token]) / np.ptp(logits))
  return float(worst)


def main(_: list[str]) -> None:
  model = make_model()
  shapes = step_shapes(_SIZES, _LENGTH)
  runner = DeviceRunner(
    model,
    states=paged_states(model.cfg, page_size=_PAGE),
    shapes=shapes,
    num_pages=_PAGES,
  )
  runner.compile_copies(256 // _PAGE)

  @functools.cache
  def alone(prompt: tuple[int, ...], number: int) -> list[int]:
    return list(generate(model, prompt, max_new_tokens=number, chunk_size=32))

  # What is compared with is compiled first.
  for number in range(_TRACES.value):
    rng = np.random.default_rng([_SEED.value, number])
    for request in draw_requests(rng):
      alone(request.prompt, request.params.max_tokens)
  found: dict[str, Any] = {"chunks": chunk_difference(runner, model)}
  heard = Compilations()
  for name, options in _WAYS.items():
    found[name] = run_way(runner, alone, options)
    print(name, found[name], file=sys.stderr, flush=True)
  found["compiled_on_the_way"] = heard.count
  report("serving_exactness", **rounded(found))


if __name__ == "__main__":
  app.run(main)
