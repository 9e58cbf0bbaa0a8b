"""Eight forced CPU devices, strict rank promotion, few programs at a time.

A test runs its programs once or twice, so LLVM does not optimise them: the
suite takes 0.6 of the time. For programs as users have them set
`XLA_FLAGS=--xla_backend_optimization_level=3`, as `.ci/run` does on the newest
Python: the last one of two equal flags counts.
"""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  "--xla_backend_optimization_level=0 "
  + os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
  + " --xla_cpu_collective_call_warn_stuck_timeout_seconds=2"
  + " --xla_cpu_collective_call_terminate_timeout_seconds=5"
)

import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True, scope="module")
def few_programs():
  """Forgets compiled programs before the system's limit on mappings is near.

  Each program on CPU takes several; Linux allows 65,530 in a process.
  """
  yield
  maps = pathlib.Path("/proc/self/maps")
  if maps.exists() and maps.read_text().count("\n") > 20_000:
    jax.clear_caches()
