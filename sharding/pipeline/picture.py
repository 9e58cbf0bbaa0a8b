"""Pictures of pipelines: what each device does when, and what it keeps."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from jaxchunk.sharding.pipeline.table import KINDS, Table
from jaxchunk.sharding.pipeline.timeline import Span, Timeline
from jaxchunk.sharding.pipeline.usage import SlotBytes, memory

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_STYLES: dict[str, tuple[str, str]] = {
  "F_keep": ("#009E73", "forward, kept"),
  "F_drop": ("#56B4E9", "forward, dropped"),
  "again": ("#E69F00", "forward again"),
  "B": ("#D55E00", "backward"),
  "W": ("#CC79A7", "gradient of weights"),
  "embed": ("#999999", "embedding"),
  "head": ("#666666", "head and loss"),
}
# Lanes that follow each other have different shades: white that is mixed in.
_SHADES = (0.15, 0.4, 0.62)

_EDGE = "#333333"
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")

_WIDTH = 13.0
_TEXT_SIZE = 7.0
# Of a digit of this size.
_DIGIT_INCHES = 0.062
# Boxes in a picture; with more, shapes become pixels.
_MANY = 5000


class Panel(NamedTuple):
  """A row of pictures.

  Attributes:
    title: Above it.
    timeline: What it shows.
  """

  title: str
  timeline: Timeline


def draw_timeline(
  table: Table,
  timeline: Timeline,
  *,
  measured: Timeline | None = None,
  slot_bytes: SlotBytes | None = None,
  unit: str = "",
  path: str | Path | None = None,
) -> Figure:
  """What devices do, a row for each, and below it what they keep.

  A box is an operation, with the number of its chunk, or lane and place in the
  lane, where there is room; a dark edge says that it is on the device's second
  or a later virtual stage.

  Args:
    table: What runs.
    timeline: Of the table, simulated.
    measured: Of the table too, drawn below on the same scale.
    slot_bytes: What slots weigh, to show bytes; without, the chunks that are
      kept for the backward pass are counted.
    unit: Of time.
    path: Where to write it, if anywhere; the suffix says how: .png or .svg.

  Returns:
    The figure.

  Raises:
    ValueError: A timeline is not of the table, or the suffix is unknown.
  """
  panels = [Panel(_title("simulated", timeline, unit), timeline)]
  if measured is not None:
    panels.append(Panel(_title("measured", measured, unit), measured))
  devices = table.placement.devices
  row = min(0.34, max(0.17, 6 / devices))
  heights = [0.75 + row * devices] * len(panels) + [2.2]
  figure = Figure(
    figsize=(_WIDTH, sum(heights) + 0.6), dpi=130, layout="constrained"
  )
  FigureCanvasAgg(figure)
  axes = figure.subplots(len(heights), sharex=True, height_ratios=heights)
  end = max(panel.timeline.makespan for panel in panels) or 1.0
  for panel, where in zip(panels, axes, strict=False):
    where.set_title(panel.title, loc="left", fontsize=9)
    _draw_gantt(where, table, panel.timeline, end)
  _draw_memory(axes[-1], table, timeline, slot_bytes)
  axes[-1].set_xlim(0, end)
  axes[-1].set_xlabel(f"time{f' ({unit})' if unit else ''}")
  # A name may hold what would be taken for a formula.
  figure.suptitle(str(table), fontsize=11, parse_math=False)
  _draw_legend(figure, table, [panel.timeline for panel in panels])
  if path is not None:
    figure.savefig(path)
  return figure


def _title(name: str, timeline: Timeline, unit: str) -> str:
  """What a picture shows, in numbers."""
  time = f"{timeline.makespan:.4g}{f' {unit}' if unit else ''}"
  return f"{name}: {time}, bubble {timeline.bubble:.1%}"


def _style(timeline: Timeline, span: Span) -> str:
  return "again" if timeline.repeats(span) else span.kind


def _draw_gantt(
  axes: Axes, table: Table, timeline: Timeline, end: float
) -> None:
  """Boxes of all spans, one collection for each shape."""
  lanes, part_of = table.lanes, table.placement.part_of
  boxes, colours, edges = [], [], []
  for span in timeline.spans:
    lane = lanes.lane_of[span.item]
    hue = np.asarray(to_rgb(_STYLES[_style(timeline, span)][0]))
    white = _SHADES[lane % len(_SHADES)]
    boxes.append(_corners(span, -0.46, 0.46))
    colours.append(hue + (1 - hue) * white)
    if part_of[span.stage] and span.kind in KINDS:
      edges.append(_corners(span, 0.32, 0.46))
  for shapes, faces in ((boxes, colours), (edges, _EDGE)):
    if shapes:
      collection = PolyCollection(
        shapes,
        facecolors=faces,
        edgecolors="white",
        linewidths=0.4 if len(boxes) < _MANY else 0,
      )
      collection.set_rasterized(len(boxes) >= _MANY)
      axes.add_collection(collection)
  _write_numbers(axes, table, timeline, end)
  devices = table.placement.devices
  axes.set_ylim(devices - 0.4, -0.6)
  axes.set_yticks(range(0, devices, -(-devices // 16)))
  axes.set_ylabel("device")
  axes.set_facecolor("#F4F4F4")
  axes.tick_params(labelsize=8)
  axes.spines[["top", "right"]].set_visible(False)


def _corners(span: Span, low: float, high: float) -> list[tuple[float, float]]:
  """Of a box in the row of the span's device."""
  top, bottom = span.device + low, span.device + high
  return [
    (span.start, top),
    (span.stop, top),
    (span.stop, bottom),
    (span.start, bottom),
  ]


