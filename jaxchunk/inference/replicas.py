"""Several copies of a model, each with pages and a schedule of its own."""

import dataclasses
from collections.abc import Iterable
from collections.abc import Sequence as Many

from jaxchunk.inference.core import CoreStats, EngineCore, Request
from jaxchunk.inference.output import Event
from jaxchunk.inference.sequence import Sequence


class Replicas:
  """Engines that serve as one; a request goes to the one with least to do.

  Args:
    cores: Of the engines; used by one thread.
  """

  def __init__(self, cores: Many[EngineCore]):
    self.cores = tuple(cores)
    self._where: dict[str, EngineCore] = {}

  @property
  def max_length(self) -> int:
    """The most tokens that a sequence may have."""
    return self.cores[0].max_length

  @property
  def has_work(self) -> bool:
    """Whether `step` has something to do."""
    return any(core.has_work for core in self.cores)

  @property
  def num_live(self) -> int:
    """Sequences that have not ended."""
    return sum(core.num_live for core in self.cores)

  @property
  def stats(self) -> CoreStats:
    """Of all together."""
    return add_stats(core.stats for core in self.cores)

  def check(self, request: Request) -> None:
    """See `EngineCore.check`."""
    self._where.get(request.request_id, self.cores[0]).check(request)

  def add(self, request: Request) -> list[Sequence]:
    """See `EngineCore.add`."""
    self.check(request)
    core = min(self.cores, key=lambda core: core.num_live)
    made = core.add(request)
    self._where[request.request_id] = core
    return made

  def cancel(self, request_id: str) -> bool:
    """See `EngineCore.cancel`."""
    core = self._where.pop(request_id, None)
    return core is not None and core.cancel(request_id)

  def step(self) -> list[Event]:
    """A step of each, all under way before the first is waited for."""
    busy = [core for core in self.cores if core.has_work]
    for core in busy:
      core.begin_step()
    events = [event for core in busy for event in core.end_step()]
    for event in events:
      name = event.sequence.request_id
      where = self._where.get(name)
      if event.finish_reason is not None and where and not where.runs(name):
        del self._where[name]
    return events


def add_stats(every: Iterable[CoreStats]) -> CoreStats:
  """Counts of several engines together."""
  total = dict.fromkeys((f.name for f in dataclasses.fields(CoreStats)), 0)
  for stats in every:
    for name in total:
      total[name] += getattr(stats, name)
  return CoreStats(**total)
