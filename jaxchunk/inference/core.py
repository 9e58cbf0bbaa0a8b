"""The engine's loop: plans a step while another runs, and hands out tokens.

`step` dispatches the next step before it waits for the one before, so the
device has work while the host plans and decodes text. A sequence whose token
is still being drawn goes on with it: the token stays on the device. So it is
learnt one step late that a text has ended, and what ran for it meanwhile is
thrown away.
"""

import dataclasses
import logging
import random
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from jaxchunk.data.tokenizers import Tokenizer
from jaxchunk.inference.draw import Drawn
from jaxchunk.inference.output import (
  Event,
  FinishReason,
  TextStream,
  TokenLogprobs,
)
from jaxchunk.inference.params import MAX_BIASES, SamplingParams
from jaxchunk.inference.runner import Runner, Ticket
from jaxchunk.inference.scheduler import Lost, Plan, StallFree
from jaxchunk.inference.sequence import Guide, Sequence, Status, Work
from jaxchunk.kv.pool import root


class RequestError(ValueError):
  """A request that cannot be served as it is; says why.

  Attributes:
    param: The field that is to blame, if it is one.
  """

  def __init__(self, message: str, param: str | None = None):
    super().__init__(message)
    self.param = param


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
  """A prompt to continue.

  Attributes:
    request_id: Unique among those that run.
    prompt: Token ids, one at least.
    params: How.
    priority: Lower runs first.
    adapter: Its name; `None` is the model as it is.
  """

  request_id: str
  prompt: tuple[int, ...]
  params: SamplingParams = dataclasses.field(default_factory=SamplingParams)
  priority: int = 0
  adapter: str | None = None


class Swap(Protocol):
  """Pages outside of the device, and what moves them."""

  def park(self, lost: Lost) -> None:
    """Keeps what a sequence had, until it begins again."""

  def offer(self, sequence: Sequence) -> None:
    """May keep full pages of a sequence for others."""

  def drop(self, sequence: Sequence) -> None:
    """A sequence has ended."""


@dataclasses.dataclass
class CoreStats:
  """Counts since the engine began.

  Attributes:
    steps: That were dispatched.
    prompt_tokens: Of prompts that ran, again after a preemption.
    cached_tokens: That were known, or came back, when a sequence began.
    new_tokens: That were drawn and handed out.
    wasted_tokens: That were drawn for texts which had ended.
    padding_tokens: That programs ran beside those.
    preemptions: Sequences that lost their pages.
  """

  steps: int = 0
  prompt_tokens: int = 0
  cached_tokens: int = 0
  new_tokens: int = 0
  wasted_tokens: int = 0
  padding_tokens: int = 0
  preemptions: int = 0


