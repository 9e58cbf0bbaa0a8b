"""The device's side of the engine: programs, pages, and what is under way."""

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Many
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxchunk.inference.cost import MeasuredCost, keys_read
from jaxchunk.inference.draw import PROMPT, Drawn
from jaxchunk.inference.params import MAX_BIASES, SamplingParams
from jaxchunk.inference.placement import Placement, placements
from jaxchunk.inference.programs import LayeredSteps, Run, whole_step
from jaxchunk.inference.scheduler import Plan
from jaxchunk.inference.sequence import Sequence, Work
from jaxchunk.inference.step import Extras, State, StepShape
from jaxchunk.kv.paged import (
  PagedKV,
  PagedState,
  init_pages,
  read_pages,
  write_pages,
)
from jaxchunk.models.adapter_set import AdapterSet
from jaxchunk.models.transformer import Transformer


class Ticket(Protocol):
  """A step that is under way."""

  works: list[Work]
  """Those that draw, in the order of the results."""

  def result(self) -> Drawn | None:
    """Waits for the step; host arrays, the first rows for the works."""


class Runner(Protocol):
  """What runs the steps that a scheduler plans."""

  def dispatch(self, plan: Plan) -> Ticket:
    """Begins a step behind those that are under way."""

  def now(self) -> float:
    """The clock of requests, in seconds."""


@dataclasses.dataclass
class DeviceTicket:
  """A step on the device."""

  works: list[Work]
  drawn: Drawn | None

  def result(self) -> Drawn | None:
    """Waits for the step."""
    if self.drawn is None:
      return None
    if any(w.sequence.params.logprobs is not None for w in self.works):
      reported: Drawn = jax.device_get(self.drawn)
      return reported
    tokens = jax.device_get(self.drawn.tokens)
    return dataclasses.replace(self.drawn, tokens=tokens)


