"""Which chunk operations make a step, what they cost, and a picture of it."""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from jaxchunk.chunking.memory import Strategy
from jaxchunk.models.config import ModelConfig

Op = Literal["F_drop", "F_keep", "B"]

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_STYLES: dict[Op, tuple[str, str]] = {
  "F_drop": ("#56B4E9", "forward, activations dropped"),
  "F_keep": ("#009E73", "forward, activations kept"),
  "B": ("#D55E00", "backward"),
}
_BACKWARD = 2.0
"""Cost of a backward in forwards: two matrix products for each one."""


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The work of one step, for a picture.

  Attributes:
    title: What is shown.
    lanes: Operations in the order in which they run, lane after lane.
    slope: What each chunk of prefix adds to the cost of a chunk, whose cost
      without a prefix is 1.
    shares: Share of a chunk's cost that one operation of each lane is: 1, or
      a layer's, 1 / L. `None` is 1 for all.
  """

  title: str
  lanes: list[list[tuple[Op, int]]]
  slope: float
  shares: list[float] | None = None


def lane_ops(num_chunks: int, live_chunks: int) -> list[tuple[Op, int]]:
  """The order in which the chunks of one sequence run, chunk-outer.

  Forward in ascending order, keeping the activations of the last
  `live_chunks`; backward in descending order, running those that were
  dropped forward again just before.
  """
  first_kept = max(num_chunks - live_chunks, 0)
  ops: list[tuple[Op, int]] = [
    ("F_drop" if i < first_kept else "F_keep", i) for i in range(num_chunks)
  ]
  for i in reversed(range(num_chunks)):
    if i < first_kept:
      ops.append(("F_keep", i))
    ops.append(("B", i))
  return ops


def layer_outer_ops(num_chunks: int, num_layers: int) -> list[tuple[Op, int]]:
  """The order layer-outer: each operation is one layer of one chunk.

  Forward layer by layer; backward layer by layer from the last, each layer
  once more forward and backward over its chunks from the last.
  """
  forward: list[tuple[Op, int]] = [("F_drop", i) for i in range(num_chunks)]
  backward: list[tuple[Op, int]] = []
  for i in reversed(range(num_chunks)):
    backward += [("F_keep", i), ("B", i)]
  return forward * num_layers + backward * num_layers


def prefix_slope(cfg: ModelConfig, chunk_size: int) -> float:
  """Cost of attending to one more chunk, as a share of a chunk's own cost.

  Counts the multiplications of matrix products and attention, forward.
  """
  H, N, K, D = cfg.head_width, cfg.num_heads, cfg.kv_heads, cfg.d_model
  matrices = cfg.num_layers * D * (2 * N * H + 2 * K * H + 3 * cfg.d_ff)
  matrices += cfg.vocab_size * D
  full = sum(
    cfg.layers_of(n) for n, w in enumerate(cfg.window_pattern) if w is None
  )
  pair = 2 * N * H
  windows = sum(
    cfg.layers_of(n) * min(w, chunk_size)
    for n, w in enumerate(cfg.window_pattern)
    if w is not None
  )
  own = matrices + pair * (full * chunk_size / 2 + windows)
  return pair * full * chunk_size / own


def of_plan(
  title: str,
  lanes: Sequence[int],
  *,
  cfg: ModelConfig,
  chunk_size: int,
  live_chunks: int,
  strategy: Strategy,
) -> Schedule:
  """The schedule of a step.

  Args:
    title: What is shown.
    lanes: Number of chunks of each.
    cfg: The model; its shape decides the costs.
    chunk_size: C.
    live_chunks: K.
    strategy: As the executor takes it.
  """
  slope = prefix_slope(cfg, chunk_size)
  ops, shares = [], []
  for chunks in lanes:
    # As the executor: what fits into the live chunks runs nothing twice.
    if strategy == "layer_outer" and chunks > max(live_chunks, 1):
      ops.append(layer_outer_ops(chunks, cfg.num_layers))
      shares.append(1 / cfg.num_layers)
    else:
      ops.append(lane_ops(chunks, live_chunks))
      shares.append(1.0)
  return Schedule(title, ops, slope, shares)


def draw_schedule(axes: Axes, schedule: Schedule) -> None:
  """Draws time to the right and chunks upward, one lane after the other.

  Raises:
    ValueError: An operation is unknown.
  """
  boxes: dict[Op, list[np.ndarray]] = {op: [] for op in get_args(Op)}
  borders, now = [0.0], 0.0
  shares = schedule.shares or [1.0] * len(schedule.lanes)
  for lane, share in zip(schedule.lanes, shares, strict=True):
    for op, chunk in lane:
      if op not in boxes:
        raise ValueError(f"op={op!r} is not one of {list(boxes)}")
      cost = share * (1 + schedule.slope * chunk)
      cost *= _BACKWARD if op == "B" else 1
      x, y = (now, now + cost), (chunk - 0.42, chunk + 0.42)
      corners = [(x[0], y[0]), (x[1], y[0]), (x[1], y[1]), (x[0], y[1])]
      boxes[op].append(np.asarray(corners))
      now += cost
    borders.append(now)
  for op, (colour, _) in _STYLES.items():
    axes.add_collection(
      PolyCollection(boxes[op], facecolors=colour, linewidths=0)
    )
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
