"""The FLOP/s that a device could reach: the denominator of the MFU."""

import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp

# Dense bf16 products of one device as jax counts devices, in FLOP/s. The
# longest prefix of `device_kind` counts. Sources: NVIDIA's data sheets of A100,
# L4, L40S, H100, H200, B200 (half of the figures "with sparsity") and the RTX
# 4090 (with sums in fp32); Google Cloud's pages of the TPU generations, by
# chip, divided by two where a chip shows as two devices (v2, v3, 7x).
_BF16_PEAKS = {
  "NVIDIA A100": 312e12,
  "NVIDIA L4": 121e12,
  "NVIDIA L40S": 362e12,
  "NVIDIA H100": 989e12,
  "NVIDIA H100 PCIe": 756e12,
  "NVIDIA H100 NVL": 835e12,
  "NVIDIA H200": 989e12,
  "NVIDIA H200 NVL": 835e12,
  "NVIDIA GH200": 989e12,
  "NVIDIA B200": 2250e12,
  "NVIDIA GeForce RTX 4090": 165.2e12,
  "TPU v2": 23e12,
  "TPU v3": 61.5e12,
  "TPU v4": 275e12,
  "TPU v5 lite": 197e12,
  "TPU v5e": 197e12,
  "TPU v5": 459e12,
  "TPU v5p": 459e12,
  "TPU v6 lite": 918e12,
  "TPU v6e": 918e12,
  "TPU7x": 1153.5e12,
}
_LONG_ENOUGH = 0.05
_SIZES = (512, 1024, 2048, 4096, 8192)


class Peak(NamedTuple):
  """What a device could do.

  Attributes:
    flops: Per second.
    source: How that is known, in words.
  """

  flops: float
  source: str


def peak_of(device: jax.Device, dtype: str) -> Peak:
  """The peak of a device.

  Known accelerators have their bf16 figure from the data sheet, whatever the
  dtype: a run in fp32 shows what it leaves unused. Others, CPUs among them,
  are measured once by matrix products of `dtype`, in about half a second; a
  machine that is busy then looks slower than it is.

  Args:
    device: On which the model runs.
    dtype: Of its matrix products.
  """
  return known_peak(device.device_kind) or _measured(device, dtype)


def known_peak(kind: str) -> Peak | None:
  """The peak of a kind of device, as jax calls it, if its data sheet says."""
  known = [name for name in _BF16_PEAKS if _is_kind(kind, name)]
  if not known:
    return None
  name = max(known, key=len)
  return Peak(_BF16_PEAKS[name], f"{kind}: bf16, by its data sheet")


def _is_kind(kind: str, name: str) -> bool:
  """Whether a kind is this one or a variant: "L4" is no prefix of "L40S"."""
  return kind == name or kind.startswith((f"{name} ", f"{name}-"))


@functools.cache
def _measured(device: jax.Device, dtype: str) -> Peak:
  product = jax.jit(jnp.matmul)
  best = 0.0
  for size in _SIZES:
    with jax.default_device(device):
      x = jnp.ones((size, size), dtype)
    product(x, x).block_until_ready()
    times = []
    for _ in range(3):
      start = time.perf_counter()
      product(x, x).block_until_ready()
      times.append(time.perf_counter() - start)
    best = max(best, 2 * size**3 / min(times))
    if min(times) > _LONG_ENOUGH:
      break
  return Peak(best, f"{device.device_kind}: {dtype}, measured at the start")