class Assembler:
  """Writes down a plan in the numbers that a step takes.

  Args:
    shapes: Of the programs, by tokens.
    page_size: Z.
    num_pages: P.
  """

  def __init__(
    self, shapes: Mapping[int, StepShape], page_size: int, num_pages: int
  ):
    self._shapes, self._page_size = shapes, page_size
    self._nowhere = page_size * num_pages
    widest = shapes[max(shapes)]
    self._slots = widest.max_sequences
    self._tables = np.zeros((self._slots, widest.table), np.int32)
    # Whose table each is, since when, and how many of its pages stand in it.
    self._owners: list[tuple[Sequence, int] | None] = [None] * self._slots
    self._filled = [0] * self._slots

  def round_up(self, tokens: int) -> int:
    """Of the programs' numbers of tokens the least with room for so many."""
    return min(size for size in self._shapes if size >= tokens)

  def _update_table(self, sequence: Sequence) -> int:
    slot, pages = sequence.slot, sequence.pages
    # After a preemption it has other pages, perhaps in the same slot.
    owner = sequence, sequence.preemptions
    if self._owners[slot] != owner:
      self._owners[slot], self._filled[slot] = owner, 0
    filled = self._filled[slot]
    if filled < len(pages):
      self._tables[slot, filled : len(pages)] = pages[filled:]
      self._filled[slot] = len(pages)
    return slot

  def pack(self, works: Many[Work], tokens: int) -> np.ndarray:
    """The numbers of a step of `tokens` tokens."""
    shape = self._shapes[tokens]
    whole, v = shape.packing.empty()
    v["positions"].fill(-1)
    v["slots"].fill(self._nowhere)
    for name in ("single_index", "several_index", "draw_index"):
      v[name].fill(shape.tokens)
    v["single_positions"].fill(-1)
    v["several_positions"].fill(-1)
    v["draw_slot"].fill(self._slots)
    at = single = several = draws = 0
    slots = [self._update_table(work.sequence) for work in works]
    if slots:
      v["tables"][: len(works), 0] = self._tables[slots]
    for owner, work in enumerate(works):
      sequence, start, count = work.sequence, work.start, work.count
      end = at + count
      v["lengths"][owner] = start + count
      if count == 1:
        v["tokens"][at] = self._token(sequence, start)
        v["positions"][at] = start
        v["slots"][at] = self._slot_of(sequence, start)
        v["single_index"][single, 0] = at
        v["single_positions"][single, 0] = start
        v["single_owner"][single] = owner
        single += 1
      else:
        several = self._add_prompt(v, shape, work, owner, at, several)
      v["adapters"][at:end] = sequence.adapter
      if work.draws:
        self._add_draw(v, draws, end - 1, sequence)
        draws += 1
      at = end
    v["numbers"][:] = single, several, draws
    return whole

  def _token(self, sequence: Sequence, at: int) -> int:
    if at < len(sequence.tokens):
      return sequence.tokens[at]
    return -1 - sequence.slot

  def _slot_of(self, sequence: Sequence, at: int) -> int:
    Z = self._page_size
    return sequence.pages[at // Z] * Z + at % Z

  def _add_prompt(
    self,
    v: dict[str, np.ndarray],
    shape: StepShape,
    work: Work,
    owner: int,
    at: int,
    row: int,
  ) -> int:
    sequence, start, count = work.sequence, work.start, work.count
    positions = np.arange(start, start + count, dtype=np.int32)
    end = at + count
    tokens = sequence.tokens[start : start + count]
    if len(tokens) < count:
      tokens = [*tokens, -1 - sequence.slot]
    v["tokens"][at:end] = tokens
    v["positions"][at:end] = positions
    Z = self._page_size
    pages = self._tables[sequence.slot][positions // Z]
    v["slots"][at:end] = pages * Z + positions % Z
    Q = shape.queries
    rows = -(-count // Q)
    index = v["several_index"][row : row + rows].reshape(-1)
    index[:count] = np.arange(at, end)
    v["several_positions"][row : row + rows].reshape(-1)[:count] = positions
    v["several_owner"][row : row + rows] = owner
    return row + rows

  def _add_draw(
    self, v: dict[str, np.ndarray], row: int, index: int, sequence: Sequence
  ) -> None:
    params = sequence.params
    v["draw_index"][row] = index
    v["draw_slot"][row] = sequence.slot
    v["seed"][row] = sequence.seed
    # `pending` counts the token that is drawn here.
    v["position"][row] = sequence.length - 1
    v["temperature"][row] = params.temperature
    v["top_k"][row] = params.top_k or 0
    v["top_p"][row] = params.top_p
    v["min_p"][row] = params.min_p
    v["repetition"][row] = params.repetition_penalty
    v["presence"][row] = params.presence_penalty
    v["frequency"][row] = params.frequency_penalty
    v["logprobs"][row] = params.logprobs is not None


@dataclasses.dataclass(frozen=True)
class Program:
  """A compiled step."""

  shape: StepShape
  run: Run


class DeviceRunner:
  """Runs steps on the model's devices.

  Args:
    model: The model. On one CPU device its layers are copied one by one.
    states: What layers do with pages.
    shapes: Of the steps.
    num_pages: P.
    place: Where it runs; `None` is where the model is.
    adapters: That requests may name.
    ends: Tokens that end a text.
    say: Told how far compiling is.
  """

  def __init__(
    self,
    model: Transformer,
    *,
    states: tuple[PagedState, ...],
    shapes: Many[StepShape],
    num_pages: int,
    place: Placement | None = None,
    adapters: AdapterSet | None = None,
    ends: tuple[int, ...] = (),
    say: Callable[[str], None] | None = None,
  ):
    cfg = model.cfg
    self._place = place or placements(cfg, model, None)[0]
    self._cfg = cfg
    model = self._place.put_model(model)
    self._adapters = adapters = self._place.put_adapters(adapters)
    self._states, self._ends = states, ends
    self._layered = None
    devices = self._place.devices
    if len(devices) == 1 and devices[0].platform == "cpu":
      self._layered = LayeredSteps(model, adapters, states)
    by_tokens = {shape.tokens: shape for shape in shapes}
    self._assembler = Assembler(by_tokens, states[0].page_size, num_pages)
    widest = by_tokens[max(by_tokens)]
    self._max_sequences = widest.max_sequences
    self._num_pages = num_pages
    self.state = self._start(num_pages, widest.max_sequences)
    self._read: Any = None
    self._write: Any = None
    # On the devices already.
    self._nothing = jax.device_put(self._no_extras(), self._place.everywhere)
    # Of the last step in which somebody asked for something.
    self._asking: list[tuple[int, Sequence]] = []
    self._asked: Extras = self._nothing
    began = time.perf_counter()
    self._programs = self._compile(model, by_tokens, say)
    self.startup_seconds = time.perf_counter() - began

  def _start(self, num_pages: int, slots: int) -> State:
    cfg, states = self._cfg, self._states

    def make() -> State:
      return State(
        init_pages(cfg, states, num_pages),
        jnp.zeros(slots, jnp.int32),
        jnp.zeros((slots, cfg.vocab_size), jnp.int16),
      )

    shardings = self._place.state_shardings(jax.eval_shape(make))
    return jax.jit(make, out_shardings=shardings)()

  def _compile(
    self,
    model: Transformer,
    shapes: Mapping[int, StepShape],
    say: Callable[[str], None] | None,
  ) -> dict[int, Program]:
    """All programs that can ever run, so that none is compiled later."""
    done: dict[int, Program] = {}
    for tokens, shape in sorted(shapes.items()):
      began = time.perf_counter()
      done[tokens] = Program(shape, self._compile_one(model, shape))
      if say is not None:
        seconds = time.perf_counter() - began
        say(f"compiled steps of {tokens} tokens in {seconds:.1f} s")
    self._count_program = _count_program.lower(
      self.state,
      jax.ShapeDtypeStruct((), jnp.int32),
      jax.ShapeDtypeStruct((self._cfg.vocab_size,), jnp.int16),
    ).compile()
    return done

  def _compile_one(self, model: Transformer, shape: StepShape) -> Run:
    if self._layered is not None:
      return self._layered.compile(self.state, self._nothing, shape=shape)
    return whole_step(
      model,
      self._adapters,
      self.state,
      self._nothing,
      shape=shape,
      states=self._states,
      place=self._place,
    )

  def _no_extras(self) -> Extras:
    """Extras that change nothing, on the host."""
    W, V = self._max_sequences, self._cfg.vocab_size
    bias_ids: Any = np.full((W, MAX_BIASES), V, np.int32)
    bias: Any = np.zeros((W, MAX_BIASES), np.float32)
    allowed: Any = np.full((W, -(-V // 32)), 0xFFFFFFFF, np.uint32)
    return Extras(bias_ids, bias, allowed)

  def dispatch(self, plan: Plan) -> DeviceTicket:
    """Begins a step behind those that are under way."""
    for sequence, _ in plan.admitted:
      if sequence.params.counts_tokens:
        self._set_counts(sequence)
    tokens = self._assembler.round_up(plan.tokens)
    packed = self._assembler.pack(plan.works, tokens)
    draws = [work for work in plan.works if work.draws]
    program = self._programs[tokens]
    extras = self._extras_of(draws)
    self.state, drawn = program.run(self.state, packed, len(draws), extras)
    return DeviceTicket(draws, drawn)

  def _set_counts(self, sequence: Sequence) -> None:
    V = self._cfg.vocab_size
    prompt = sequence.tokens[: sequence.prompt_length]
    since = sequence.tokens[sequence.prompt_length :]
    row = np.bincount(np.asarray(since, np.int64), minlength=V)[:V]
    row = np.minimum(row, PROMPT - 1).astype(np.int16)
    row[np.unique(prompt)] += PROMPT
    slot = np.asarray(sequence.slot, np.int32)
    self.state = self._count_program(self.state, slot, row)

  def _extras_of(self, draws: Many[Work]) -> Extras:
    asking = [
      (row, work.sequence)
      for row, work in enumerate(draws)
      if _asks(work.sequence)
    ]
    if not asking:
      return self._nothing
    changing = any(s.guide or s.params.min_tokens for _, s in asking)
    if asking == self._asking and not changing:
      return self._asked
    extras: Any = self._no_extras()
    for row, sequence in asking:
      biases = dict(sequence.params.logit_bias)
      if sequence.drawing < sequence.params.min_tokens:
        stops = (*self._ends, *sequence.params.stop_token_ids)
        biases |= dict.fromkeys(stops, -np.inf)
      extras.bias_ids[row, : len(biases)] = list(biases)
      extras.bias[row, : len(biases)] = list(biases.values())
      if sequence.guide is not None:
        allowed = sequence.guide.allowed()
        extras.allowed[row, : len(allowed)] = allowed
    self._asking = asking
    self._asked = jax.device_put(extras, self._place.everywhere)
    return self._asked

  def now(self) -> float:
    """Seconds of a clock that only goes forward."""
    return time.monotonic()

  def measure(self) -> MeasuredCost:
    """Times the programs; the pages' contents are lost."""
    steps = [self._time([], tokens) for tokens in self._programs]
    at = min(len(self._programs) - 1, _TIMED)
    tokens = list(self._programs)[at]
    shape = self._programs[tokens].shape
    Z = self._states[0].page_size
    pages = list(range(min(shape.table, self._num_pages)))
    start = len(pages) * Z - tokens
    if start < tokens:
      return MeasuredCost(tuple(self._programs), tuple(steps), 0.0)
    sequence = timing_sequence(pages, start + tokens)
    work = Work(sequence, start, tokens, draws=False)
    more = self._time([work], tokens) - steps[at]
    key = max(more, 0.0) / keys_read(start, tokens)
    return MeasuredCost(tuple(self._programs), tuple(steps), key)

  def _time(self, works: Many[Work], tokens: int) -> float:
    """The least seconds of a step."""
    best = float("inf")
    for _ in range(3):
      packed = self._assembler.pack(works, tokens)
      jax.block_until_ready(self.state)
      began = time.perf_counter()
      run = self._programs[tokens].run
      self.state, _ = run(self.state, packed, 0, self._nothing)
      jax.block_until_ready(self.state)
      best = min(best, time.perf_counter() - began)
    return best

  def compile_copies(self, group: int) -> None:
    """The programs of `read` and `write`, for so many pages at a time."""
    numbers = jax.ShapeDtypeStruct((group,), jnp.int32)
    pages = self.state.pages
    copies = jax.eval_shape(read_pages, pages, numbers)
    self._read = jax.jit(read_pages).lower(pages, numbers).compile()
    writes = jax.jit(write_pages, donate_argnums=(0,))
    self._write = writes.lower(pages, numbers, copies).compile()

  def read(self, numbers: np.ndarray) -> PagedKV:
    """Copies of pages, behind the steps under way."""
    copies: PagedKV = self._read(self.state.pages, numbers)
    return copies

  def write(self, numbers: np.ndarray, copies: PagedKV) -> None:
    """Fills pages, before the steps to come."""
    pages = self._write(self.state.pages, numbers, copies)
    self.state = dataclasses.replace(self.state, pages=pages)


# Of the programs, in order: that of 64 tokens, more or less.
_TIMED = 8


def timing_sequence(pages: list[int], length: int) -> Sequence:
  """A sequence of nothing that holds pages, in slot 0."""
  sequence = Sequence(
    request_id="timing",
    index=0,
    tokens=[0] * length,
    prompt_length=length,
    max_length=length + 1,
    params=SamplingParams(),
    seed=0,
    priority=0,
    arrival=0.0,
    root=b"",
  )
  sequence.pages, sequence.slot = pages, 0
  return sequence


def _asks(sequence: Sequence) -> bool:
  params = sequence.params
  return bool(
    params.logit_bias
    or sequence.guide is not None
    or sequence.drawing < params.min_tokens
  )


@functools.partial(jax.jit, donate_argnums=(0,))
def _count_program(state: State, slot: Array, row: Array) -> State:
  return dataclasses.replace(state, counts=state.counts.at[slot].set(row))
