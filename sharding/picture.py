"""Layouts drawn: which place in a mesh has which lanes, tokens and heads."""

import math
from pathlib import Path

from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.rules import AXES

_ROWS = ("stage", "data", "fsdp", "expert")
_COLUMNS = ("context", "tensor")
# With more devices than this along a side the numbers could not be read.
_LEGIBLE = 32


def draw_layout(layout: Layout, path: str | Path | None = None) -> Figure:
  """A grid of devices: lanes downwards, parts of a lane to the right.

  Numbers are places in the mesh, in its order. Devices of one color share the
  parameters by gathering them; each row has lanes of its own, the darker a
  device the later its part of the tokens, and its lower label says which of the
  heads are its own.

  Args:
    layout: The layout.
    path: Where to write it, if anywhere; the suffix says how.

  Returns:
    The figure.
  """
  rows, columns = (
    math.prod(getattr(layout, a) for a in names) for names in (_ROWS, _COLUMNS)
  )
  legible = max(rows, columns) <= _LEGIBLE
  figure = Figure(
    figsize=(
      max(4.0, min(2.0 + 0.9 * columns, 16)),
      max(2.2, min(1.2 + 0.5 * rows, 16)),
    ),
    dpi=130,
    layout="constrained",
  )
  axes = figure.subplots()
  colors = colormaps["tab10"]
  for device in range(layout.num_devices):
    row, column = divmod(device, columns)
    place = _place(layout, device)
    own = colors((place["stage"] * layout.data + place["data"]) % 10)
    share = 0.25 + 0.5 * place["context"] / max(layout.context - 1, 1)
    axes.add_patch(
      Rectangle(
        (column, row),
        1,
        1,
        facecolor=(*own[:3], share),
        edgecolor="white",
        linewidth=1.5 if legible else 0.2,
      )
    )
    if legible:
      label = f"{device}"
      if layout.tensor > 1:
        label += f"\nheads {place['tensor'] + 1}/{layout.tensor}"
      axes.text(
        column + 0.5, row + 0.5, label, ha="center", va="center", size=7
      )
  if layout.slices_over == _outermost(layout):
    for n in range(1, layout.slices):
      axes.axhline(n * rows / layout.slices, color="black", linewidth=2)
  if legible:
    axes.set_xticks([n + 0.5 for n in range(columns)])
    axes.set_xticklabels([_tick(layout, n, _COLUMNS) for n in range(columns)])
    axes.set_yticks([n + 0.5 for n in range(rows)])
    names = [_tick(layout, n * columns, _ROWS) for n in range(rows)]
    axes.set_yticklabels(names)
    axes.tick_params(length=0, labelsize=7)
  else:
    axes.set(xticks=[], yticks=[])
  axes.set(xlim=(0, columns), ylim=(rows, 0))
  axes.set_title(str(layout), size=9)
  for side in axes.spines.values():
    side.set_visible(False)
  if path is not None:
    figure.savefig(path)
  return figure


def _place(layout: Layout, device: int) -> dict[str, int]:
  """Where a device is on every axis."""
  place = {}
  for axis in reversed(AXES):
    device, place[axis] = divmod(device, getattr(layout, axis))
  return place


def _tick(layout: Layout, device: int, names: tuple[str, ...]) -> str:
  place = _place(layout, device)
  shown = [f"{a} {place[a]}" for a in names if getattr(layout, a) > 1]
  return "\n".join(shown) if names == _COLUMNS else ", ".join(shown)


def _outermost(layout: Layout) -> str:
  """The first axis of more than one device."""
  return next((a for a in AXES if getattr(layout, a) > 1), "data")
