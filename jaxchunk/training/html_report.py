"""`report.html`: a run in one file, that needs nothing else."""

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from jaxchunk.data.accounting import Accounting
from jaxchunk.training.breakdown import (
  PARTS,
  Compiled,
  Lines,
  breakdown,
  compile_events,
)
from jaxchunk.training.html_style import STYLE
from jaxchunk.training.info import RunInfo
from jaxchunk.training.panels import Panel, panels_of, series

_UNKNOWN = "not recorded"
_COMPUTE = ("useful compute", "recomputation", "padding", "undivided compute")


def page(
  run: RunInfo, lines: Lines, *, config: Mapping[str, Any] | None
) -> str:
  """The whole page.

  Args:
    run: What does not change from step to step.
    lines: Those of `metrics.jsonl`; what they do not have is left out or
      shown as not recorded.
    config: The values of `config.json`; `None` leaves them out.
  """
  body = [
    f"<h1>{escape(run.title)}</h1>",
    f"<p>{escape(_summary(lines))}</p>",
    _headlines(lines),
    _section("Where each second went", _seconds(lines)),
    _section("By step", _pictures(panels_of(run, lines))),
    _section("Compiled programs", _compilations(lines)),
    _section("Tokens", _tokens(run.accounting)),
    _section("How this is counted", _definitions(lines)),
  ]
  if config is not None:
    table = _table(("field", "value"), _flatten(config))
    body.append(_section("Configuration", _folded("all fields", table)))
  return (
    '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f"<title>{escape(run.title)}</title>\n<style>{STYLE}</style>\n</head>\n"
    f"<body>\n{''.join(body)}</body>\n</html>\n"
  )


def _section(title: str, *content: str) -> str:
  return f"<section>\n<h2>{escape(title)}</h2>\n{''.join(content)}</section>\n"


def _folded(title: str, content: str) -> str:
  return f"<details><summary>{escape(title)}</summary>\n{content}</details>\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
  def cells(tag: str, row: Sequence[Any]) -> str:
    inner = "".join(f"<{tag}>{escape(str(cell))}</{tag}>" for cell in row)
    return f"<tr>{inner}</tr>\n"

  body = "".join(cells("td", row) for row in rows)
  return (
    f'<div class="scroll"><table>\n<thead>{cells("th", head)}</thead>\n'
    f"<tbody>{body}</tbody>\n</table></div>\n"
  )


def _summary(lines: Lines) -> str:
  starts = sum("startup_seconds" in line for line in lines)
  text = f"{len(lines):,} step{'' if len(lines) == 1 else 's'} in the metrics"
  if starts > 1:
    text += f", {starts} starts of the run"
  if lines:
    text += f", {duration(sum(breakdown(lines).values()))} in all"
  if starts > 1:
    text += "; what a crash undid and a resume did again counts once"
  return text + "."


def duration(seconds: float) -> str:
  """Seconds as a reader wants them: `4.2 s`, `3 min 20 s`, `2 h 5 min`."""
  if seconds < 100:
    return f"{seconds:.3g} s"
  minutes, rest = divmod(round(seconds), 60)
  if minutes < 100:
    return f"{minutes} min {rest} s"
  return f"{minutes // 60:,} h {minutes % 60} min"


def _headlines(lines: Lines) -> str:
  parts = breakdown(lines)
  total = sum(parts.values())

  def middle(name: str, form: str) -> str:
    values = series(lines, name)[1]
    return format(float(np.median(values)), form) if len(values) else _UNKNOWN

  def share(part: str, metric: str) -> str:
    if not total or not len(series(lines, metric)[1]):
      return _UNKNOWN
    return f"{parts.get(part, 0) / total:.2%}"

  later = [event for event in compile_events(lines) if not event.expected]
  counted = series(lines, "compiles")[1]
  cards = [
    (_last_loss(lines)),
    ("tokens per second", middle("tokens_per_sec", ",.0f"), "median step"),
    ("MFU", middle("mfu", ".1%"), "model FLOPs, median step"),
    ("HFU", middle("hfu", ".1%"), "with recomputation and padding"),
    (
      "useful compute",
      share("useful compute", "hardware_flops"),
      "of all seconds",
    ),
    ("padding", middle("padding_fraction", ".2%"), "of positions, median"),
    ("imbalance", middle("imbalance", ".2f"), _waits(lines)),
    ("input wait", share("input wait", "input_wait"), "of all seconds"),
    ("save stall", share("save stall", "save_stall"), "of all seconds"),
    (
      "compiled later",
      f"{len(later) or int(counted.sum()):,}" if len(counted) else _UNKNOWN,
      f"programs after the warm-up, {duration(_total(later))}",
    ),
  ]
  return (
    '<dl class="cards">\n'
    + "".join(
      f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd>"
      f"<dd class=note>{escape(note)}</dd></div>\n"
      for name, value, note in cards
    )
    + "</dl>\n"
  )


def _last_loss(lines: Lines) -> tuple[str, str, str]:
  for metric, name in (
    ("heldout_bits_per_byte", "held-out loss"),
    ("bits_per_byte", "training loss"),
  ):
    steps, values = series(lines, metric)
    if len(values):
      return name, f"{values[-1]:.3f}", f"bits per byte, step {steps[-1]:,.0f}"
  return "loss", _UNKNOWN, "bits per byte"


def _waits(lines: Lines) -> str:
  values = series(lines, "imbalance")[1]
  if not len(values):
    return "costliest chunk over mean"
  lost = 1 - 1 / float(np.median(values))
  return f"costliest chunk over mean: lockstep stages would wait {lost:.0%}"


