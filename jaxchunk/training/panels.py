"""The panels of a report: each draws one thing into given axes."""

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import EngFormatter, FuncFormatter, PercentFormatter

from jaxchunk.data.accounting import Accounting
from jaxchunk.training.breakdown import PARTS, Lines, breakdown
from jaxchunk.training.info import Memory, RunInfo
from jaxchunk.training.schedule import draw_schedule

# Okabe and Ito's palette, which colour-blind readers can tell apart.
_BLUE, _ORANGE, _GREEN = "#0072B2", "#E69F00", "#009E73"
_RED, _PURPLE, _GREY = "#D55E00", "#CC79A7", "#999999"
_FATES = {
  "trained": _BLUE,
  "masked": _PURPLE,
  "truncated": "#56B4E9",
  "held_out": _GREEN,
  "empty": _GREY,
  "too_short": _RED,
  "too_long": _ORANGE,
}


class Panel(NamedTuple):
  """One picture.

  Attributes:
    name: For whoever cannot see it.
    draw: Draws it.
    wide: Whether it wants the whole width.
  """

  name: str
  draw: Callable[[Axes], None]
  wide: bool = False


def panels_of(info: RunInfo, lines: Lines) -> list[Panel]:
  """The pictures of a run, in the order of reading.

  Args:
    info: What does not change from step to step.
    lines: Those of `metrics.jsonl`.
  """

  def of_lines(name: str, draw: Callable[[Axes, Lines], None]) -> Panel:
    return Panel(name, lambda axes: draw(axes, lines))

  panels = [
    of_lines("loss by step", draw_loss),
    of_lines("speed by step", draw_speed),
    of_lines("time by step", draw_time),
    of_lines("utilization by step", draw_utilization),
    of_lines("padding by step", draw_padding),
    of_lines("imbalance by step", draw_imbalance),
    Panel(
      "tokens by what became of them",
      functools.partial(draw_accounting, accounting=info.accounting),
    ),
    Panel("documents by length", functools.partial(draw_lengths, info=info)),
  ]
  if info.memory is not None:
    draw = functools.partial(draw_memory, memory=info.memory)
    panels.append(Panel("memory by length", draw))
  if info.schedule is not None:
    draw = functools.partial(draw_schedule, schedule=info.schedule)
    panels.append(Panel("schedule of one step", draw, wide=True))
  return panels


