"""How fast a device computes and copies, by data sheets."""

import dataclasses
import math
import types
from collections.abc import Mapping

from jaxchunk.targets import Target, target
from jaxchunk.training.peak import known_peak


@dataclasses.dataclass(frozen=True)
class Links:
  """Bytes a second that a device copies.

  Attributes:
    memory: To and from its own memory.
    ring: To a neighbour: both directions of a TPU's link, one of NVLink.
    host: To or from its share of host memory, one direction.
  """

  memory: float
  ring: float
  host: float


# Sources: "How to scale your model" (Austin et al., 2025) and Google Cloud's
# pages for TPUs (a device of 7x is half a chip), NVIDIA's data sheets; hosts by
# PCIe 5 x16 for Hopper and PCIe 4 x16 for the RTX 4090, which has no NVLink.
LINKS: Mapping[str, Links] = types.MappingProxyType(
  {
    "h100": Links(3352e9, 450e9, 64e9),
    "h200": Links(4800e9, 450e9, 64e9),
    "rtx4090": Links(1008e9, 32e9, 32e9),
    "v5e": Links(819e9, 90e9, 16e9),
    "v5p": Links(2765e9, 180e9, 16e9),
    "v6e": Links(1638e9, 180e9, 32e9),
    "tpu7x": Links(3690e9, 200e9, 32e9),
  }
)

# How jax shows a chip.
_DEVICES_OF_A_CHIP = {"tpu7x": 2}


@dataclasses.dataclass(frozen=True)
class Machine:
  """Devices to plan for, none of which need be there.

  Attributes:
    name: As `jaxchunk.targets.target` takes it.
    target: What it means.
    count: How many devices.
    flops: A second of each, in bf16.
    links: Of each.
  """

  name: str
  target: Target
  count: int
  flops: float
  links: Links


def machine(name: str) -> Machine:
  """A machine by its name: "h200", "h200:8", "v5e:4x4".

  Raises:
    ValueError: The name is unknown, or how many is no number.
  """
  found = target(name)
  kind, _, size = name.partition(":")
  peak = known_peak(found.kind)
  assert peak is not None
  return Machine(name, found, _count(kind, size), peak.flops, LINKS[kind])


def _count(kind: str, size: str) -> int:
  if not size:
    return 1
  parts = size.split("x")
  if not all(part.isdecimal() and int(part) for part in parts):
    raise ValueError(
      f"target {kind}:{size}: behind the colon goes a number of GPUs, "
      "'h200:8', or the chips of a TPU's slice, 'v5e:4x4'"
    )
  return math.prod(map(int, parts)) * _DEVICES_OF_A_CHIP.get(kind, 1)