def _seconds(lines: Lines) -> str:
  """One stacked bar and its legend, which is a table too."""
  parts = breakdown(lines)
  total = sum(parts.values())
  if not total:
    return f"<p>{_UNKNOWN}</p>\n"
  shown = [part for part in PARTS if part.name in parts]
  bar, rows = [], []
  for part in shown:
    seconds = parts[part.name]
    label = f"{part.name}: {duration(seconds)}, {seconds / total:.1%}"
    bar.append(
      f'<span style="width:{seconds / total:.4%};background:{part.colour}" '
      f'title="{escape(label)}"></span>'
    )
    rows.append(
      f'<tr><td><i style="background:{part.colour}"></i>{escape(part.name)}'
      f"</td><td>{duration(seconds)}</td><td>{seconds / total:.1%}</td>"
      f"<td>{escape(part.meaning)}</td></tr>\n"
    )
  compute = sum(parts.get(name, 0) for name in _COMPUTE)
  note = (
    f"<p>{compute / total:.1%} of the time is compute, divided here by FLOPs. "
    "Chunks of unequal cost run one after the other on this device and wait "
    "for nobody; the imbalance below is what stages or devices in lockstep "
    "would lose.</p>\n"
  )
  return (
    f'<div class="bar">{"".join(bar)}</div>\n<div class="scroll"><table '
    'class="legend">\n<thead><tr><th>kind</th><th>time</th><th>share</th>'
    f"<th>what it is</th></tr></thead>\n<tbody>{''.join(rows)}</tbody>\n"
    f"</table></div>\n{note}"
  )


def _pictures(panels: Sequence[Panel]) -> str:
  figures = "".join(
    f"<figure{' class=wide' if panel.wide else ''}>"
    f"{_svg(panel, f'p{number}')}</figure>\n"
    for number, panel in enumerate(panels)
  )
  return f'<div class="pictures">\n{figures}</div>\n'


def _svg(panel: Panel, prefix: str) -> str:
  """A panel as an `<svg>` element that takes the page's text colour.

  Args:
    panel: What to draw.
    prefix: Keeps the names in it apart from those of other panels.
  """
  buffer = io.StringIO()
  with mpl.rc_context(
    {"svg.fonttype": "none", "svg.hashsalt": prefix, "font.size": 9}
  ):
    size = (10.8, 3.6) if panel.wide else (5.2, 3.5)
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    panel.draw(figure.add_subplot())
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
  text = buffer.getvalue()
  head, inner = text[text.index("<svg") + 4 :].split(">", 1)
  # As wide as the page allows.
  head = re.sub(r'\s(width|height)="[^"]*"', "", head)
  inner = re.sub(r"<metadata>.*?</metadata>", "", inner, flags=re.DOTALL)
  for before in ('id="', 'href="#', "url(#"):
    inner = inner.replace(before, f"{before}{prefix}-")
  # Black is the page's text.
  inner = inner.replace("#000000", "currentColor")
  return f'<svg role="img" aria-label="{escape(panel.name)}"{head}>{inner}'


def _compilations(lines: Lines) -> str:
  events = list(compile_events(lines))
  later = [event for event in events if not event.expected]
  before = [event for event in events if event.expected]
  counted = int(series(lines, "compiles")[1].sum())
  if later:
    text = _events(later)
  elif counted:
    text = f"<p>{counted:,} programs, whose names were not recorded.</p>\n"
  else:
    text = "<p>None after the warm-up.</p>\n"
  if before:
    title = (
      f"{len(before):,} programs before the first step of a start, "
      f"{duration(_total(before))}"
    )
    text += _folded(title, _events(before))
  return text


def _events(events: Sequence[Compiled]) -> str:
  rows = [(event.step, event.name, f"{event.seconds:.2f}") for event in events]
  return _table(("step", "program", "seconds"), rows)


def _total(events: Iterable[Compiled]) -> float:
  return sum(event.seconds for event in events)


def _tokens(accounting: Accounting) -> str:
  return f"<pre>{escape(accounting.table())}</pre>\n"


def _definitions(lines: Lines) -> str:
  sources = {
    f"{line['peak_flops'] / 1e12:,.4g} TFLOP/s ({line['peak_source']})": None
    for line in lines
    if line.get("peak_flops") and line.get("peak_source")
  }
  peak = "; ".join(sources) or _UNKNOWN
  return (
    "<ul>\n"
    f"<li>Peak of the device: {escape(peak)}.</li>\n"
    "<li>MFU: FLOPs that the model needs for the step's tokens, forward once "
    "and backward twice that, over the step's seconds and the peak. No "
    "recomputation, no padding; attention counts visible pairs of tokens "
    "alone; embeddings, norms and the optimizer count nothing. Steps without "
    "evaluation and saving.</li>\n"
    "<li>HFU: the same with recomputation and padding.</li>\n"
    "<li>Cost of a chunk: a &middot; C + b &middot; (visible pairs), about a "
    "&middot; C + b &middot; C &middot; prefix, forward and backward. "
    "Imbalance is the costliest over the mean of a step; a pipeline in "
    "lockstep would lose 1 &minus; 1/imbalance. That of lanes is for devices "
    "with a lane each.</li>\n"
    "<li>Input wait is taken on the host: the device may have been at work in "
    "a part of it.</li>\n</ul>\n"
  )


def _flatten(values: Any, path: str = "") -> Iterable[tuple[str, str]]:
  if isinstance(values, Mapping):
    for name, value in values.items():
      if name != "class":
        yield from _flatten(value, f"{path}.{name}" if path else str(name))
  else:
    yield path, str(values)
