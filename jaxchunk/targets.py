"""Devices to compile for without having them.

With the extra `aot` installed, programs compile for TPUs and NVIDIA GPUs on
any machine: the compiler says whether a kernel is legal, whether it fits, what
memory a step takes, and how its program looks. Nothing can be run.
"""

import dataclasses
import functools
import os
import types
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, Literal

import jax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, SingleDeviceSharding

# What the compiler asks about a device, as XLA's GpuTargetConfigProto: first
# what all of them share.
_GPU_INFO = """
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  pcie_bandwidth: 34359738368
  device_address_bits: 64
  device_vendor: "NVIDIA Corporation"
  driver_version: "13.0.0"
  runtime_version: "13.0.0"
  compile_time_toolkit_version: "13.0.0"
  dnn_version: "9.12.0"
"""
_HOPPER = """
  shared_memory_per_core: 233472
  shared_memory_per_block_optin: 232448
  threads_per_core_limit: 2048
  core_count: 132
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  ecc_enabled: true
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  platform_version: "Compute Capability 9.0a"
"""
_RTX4090 = """
  shared_memory_per_core: 102400
  shared_memory_per_block_optin: 101376
  threads_per_core_limit: 1536
  core_count: 128
  l2_cache_size: 75497472
  clock_rate_ghz: 2.52
  cuda_compute_capability { major: 8 minor: 9 }
  platform_version: "Compute Capability 8.9"
"""


@dataclasses.dataclass(frozen=True)
class Target:
  """A kind of device to compile for.

  Attributes:
    kind: As jax calls it.
    platform: "gpu" or "tpu".
    memory: Bytes on a device, as CUDA counts them or as the compiler of a TPU
      allows a program.
    implementation: The kernels of attention written for it, or "xla".
    topology: Of a TPU, the slice; by default the smallest.
    description: Of a GPU, what the compiler asks about it.
    bandwidth: Of a GPU, in bytes a second.
    count: Of a GPU, how many in one host.
  """

  kind: str
  platform: Literal["gpu", "tpu"]
  memory: int
  implementation: Literal["xla", "pallas_tpu", "pallas_gpu"]
  topology: str = ""
  description: str = ""
  bandwidth: int = 0
  count: int = 1

  @property
  def device(self) -> jax.Device:
    """One of them.

    Raises:
      RuntimeError: What compiles for it is not installed.
    """
    return self.devices[0]

  @property
  def devices(self) -> tuple[jax.Device, ...]:
    """All of the slice, or of the host.

    Raises:
      RuntimeError: As `device`.
    """
    if self.platform == "tpu":
      return tpu(self.topology)
    return _gpus(self, self.count)


def _tpu(kind: str, gib: float, topology: str) -> Target:
  memory = int(gib * 2**30)
  return Target(kind, "tpu", memory, "pallas_tpu", topology)


def _gpu(
  kind: str, gib: float, implementation: Any, description: str, gb_per_s: int
) -> Target:
  return Target(
    kind,
    "gpu",
    int(gib * 2**30),
    implementation,
    description=description,
    bandwidth=gb_per_s * 10**9,
  )


TARGETS: Mapping[str, Target] = types.MappingProxyType(
  {
    "h100": _gpu("NVIDIA H100 80GB HBM3", 79.1, "pallas_gpu", _HOPPER, 3352),
    "h200": _gpu("NVIDIA H200", 139.8, "pallas_gpu", _HOPPER, 4800),
    "rtx4090": _gpu("NVIDIA GeForce RTX 4090", 23.5, "xla", _RTX4090, 1008),
    "v5e": _tpu("TPU v5 lite", 15.75, "v5e:2x2"),
    "v5p": _tpu("TPU v5", 95.74, "v5p:2x2x1"),
    "v6e": _tpu("TPU v6 lite", 31.25, "v6e:2x2"),
    "tpu7x": _tpu("TPU7x", 94.75, "tpu7x:2x2x1"),
  }
)


def target(name: str) -> Target:
  """A kind of device by name, and perhaps how many.

  Args:
    name: Of `TARGETS`, such as "h200"; of a TPU's slice "v5e:4x4", of a host
      with several GPUs "h200:8".

  Raises:
    ValueError: The name is unknown.
  """
  kind, _, size = name.partition(":")
  if kind not in TARGETS:
    raise ValueError(f"unknown target {name!r}; there are {sorted(TARGETS)}")
  found = TARGETS[kind]
  if not size:
    return found
  if found.platform == "tpu":
    return dataclasses.replace(found, topology=name)
  if not size.isdecimal() or not int(size):
    raise ValueError(
      f"unknown target {name!r}: behind the colon goes how many, '{kind}:8'"
    )
  return dataclasses.replace(found, count=int(size))


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


def gpu(name: str = "h200", count: int = 1) -> tuple[jax.Device, ...]:
  """NVIDIA GPUs of one host that need not be there.

  Args:
    name: Of `TARGETS`, such as "h200" or "rtx4090".
    count: How many.

  Returns:
    The devices, to be named in shardings of what is lowered.

  Raises:
    ValueError: There is no such GPU.
    RuntimeError: The plugin is not installed.
  """
  found = target(name)
  if found.platform != "gpu":
    known = sorted(n for n, t in TARGETS.items() if t.platform == "gpu")
    raise ValueError(f"{name!r} is not a GPU; there are {known}")
  return _gpus(found, count)


@functools.cache
def _gpus(target: Target, count: int) -> tuple[jax.Device, ...]:
  return _devices(
    platform="cuda",
    topology_name="",
    target_config=f"""
      gpu_device_info {{
        {_GPU_INFO}
        {target.description}
        name: "{target.kind}"
        device_memory_size: {target.memory}
        memory_bandwidth: {target.bandwidth}
      }}
      platform_name: "CUDA"
      dnn_version_info {{ major: 9 minor: 12 patch: 0 }}
      device_description_str: "{target.kind}"
    """,
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
  cores = device.core_count if device.platform == "gpu" else 1
  abstract = AbstractDevice(device.device_kind, cores, device.platform)
  mesh = AbstractMesh((), (), abstract_device=abstract)
  return jax.sharding.use_abstract_mesh(mesh)
