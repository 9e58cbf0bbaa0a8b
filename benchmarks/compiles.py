"""How many programs a run compiles, how long, and what a restart finds.

python benchmarks/compiles.py
"""

import json
import subprocess
import sys
import tempfile
import time

import jax
import numpy as np
from absl import app, flags
from common import report, rounded
from flax import nnx

import jaxchunk as jc
from jaxchunk.chunking.executor import (
  accumulate,
  lane_program,
  make_options,
  warm_up,
)
from jaxchunk.types import Example

_CACHE = flags.DEFINE_string("cache", None, "For the restarts only.")

_CHUNK = 256


def examples(rng: np.random.Generator, longest: int) -> list[Example]:
  """A long-tailed batch that contains its longest length."""
  lengths = np.clip(rng.lognormal(5.0, 1.2, 40).astype(int), 1, longest)
  out = []
  for length in [*lengths, longest]:
    tokens = rng.integers(0, 64, length + 1).astype(np.int32)
    weights = np.ones(length, np.float32)
    out.append(Example(tokens[:-1], tokens[1:], weights))
  return out


def programs_of_two_epochs() -> dict[str, float]:
  cfg = jc.ModelConfig(
    vocab_size=64, d_model=32, num_layers=2, num_heads=2, d_ff=64
  )
  model = jc.Transformer(cfg, rngs=nnx.Rngs(0))
  longest = 20 * _CHUNK
  options = make_options(model, chunk_size=_CHUNK)
  warm_up(model, longest, options)
  counts = []
  for epoch in range(2):
    for seed in range(3):
      rng = np.random.default_rng(100 * epoch + seed)
      sums = accumulate(model, examples(rng, longest), options)
      jax.block_until_ready(sums.loss)
    counts.append(lane_program._cache_size())
  return {
    "programs": counts[0],
    "limit": 2 + np.log2(longest / _CHUNK),
    "new_in_second_epoch": counts[1] - counts[0],
  }


def deep_compile_seconds() -> float:
  cfg = jc.ModelConfig(
    vocab_size=4096,
    d_model=512,
    num_layers=32,
    num_heads=8,
    num_kv_heads=2,
    d_ff=1024,
  )
  model = nnx.eval_shape(lambda: jc.Transformer(cfg, rngs=nnx.Rngs(0)))
  start = time.perf_counter()
  jc.lower_chunked(
    model, capacity=32768, chunk_size=1024, live_chunks=4
  ).compile()
  return time.perf_counter() - start


def restart(cache: str) -> dict[str, int]:
  """One process with a persistent cache: what it found there."""
  events: list[str] = []
  jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
  jax.config.update("jax_compilation_cache_dir", cache)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
  jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
  cfg = jc.ModelConfig(
    vocab_size=64, d_model=32, num_layers=2, num_heads=2, d_ff=64
  )
  model = nnx.eval_shape(lambda: jc.Transformer(cfg, rngs=nnx.Rngs(0)))
  for chunks in (1, 4, 16):
    jc.lower_chunked(
      model, capacity=chunks * _CHUNK, chunk_size=_CHUNK
    ).compile()
  return {
    "hits": events.count("/jax/compilation_cache/cache_hits"),
    "misses": events.count("/jax/compilation_cache/cache_misses"),
  }


def main(_: list[str]) -> None:
  if _CACHE.value:
    print(json.dumps(restart(_CACHE.value)))
    return
  with tempfile.TemporaryDirectory() as cache:
    cold, warm = (
      json.loads(
        subprocess.run(
          [sys.executable, __file__, f"--cache={cache}"],
          check=True,
          capture_output=True,
          text=True,
        ).stdout
      )
      for _ in range(2)
    )
  programs = programs_of_two_epochs()
  seconds = deep_compile_seconds()
  report(
    "compiles",
    **rounded(programs),
    compile_32_layers_k4_seconds=rounded(seconds),
    cold_start=cold,
    warm_restart=warm,
    ok=programs["programs"] <= programs["limit"]
    and programs["new_in_second_epoch"] == 0
    and seconds < 60
    and warm["misses"] == 0
    and warm["hits"] > 0,
  )


if __name__ == "__main__":
  app.run(main)
