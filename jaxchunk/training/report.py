"""`report.png` and `schedule.png`, drawn from the files in a workdir."""

import dataclasses
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import EngFormatter, FuncFormatter, PercentFormatter

from jaxchunk.data.accounting import EXCLUSIONS, KEPT, Accounting
from jaxchunk.training import metrics
from jaxchunk.training.schedule import (
  Schedule,
  draw_schedule,
  schedule_figure,
)

FILE_NAME = "report.png"
SCHEDULE_NAME = "schedule.png"
_INFO_NAME = "run.json"

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#E69F00", "#009E73"
_RED, _PURPLE, _GREY = "#D55E00", "#CC79A7", "#999999"
_FATES = {
  "trained": _BLUE,
  "masked": _PURPLE,
  "truncated": "black",
  "held_out": _GREEN,
  "empty": _GREY,
  "too_short": _RED,
  "too_long": _ORANGE,
}


@dataclasses.dataclass(frozen=True)
class Lengths:
  """How many documents have which length.

  Attributes:
    edges: Borders of the bins, in tokens, bin by bin larger.
    counts: Documents in each bin, by what becomes of them.
  """

  edges: list[float]
  counts: dict[str, list[int]]


@dataclasses.dataclass(frozen=True)
class Memory:
  """Bytes against the length of a sequence, one line a way to train.

  Attributes:
    lengths: In tokens.
    bytes: Of each line, at each length.
  """

  lengths: list[int]
  bytes: dict[str, list[float]]


@dataclasses.dataclass(frozen=True)
class RunInfo:
  """What a report shows besides the metrics; kept in `run.json`.

  Attributes:
    title: Heads the report.
    chunk_size: C.
    lengths: The documents of the corpus.
    accounting: Where all tokens read so far went.
    schedule: The step that is pictured.
    memory: Predicted or measured.
  """

  title: str
  chunk_size: int
  lengths: Lengths
  accounting: Accounting
  schedule: Schedule | None = None
  memory: Memory | None = None


def document_lengths(lengths: np.ndarray, reasons: np.ndarray) -> Lengths:
  """Counts documents in bins of equal ratio, four to a doubling at most.

  Args:
    lengths: Tokens of each document.
    reasons: `accounting.KEPT` or an index into `accounting.EXCLUSIONS`.
  """
  sizes = np.maximum(lengths, 1)
  low, high = math.log2(sizes.min()), math.log2(sizes.max() + 1)
  bins = int(np.clip((high - low) * 4, 1, 48))
  edges = np.exp2(np.linspace(low, max(high, low + 0.1), bins + 1))
  names = {KEPT: "trained", **dict(enumerate(EXCLUSIONS))}
  counts = {
    name: np.histogram(sizes[reasons == reason], edges)[0].tolist()
    for reason, name in names.items()
    if (reasons == reason).any()
  }
  return Lengths(edges.tolist(), counts)


def write_info(workdir: Path, info: RunInfo) -> None:
  """Writes `run.json`, whole or not at all."""
  path = workdir / _INFO_NAME
  values = dataclasses.asdict(info)
  temporary = path.with_suffix(".tmp")
  temporary.write_text(json.dumps(values), encoding="utf-8")
  temporary.replace(path)


def read_info(workdir: Path) -> RunInfo:
  """Reads `run.json`.

  Raises:
    FileNotFoundError: The folder has none: no run has finished a step there.
  """
  path = workdir / _INFO_NAME
  if not path.exists():
    raise FileNotFoundError(
      f"{path} does not exist; name the --workdir of a run of scripts/train.py"
    )
  values = json.loads(path.read_text(encoding="utf-8"))
  schedule, memory = values["schedule"], values["memory"]
  if schedule is not None:
    lanes = [[(op, i) for op, i in lane] for lane in schedule["lanes"]]
    schedule = Schedule(**{**schedule, "lanes": lanes})
  return RunInfo(
    title=values["title"],
    chunk_size=values["chunk_size"],
    lengths=Lengths(**values["lengths"]),
    accounting=Accounting.from_json(values["accounting"]),
    schedule=schedule,
    memory=memory and Memory(**memory),
  )