def _write_numbers(
  axes: Axes, table: Table, timeline: Timeline, end: float
) -> None:
  """The chunk of each box that is wide enough."""
  lanes = table.lanes
  plain = max(lanes.sizes) == 1
  # What is left of the figure's width between its labels.
  inches = (_WIDTH - 0.8) / end
  for span in timeline.spans:
    if span.kind not in KINDS:
      continue
    lane, index = lanes.lane_of[span.item], lanes.index_of[span.item]
    text = str(lane) if plain else f"{lane}.{index}"
    if _DIGIT_INCHES * (len(text) + 0.2) <= (span.stop - span.start) * inches:
      axes.text(
        (span.start + span.stop) / 2,
        span.device,
        text,
        ha="center",
        va="center",
        size=_TEXT_SIZE,
        clip_on=True,
      )


def _draw_memory(
  axes: Axes, table: Table, timeline: Timeline, slot_bytes: SlotBytes | None
) -> None:
  """What each device keeps, by time."""
  weights = SlotBytes(kept=1) if slot_bytes is None else slot_bytes
  found = memory(table, timeline, weights)
  peaks = found.bytes.max(axis=0)
  peak = max(int(peaks.max()), 1)
  scale, unit, name = 1, "chunks", f"{peak} chunks of a stage"
  if slot_bytes is not None:
    power = min(int(np.log2(peak)) // 10, len(_UNITS) - 1)
    scale, unit = 1024**power, _UNITS[power]
    name = f"{peak / scale:.4g} {unit}"
  devices = table.placement.devices
  colours = colormaps["viridis"](np.linspace(0, 0.92, devices))
  for device in range(devices):
    # A legend of more than this many would be larger than the picture.
    named = devices <= 8 or device in (0, devices - 1)
    axes.step(
      [*found.times[:, device], timeline.makespan],
      [*(found.bytes[:, device] / scale), 0],
      where="post",
      color=colours[device],
      linewidth=1.2 if devices <= 16 else 0.6,
      label=f"device {device}" if named else None,
    )
  axes.set_title(
    f"kept: peak {name}, on device {int(peaks.argmax())}",
    loc="left",
    fontsize=9,
  )
  axes.set_ylabel(f"{unit} kept")
  axes.set_ylim(0, 1.08 * peak / scale)
  axes.yaxis.set_major_locator(MaxNLocator(6, integer=slot_bytes is None))
  axes.grid(alpha=0.25)
  axes.tick_params(labelsize=8)
  axes.spines[["top", "right"]].set_visible(False)
  axes.legend(
    loc="lower right",
    bbox_to_anchor=(1, 1),
    ncols=8,
    frameon=False,
    fontsize=7,
    handlelength=1.2,
    columnspacing=1.0,
    borderaxespad=0.1,
  )


def _draw_legend(
  figure: Figure, table: Table, timelines: Sequence[Timeline]
) -> None:
  """Names of the colours that there are."""
  shown = {
    _style(timeline, span) for timeline in timelines for span in timeline.spans
  }
  handles = [
    Patch(color=colour, label=label)
    for kind, (colour, label) in _STYLES.items()
    if kind in shown
  ]
  if table.placement.parts > 1:
    label = "edge: on a later stage of the device"
    handles.append(Patch(color=_EDGE, label=label))
  figure.legend(
    handles=handles,
    loc="outside lower center",
    ncols=len(handles),
    frameon=False,
    fontsize=8,
  )
