"""What each device did when: simulated, or measured and read from a file."""

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxchunk.sharding.pipeline.table import KINDS, Table

# What a device does: the kinds of a table, and the steps before its first
# stage and behind its last.
_KINDS = (*KINDS, "embed", "head")


class Span(NamedTuple):
  """Something that a device did.

  Attributes:
    device: Which did it.
    kind: That of an operation of a table, or "embed" or "head".
    stage: On which virtual stage.
    item: For which chunk.
    start: When it began, from the start of the timeline.
    stop: When it ended, in the same unit.
  """

  device: int
  kind: str
  stage: int
  item: int
  start: float
  stop: float


@dataclasses.dataclass(frozen=True)
class Timeline:
  """All that the devices did; time is in the unit of what made it.

  Attributes:
    devices: P, how many there are.
    spans: What they did, those of each device in order.
  """

  devices: int
  spans: tuple[Span, ...]

  @functools.cached_property
  def makespan(self) -> float:
    """When all is done."""
    return max((span.stop for span in self.spans), default=0.0)

  @functools.cached_property
  def dropped(self) -> frozenset[tuple[int, int]]:
    """The `(stage, item)` whose `F_keep` is the second forward pass."""
    return frozenset(
      (span.stage, span.item) for span in self.spans if span.kind == "F_drop"
    )

  @functools.cached_property
  def busy(self) -> tuple[float, ...]:
    """Time in which each device did work that counts: not what it repeated."""
    busy = [0.0] * self.devices
    for span in self.spans:
      if not self.repeats(span):
        busy[span.device] += span.stop - span.start
    return tuple(busy)

  @property
  def bubble(self) -> float:
    """Share of the devices' time in which they did no work that counts."""
    if not self.makespan:
      return 0.0
    return 1 - sum(self.busy) / self.devices / self.makespan

  def repeats(self, span: Span) -> bool:
    """Whether a span is the second forward pass of a dropped chunk."""
    return span.kind == "F_keep" and (span.stage, span.item) in self.dropped

  def orders(self) -> list[list[Span]]:
    """Operations of each device, without embedding and head, in order."""
    orders: list[list[Span]] = [[] for _ in range(self.devices)]
    for span in sorted(self.spans, key=lambda s: (s.start, s.stop)):
      if span.kind in KINDS:
        orders[span.device].append(span)
    return orders


def check_timeline(table: Table, timeline: Timeline) -> None:
  """Whether a timeline is of a table: the same operations in the same order.

  Raises:
    ValueError: It is not; names the device, and the operation of both.
  """
  devices = table.placement.devices
  if timeline.devices != devices:
    raise ValueError(
      f"the timeline has {timeline.devices} devices and the table {devices}"
    )
  stages, items = table.placement.stages, table.lanes.count
  for span in timeline.spans:
    if not (0 <= span.stage < stages and 0 <= span.item < items):
      raise ValueError(
        f"the timeline has chunk {span.item} on stage {span.stage}, and the "
        f"table {items} chunks and {stages} stages"
      )
  both = zip(table.orders(), timeline.orders(), strict=True)
  for device, (wanted, spans) in enumerate(both):
    found = [span[1:4] for span in spans]
    if len(found) != len(wanted):
      raise ValueError(
        f"the timeline has {len(found)} operations of device {device} and the "
        f"table {len(wanted)}"
      )
    for number, (have, want) in enumerate(zip(found, wanted, strict=True)):
      if have != tuple(want):
        raise ValueError(
          f"operation {number} of device {device} is {have[0]} of chunk "
          f"{have[2]} on stage {have[1]} in the timeline and {want} in the "
          "table"
        )


def write_timeline(timeline: Timeline, path: str | Path) -> None:
  """Writes what `read_timeline` reads."""
  text = json.dumps({"spans": [list(span) for span in timeline.spans]})
  Path(path).write_text(text, encoding="utf-8")


def read_timeline(path: str | Path, devices: int) -> Timeline:
  """A timeline from a file; time begins with its first span.

  The file is JSON, with times in seconds from any moment:

    {"spans": [[device, kind, stage, item, start, stop], ...]}

  Args:
    path: Of the file.
    devices: P, which its devices are below.

  Raises:
    OSError: The file cannot be read.
    ValueError: It is not such a file; names the span that is wrong.
  """
  text = Path(path).read_text(encoding="utf-8")
  try:
    rows = json.loads(text)["spans"]
  except (ValueError, KeyError, TypeError) as error:
    raise ValueError(
      f'{path} is not JSON of the form {{"spans": [...]}}: {error!r}'
    ) from error
  if not isinstance(rows, list) or not rows:
    raise ValueError(f"{path} has no spans")
  spans = [_span(path, number, row, devices) for number, row in enumerate(rows)]
  begin = min(span.start for span in spans)
  return Timeline(
    devices,
    tuple(
      span._replace(start=span.start - begin, stop=span.stop - begin)
      for span in sorted(spans, key=lambda span: (span.start, span.stop))
    ),
  )


def _span(
  path: str | Path, number: int, row: Sequence[Any], devices: int
) -> Span:
  """A span from what JSON has for it."""
  try:
    device, kind, stage, item, start, stop = row
    span = Span(
      int(device), str(kind), int(stage), int(item), float(start), float(stop)
    )
  except (TypeError, ValueError, OverflowError) as error:
    raise ValueError(
      f"{path}: span {number} is {row!r}, not "
      "[device, kind, stage, item, start, stop]"
    ) from error
  if span.kind not in _KINDS:
    raise ValueError(
      f"{path}: span {number} has kind {span.kind!r}, not one of {list(_KINDS)}"
    )
  if not 0 <= span.device < devices:
    raise ValueError(
      f"{path}: span {number} has device {span.device} of {devices}"
    )
  if not (math.isfinite(span.stop) and -math.inf < span.start <= span.stop):
    raise ValueError(
      f"{path}: span {number} starts at {span.start} and stops at {span.stop}"
    )
  return span
