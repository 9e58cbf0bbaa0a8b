"""What `scripts/plot_schedule.py` is told, read and checked.

All of it raises `ValueError` with the flag's name, its value, and what to give.
"""

import math
from pathlib import Path

from jaxchunk.sharding.pipeline import tables
from jaxchunk.sharding.pipeline.simulate import Costs, fitted_costs
from jaxchunk.sharding.pipeline.table import Lanes, Table
from jaxchunk.sharding.pipeline.timeline import (
  Timeline,
  check_timeline,
  read_timeline,
)

NAMES = (*tables.BUILDERS, "two_bw")
"""Schedules that can be drawn."""


def picture_path(text: str) -> Path:
  """Where a picture goes, from `--out`."""
  path = Path(text)
  if path.suffix not in (".png", ".svg"):
    raise ValueError(f"--out={text}: end it in .png or .svg")
  if not path.parent.is_dir():
    raise ValueError(f"--out={text}: there is no folder {path.parent}; make it")
  return path


def read_lanes(text: str, live: int | None) -> Lanes:
  """Lanes from `--lanes`, "8" or "4,1,2,1", and `--live`."""
  try:
    sizes = tuple(int(size) for size in text.removesuffix(",").split(","))
  except ValueError as error:
    raise ValueError(
      f"--lanes={text}: give a number of microbatches as in 8, or the chunks "
      "of each lane as in 4,1,2,1"
    ) from error
  if min(sizes) < 1:
    raise ValueError(f"--lanes={text}: numbers must be at least 1")
  if live is not None and live < 0:
    raise ValueError(f"--live={live}: give 0 or more, or leave it out for all")
  return Lanes(sizes if "," in text else (1,) * sizes[0], live)


def read_table(name: str, devices: int, lanes: Lanes, batches: int) -> Table:
  """A table from `--schedule`, `--devices` and, for two_bw, `--batches`."""
  if devices < 1:
    raise ValueError(f"--devices={devices}: give at least 1")
  if name == "two_bw":
    if batches < 1:
      raise ValueError(f"--batches={batches}: give at least 1")
    return tables.two_bw(devices, [lanes] * batches)
  for known in tables.BUILDERS:
    if name == known:
      return tables.build(known, devices, lanes)
  raise ValueError(f"--schedule={name}: give one of {', '.join(NAMES)}")


def read_measured(path: str | None, table: Table) -> Timeline | None:
  """What was measured of a table, from `--measured`."""
  if path is None:
    return None
  try:
    timeline = read_timeline(path, table.placement.devices)
    check_timeline(table, timeline)
  except OSError as error:
    raise ValueError(
      f"--measured={path}: {error.strerror}; name a file that exists"
    ) from error
  except ValueError as error:
    raise ValueError(
      f"--measured={path}: {error}; give the --schedule, --devices, --lanes "
      "and --live that ran"
    ) from error
  return timeline


def read_costs(
  text: str | None, table: Table, measured: Timeline | None
) -> Costs:
  """Costs from `--costs`, or those that were measured."""
  if text is None:
    return Costs() if measured is None else fitted_costs(table, measured)
  try:
    f, b, w = (float(time) for time in text.split(","))
    if not all(math.isfinite(time) and time >= 0 for time in (f, b, w)):
      raise ValueError(text)
  except ValueError as error:
    raise ValueError(
      f"--costs={text}: give three times of 0 or more, F,B,W, as in 1,1,1"
    ) from error
  return Costs(f=f, b=b, w=w)
