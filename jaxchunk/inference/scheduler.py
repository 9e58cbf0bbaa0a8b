"""What the next step does: running continuations first, then prompts by parts.

Every step has room for so many tokens. Each sequence that draws takes one of
them, so that a long prompt never holds up the others; what is left goes to
prompts that have begun, then to new ones. Without pages for all, the sequence
that ranks last loses its own and starts again later, from its known pages or
from those it left in host memory.

Sources: Sarathi-Serve (arXiv 2403.02310), DeepSpeed SplitFuse, Past-Future
(Gong et al., ASPLOS 2025).
"""

import bisect
import collections
import dataclasses
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Many
from typing import Protocol

import numpy as np

from jaxchunk.inference.cost import Cost, keys_of, keys_read
from jaxchunk.inference.sequence import Sequence, Status, Work
from jaxchunk.kv.policies import Prefix, Reuser
from jaxchunk.kv.pool import PagePool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What a step has room for.

  Attributes:
    tokens: In all.
    sequences: That may run at a time.
    prompts: Of which parts may run in one step.
    shapes: Numbers of tokens that programs are compiled for, ascending; the
      last is `tokens`.
    slowdown: How many times as long a step with parts of prompts may take as
      one without, while sequences draw; `None` is any.
  """

  tokens: int
  sequences: int
  prompts: int
  shapes: tuple[int, ...]
  slowdown: float | None = None

  def shape(self, tokens: int) -> int:
    """The least shape with room for so many."""
    return self.shapes[bisect.bisect_left(self.shapes, tokens)]


@dataclasses.dataclass(frozen=True)
class Lost:
  """What a sequence had when its pages were taken.

  Attributes:
    sequence: Whose.
    pages: In order.
    computed: Tokens whose keys are in them.
  """

  sequence: Sequence
  pages: tuple[int, ...]
  computed: int


@dataclasses.dataclass
class Plan:
  """What a step does.

  Attributes:
    works: For which sequences it does what.
    preempted: Those that lost their pages before it. What these held has to
      be read before the step begins.
    admitted: Those that began or began again, and with how many tokens that
      were known already.
  """

  works: list[Work] = dataclasses.field(default_factory=list)
  preempted: list[Lost] = dataclasses.field(default_factory=list)
  admitted: list[tuple[Sequence, int]] = dataclasses.field(default_factory=list)

  @property
  def tokens(self) -> int:
    """How many tokens it runs."""
    return sum(work.count for work in self.works)


class Stored(Protocol):
  """Pages outside of the pool, which come back at admission."""

  def restore(self, sequence: Sequence, pages: Many[int], known: int) -> int:
    """Fills pages with what is stored of a sequence.

    Args:
      sequence: Whose.
      pages: For all of its tokens.
      known: Tokens of the first pages that are there already.

    Returns:
      How many tokens are there then, at least `known`.
    """


class Scheduler(Protocol):
  """Decides what runs."""

  running: list[Sequence]

  def add(self, sequence: Sequence) -> None:
    """Takes a new sequence."""

  def remove(self, sequence: Sequence, *, whole: bool = False) -> None:
    """Ends a sequence, wherever it stands, and lets go of what it holds.

    Args:
      sequence: Which.
      whole: Whether it came to its own end.
    """

  def schedule(self) -> Plan:
    """The next step. Sequences count it as done."""

  @property
  def num_waiting(self) -> int:
    """Sequences that wait."""


class StallFree:
  """Continuations first, then prompts that have begun, then new ones.

  A new sequence begins when there are pages for its whole prompt.

  Args:
    limits: Of a step.
    pool: The pages.
    stored: Pages outside of the pool; `None` is none.
    cost: What a step takes, for `limits.slowdown`.
    reuser: Finds known keys of a prompt; `None` is those of equal beginnings.
  """

  def __init__(
    self,
    limits: Limits,
    pool: PagePool,
    stored: Stored | None = None,
    *,
    cost: Cost | None = None,
    reuser: Reuser | None = None,
  ):
    self.limits, self.pool, self.stored = limits, pool, stored
    self._reuser = reuser or Prefix()
    self._cost = cost
    # Of the step that is planned; `None` is any.
    self._seconds: float | None = None
    self.running: list[Sequence] = []
    self._waiting: list[Sequence] = []
    self._slots = list(range(limits.sequences - 1, -1, -1))

  @property
  def num_waiting(self) -> int:
    """Sequences that wait."""
    return len(self._waiting)

  def add(self, sequence: Sequence) -> None:
    """Takes a new sequence."""
    sequence.status = Status.WAITING
    bisect.insort(self._waiting, sequence, key=lambda s: s.rank)

  def remove(self, sequence: Sequence, *, whole: bool = False) -> None:
    """Ends a sequence, wherever it stands, and lets go of what it holds."""
    del whole
    if sequence.status is Status.RUNNING:
      self.running.remove(sequence)
      self._let_go(sequence)
    elif sequence.status is Status.WAITING:
      self._waiting.remove(sequence)
    sequence.status = Status.FINISHED

  def _let_go(self, sequence: Sequence) -> None:
    self.pool.release(sequence.pages)
    sequence.pages = []
    self._slots.append(sequence.slot)
    sequence.slot = -1

  def schedule(self) -> Plan:
    """The next step. Sequences count it as done."""
    plan = Plan()
    room = self.limits.tokens
    self._seconds = None
    drawing = [s for s in self.running if s.remaining == 1 and s.can_go_on]
    for sequence in drawing:
      # It may have lost its pages to one before.
      if sequence.status is Status.RUNNING and self._grow(sequence, plan):
        self._take(sequence, 1, plan)
        room -= 1
    self._seconds = self._allowed(plan)
    prompts = 0
    for sequence in self.running:
      if room < 1 or prompts == self.limits.prompts:
        break
      if sequence.remaining > 1 and sequence.can_go_on:
        room -= self._take(sequence, room, plan)
        prompts += 1
        if self._is_slow(plan):
          break
    while (
      room > 0
      and prompts < self.limits.prompts
      and not plan.preempted
      and not (prompts and self._is_slow(plan))
      and self._admit_first(plan)
    ):
      room -= self._take(self.running[-1], room, plan)
      prompts += 1
    self.running.sort(key=lambda s: s.rank)
    self._fit(plan)
    for work in plan.works:
      self._count(work)
    return plan

  def _take(self, sequence: Sequence, room: int, plan: Plan) -> int:
    """Lets a sequence run as many tokens as there is room for."""
    count = min(sequence.remaining, self._affordable(sequence, room, plan))
    draws = count == sequence.remaining
    plan.works.append(Work(sequence, sequence.computed, count, draws))
    return count

  def _allowed(self, plan: Plan) -> float | None:
    """Seconds that a step may take which has these sequences drawing."""
    slowdown = self.limits.slowdown
    if slowdown is None or self._cost is None or not plan.works:
      return None
    keys = keys_of(plan.works)
    return slowdown * self._cost.seconds(plan.tokens, keys)

  def _is_slow(self, plan: Plan) -> bool:
    """Whether no program is left in which one token more has the time."""
    if self._seconds is None or self._cost is None:
      return False
    total = plan.tokens
    if total >= self.limits.tokens:
      return True
    keys = keys_of(plan.works)
    return self._cost.seconds(total + 1, keys) > self._seconds

  def _affordable(self, sequence: Sequence, room: int, plan: Plan) -> int:
    """How many of a sequence's tokens keep a step within its seconds.

    Some always, up to the next shape, or a prompt might never end.
    """
    if self._seconds is None or self._cost is None:
      return room
    total, keys = plan.tokens, keys_of(plan.works)
    least = self.limits.shape(min(total + 1, self.limits.tokens)) - total
    for shape in reversed(self.limits.shapes):
      count = min(shape - total, room, sequence.remaining)
      if count <= least:
        break
      more = keys + keys_read(sequence.computed, count)
      if self._cost.seconds(total + count, more) <= self._seconds:
        return count
    return max(min(least, room), 1)

  def _fit(self, plan: Plan) -> None:
    """Cuts a prompt's part where the program would run mostly padding."""
    if not plan.works:
      return
    total = plan.tokens
    shapes = self.limits.shapes
    above = self.limits.shape(total)
    below = max((shape for shape in shapes if shape <= total), default=0)
    last = plan.works[-1]
    excess = total - below
    if last.draws or not 0 < excess < min(last.count, above - total):
      return
    plan.works[-1] = dataclasses.replace(last, count=last.count - excess)

  def _count(self, work: Work) -> None:
    sequence = work.sequence
    sequence.computed += work.count
    sequence.pending += work.draws
    self._name(sequence)

  def _name(self, sequence: Sequence) -> None:
    """Makes the pages known that are full."""
    size = self.pool.page_size
    full = min(sequence.computed, len(sequence.tokens)) // size
    if not self.pool.caching or full == sequence.named:
      return
    names = sequence.page_names(size, full * size)
    for at in range(sequence.named, full):
      self.pool.name(sequence.pages[at], names[at])
    sequence.named = full

  def _grow(self, sequence: Sequence, plan: Plan) -> bool:
    """Gives a sequence a page for its next token, perhaps another's."""
    while sequence.length > len(sequence.pages) * self.pool.page_size:
      pages = self.pool.allocate(1)
      if pages is not None:
        sequence.pages += pages
        continue
      taken = {work.sequence for work in plan.works}
      victim = max(
        (s for s in self.running if s not in taken), key=lambda s: s.rank
      )
      self._preempt(victim, plan)
      if victim is sequence:
        return False
    return True

  def _preempt(self, victim: Sequence, plan: Plan) -> None:
    plan.preempted.append(Lost(victim, tuple(victim.pages), victim.computed))
    self.running.remove(victim)
    self._let_go(victim)
    victim.computed = victim.named = 0
    victim.preemptions += 1
    self.add(victim)

  def _admit_first(self, plan: Plan) -> bool:
    """Lets the next waiting sequence begin, if it may."""
    ready = (s for s in self._waiting if not s.pending and not s.held)
    sequence = next(ready, None)
    if sequence is None or not self._slots or not self.admits(sequence):
      return False
    size = self.pool.page_size
    # One token at least has to run, for the logits behind it.
    names = sequence.page_names(size, sequence.length - 1)
    needed = -(-sequence.length // size)
    if needed - self.pool.count_shared(names) > self.pool.free:
      return False
    reuse = self._reuser.find(names, self.pool)
    if reuse.repair or any(one.start for one in reuse.segments):
      raise NotImplementedError(
        f"{self._reuser} finds more than a beginning: that is not served so far"
      )
    pages = [page for one in reuse.segments for page in one.pages]
    more = self.pool.allocate(needed - len(pages))
    if more is None:
      self.pool.release(pages)
      return False
    self.pool.stats.asked += len(names)
    self.pool.stats.found += len(pages)
    known = len(pages) * size
    if self.stored is not None:
      try:
        known = self.stored.restore(sequence, pages + more, known)
      except BaseException:
        self.pool.release(pages + more)
        raise
    sequence.pages = pages + more
    sequence.computed = known
    if not sequence.preemptions:
      sequence.cached = min(known, sequence.prompt_length)
    self._name(sequence)
    sequence.slot = self._slots.pop()
    sequence.status = Status.RUNNING
    self._waiting.remove(sequence)
    self.running.append(sequence)
    plan.admitted.append((sequence, known))
    return True

  def admits(self, sequence: Sequence) -> bool:
    """Whether a sequence may begin, if there are pages for its prompt."""
    del sequence
    return True


class Lengths:
  """How many tokens continuations have come to have.

  Args:
    window: How many of the last ones count.
  """

  def __init__(self, window: int = 1000):
    self._last: collections.deque[int] = collections.deque(maxlen=window)
    self._sorted = np.zeros(0, np.int64)
    self._tails = np.zeros(0, np.int64)

  def add(self, tokens: int) -> None:
    """Takes in the length of one that ended."""
    self._last.append(tokens)
    self._sorted = np.sort(np.fromiter(self._last, np.int64))
    self._tails = np.cumsum(self._sorted[::-1])[::-1]

  def expect(self, so_far: int, most: int) -> int:
    """How many there will be on average, given more than so many."""
    begin = int(np.searchsorted(self._sorted, so_far, side="right"))
    longer = len(self._sorted) - begin
    if not longer:
      return most
    return min(-(-int(self._tails[begin]) // longer), most)


class PastFuture(StallFree):
  """A sequence begins when all that run will have pages until they end.

  How long they will be is guessed from how long others came to be, on average
  of those that were longer than they are by now. With
  sequences in the order of their expected ends, the last first, the first i
  of them together need

      sum(tokens now of the first i) + i * (tokens still to come of the i-th)

  when the i-th ends; the largest of these must fit.

  Args:
    limits: Of a step.
    pool: The pages.
    stored: Pages outside of the pool; `None` is none.
    cost: What a step takes, for `limits.slowdown`.
    reuser: As of `StallFree`.
    reserve: Part of the pages that is left for those that become longer.
  """

  def __init__(
    self,
    limits: Limits,
    pool: PagePool,
    stored: Stored | None = None,
    *,
    cost: Cost | None = None,
    reuser: Reuser | None = None,
    reserve: float = 0.05,
  ):
    super().__init__(limits, pool, stored, cost=cost, reuser=reuser)
    if not 0 <= reserve < 1:
      raise ValueError(f"reserve={reserve} must be at least 0 and below 1")
    self._reserve, self._lengths = reserve, Lengths()

  def remove(self, sequence: Sequence, *, whole: bool = False) -> None:
    """As for any scheduler; remembers how long it came to be by itself."""
    if whole and sequence.generated:
      self._lengths.add(sequence.generated)
    super().remove(sequence, whole=whole)

  def admits(self, sequence: Sequence) -> bool:
    """Whether it and all that run will have pages until they end."""
    # One always may, or nothing would ever run.
    if not self.running:
      return True
    pool = self.pool
    names = sequence.page_names(pool.page_size, sequence.length - 1)
    # A page of several sequences is needed once.
    twice = sum(len(s.pages) for s in self.running) - pool.held
    twice += pool.count_shared(names)
    pages = pool.num_pages * (1 - self._reserve) + twice
    every = (*self.running, sequence)
    return future_peak(map(self._expected, every)) <= pages * pool.page_size

  def _expected(self, sequence: Sequence) -> tuple[int, int]:
    size = self.pool.page_size
    most = sequence.max_length - sequence.prompt_length
    end = self._lengths.expect(sequence.generated, most)
    # Whole pages, the last of them perhaps nearly empty.
    held = -(-sequence.length // size) * size
    return held, max(end - sequence.generated, 0)


def future_peak(sequences: Iterable[tuple[int, int]]) -> int:
  """The most tokens that sequences will hold at once.

  Args:
    sequences: Tokens now and tokens still to come of each.
  """
  peak = total = 0
  ordered = sorted(sequences, key=lambda pair: -pair[1])
  for number, (now, left) in enumerate(ordered, 1):
    total += now
    peak = max(peak, total + number * left)
  return peak


SCHEDULERS: dict[str, Callable[..., StallFree]] = {
  "stall_free": StallFree,
  "past_future": PastFuture,
}
