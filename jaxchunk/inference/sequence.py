"""A continuation under way: its tokens, its pages, and how far it has come."""

import dataclasses
import enum
from typing import Protocol

import numpy as np
from jaxtyping import UInt32

from jaxchunk.inference.params import SamplingParams
from jaxchunk.kv.pool import PageHash, chain


class Guide(Protocol):
  """Follows a text that has to have a form."""

  def allowed(self) -> UInt32[np.ndarray, " w"]:
    """One bit for each token that may come next, the lowest first."""

  def accept(self, token: int) -> bool:
    """Takes a token in; whether the text may go on."""


class Status(enum.Enum):
  """Where a sequence stands."""

  WAITING = "waiting"
  RUNNING = "running"
  FINISHED = "finished"


@dataclasses.dataclass(eq=False, kw_only=True)
class Sequence:
  """One continuation of a request's prompt.

  Attributes:
    request_id: Of the request.
    index: Which of the request's n continuations.
    tokens: Of the prompt, and those that came since.
    prompt_length: How many are the prompt's.
    max_length: It ends with so many tokens.
    params: What the request asks for.
    seed: Of the draws.
    priority: Lower begins first and keeps its pages longest; of equal ones
      the earlier. None waits for room that another has.
    arrival: When it came, in seconds of the engine's clock.
    root: The parent of its first page's hash.
    adapter: Number of its adapter, -1 for none.
    computed: Tokens whose keys and values are in its pages, or will be when
      what is under way has run.
    pending: 1 while a token is being drawn, else 0.
    pages: What it holds.
    names: Hashes of its full pages.
    named: How many of its pages the pool knows by these.
    slot: Its place in the runner's state; -1 is none.
    status: Where it stands.
    cached: Tokens of its prompt that were known when it began first.
    preemptions: How often it lost its pages.
    first: The one that computes the prompt for all continuations of a request;
      this one begins behind it.
    guide: What the guide of its text knows; `None` without one.
  """

  request_id: str
  index: int
  tokens: list[int]
  prompt_length: int
  max_length: int
  params: SamplingParams
  seed: int
  priority: int
  arrival: float
  root: PageHash
  adapter: int = -1
  computed: int = 0
  pending: int = 0
  pages: list[int] = dataclasses.field(default_factory=list)
  names: list[PageHash] = dataclasses.field(default_factory=list)
  named: int = 0
  slot: int = -1
  status: Status = Status.WAITING
  cached: int = 0
  preemptions: int = 0
  first: "Sequence | None" = None
  guide: Guide | None = None

  @property
  def length(self) -> int:
    """Tokens, with one that is being drawn."""
    return len(self.tokens) + self.pending

  @property
  def remaining(self) -> int:
    """Tokens whose keys are still to be computed."""
    return self.length - self.computed

  @property
  def generated(self) -> int:
    """New tokens so far."""
    return len(self.tokens) - self.prompt_length

  @property
  def drawing(self) -> int:
    """Which new token is being drawn, from 0; for a step that draws."""
    return self.length - 1 - self.prompt_length

  @property
  def rank(self) -> tuple[int, float, int]:
    """Sequences run in this order."""
    return self.priority, self.arrival, self.index

  @property
  def held(self) -> bool:
    """Whether another computes its prompt just now."""
    first = self.first
    return (
      first is not None
      and first.status is not Status.FINISHED
      and first.computed < first.prompt_length
    )

  @property
  def can_go_on(self) -> bool:
    """Whether there is something to compute before its token is known.

    A guide has to see each token before the next is drawn.
    """
    if self.pending and self.guide is not None:
      return False
    return self.length < self.max_length or not self.pending

  def page_names(self, page_size: int, tokens: int) -> list[PageHash]:
    """Hashes of the full pages of its first `tokens` tokens."""
    full = min(tokens, len(self.tokens)) // page_size
    while len(self.names) < full:
      at = len(self.names)
      parent = self.names[-1] if at else self.root
      part = self.tokens[at * page_size : (at + 1) * page_size]
      self.names.append(chain(parent, part))
    return self.names[:full]


@dataclasses.dataclass(frozen=True)
class Work:
  """What a step does for a sequence.

  Attributes:
    sequence: Whose.
    start: The first token that runs.
    count: How many run.
    draws: Whether the next token is drawn behind them.
  """

  sequence: Sequence
  start: int
  count: int
  draws: bool