class EngineCore:
  """Requests in, events out, a step at a time; used by one thread.

  Args:
    runner: What runs steps.
    scheduler: What plans them.
    vocab_size: Of the model.
    max_length: The most tokens that a sequence may have.
    tokenizer: For texts and stop texts; without one there is no text.
    ends: Tokens that end a text.
    adapters: Number of each adapter by its name.
    policy: Name of how keys are chosen and dropped.
    swap: Pages outside of the device; `None` is none.
    guides: Makes the guide of a request that asks for one.
    seed: Of requests without a seed of their own.
  """

  def __init__(
    self,
    runner: Runner,
    scheduler: StallFree,
    *,
    vocab_size: int,
    max_length: int,
    tokenizer: Tokenizer | None = None,
    ends: Iterable[int] = (),
    adapters: Mapping[str, int] | None = None,
    policy: str = "all",
    swap: Swap | None = None,
    guides: Any = None,
    seed: int | None = None,
  ):
    self.runner, self.scheduler = runner, scheduler
    self.tokenizer, self.vocab_size = tokenizer, vocab_size
    pool = scheduler.pool
    self.max_length = min(max_length, pool.num_pages * pool.page_size)
    self.stats = CoreStats()
    self._ends = frozenset(ends)
    self._adapters = dict(adapters or {})
    self._policy, self.swap, self._guides = policy, swap, guides
    self._seeds = random.Random(seed)
    self._live: dict[str, list[Sequence]] = {}
    self._texts: dict[Sequence, TextStream] = {}
    self._under_way: Ticket | None = None
    self._next: Ticket | None = None
    self._cancelled: list[Event] = []

  @property
  def has_work(self) -> bool:
    """Whether `step` has something to do."""
    return bool(self._live or self._under_way or self._cancelled)

  @property
  def num_live(self) -> int:
    """Sequences that have not ended."""
    return sum(map(len, self._live.values()))

  def runs(self, request_id: str) -> bool:
    """Whether some of a request has not ended."""
    return request_id in self._live

  def check(self, request: Request) -> None:
    """Whether a request can be served.

    Raises:
      RequestError: It cannot; says why.
    """
    prompt, params = request.prompt, request.params
    if not prompt:
      raise RequestError("the prompt has no token", "prompt")
    ids = np.asarray(prompt)
    wrong = ids[(ids < 0) | (ids >= self.vocab_size)]
    if wrong.size:
      raise RequestError(
        f"token {wrong[0]} of the prompt is not below vocab_size="
        f"{self.vocab_size}",
        "prompt",
      )
    if len(prompt) >= self.max_length:
      raise RequestError(
        f"the prompt has {len(prompt)} tokens; with one to follow at most "
        f"{self.max_length} fit",
        "prompt",
      )
    more = params.max_tokens
    if more is not None and len(prompt) + more > self.max_length:
      raise RequestError(
        f"the prompt has {len(prompt)} tokens and max_tokens={more}; together "
        f"at most {self.max_length} fit",
        "max_tokens",
      )
    if request.adapter is not None and request.adapter not in self._adapters:
      raise RequestError(
        f"there is no adapter {request.adapter!r}; there are "
        f"{sorted(self._adapters)}",
        "model",
      )
    for name in ("logit_bias", "stop_token_ids"):
      for token in getattr(params, name):
        if token >= self.vocab_size:
          raise RequestError(
            f"{name} has token {token}, which is not below vocab_size="
            f"{self.vocab_size}",
            name,
          )
    if params.stop and self.tokenizer is None:
      raise RequestError("stop texts need a tokenizer", "stop")
    ending = {event.sequence.request_id for event in self._cancelled}
    if request.request_id in self._live or request.request_id in ending:
      raise RequestError(f"request {request.request_id!r} runs already")
    banned = len(params.stop_token_ids) + len(self._ends)
    if params.min_tokens and len(params.logit_bias) + banned > MAX_BIASES:
      raise RequestError(
        f"logit_bias has {len(params.logit_bias)} tokens, and min_tokens needs "
        f"{banned} more; together at most {MAX_BIASES}",
        "logit_bias",
      )

  def add(self, request: Request) -> list[Sequence]:
    """Takes a request.

    Returns:
      Its continuations.

    Raises:
      RequestError: It cannot be served; says why. Nothing has changed then.
    """
    self.check(request)
    params, prompt = request.params, list(request.prompt)
    guides = [self._guide(params) for _ in range(params.n)]
    seed = params.seed
    if seed is None:
      seed = self._seeds.randrange(2**32)
    most = params.max_tokens or self.max_length
    adapter = request.adapter
    number = -1 if adapter is None else self._adapters[adapter]
    made: list[Sequence] = []
    for index in range(params.n):
      sequence = Sequence(
        request_id=request.request_id,
        index=index,
        tokens=list(prompt),
        prompt_length=len(prompt),
        max_length=min(len(prompt) + most, self.max_length),
        params=params,
        seed=(seed + index) % 2**32,
        priority=request.priority,
        arrival=self.runner.now(),
        root=root(adapter, self._policy),
        adapter=number,
        first=made[0] if made and self.scheduler.pool.caching else None,
        guide=guides[index],
      )
      made.append(sequence)
    for sequence in made:
      self._texts[sequence] = TextStream(self.tokenizer, params.stop)
      self.scheduler.add(sequence)
    self._live[request.request_id] = list(made)
    return made

  def _guide(self, params: SamplingParams) -> Guide | None:
    if params.guide is None:
      return None
    if self._guides is None:
      raise RequestError("this engine guides no texts", "guide")
    guide: Guide = self._guides(params.guide)
    return guide

  def cancel(self, request_id: str) -> bool:
    """Ends a request; its events come with the next step.

    Returns:
      Whether there was one.
    """
    live = self._live.get(request_id)
    if live is None:
      return False
    for sequence in list(live):
      self._cancelled.append(self._end(sequence, (), "", (), "cancelled"))
    return True

  def step(self) -> list[Event]:
    """Dispatches a step, and waits for the one before."""
    self.begin_step()
    return self.end_step()

  def begin_step(self) -> None:
    """Dispatches a step, if there is something to do."""
    try:
      plan = self.scheduler.schedule()
      self._before(plan)
      self._next = self.runner.dispatch(plan) if plan.works else None
      self._after(plan)
    except BaseException:
      # Sequences count as computed what may never run.
      self._abandon()
      raise

  def _abandon(self) -> None:
    """Ends all without an event, and forgets what pages hold."""
    for sequence in [s for live in self._live.values() for s in live]:
      self.scheduler.remove(sequence)
      if self.swap is not None:
        self.swap.drop(sequence)
    self._live.clear()
    self._texts.clear()
    self._under_way = self._next = None
    self.scheduler.pool.forget()

  def end_step(self) -> list[Event]:
    """Waits for the step before the one that was begun."""
    ticket, self._under_way, self._next = self._under_way, self._next, None
    try:
      drawn = None if ticket is None else ticket.result()
    except BaseException:
      # Its tokens are lost, and what came behind them wants them.
      self._abandon()
      raise
    events, self._cancelled = self._cancelled, []
    if ticket is not None and drawn is not None:
      events += self._collect(ticket, drawn)
    return events

  def _before(self, plan: Plan) -> None:
    self.stats.preemptions += len(plan.preempted)
    if self.swap is not None:
      for lost in plan.preempted:
        self.swap.park(lost)

  def _after(self, plan: Plan) -> None:
    if not plan.works:
      return
    stats = self.stats
    stats.steps += 1
    stats.cached_tokens += sum(known for _, known in plan.admitted)
    stats.prompt_tokens += sum(map(_of_prompt, plan.works))
    total = plan.tokens
    stats.padding_tokens += self.scheduler.limits.shape(total) - total
    if self.swap is not None:
      for work in plan.works:
        self.swap.offer(work.sequence)

  def _collect(self, ticket: Ticket, drawn: Drawn) -> list[Event]:
    now = self.runner.now()
    tokens = np.asarray(drawn.tokens).tolist()
    events = []
    for row, work in enumerate(ticket.works):
      sequence = work.sequence
      sequence.pending -= 1
      if sequence.status is Status.FINISHED:
        self.stats.wasted_tokens += 1
        continue
      events.append(self._take(sequence, tokens[row], row, drawn, now))
    return events

  def _take(
    self, sequence: Sequence, token: int, row: int, drawn: Drawn, now: float
  ) -> Event:
    params, text = sequence.params, self._texts[sequence]
    self.stats.new_tokens += 1
    sequence.tokens.append(token)
    counts = sequence.generated > params.min_tokens
    at_end = token in self._ends and not params.ignore_eos
    if counts and (at_end or token in params.stop_token_ids):
      return self._end(sequence, (), text.flush(), (), "stop")
    try:
      goes_on = sequence.guide is None or sequence.guide.accept(token)
    except Exception:
      # Its own trouble: the others' tokens are here too.
      logging.getLogger("jaxchunk").exception("a guide has failed")
      return self._end(sequence, (), "", (), "cancelled")
    logprobs = _logprobs(sequence, token, row, drawn)
    piece = text.push(token, watch=counts)
    reason: FinishReason | None = None
    if text.stopped or not goes_on:
      reason = "stop"
    elif len(sequence.tokens) >= sequence.max_length:
      reason = "length"
    if reason is None:
      return Event(sequence, (token,), piece, logprobs, None, now)
    piece += text.flush()
    if text.stopped:
      reason = "stop"
    return self._end(sequence, (token,), piece, logprobs, reason)

  def _end(
    self,
    sequence: Sequence,
    tokens: tuple[int, ...],
    text: str,
    logprobs: tuple[TokenLogprobs, ...],
    reason: FinishReason,
  ) -> Event:
    self.scheduler.remove(sequence, whole=reason != "cancelled")
    if self.swap is not None:
      self.swap.drop(sequence)
    del self._texts[sequence]
    live = self._live[sequence.request_id]
    live.remove(sequence)
    if not live:
      del self._live[sequence.request_id]
    now = self.runner.now()
    return Event(sequence, tokens, text, logprobs, reason, now)


def _of_prompt(work: Work) -> int:
  """How many of a step's tokens are of a sequence's prompt."""
  end = min(work.start + work.count, work.sequence.prompt_length)
  return max(end - work.start, 0)


def _logprobs(
  sequence: Sequence, token: int, row: int, drawn: Drawn
) -> tuple[TokenLogprobs, ...]:
  asked = sequence.params.logprobs
  if asked is None:
    return ()
  ids = np.asarray(drawn.top_tokens)[row, :asked].tolist()
  values = np.asarray(drawn.top_logprobs)[row, :asked].tolist()
  own = float(np.asarray(drawn.logprobs)[row])
  top = tuple(zip(ids, values, strict=True))
  return (TokenLogprobs(token, own, top),)
