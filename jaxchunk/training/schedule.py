"""Which chunk operations make a step, what they cost, and a picture of it."""

import dataclasses

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from jaxchunk.chunking import chunk_outer, layer_outer
from jaxchunk.chunking.cost import (
  attention_flops,
  layer_flops_per_token,
  plan_cost,
  runs_layer_outer,
)
from jaxchunk.chunking.memory import Strategy
from jaxchunk.chunking.plan import ChunkPlan
from jaxchunk.models.config import ModelConfig

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_STYLES: dict[str, tuple[str, str]] = {
  "F_drop": ("#56B4E9", "forward, activations dropped"),
  "F_keep": ("#009E73", "forward, activations kept"),
  "B": ("#D55E00", "backward"),
}


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The work of one step, for a picture.

  Attributes:
    title: What is shown.
    lanes: Operations in the order in which they run, lane after lane.
    costs: Of each chunk of each lane, forward and backward; 1 is the forward
      of a full chunk without a prefix.
    shares: Share of a chunk's cost that one operation of each lane is: 1, or
      a layer's, 1 / L.
  """

  title: str
  lanes: list[list[tuple[str, int]]]
  costs: list[list[tuple[float, float]]]
  shares: list[float]


def of_plan(
  title: str,
  plan: ChunkPlan,
  *,
  cfg: ModelConfig,
  live_chunks: int,
  strategy: Strategy,
) -> Schedule:
  """The schedule of a step.

  Args:
    title: What is shown.
    plan: Of the step.
    cfg: The model; its shape decides the costs.
    live_chunks: K.
    strategy: As the executor takes it.
  """
  chunks = plan_cost(
    cfg, plan, live_chunks=live_chunks, strategy=strategy
  ).chunks
  size = plan.chunk_size
  unit = size * layer_flops_per_token(cfg) + attention_flops(cfg, 0, size)
  lanes, shares = [], []
  for lane in chunks:
    if runs_layer_outer(len(lane), strategy):
      lanes.append(layer_outer.schedule(len(lane), cfg.num_layers))
      shares.append(1 / cfg.num_layers)
    else:
      lanes.append(chunk_outer.schedule(len(lane), live_chunks))
      shares.append(1.0)
  costs = [[(c.forward / unit, c.backward / unit) for c in x] for x in chunks]
  return Schedule(title, lanes, costs, shares)


def draw_schedule(axes: Axes, schedule: Schedule) -> None:
  """Draws time to the right and chunks upward, one lane after the other.

  Raises:
    ValueError: An operation is unknown.
  """
  boxes: dict[str, list[np.ndarray]] = {op: [] for op in _STYLES}
  borders, now = [0.0], 0.0
  parts = zip(schedule.lanes, schedule.costs, schedule.shares, strict=True)
  for lane, costs, share in parts:
    for op, chunk in lane:
      if op not in boxes:
        raise ValueError(f"op={op!r} is not one of {list(boxes)}")
      cost = share * costs[chunk][op == "B"]
      x, y = (now, now + cost), (chunk - 0.42, chunk + 0.42)
      corners = [(x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1])]
      boxes[op].append(np.asarray(corners))
      now += cost
    borders.append(now)
  for op, (colour, _) in _STYLES.items():
    collection = PolyCollection(boxes[op], facecolors=colour, linewidths=0)
    # As pixels also in a drawing of shapes: there may be thousands.
    collection.set_rasterized(True)
    axes.add_collection(collection)
  for border in borders[1:-1]:
    axes.axvline(border, color="0.8", linewidth=0.6, zorder=0)
  tallest = 1 + max((i for lane in schedule.lanes for _, i in lane), default=0)
  axes.set_xlim(0, max(now, 1))
  axes.set_ylim(-0.6, tallest - 0.4)
  axes.yaxis.set_major_locator(MaxNLocator(8, integer=True))
  axes.set_xlabel("time (1 = forward of a chunk without a prefix)")
  axes.set_ylabel("chunk of its sequence")
  axes.set_title(schedule.title, loc="left", pad=26)
  axes.legend(
    handles=[Patch(color=c, label=label) for c, label in _STYLES.values()],
    loc="lower left",
    bbox_to_anchor=(0, 1),
    ncols=3,
    frameon=False,
    borderpad=0.2,
    borderaxespad=0.2,
  )


def schedule_figure(schedule: Schedule) -> Figure:
  """The picture alone; write it with `figure.savefig(path)`."""
  figure = Figure(figsize=(11, 3.6), dpi=130, layout="constrained")
  FigureCanvasAgg(figure)
  draw_schedule(figure.add_subplot(), schedule)
  return figure
