"""Layouts: how many devices each way of parallelism gets.

The same configuration runs on one device, eight or a pod by another layout:

  layout = Layout(fsdp=4, tensor=2)
  mesh = layout.mesh()            # of the devices that are there
  print(layout.table())

Axes are ordered from those that talk least to those that talk most, so that
the last lie on neighbouring devices and the first may span slices.
"""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from jaxchunk.sharding.pipeline.tables import Pipeline
from jaxchunk.sharding.rules import (
  AXES,
  Rules,
  Split,
  axis_names,
  split_by,
)

_MEANINGS = {
  "stage": "layers, one stage after the other (pipeline)",
  "data": "lanes; parameters are on all",
  "fsdp": "lanes, and parameters, gathered where they are used",
  "expert": "lanes, and experts",
  "context": "tokens of a sequence",
  "tensor": "heads, the MLP's width, the vocabulary",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
  """The sizes of the mesh axes, and what they split.

  Attributes:
    stage: Pipeline stages.
    data: Groups of devices with lanes of their own and all parameters.
    fsdp: Devices with lanes of their own that share the parameters.
    expert: Devices that share the experts.
    context: Devices that share a sequence.
    tensor: Devices that share heads and the MLP.
    slices: TPU slices, or hosts of GPUs, that are joined by a slower network;
      they divide `slices_over`.
    slices_over: The axis that spans them.
    gather: Where parameters that lanes share are gathered: "layer" by layer,
      where each is used, or all of them once a "step".
    rules: What splits each logical axis of an array.
    pipeline: How stages take turns.

  Raises:
    ValueError: A size is no positive integer, or the slices do not divide.
  """

  stage: int = 1
  data: int = 1
  fsdp: int = 1
  expert: int = 1
  context: int = 1
  tensor: int = 1
  slices: int = 1
  slices_over: Literal["stage", "data", "fsdp"] = "data"
  gather: Literal["layer", "step"] = "layer"
  rules: Rules = dataclasses.field(default_factory=Rules)
  pipeline: Pipeline = dataclasses.field(default_factory=Pipeline)

  def __post_init__(self) -> None:
    for name in (*AXES, "slices"):
      value = getattr(self, name)
      if not isinstance(value, int) or value < 1:
        raise ValueError(f"layout.{name}={value!r} must be a positive integer")
    if self.slices_over not in ("stage", "data", "fsdp"):
      raise ValueError(
        f"layout.slices_over={self.slices_over!r}: only stage, data or fsdp "
        "may span slices; the others talk in every layer"
      )
    if self.gather not in ("layer", "step"):
      raise ValueError(
        f"layout.gather={self.gather!r} is not one of ['layer', 'step']"
      )
    spanning = getattr(self, self.slices_over)
    if spanning % self.slices:
      raise ValueError(
        f"layout.slices={self.slices} does not divide "
        f"layout.{self.slices_over}={spanning}, which spans them"
      )

  @property
  def shape(self) -> dict[str, int]:
    """Size of every axis, in the order of the mesh."""
    return {name: getattr(self, name) for name in AXES}

  @property
  def num_devices(self) -> int:
    """How many devices it takes."""
    return math.prod(self.shape.values())

  def mesh(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices in order.

    Args:
      devices: Real ones, or those of `jaxchunk.targets`; by default all.

    Returns:
      A mesh with every axis of `AXES`.

    Raises:
      ValueError: There are more or fewer devices than the layout takes; names
        the nearest layout that fits.
    """
    devices = jax.devices() if devices is None else list(devices)
    if len(devices) != self.num_devices:
      raise ValueError(
        f"{self} takes {self.num_devices} devices and there are "
        f"{len(devices)}; the nearest layout is {self.nearest(len(devices))}"
      )
    auto = (AxisType.Auto,) * len(AXES)
    return Mesh(self._placed(devices), AXES, axis_types=auto)

  def _placed(self, devices: Sequence[jax.Device]) -> np.ndarray[Any, Any]:
    shape = list(self.shape.values())
    if self.slices > 1:
      across = [self.slices if a == self.slices_over else 1 for a in AXES]
      inside = [n // m for n, m in zip(shape, across, strict=True)]
      groups = _slices(devices, self.slices)
      if groups is not None:
        # Slices in a row along the axis that spans them.
        parts = [_in_slice(inside, group) for group in groups]
        return np.concatenate(parts, AXES.index(self.slices_over))
    return _in_slice(shape, devices)

  def nearest(self, num_devices: int) -> "Layout":
    """The layout for so many devices whose sizes differ least.

    In one slice; each axis may change by any factor, and the sum of the
    factors' logarithms is the least. Of equals, lanes change.
    """
    old = list(self.shape.values())
    weights = [1.0 if a in ("data", "fsdp") else 1.001 for a in AXES]

    def distance(new: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
      gaps = [abs(math.log(a / b)) for a, b in zip(new, old, strict=True)]
      gap = sum(w * g for w, g in zip(weights, gaps, strict=True))
      return round(gap, 9), new[::-1]

    best = min(_factorings(num_devices, len(AXES)), key=distance)
    return from_shape(dict(zip(AXES, best, strict=True)), self.rules)

  def sharding(
    self,
    mesh: Mesh,
    axes: Sequence[str | None],
    shape: Sequence[int],
    name: str = "an array",
  ) -> NamedSharding:
    """Where an array lies: `spec` on a mesh from `mesh`."""
    return NamedSharding(mesh, self.spec(axes, shape, name))

  def spec(
    self,
    axes: Sequence[str | None],
    shape: Sequence[int],
    name: str = "an array",
  ) -> PartitionSpec:
    """How an array is split, leaving out mesh axes of one device.

    Args:
      axes: Logical axes of the array.
      shape: Its shape.
      name: What to call it in a message.

    Raises:
      ValueError: An axis cannot be split evenly; names it and the sizes.
    """
    entries: list[Split] = []
    whole = self.rules.spec(axes)
    for logical, size, split in zip(axes, shape, whole, strict=True):
      names = tuple(a for a in axis_names(split) if self.shape[a] > 1)
      entries.append(split_by(names))
      parts = math.prod(self.shape[axis] for axis in names)
      if size % parts:
        fits = [n for n in range(parts, 0, -1) if size % n == 0]
        raise ValueError(
          f"{name} has {size} along {logical!r}, which {' x '.join(names)} = "
          f"{parts} does not divide; the nearest that does is {fits[0]}, and "
          f"Rules({{{logical!r}: None}}) leaves it whole"
        )
    return PartitionSpec(*entries)

  def splits(self, *logical: str) -> bool:
    """Whether any of these logical axes is split at all."""
    axes = {axis for name in logical for axis in self.rules[name]}
    return any(self.shape[axis] > 1 for axis in axes)

  def spread(self, spec: PartitionSpec, shape: Sequence[int]) -> PartitionSpec:
    """The spec of an array, split further over devices that have copies.

    So that what is needed once, an optimizer's state, is held once (ZeRO,
    arXiv 1910.02054, stage 1). Devices that share heads are left out.

    Args:
      spec: How the array is split where it is used.
      shape: Its shape.

    Returns:
      The largest axis takes all mesh axes by which it can be divided.
    """
    entries = [axis_names(split) for split in spec]
    entries += [()] * (len(shape) - len(entries))
    used = {name for names in entries for name in names}
    free = [
      axis
      for axis in ("data", "fsdp", "expert", "context")
      if self.shape[axis] > 1 and axis not in used
    ]
    while free:
      parts = math.prod(self.shape[axis] for axis in free)
      rests = [
        size // math.prod(self.shape[axis] for axis in names)
        for size, names in zip(shape, entries, strict=True)
      ]
      fits = [n for n, rest in enumerate(rests) if rest % parts == 0]
      if fits:
        best = max(fits, key=lambda n: rests[n])
        entries[best] = (*entries[best], *free)
        break
      free.pop()
    return PartitionSpec(*map(split_by, entries))

  def table(self) -> str:
    """One line for every axis of more than one device, and for the rules."""
    lines = [f"{self.num_devices} devices"]
    if self.slices > 1:
      lines[0] += f" in {self.slices} slices along {self.slices_over}"
    for axis, size in self.shape.items():
      if size > 1:
        lines.append(f"  {axis:8} {size:5}  {_MEANINGS[axis]}")
    for name, axes in sorted(self.rules.items()):
      used = [a for a in axes if self.shape[a] > 1]
      if used:
        lines.append(f"  {name:12} split by {' x '.join(used)}")
    return "\n".join(lines)

  def __str__(self) -> str:
    sizes = [f"{name}={size}" for name, size in self.shape.items() if size > 1]
    if self.slices > 1:
      sizes += [f"slices={self.slices}", f"slices_over={self.slices_over!r}"]
    if self.stage > 1:
      sizes.append(f"schedule={self.pipeline.schedule!r}")
    return f"Layout({', '.join(sizes)})"


def from_shape(shape: Mapping[str, int], rules: Rules | None = None) -> Layout:
  """The layout of a mesh's sizes, such as `mesh.shape`.

  Args:
    shape: Size by axis; those that are left out are 1.
    rules: What splits each logical axis.

  Raises:
    ValueError: An axis is unknown.
  """
  if unknown := sorted(set(shape) - set(AXES)):
    raise ValueError(f"mesh axes {unknown} are none of {list(AXES)}")
  sizes = dict.fromkeys(AXES, 1) | dict(shape)
  stage, data, fsdp, expert, context, tensor = sizes.values()
  return Layout(
    stage=stage,
    data=data,
    fsdp=fsdp,
    expert=expert,
    context=context,
    tensor=tensor,
    rules=rules or Rules(),
  )


def _in_slice(
  shape: Sequence[int], devices: Sequence[jax.Device]
) -> np.ndarray[Any, Any]:
  """Devices so that the last axes are neighbours."""
  if devices[0].platform == "tpu":
    placed = mesh_utils.create_device_mesh(
      tuple(shape), list(devices), allow_split_physical_axes=True
    )
    return np.asarray(placed)
  return np.asarray(devices).reshape(tuple(shape))


def _slices(
  devices: Sequence[jax.Device], count: int
) -> list[list[jax.Device]] | None:
  """The devices by slice, or by process; `None` if they are all in one.

  Raises:
    ValueError: They are in another number of slices.
  """
  for attribute in ("slice_index", "process_index"):
    numbers = [getattr(device, attribute, 0) for device in devices]
    found = sorted(set(numbers))
    if len(found) == 1:
      continue
    if len(found) % count:
      raise ValueError(
        f"layout.slices={count}, and the devices are in {len(found)} "
        f"({attribute})"
      )
    # Several hosts may make up a slice.
    each = len(found) // count
    groups = [found[n : n + each] for n in range(0, len(found), each)]
    return [
      [d for d, n in zip(devices, numbers, strict=True) if n in group]
      for group in groups
    ]
  return None


def _factorings(number: int, count: int) -> Iterator[tuple[int, ...]]:
  """All ways to write a number as a product of so many factors, in order."""
  if count == 1:
    yield (number,)
    return
  divisors = (n for n in range(1, number + 1) if number % n == 0)
  for first in divisors:
    for rest in _factorings(number // first, count - 1):
      yield (first, *rest)


def coordinates(mesh: Mesh) -> dict[jax.Device, dict[str, int]]:
  """Where each device is on every axis."""
  ranges = [range(size) for size in mesh.devices.shape]
  return {
    mesh.devices[place]: dict(zip(mesh.axis_names, place, strict=True))
    for place in itertools.product(*ranges)
  }