def draw(workdir: Path) -> Path:
  """Draws `report.png` and `schedule.png` from the workdir's files.

  Returns:
    The report's path.
  """
  info, lines = read_info(workdir), list(metrics.read(workdir))
  report_figure(info, lines).savefig(workdir / FILE_NAME)
  if info.schedule is not None:
    schedule_figure(info.schedule).savefig(workdir / SCHEDULE_NAME)
  return workdir / FILE_NAME


def report_figure(info: RunInfo, lines: Sequence[Mapping[str, Any]]) -> Figure:
  """All panels of a run.

  Args:
    info: What does not change from step to step.
    lines: Those of `metrics.jsonl`.
  """
  rows = 4 if info.schedule is not None else 3
  layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12)
  figure = Figure(figsize=(12, 3.5 * rows), dpi=110, layout=layout)
  FigureCanvasAgg(figure)
  figure.suptitle(info.title, fontsize=14)
  grid = figure.add_gridspec(rows, 2)
  _draw_loss(figure.add_subplot(grid[0, 0]), lines)
  _draw_lengths(figure.add_subplot(grid[0, 1]), info)
  _draw_accounting(figure.add_subplot(grid[1, 0]), info.accounting)
  _draw_padding(figure.add_subplot(grid[1, 1]), lines)
  if info.memory is None:
    _draw_speed(figure.add_subplot(grid[2, :]), lines)
  else:
    _draw_speed(figure.add_subplot(grid[2, 0]), lines)
    _draw_memory(figure.add_subplot(grid[2, 1]), info)
  if info.schedule is not None:
    draw_schedule(figure.add_subplot(grid[3, :]), info.schedule)
  return figure


def _series(
  lines: Sequence[Mapping[str, Any]], name: str
) -> tuple[np.ndarray, np.ndarray]:
  points = [(s["step"], s[name]) for s in lines if s.get(name) is not None]
  steps, values = np.asarray(points, float).reshape(-1, 2).T
  return steps, values


