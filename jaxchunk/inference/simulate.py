"""The engine without a device: the same code, and a clock that is computed.

    python benchmarks/scheduling.py

compares schedulers so, on traces of thousands of requests, in seconds.
"""

import dataclasses
from collections.abc import Sequence as Many
from typing import Any

import numpy as np

from jaxchunk.inference.core import EngineCore, Request
from jaxchunk.inference.cost import Cost, keys_of
from jaxchunk.inference.draw import Drawn
from jaxchunk.inference.params import SamplingParams
from jaxchunk.inference.runner import Assembler
from jaxchunk.inference.scheduler import SCHEDULERS, Limits, Plan
from jaxchunk.inference.sequence import Work
from jaxchunk.kv.pool import PagePool

_END = 0


@dataclasses.dataclass(frozen=True)
class Arrival:
  """A request of a trace.

  Attributes:
    time: When it comes, in seconds.
    prompt: Token ids.
    tokens: How many will come.
    most: How many it asks for.
  """

  time: float
  prompt: tuple[int, ...]
  tokens: int
  most: int


@dataclasses.dataclass
class SimulatedTicket:
  """A step that is under way on the computed clock."""

  works: list[Work]
  ready: float
  runner: "SimulatedRunner"

  def result(self) -> Drawn:
    """Sets the clock to when the step ends."""
    return self.runner.finish(self)


class SimulatedRunner:
  """Runs steps by adding up what they cost.

  Args:
    cost: Of a step.
    lengths: How many tokens each request will get, by its id.
    assembler: Writes steps down as for a device, to measure that too.
  """

  def __init__(
    self,
    cost: Cost,
    lengths: dict[str, int],
    assembler: Assembler | None = None,
  ):
    self._cost, self._lengths, self._assembler = cost, lengths, assembler
    self._clock = self._busy = 0.0

  def dispatch(self, plan: Plan) -> SimulatedTicket:
    """Begins a step when the one before ends."""
    if self._assembler is not None:
      size = self._assembler.round_up(plan.tokens)
      self._assembler.pack(plan.works, size)
    begin = max(self._clock, self._busy)
    seconds = self._cost.seconds(plan.tokens, keys_of(plan.works))
    self._busy = begin + seconds
    draws = [work for work in plan.works if work.draws]
    return SimulatedTicket(draws, self._busy, self)

  def finish(self, ticket: SimulatedTicket) -> Drawn:
    """Tokens of a step, the last of each request one that ends it."""
    self.wait(ticket.ready)
    tokens: Any = np.ones(len(ticket.works), np.int32)
    for row, work in enumerate(ticket.works):
      sequence = work.sequence
      if sequence.generated >= self._lengths[sequence.request_id]:
        tokens[row] = _END
    nothing: Any = np.zeros((len(tokens), 0))
    return Drawn(tokens, tokens, nothing, nothing)

  def wait(self, until: float) -> None:
    """Sets the clock, which only goes forward."""
    self._clock = max(self._clock, until)

  def now(self) -> float:
    """The clock, in seconds."""
    return self._clock


@dataclasses.dataclass
class Served:
  """How a request was served; times in seconds.

  Attributes:
    first: From its arrival to its first token.
    between: Between one token and the next, all of them.
    end: When it ended, on the clock.
  """

  first: float = float("nan")
  between: list[float] = dataclasses.field(default_factory=list)
  end: float = float("nan")


@dataclasses.dataclass
class Simulation:
  """What came of a trace.

  Attributes:
    served: Of each request, in order.
    core: The engine afterwards.
    seconds: From the first arrival to the last token.
  """

  served: list[Served]
  core: EngineCore
  seconds: float

  def figures(self) -> dict[str, float]:
    """What one compares: seconds, tokens a second, counts."""
    first = np.asarray([one.first for one in self.served])
    between = np.concatenate(
      [np.asarray(one.between, np.float64) for one in self.served]
    )
    stats, pool = self.core.stats, self.core.scheduler.pool
    tokens = stats.new_tokens
    return {
      "seconds": self.seconds,
      "tokens_per_second": tokens / self.seconds,
      "first_token_p50": float(np.percentile(first, 50)),
      "first_token_p99": float(np.percentile(first, 99)),
      "between_tokens_p50": float(np.percentile(between, 50)),
      "between_tokens_p99": float(np.percentile(between, 99)),
      "preemptions": stats.preemptions,
      "prompt_tokens_run": stats.prompt_tokens,
      "known_pages": pool.stats.found / max(pool.stats.asked, 1),
    }


def simulate(
  trace: Many[Arrival],
  *,
  scheduler: str,
  limits: Limits,
  num_pages: int,
  page_size: int,
  cost: Cost,
  max_length: int,
  caching: bool = True,
) -> Simulation:
  """Serves a trace.

  Args:
    trace: Requests, by time of arrival.
    scheduler: Its name.
    limits: Of a step.
    num_pages: Pages for keys and values.
    page_size: Tokens in a page.
    cost: Of a step.
    max_length: Tokens that a sequence may have.
    caching: Whether keys of equal beginnings are used again.

  Raises:
    RequestError: A request cannot be served.
  """
  lengths = {str(n): one.tokens for n, one in enumerate(trace)}
  runner = SimulatedRunner(cost, lengths)
  pool = PagePool(num_pages, page_size, caching=caching)
  core = EngineCore(
    runner,
    SCHEDULERS[scheduler](limits, pool),
    vocab_size=2**31 - 1,
    max_length=max_length,
    ends=(_END,),
    seed=0,
  )
  served = [Served() for _ in trace]
  last: dict[int, float] = {}
  at = 0
  while at < len(trace) or core.has_work:
    if not core.has_work:
      runner.wait(trace[at].time)
    while at < len(trace) and trace[at].time <= runner.now():
      params = SamplingParams(max_tokens=trace[at].most)
      core.add(
        Request(request_id=str(at), prompt=trace[at].prompt, params=params)
      )
      at += 1
    for event in core.step():
      number = int(event.sequence.request_id)
      one = served[number]
      if event.tokens and number in last:
        one.between.append(event.time - last[number])
      elif event.tokens:
        one.first = event.time - trace[number].time
      last[number] = event.time
      if event.finish_reason is not None:
        one.end = event.time
  return Simulation(served, core, runner.now() - trace[0].time)
