"""The report of a run, drawn from the files in its workdir."""

from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from jaxchunk.training import html_report, info, metrics, panels
from jaxchunk.training.breakdown import Lines
from jaxchunk.training.info import RunInfo
from jaxchunk.training.panels import Panel
from jaxchunk.training.schedule import schedule_figure

FILE_NAME = "report.png"
HTML_NAME = "report.html"
SCHEDULE_NAME = "schedule.png"


def draw(workdir: Path) -> Path:
  """Draws `report.html`, `report.png` and `schedule.png`.

  Returns:
    The first one's path.

  Raises:
    FileNotFoundError: No run has finished a step in this folder.
  """
  run, lines = info.read_info(workdir), list(metrics.read(workdir))
  page = html_report.page(run, lines, config=info.read_config(workdir))
  (workdir / HTML_NAME).write_text(page, encoding="utf-8")
  report_figure(run, lines).savefig(workdir / FILE_NAME)
  if run.schedule is not None:
    schedule_figure(run.schedule).savefig(workdir / SCHEDULE_NAME)
  return workdir / HTML_NAME


def report_figure(run: RunInfo, lines: Lines) -> Figure:
  """All panels of a run.

  Args:
    run: What does not change from step to step.
    lines: Those of `metrics.jsonl`.
  """
  shown = panels.panels_of(run, lines)
  # The page has a bar of its own in its place.
  seconds = Panel("seconds", lambda axes: panels.draw_breakdown(axes, lines))
  # Two by two; the wide ones have a row of their own, below.
  narrow = [*(panel for panel in shown if not panel.wide), seconds]
  wide = [panel for panel in shown if panel.wide]
  rows = -(-len(narrow) // 2) + len(wide)
  layout = ConstrainedLayoutEngine(h_pad=0.12, w_pad=0.12)
  figure = Figure(figsize=(12, 3.5 * rows), dpi=110, layout=layout)
  FigureCanvasAgg(figure)
  # A name may hold what would be taken for a formula.
  figure.suptitle(run.title, fontsize=14, parse_math=False)
  grid = figure.add_gridspec(rows, 2)
  for number, panel in enumerate(narrow):
    panel.draw(figure.add_subplot(grid[divmod(number, 2)]))
  for row, panel in enumerate(wide, rows - len(wide)):
    panel.draw(figure.add_subplot(grid[row, :]))
  return figure