def _draw_loss(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
  steps, loss = _series(lines, "bits_per_byte")
  axes.plot(steps, loss, color=_BLUE, alpha=0.3, linewidth=0.8)
  width = max(len(loss) // 40, 1)
  axes.plot(
    steps,
    _running_mean(loss, width),
    color=_BLUE,
    label="training" if width == 1 else f"training (mean of {width} steps)",
  )
  steps, heldout = _series(lines, "heldout_bits_per_byte")
  if len(heldout):
    axes.plot(
      steps,
      heldout,
      color=_RED,
      marker="o",
      markersize=4,
      label=f"held out (last {heldout[-1]:.3f})",
    )
  axes.set_title("Loss", loc="left")
  axes.set_xlabel("step")
  axes.set_ylabel("bits per byte")
  axes.legend(frameon=False)
  axes.grid(alpha=0.25)


def _running_mean(values: np.ndarray, width: int) -> np.ndarray:
  """Mean of the last `width` values, or of all so far."""
  total = np.cumsum(np.concatenate([[0.0], values]))
  stop = np.arange(1, len(values) + 1)
  start = np.maximum(stop - width, 0)
  return (total[stop] - total[start]) / (stop - start)


def _draw_lengths(axes: Axes, info: RunInfo) -> None:
  edges = np.asarray(info.lengths.edges)
  bottom = np.zeros(len(edges) - 1)
  for name, values in info.lengths.counts.items():
    counts = np.asarray(values)
    axes.bar(
      edges[:-1],
      counts,
      width=np.diff(edges),
      bottom=bottom,
      align="edge",
      color=_FATES.get(name, _GREY),
      edgecolor="white",
      linewidth=0.3,
      label=name.replace("_", " "),
    )
    bottom += counts
  axes.axvline(
    info.chunk_size,
    color="black",
    linestyle="--",
    linewidth=1.2,
    label=f"chunk of {info.chunk_size:,}",
  )
  axes.set_xscale("log")
  axes.set_ylim(0, 1.1 * max(bottom.max(), 1))
  axes.xaxis.set_major_formatter(EngFormatter(sep=""))
  axes.set_title("Documents by length", loc="left")
  axes.set_xlabel("tokens in the document")
  axes.set_ylabel("documents")
  axes.legend(frameon=False)


def _draw_accounting(axes: Axes, accounting: Accounting) -> None:
  parts = {
    "trained": accounting.trained,
    "masked": accounting.masked,
    "truncated": accounting.truncated,
    **{
      f"excluded:\n{reason.replace('_', ' ')}": tokens
      for reason, tokens in accounting.excluded.items()
    },
  }
  read = max(accounting.read, 1)
  names = ["trained", "masked", "truncated", *accounting.excluded]
  colours = [_FATES.get(name, _GREY) for name in names]
  bars = axes.barh(list(parts), list(parts.values()), color=colours)
  axes.bar_label(
    bars,
    [f"{tokens:,} ({tokens / read:.1%})" for tokens in parts.values()],
    padding=4,
  )
  axes.invert_yaxis()
  axes.set_xlim(0, max(parts.values()) * 1.45 or 1)
  axes.xaxis.set_major_formatter(EngFormatter(sep=""))
  axes.set_title(f"Where the {accounting.read:,} tokens read went", loc="left")
  axes.set_xlabel("tokens")
  axes.spines[["top", "right"]].set_visible(False)


def _draw_padding(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
  steps, padding = _series(lines, "padding_fraction")
  axes.plot(steps, padding, color=_ORANGE, linewidth=0.9)
  if len(padding):
    mean = float(padding.mean())
    axes.axhline(
      mean,
      color="black",
      linestyle="--",
      linewidth=1,
      label=f"mean {mean:.1%}",
    )
    axes.legend(frameon=False)
  axes.set_ylim(0, max(0.01, *padding * 1.25) if len(padding) else 1)
  axes.yaxis.set_major_formatter(PercentFormatter(1))
  axes.set_title("Padding in the chunks of a step", loc="left")
  axes.set_xlabel("step")
  axes.set_ylabel("share of positions")
  axes.grid(alpha=0.25)


def _draw_speed(axes: Axes, lines: Sequence[Mapping[str, Any]]) -> None:
  steps, speed = _series(lines, "tokens_per_sec")
  axes.plot(steps, speed, color=_GREEN, linewidth=0.9)
  compiled = [s for s in lines if s.get("compiles")]
  if compiled:
    total = sum(s["compiles"] for s in compiled)
    axes.scatter(
      [s["step"] for s in compiled],
      np.zeros(len(compiled)),
      marker="|",
      s=60,
      color=_RED,
      clip_on=False,
      zorder=3,
      label=f"compiled ({total} programs)",
    )
    axes.legend(frameon=False, loc="lower right")
  axes.set_ylim(0, None)
  axes.yaxis.set_major_formatter(EngFormatter(sep=""))
  axes.set_title("Speed", loc="left")
  axes.set_xlabel("step")
  axes.set_ylabel("tokens per second")
  axes.grid(alpha=0.25)


def _draw_memory(axes: Axes, info: RunInfo) -> None:
  if info.memory is None:
    raise ValueError("memory is None: there is nothing to draw")
  colours = itertools.cycle([_BLUE, _RED, _GREEN, _ORANGE, _PURPLE, _GREY])
  for name, values in info.memory.bytes.items():
    axes.plot(
      info.memory.lengths,
      values,
      color=next(colours),
      marker="o",
      markersize=3,
      label=name,
    )
  axes.set_xscale("log", base=2)
  axes.set_yscale("log", base=2)
  axes.xaxis.set_major_formatter(FuncFormatter(_binary_tokens))
  axes.yaxis.set_major_formatter(FuncFormatter(_binary_bytes))
  axes.set_title("Memory against length", loc="left")
  axes.set_xlabel("tokens in the sequence")
  axes.set_ylabel("bytes")
  axes.legend(frameon=False)
  axes.grid(alpha=0.25)


def _binary_tokens(value: float, _: Any) -> str:
  return f"{value / 1024:.4g}k" if value >= 1024 else f"{value:.4g}"


def _binary_bytes(value: float, _: Any) -> str:
  for unit in ("B", "KiB", "MiB", "GiB"):
    if value < 1024:
      return f"{value:.4g} {unit}"
    value /= 1024
  return f"{value:.4g} TiB"
