"""Eight forced CPU devices, strict rank promotion, no hidden transfers."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = (
  os.environ.get("XLA_FLAGS", "")
  + " --xla_force_host_platform_device_count=8"
  + " --xla_cpu_collective_call_warn_stuck_timeout_seconds=2"
  + " --xla_cpu_collective_call_terminate_timeout_seconds=5"
)

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
