"""Devices to compile for without having them.

With the extra `aot` installed, programs compile for TPUs and NVIDIA GPUs on
any machine: the compiler says whether a kernel is legal, whether it fits, what
memory a step takes, and how its program looks. Nothing can be run.
"""

import functools
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

# What the compiler asks about a device, as XLA's GpuTargetConfigProto.
_H200 = """
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  memory_bandwidth: 4800000000000
  device_memory_size: 151397597184
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  pcie_bandwidth: 34359738368
  device_address_bits: 64
  ecc_enabled: true
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  device_vendor: "NVIDIA Corporation"
  name: "NVIDIA H200"
  platform_version: "Compute Capability 9.0a"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 12 patch: 0 }
device_description_str: "NVIDIA H200"
"""
_GPUS = {"h200": ("NVIDIA H200", 132, _H200)}


@functools.cache
def tpu(topology: str) -> tuple[jax.Device, ...]:
  """Devices of a TPU slice that need not be there.

  Args:
    topology: Generation and chips, such as "v5e:2x2", "v5p:2x2x1", "v6e:2x4"
      or "tpu7x:2x2x1".

  Returns:
    Its devices, to be named in shardings of what is lowered.

  Raises:
    RuntimeError: libtpu is not installed, or knows no such slice.
  """
  for name, value in (
    ("TPU_ACCELERATOR_TYPE", "v5litepod-4"),
    ("TPU_WORKER_HOSTNAMES", "localhost"),
    ("TPU_SKIP_MDS_QUERY", "1"),
    # Several processes may compile at once; none of them runs anything.
    ("ALLOW_MULTIPLE_LIBTPU_LOAD", "1"),
  ):
    os.environ.setdefault(name, value)
  return _devices(platform="tpu", topology_name=topology)


@functools.cache
def gpu(name: str = "h200", count: int = 1) -> tuple[jax.Device, ...]:
  """NVIDIA GPUs of one host that need not be there.

  Args:
    name: Only "h200" so far.
    count: How many.

  Returns:
    The devices, to be named in shardings of what is lowered.

  Raises:
    ValueError: The name is unknown.
    RuntimeError: The plugin is not installed.
  """
  if name not in _GPUS:
    raise ValueError(f"unknown GPU {name!r}; there are {sorted(_GPUS)}")
  return _devices(
    platform="cuda",
    topology_name="",
    target_config=_GPUS[name][2],
    topology=f"1x{count}x1",
  )


def _devices(**options: Any) -> tuple[jax.Device, ...]:
  try:
    return tuple(topologies.get_topology_desc(**options).devices)
  except Exception as error:
    raise RuntimeError(
      f"cannot compile for {options['platform']} "
      f"{options['topology_name']}: {error}; is the extra installed? "
      "pip install 'jaxchunk[aot]'"
    ) from error


def lower_on(
  device: jax.Device, function: Callable[..., Any], *shapes: Any, **options: Any
) -> jax.stages.Lowered:
  """`jax.jit(function, **options).lower(*shapes)` for a device.

  Args:
    device: From `tpu` or `gpu`.
    function: What to compile.
    *shapes: Its arguments, as arrays or `jax.ShapeDtypeStruct`.
    **options: Of `jax.jit`.

  Returns:
    The lowered program; `.compile()` it.
  """
  with tracing_for(device):
    return jax.jit(function, **options).lower(*place_on(device, shapes))


def place_on(device: jax.Device, shapes: Any) -> Any:
  """The shapes of a pytree, a model perhaps, as if they were on a device."""
  sharding = SingleDeviceSharding(device)
  return jax.tree.map(
    lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=sharding), shapes
  )


def tracing_for(device: jax.Device) -> AbstractContextManager[Any]:
  """Within it kernels are traced for the device, as `lower_on` does."""
  # A mesh without axes, by which kernels know what they are compiled for.
  kind, cores = device.device_kind, 1
  if device.platform == "gpu":
    # The description has no cores; there is one kind so far.
    kind, cores, _ = _GPUS["h200"]
  abstract = AbstractDevice(kind, cores, device.platform)
  mesh = AbstractMesh((), (), abstract_device=abstract)
  return jax.sharding.use_abstract_mesh(mesh)
