"""The ways to run a model on a machine, weighed, and the best compiled.

Pipette (arXiv 2405.18093) and Zorse search as much: an estimate of memory
prunes what cannot run, one of time orders the rest.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

from jaxchunk.planner.candidates import Candidate, Request, candidates
from jaxchunk.planner.compiled import Compiler, Say
from jaxchunk.planner.lengths import Lengths
from jaxchunk.planner.memory import Memory, Predicted
from jaxchunk.planner.requests import lora_of
from jaxchunk.planner.seconds import Clock, Step
from jaxchunk.training import fits

_CLOSE = 0.01
_SIMULATED = 24
_MOST_DEVICES = 64
"""Times those that there are, of what would fit."""


@dataclasses.dataclass(frozen=True)
class Choice:
  """A candidate that should fit.

  Attributes:
    candidate: How it runs.
    predicted: What it needs, by formula.
    step: How long it takes.
    compiled: What each program needs, by the compiler's account; `None` if it
      was not compiled.
  """

  candidate: Candidate
  predicted: Predicted
  step: Step
  compiled: dict[str, fits.Need] | None = None

  @property
  def compiled_peak(self) -> int | None:
    """The most of all compiled programs."""
    if self.compiled is None:
      return None
    return max(need.peak for need in self.compiled.values())

  @property
  def need(self) -> int:
    """Bytes of a device, compiled or else predicted."""
    return self.compiled_peak or self.predicted.peak


@dataclasses.dataclass(frozen=True)
class Remedy:
  """A change after which something fits.

  Attributes:
    change: What to do.
    need: Bytes that the smallest candidate then needs.
    candidate: Which.
  """

  change: str
  need: int
  candidate: Candidate


class NothingFits(ValueError):
  """No candidate fits; says the smallest need and what to change.

  Attributes:
    smallest: The candidate that needs least.
    need: Its bytes.
    remedies: What would fit.
  """

  def __init__(
    self,
    request: Request,
    smallest: Candidate,
    need: int,
    remedies: list[Remedy],
  ):
    self.smallest, self.need, self.remedies = smallest, need, remedies
    lines = [
      f"nothing fits into {_gib(request.limit)} on each of "
      f"{request.machine.count} x {request.machine.target.kind}: the smallest "
      f"need is {_gib(need)} ({smallest})"
    ]
    lines += [
      f"  {one.change}: {_gib(one.need)} ({one.candidate})" for one in remedies
    ]
    if not remedies:
      lines.append("  none of the changes that were tried fits either")
    super().__init__("\n".join(lines))


@dataclasses.dataclass(frozen=True)
class Plan:
  """The candidates of a request that should fit, the fastest first.

  Attributes:
    request: What was asked.
    choices: Those that fit, as far as is known.
    refused: Those that were predicted to fit, and do not.
    weighed: How many candidates there were.
  """

  request: Request
  choices: tuple[Choice, ...]
  refused: tuple[Choice, ...]
  weighed: int

  @property
  def best(self) -> Choice:
    """The fastest: of those that were compiled, if any was."""
    compiled = [c for c in self.choices if c.compiled is not None]
    return (compiled or list(self.choices))[0]


def make_plan(
  request: Request, *, compile_best: int = 0, say: Say = lambda _: None
) -> Plan:
  """Weighs all candidates by formula and compiles the best.

  Args:
    request: What is to run, and where.
    compile_best: How many that fit to compile; 0 compiles none. Others that
      turn out not to fit are compiled on the way, at most as many.
    say: Is told what goes on.

  Raises:
    NothingFits: Nothing does; says what to change.
    RuntimeError: What compiles for the target is not installed.
  """
  memory = Memory(request)
  found = list(candidates(request))
  say(f"{len(found):,} candidates")
  small = [
    (c, p) for c, p in _predicted(memory, found) if p.peak <= request.limit
  ]
  say(f"{len(small):,} fit by formula")
  if not small:
    raise _nothing_fits(request)
  clock = Clock(request, memory)
  choices = [Choice(c, p, clock.step(c)) for c, p in small]
  choices = simulated(clock, sorted(choices, key=_order))
  return _compiled(
    Plan(request, tuple(choices), (), len(found)), compile_best, say
  )


def simulated(clock: Clock, choices: Iterable[Choice]) -> list[Choice]:
  """With the best pipelines simulated tick by tick, in the order of times.

  What the published bubble says of others is enough to leave them behind.
  """
  left, found = _SIMULATED, []
  for choice in choices:
    if choice.candidate.layout.stage > 1 and left:
      step = clock.step(choice.candidate, simulate=True)
      choice = dataclasses.replace(choice, step=step)
      left -= 1
    found.append(choice)
  return sorted(found, key=_order)


def _order(choice: Choice) -> tuple[int, bool, bool, int]:
  """The fastest first; of those as fast the simplest, and what needs least.

  Times within a percent or so count as equal: they are not known as well.
  """
  on_host = choice.candidate.kv_memory == "host"
  steps = round(math.log(choice.step.seconds) / math.log1p(_CLOSE))
  staged = choice.candidate.layout.stage > 1
  return steps, on_host, staged, choice.predicted.peak


def fits_by_formula(request: Request, predicted: Predicted) -> bool:
  """Whether both memories hold what is needed."""
  in_host = predicted.host <= request.host_memory
  return predicted.peak <= request.limit and in_host


def _predicted(
  memory: Memory, found: Iterable[Candidate]
) -> Iterator[tuple[Candidate, Predicted]]:
  for candidate in found:
    yield candidate, memory.predict(candidate)


def _compiled(plan: Plan, wanted: int, say: Say) -> Plan:
  """Compiles choices in order until so many fit."""
  compiler, limit = Compiler(plan.request, say), plan.request.limit
  fit: list[Choice] = []
  refused: list[Choice] = []
  for choice in plan.choices:
    if len(fit) == wanted or len(refused) > wanted:
      break
    needs = compiler.needs(choice.candidate)
    choice = dataclasses.replace(choice, compiled=needs)
    (fit if choice.need <= limit else refused).append(choice)
  known = {c.candidate for c in (*fit, *refused)}
  rest = [c for c in plan.choices if c.candidate not in known]
  choices = sorted([*fit, *rest], key=_order)
  return dataclasses.replace(
    plan, choices=tuple(choices), refused=tuple(refused)
  )


def smallest(request: Request) -> tuple[Candidate, int]:
  """The candidate that needs the least memory of a device, and its bytes."""
  memory, lean = Memory(request), candidates(request, lean=True)
  found = {
    candidate: predicted.peak
    for candidate, predicted in _predicted(memory, lean)
    if predicted.host <= request.host_memory
  }
  return min(found.items(), key=lambda pair: pair[1])


def _nothing_fits(request: Request) -> NothingFits:
  least, need = smallest(request)
  return NothingFits(request, least, need, list(remedies(request)))


def remedies(request: Request) -> Iterator[Remedy]:
  """Changes after which something fits, each alone."""
  for change, other in _changes(request):
    candidate, need = smallest(other)
    if need <= request.limit:
      yield Remedy(change, need, candidate)
  for others in (_with_devices(request), _shortened(request)):
    for change, other in others:
      candidate, need = smallest(other)
      if need <= request.limit:
        yield Remedy(change, need, candidate)
        break


def _changes(request: Request) -> Iterator[tuple[str, Request]]:
  """Of how it is trained."""
  train, model = request.train, request.model
  if train.optimizer == "adamw" and model.lora is None:
    yield "--optimizer=adamw8bit", _trained(request, optimizer="adamw8bit")
  if train.optimizer_memory == "device" and train.optimizer != "adafactor":
    yield (
      "--optimizer_memory=host",
      _trained(request, optimizer_memory="host"),
    )
  if model.lora is None:
    lora = dataclasses.replace(model, lora=lora_of(model)).frozen()
    yield "--trainable=lora", dataclasses.replace(request, model=lora)


def _trained(request: Request, **fields: Any) -> Request:
  train = dataclasses.replace(request.train, **fields)
  return dataclasses.replace(request, train=train)


def _with_devices(request: Request) -> Iterator[tuple[str, Request]]:
  """On more devices, until it fits."""
  factor = 2
  while factor <= _MOST_DEVICES:
    machine = request.machine
    count = machine.count * factor
    more = dataclasses.replace(machine, count=count)
    yield (
      f"{count} devices in place of {machine.count}",
      dataclasses.replace(request, machine=more),
    )
    factor *= 2


def _shortened(request: Request) -> Iterator[tuple[str, Request]]:
  """Without the longest sequences, until it fits."""
  longest = request.lengths.longest
  while longest > 1024:
    longest //= 2
    kept = [(n, c) for n, c in request.lengths.counts if n <= longest]
    lengths = Lengths((*kept, (longest, 1)) if not kept else tuple(kept))
    yield (
      f"sequences up to {lengths.longest:,} tokens in place of "
      f"{request.lengths.longest:,}",
      dataclasses.replace(request, lengths=lengths),
    )


def _gib(size: int) -> str:
  return f"{size / 2**30:.2f} GiB"
