"""Block sizes of attention, one frozen dataclass for each implementation.

`tables.py` has the measured ones by device and head width, and
`scripts/tune_kernels.py` refills it.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import TypeVar

import jax

from jaxchunk.kernels.attention.mask import AttentionMask

Sizes = TypeVar("Sizes")


@dataclasses.dataclass(frozen=True)
class BlockSizes:
  """Of "xla": tokens per block of queries and of keys, forward and backward."""

  q: int = 512
  kv: int = 512
  q_bwd: int = 512
  kv_bwd: int = 512


@dataclasses.dataclass(frozen=True)
class TpuBlocks:
  """Of "pallas_tpu": tokens per block, forward and backward."""

  q: int = 1024
  kv: int = 512
  q_bwd: int = 1024
  kv_bwd: int = 512


@dataclasses.dataclass(frozen=True)
class GpuBlocks:
  """Of "pallas_gpu": tokens per step of a worker, and steps in flight.

  Attributes:
    kv: Keys per step, forward.
    stages: Steps in shared memory, forward.
    kv_dq: Keys per step, for dq.
    stages_dq: Steps in shared memory, for dq.
    q_dkv: Queries per step, for dk and dv.
    stages_dkv: Steps in shared memory, for dk and dv.
  """

  kv: int = 128
  stages: int = 2
  kv_dq: int = 64
  stages_dq: int = 2
  q_dkv: int = 64
  stages_dkv: int = 2

  def stages_for(self, parts: tuple[str, ...]) -> int:
    """Steps in shared memory for the given gradients."""
    # Without dk the values need no place; 128 of them take that of a step.
    return self.stages_dkv + ("dk" not in parts)

  def fit(self, mask: AttentionMask, S: int) -> "GpuBlocks":
    """Smaller blocks of keys where the mask's table or S asks for them."""
    kv, kv_dq = (math.gcd(n, S, mask.kv_block) for n in (self.kv, self.kv_dq))
    return dataclasses.replace(self, kv=kv, kv_dq=kv_dq)


def device_kind() -> str:
  """Of the mesh that the program is made for, or of the default device."""
  device = jax.sharding.get_abstract_mesh().abstract_device
  return (device or jax.devices()[0]).device_kind


def look_up(
  table: Mapping[tuple[str, int], Sizes], width: int, default: Sizes
) -> Sizes:
  """Sizes for the device and a head width; those of "" are for any device."""
  kinds = (device_kind(), "")
  return next((table[k, width] for k in kinds if (k, width) in table), default)
