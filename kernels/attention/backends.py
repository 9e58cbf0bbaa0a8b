"""The implementations of attention's two passes, by name."""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

Backend = Literal["xla", "pallas_tpu", "pallas_gpu"]
BACKENDS: tuple[Backend, ...] = ("xla", "pallas_tpu", "pallas_gpu")


class Passes(NamedTuple):
  """`flash_forward` and `flash_backward` of `xla.py`, or what stands for them.

  A backend that cannot serve its arguments raises `NotImplementedError`; none
  falls back to another.
  """

  forward: Callable[..., Any]
  backward: Callable[..., Any]


def passes(name: str) -> Passes:
  """The two passes of a backend, loaded when first asked for.

  Raises:
    ValueError: There is no such backend.
  """
  if name == "xla":
    from jaxchunk.kernels.attention import xla

    return Passes(xla.flash_forward, xla.flash_backward)
  if name == "pallas_tpu":
    from jaxchunk.kernels.attention import pallas_tpu

    return Passes(pallas_tpu.tpu_forward, pallas_tpu.tpu_backward)
  if name == "pallas_gpu":
    from jaxchunk.kernels.attention import pallas_gpu

    return Passes(pallas_gpu.gpu_forward, pallas_gpu.gpu_backward)
  raise ValueError(
    f"unknown attention implementation {name!r}; there are {list(BACKENDS)}"
  )
