"""Pictures of results: heat maps by depth and length, losses by position."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from jaxchunk.evaluation.bits_per_byte import BitsPerByte, Bucket
from jaxchunk.evaluation.results import Results
from jaxchunk.evaluation.scoring import Cell
from jaxchunk.evaluation.tasks import NEEDLE_TASKS

# Even in lightness, and the same to colour-blind readers.
_COLOURS = "cividis"
# Okabe and Ito's palette, which colour-blind readers can tell apart.
_BLUE, _RED, _GREEN, _PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
_SERIES = ((_BLUE, "o"), (_RED, "s"), (_GREEN, "^"), (_PURPLE, "D"))
_SCORES = (
  ("ranked_first", "Answer likelier than every other candidate"),
  ("exact_match", "Greedy text begins with the answer"),
)


def draw(results: Results, folder: Path) -> list[Path]:
  """Draws a picture of each kind of result that there is.

  Args:
    results: What was found.
    folder: Gets `bits_per_byte.png`, one picture for each needle task, and
      `tasks.png`.

  Returns:
    The pictures' paths.
  """
  folder.mkdir(parents=True, exist_ok=True)
  paths = []
  for name, figure in figures(results):
    paths.append(folder / f"{name}.png")
    figure.savefig(paths[-1])
  return paths


def figures(results: Results) -> Iterator[tuple[str, Figure]]:
  """Name and figure of each picture."""
  if results.bits_per_byte is not None:
    yield "bits_per_byte", _loss_figure(results.title, results.bits_per_byte)
  for task in NEEDLE_TASKS:
    cells = [cell for cell in results.cells if cell.task == task]
    if cells:
      yield task, _needle_figure(results.title, task, cells)
  rest = [cell for cell in results.cells if cell.task not in NEEDLE_TASKS]
  if rest:
    yield "tasks", _task_figure(results.title, rest)


def _figure(width: float, height: float, title: str) -> Figure:
  figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
  FigureCanvasAgg(figure)
  figure.suptitle(title, fontsize=13)
  return figure


def _needle_figure(title: str, task: str, cells: Sequence[Cell]) -> Figure:
  lengths = sorted({cell.length for cell in cells})
  depths = sorted({cell.depth for cell in cells if cell.depth is not None})
  width = 2 * max(4.2, 1.4 + 0.85 * len(lengths))
  height = max(3.6, 2.2 + 0.55 * len(depths))
  samples = " to ".join(str(n) for n in sorted({c.samples for c in cells}))
  figure = _figure(
    width, height, f"{task.replace('_', ' ')} ({samples} samples)\n{title}"
  )
  panels = figure.subplots(1, 2, sharey=True)
  beyond = {cell.length for cell in cells if cell.extrapolated}
  for axes, (name, caption) in zip(panels, _SCORES, strict=True):
    grid = np.full((len(depths), len(lengths)), np.nan)
    for cell in cells:
      row = depths.index(cell.depth or 0.0)
      grid[row, lengths.index(cell.length)] = getattr(cell, name)
    _heat_map(
      axes,
      grid,
      columns=[_length(n) + ("*" if n in beyond else "") for n in lengths],
      rows=[f"{depth:.0%}" for depth in depths],
      norm=Normalize(0, 1),
      form="{:.0%}",
    )
    chance = f"\n(chance {cells[0].chance:.0%})" if "first" in name else ""
    axes.set_title(caption + chance, fontsize=10)
    axes.set_xlabel("tokens" + ("   (* extrapolated)" if beyond else ""))
  panels[0].set_ylabel("depth of the needle")
  figure.colorbar(panels[0].images[0], ax=panels, label="share of samples")
  return figure


def _heat_map(
  axes: Axes,
  grid: np.ndarray,
  *,
  columns: Sequence[str],
  rows: Sequence[str],
  norm: Normalize,
  form: str,
) -> None:
  """Squares of colour with their numbers; what is missing stays blank."""
  image = axes.imshow(grid, cmap=_COLOURS, norm=norm, aspect="auto")
  axes.set_xticks(range(len(columns)), columns)
  axes.set_yticks(range(len(rows)), rows)
  axes.tick_params(length=0)
  if len(columns) > 6:
    axes.tick_params(axis="x", rotation=45)
  axes.spines[:].set_visible(False)
  axes.set_facecolor("#eeeeee")
  for (row, column), value in np.ndenumerate(grid):
    if math.isfinite(value):
      red, green, blue, _ = image.cmap(norm(value))
      dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
      axes.text(
        column,
        row,
        form.format(value),
        ha="center",
        va="center",
        fontsize=9,
        color="white" if dark else "black",
      )


def _loss_figure(title: str, found: BitsPerByte) -> Figure:
  count = max(len(found.by_position), len(found.by_length))
  figure = _figure(
    6.5 + max(6.0, 1.6 + 0.72 * count),
    max(5.0, 2.4 + 0.42 * len(found.by_length)),
    f"Held out: {_with_error(found.whole)} bits per byte on "
    f"{found.whole.documents:,} documents\n{title}",
  )
  lines, heat = figure.subplots(1, 2, width_ratios=(6.0, 1.6 + 0.72 * count))
  kinds = (
    (found.by_position, "position in the document", *_SERIES[0]),
    (found.by_length, "length of the document", *_SERIES[1]),
  )
  for buckets, label, colour, marker in kinds:
    shown = [b for b in buckets if b.bits_per_byte is not None]
    lines.errorbar(
      [_middle(b) for b in shown],
      [b.bits_per_byte for b in shown],
      yerr=[b.standard_error or 0.0 for b in shown],
      label=label,
      color=colour,
      marker=marker,
      markersize=5,
      capsize=3,
    )
  lines.set_xscale("log", base=2)
  lines.xaxis.set_major_formatter(lambda value, _: _length(value))
  lines.set_title("With standard errors, by document", fontsize=10)
  lines.set_xlabel("tokens")
  lines.set_ylabel("bits per byte")
  lines.legend(frameon=False)
  lines.grid(alpha=0.25)
  _draw_both(heat, found)
  return figure


def _draw_both(axes: Axes, found: BitsPerByte) -> None:
  grid = np.asarray(found.by_both, float)  # None becomes NaN.
  low, high = np.nanmin(grid), np.nanmax(grid)
  _heat_map(
    axes,
    grid,
    columns=[_span(b) for b in found.by_position],
    rows=[f"{_span(b)}  ({b.documents})" for b in found.by_length],
    norm=Normalize(low, high if high > low else low + 1),
    form="{:.2f}",
  )
  axes.set_title("Bits per byte by both", fontsize=10)
  axes.set_xlabel("position in the document (tokens)")
  axes.set_ylabel("length of the document (documents)")


def _task_figure(title: str, cells: Sequence[Cell]) -> Figure:
  tasks = list(dict.fromkeys(cell.task for cell in cells))
  figure = _figure(11, 4.6, title)
  panels = figure.subplots(1, 2, sharey=True)
  for axes, (name, caption) in zip(panels, _SCORES, strict=True):
    for number, task in enumerate(tasks):
      colour, marker = _SERIES[number % len(_SERIES)]
      here = sorted(
        (c for c in cells if c.task == task), key=lambda c: c.length
      )
      shares = np.asarray([getattr(c, name) for c in here])
      # Side by side, or points of equal tasks would hide each other.
      shift = 2 ** (0.06 * (number - (len(tasks) - 1) / 2))
      axes.errorbar(
        [c.length * shift for c in here],
        shares,
        yerr=_wilson(shares, np.asarray([c.samples for c in here])),
        color=colour,
        marker=marker,
        capsize=3,
        label=task.replace("_", " "),
      )
      if "first" in name:
        axes.axhline(here[0].chance, color=colour, linestyle=":", linewidth=1)
    lengths = sorted({c.length for c in cells})
    beyond = {c.length for c in cells if c.extrapolated}
    axes.set_xscale("log", base=2)
    axes.set_xticks(
      lengths, [_length(n) + ("*" if n in beyond else "") for n in lengths]
    )
    axes.minorticks_off()
    axes.set_ylim(-0.03, 1.03)
    dotted = "\n(dotted: chance)" if "first" in name else ""
    axes.set_title(caption + dotted, fontsize=10)
    axes.set_xlabel("tokens" + ("   (* extrapolated)" if beyond else ""))
    axes.grid(alpha=0.25)
  panels[0].set_ylabel("share of samples (95% intervals)")
  figure.legend(
    *panels[0].get_legend_handles_labels(),
    loc="outside lower center",
    ncols=len(tasks),
    frameon=False,
  )
  return figure


def _wilson(shares: np.ndarray, counts: np.ndarray) -> np.ndarray:
  """Distances below and above of Wilson's 95% interval, `[2, points]`."""
  z = 1.96
  middle = (shares + z**2 / (2 * counts)) / (1 + z**2 / counts)
  spread = np.sqrt(shares * (1 - shares) / counts + z**2 / (4 * counts**2)) * (
    z / (1 + z**2 / counts)
  )
  low, high = middle - spread, middle + spread
  return np.maximum([shares - low, high - shares], 0)


def _middle(bucket: Bucket) -> float:
  """The geometric middle, for logarithmic axes."""
  return math.sqrt(max(bucket.start, 1) * max(bucket.stop, 2))


def _with_error(bucket: Bucket) -> str:
  value, error = bucket.bits_per_byte, bucket.standard_error
  if value is None:
    return "no"
  return f"{value:.3f}" + (
    "" if error is None else f" \N{PLUS-MINUS SIGN} {error:.3f}"
  )


def _span(bucket: Bucket) -> str:
  return f"{_length(bucket.start)}\N{EN DASH}{_length(bucket.stop)}"


def _length(tokens: float) -> str:
  """A number of tokens, short: 1024 is 1k."""
  if tokens < 1024:
    return f"{tokens:g}"
  return f"{tokens / 1024:.3g}k"
