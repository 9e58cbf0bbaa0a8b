"""What the benchmarks share.

One JSON line, times taken turn by turn, contestants that are processes of
their own, and results with the device, the date and the versions.
"""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def report(name: str, **figures: Any) -> None:
  """Prints one JSON line: the benchmark, its figures, and what it ran on."""
  # Contestants that are not jax's use this module too.
  import jax

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


class Compilations:
  """Counts programs that are compiled while it listens."""

  def __init__(self) -> None:
    import jax

    self.count = 0
    jax.monitoring.register_event_duration_secs_listener(self._hear)

  def _hear(self, name: str, seconds: float, **_: Any) -> None:
    del seconds
    self.count += name.endswith("backend_compile_duration")


def torch_settings() -> list[tuple[int, str]]:
  """Threads and waiting policies to try: torch's best differs by machine."""
  cores = len(os.sched_getaffinity(0))
  return [
    (threads, policy)
    for threads in sorted({1, cores})
    for policy in ("passive", "active")
  ]


def run_contestant(
  arguments: Sequence[str],
  policy: str = "passive",
  python: str = sys.executable,
  environment: Mapping[str, str] | None = None,
) -> tuple[list[dict[str, Any]], int]:
  """Runs a contestant as a process of its own, which prints JSON lines.

  Args:
    arguments: A script and its arguments.
    policy: How OpenMP's threads wait; fixed when a process starts.
    python: The interpreter.
    environment: Further variables.

  Returns:
    The lines, and the exit code.
  """
  out = subprocess.run(
    [python, *arguments],
    env=os.environ
    | {"OMP_WAIT_POLICY": policy, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    | dict(environment or {}),
    stdout=subprocess.PIPE,
    text=True,
  )
  lines = [json.loads(s) for s in out.stdout.splitlines() if s[:1] == "{"]
  return lines, out.returncode


def record(
  name: str,
  figures: Mapping[str, Any],
  device: str | None,
  packages: Sequence[str],
) -> pathlib.Path:
  """Writes figures with device, date and versions into benchmarks/results/.

  Without a device, what was compiled and not run.

  Returns:
    The JSON file; pictures go beside it under the same stem.
  """
  folder = pathlib.Path(__file__).parent / "results"
  folder.mkdir(exist_ok=True)
  suffix = "" if device is None else f"_{device.lower().replace(' ', '_')}"
  path = folder / f"{name}{suffix}.json"
  head = {
    "device": device or "none: compiled",
    "date": datetime.date.today().isoformat(),
    "versions": {package: version(package) for package in packages},
  }
  path.write_text(json.dumps(head | dict(figures), indent=1) + "\n")
  return path


def version(package: str) -> str | None:
  """Of what is installed; `None` if it is not."""
  try:
    return importlib.metadata.version(package)
  except importlib.metadata.PackageNotFoundError:
    return None
