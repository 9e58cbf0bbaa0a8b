"""What the benchmarks share: one JSON line, and times taken turn by turn."""

import json
import os
import platform
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax


def report(name: str, **figures: Any) -> None:
  """Prints one JSON line: the benchmark, its figures, and what it ran on."""
  line = {
    "benchmark": name,
    **figures,
    "jax": jax.__version__,
    "python": platform.python_version(),
    "device": jax.devices()[0].device_kind,
    "cores": len(os.sched_getaffinity(0)),
  }
  print(json.dumps(line, default=lambda o: o.item()), flush=True)


def best_seconds(
  runs: Mapping[str, Callable[[], Any]], rounds: int
) -> dict[str, float]:
  """The least time of each run, taking turns so that noise hits all alike.

  A run must wait for its own result. Each is called once before to warm up.
  """
  for run in runs.values():
    run()
  best = dict.fromkeys(runs, float("inf"))
  for _ in range(rounds):
    for name, run in runs.items():
      start = time.perf_counter()
      run()
      best[name] = min(best[name], time.perf_counter() - start)
  return best


def rounded(value: Any, digits: int = 4) -> Any:
  """Floats of a nested structure, to a number of significant digits."""
  if isinstance(value, float):
    return float(f"{value:.{digits}g}")
  if isinstance(value, Mapping):
    return {k: rounded(v, digits) for k, v in value.items()}
  if isinstance(value, list | tuple):
    return [rounded(v, digits) for v in value]
  return value