def series(lines: Lines, name: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps and values of a metric, where it is a finite number."""
  points = [
    (line["step"], value)
    for line in lines
    if isinstance(value := line.get(name), int | float) and math.isfinite(value)
  ]
  steps, values = np.asarray(points, float).reshape(-1, 2).T
  return steps, values


def draw_loss(axes: Axes, lines: Lines) -> None:
  """Loss of training and of the held-out documents, by step."""
  steps, loss = series(lines, "bits_per_byte")
  axes.plot(steps, loss, color=_BLUE, alpha=0.3, linewidth=0.8)
  width = max(len(loss) // 40, 1)
  axes.plot(
    steps,
    _running_mean(loss, width),
    color=_BLUE,
    label="training" if width == 1 else f"training (mean of {width} steps)",
  )
  steps, heldout = series(lines, "heldout_bits_per_byte")
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


def draw_lengths(axes: Axes, info: RunInfo) -> None:
  """How many documents of the corpus have which length."""
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


def draw_accounting(axes: Axes, accounting: Accounting) -> None:
  """What became of the tokens read."""
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


def draw_padding(axes: Axes, lines: Lines) -> None:
  """Share of padding in every step."""
  steps, padding = series(lines, "padding_fraction")
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


def draw_speed(axes: Axes, lines: Lines) -> None:
  """Tokens per second, and the steps that compiled."""
  steps, speed = series(lines, "tokens_per_sec")
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
    axes.legend(frameon=False, loc="upper right")
  axes.set_ylim(0, _top(speed))
  axes.yaxis.set_major_formatter(EngFormatter(sep=""))
  axes.set_title("Speed", loc="left")
  axes.set_xlabel("step")
  axes.set_ylabel("tokens per second")
  axes.grid(alpha=0.25)


def draw_time(axes: Axes, lines: Lines) -> None:
  """What a step's time was spent on, without the start of the run."""
  group = max(math.ceil(len(lines) / 200), 1)
  steps, rows = [], []
  for start in range(0, len(lines), group):
    some = lines[start : start + group]
    parts = breakdown(some)
    steps.append(float(np.mean([line["step"] for line in some])))
    rows.append([parts.get(part.name, 0) / len(some) for part in PARTS])
  table = np.asarray(rows).reshape(-1, len(PARTS))
  shown = [
    (part, values)
    for part, values in zip(PARTS, table.T, strict=True)
    if part.name != "start and warm-up" and values.sum() > table.sum() / 500
  ]
  if shown:
    axes.stackplot(
      steps,
      [values for _, values in shown],
      colors=[part.colour for part, _ in shown],
      labels=[part.name for part, _ in shown],
      linewidth=0,
      step="mid",
    )
  _legend_or_note(axes, above=True)
  mean = "" if group == 1 else f", mean of {group} steps"
  axes.set_ylim(0, None)
  axes.set_title("Time of a step", loc="left", pad=8 + 13 * -(-len(shown) // 3))
  axes.set_xlabel("step")
  axes.set_ylabel(f"seconds{mean}")
  axes.grid(alpha=0.25)


def draw_breakdown(axes: Axes, lines: Lines) -> None:
  """Where all seconds went, a bar for each kind."""
  parts = breakdown(lines)
  total = sum(parts.values())
  colours = {part.name: part.colour for part in PARTS}
  bars = axes.barh(
    list(parts), list(parts.values()), color=[colours[n] for n in parts]
  )
  labels = [f"{s:,.1f} s ({s / total:.1%})" for s in parts.values()]
  axes.bar_label(bars, labels, padding=4)
  axes.invert_yaxis()
  axes.set_xlim(0, max(parts.values(), default=1) * 1.3)
  axes.set_title(f"Where {total:,.0f} seconds went", loc="left")
  axes.set_xlabel("seconds")
  axes.spines[["top", "right"]].set_visible(False)


def draw_utilization(axes: Axes, lines: Lines) -> None:
  """FLOPs per second as shares of the device's peak."""
  for name, colour in (("hfu", _ORANGE), ("mfu", _BLUE)):
    steps, values = series(lines, name)
    if len(values):
      label = f"{name.upper()} (median {np.median(values):.1%})"
      axes.plot(steps, values, color=colour, linewidth=0.9, label=label)
  _legend_or_note(axes)
  axes.set_ylim(0, _top(series(lines, "hfu")[1]))
  axes.yaxis.set_major_formatter(PercentFormatter(1))
  axes.set_title("Utilization of the device", loc="left")
  axes.set_xlabel("step")
  axes.set_ylabel("share of its peak FLOP/s")
  axes.grid(alpha=0.25)


def draw_imbalance(axes: Axes, lines: Lines) -> None:
  """Costliest chunk and lane of a step over the mean."""
  for name, what, colour in (
    ("imbalance", "chunks", _BLUE),
    ("lane_imbalance", "lanes", _RED),
  ):
    steps, values = series(lines, name)
    if len(values):
      label = f"{what} (median {np.median(values):.2f})"
      axes.plot(steps, values, color=colour, linewidth=0.9, label=label)
  _legend_or_note(axes)
  axes.set_ylim(0, None)
  axes.set_title("Imbalance of cost", loc="left")
  axes.set_xlabel("step")
  axes.set_ylabel("costliest / mean")
  axes.grid(alpha=0.25)


def _top(values: np.ndarray) -> float | None:
  """Where an axis ends.

  Steps are dispatched ahead, so one that was computed while the next one was
  compiled looks many times as fast: such a step may leave the picture.
  """
  return 1.4 * float(np.quantile(values, 0.9)) or None if len(values) else None


def _legend_or_note(axes: Axes, *, above: bool = False) -> None:
  """A legend, or a word in place of what was not recorded."""
  if not axes.get_legend_handles_labels()[0]:
    axes.text(
      *(0.5, 0.5, "not recorded"), transform=axes.transAxes, ha="center"
    )
  elif above:
    axes.legend(
      loc="lower left",
      bbox_to_anchor=(0, 1),
      ncols=3,
      frameon=False,
      fontsize="small",
      borderpad=0.2,
      borderaxespad=0.2,
    )
  else:
    axes.legend(frameon=False)


def draw_memory(axes: Axes, memory: Memory) -> None:
  """Predicted bytes against the length of a sequence."""
  colours = itertools.cycle([_BLUE, _RED, _GREEN, _ORANGE, _PURPLE, _GREY])
  for name, values in memory.bytes.items():
    axes.plot(
      memory.lengths,
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
