"""Eight forced CPU devices, strict rank promotion, few programs at a time."""

import os
import pathlib

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
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
