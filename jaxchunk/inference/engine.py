"""Many prompts at once: the engine as a library.

engine = jc.Engine(model, tokenizer)
for answer in engine.generate(["Once upon", "import os"], max_tokens=50):
  print(answer.text)
"""

import collections
import dataclasses
import itertools
import logging
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Int

from jaxchunk.data.tokenizers import Tokenizer
from jaxchunk.inference.core import EngineCore, Request, RequestError
from jaxchunk.inference.guided import Guides, TokenGuide
from jaxchunk.inference.output import Event, FinishReason, TokenLogprobs
from jaxchunk.inference.params import SamplingParams
from jaxchunk.inference.placement import placements
from jaxchunk.inference.prompt import encode_prompt
from jaxchunk.inference.replicas import Replicas
from jaxchunk.inference.runner import DeviceRunner
from jaxchunk.inference.scheduler import SCHEDULERS, Limits
from jaxchunk.inference.step import StepShape
from jaxchunk.inference.swap import PageSwap
from jaxchunk.kv.paged import NARROW, page_bytes, paged_states
from jaxchunk.kv.policies import KeepAll, Selector
from jaxchunk.kv.pool import PagePool
from jaxchunk.kv.tiers import HostTier
from jaxchunk.models.adapter_set import adapter_set
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.transformer import Transformer
from jaxchunk.sharding.mesh import Layout

_GIB = 2**30


@dataclasses.dataclass(kw_only=True)
class EngineConfig:
  """Sizes of an engine, and how it serves.

  Attributes:
    max_length: Tokens that a sequence may have, prompt and continuation;
      `None` is what the model was made for, at most 32,768.
    max_sequences: Sequences that run at a time.
    step_tokens: Tokens that a step has room for: one for each sequence that
      draws, the rest for parts of prompts. Fewer make long prompts slower and
      disturb the others less.
    step_sizes: Tokens that steps are compiled for, the largest `step_tokens`;
      `None` is 1, 2, 4, 8, 16, 24, 32, 48, ... Fewer start sooner and pad more.
    max_slowdown: How many times as long a step may take for parts of prompts
      in it, while sequences draw: smoother answers, slower prompts. `None` is
      any. Programs are timed at the start then.
    prompts_at_once: Prompts of which parts run in one step.
    kv_gib: Memory for keys and values, in GiB.
    num_pages: Pages for these; `None` is as many as `kv_gib` holds.
    page_size: Tokens in a page.
    kv_dtype: Of keys and values in pages, "int8" or an 8-bit float beside the
      model's own, which is `None`.
    query_block: Tokens of a prompt that read pages together.
    scheduler: "stall_free" or "past_future".
    prefix_cache: Use the keys of equal beginnings again.
    host_gib: Memory of the host for keys that the device has no room for.
    implementation: Of paged attention.
    seed: Of requests that bring none.
  """

  max_length: int | None = None
  max_sequences: int = 16
  step_tokens: int = 256
  step_sizes: tuple[int, ...] | None = None
  max_slowdown: float | None = None
  prompts_at_once: int = 4
  kv_gib: float = 1.0
  num_pages: int | None = None
  page_size: int = 64
  kv_dtype: str | None = None
  query_block: int = 128
  scheduler: str = "stall_free"
  prefix_cache: bool = True
  host_gib: float = 0.0
  implementation: str = "xla"
  seed: int | None = None

  def check(self) -> None:
    """Whether the numbers are possible.

    Raises:
      ValueError: One is not; names it and its value.
    """
    for name in (
      "max_length",
      "max_sequences",
      "step_tokens",
      "prompts_at_once",
      "num_pages",
      "page_size",
      "query_block",
    ):
      value = getattr(self, name)
      if value is None and name in ("max_length", "num_pages"):
        continue
      if not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer")
    if self.step_tokens < self.max_sequences:
      raise ValueError(
        f"step_tokens={self.step_tokens} must be at least max_sequences="
        f"{self.max_sequences}: each takes one of a step's tokens"
      )
    sizes = self.step_sizes
    if sizes is not None and (
      not sizes or min(sizes) < 1 or max(sizes) != self.step_tokens
    ):
      raise ValueError(
        f"step_sizes={sizes} must be positive, the largest step_tokens="
        f"{self.step_tokens}"
      )
    if self.max_slowdown is not None and not self.max_slowdown > 1:
      raise ValueError(f"max_slowdown={self.max_slowdown} must be above 1")
    if self.scheduler not in SCHEDULERS:
      raise ValueError(
        f"scheduler={self.scheduler!r} must be one of {list(SCHEDULERS)}"
      )
    if not self.kv_gib > 0 or self.host_gib < 0:
      raise ValueError(
        f"kv_gib={self.kv_gib} must be positive, and host_gib={self.host_gib} "
        "not negative"
      )
    if self.kv_dtype is not None and self.kv_dtype not in NARROW:
      raise ValueError(
        f"kv_dtype={self.kv_dtype!r} must be one of {list(NARROW)}, or None "
        "for the model's"
      )


@dataclasses.dataclass
class Completion:
  """One continuation.

  Attributes:
    index: Which of the n.
    tokens: New ones.
    text: Theirs, without a stop text.
    logprobs: One entry a token, if asked for.
    finish_reason: "stop" at the end of the text or a stop text, "length",
      "cancelled"; `None` while it goes on.
  """

  index: int
  tokens: list[int] = dataclasses.field(default_factory=list)
  text: str = ""
  logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
  finish_reason: FinishReason | None = None

  def add(self, event: Event) -> None:
    """Takes in what a step brought."""
    self.tokens += event.tokens
    self.text += event.text
    self.logprobs += event.logprobs
    self.finish_reason = event.finish_reason


@dataclasses.dataclass
class Answer:
  """What came of a prompt.

  Attributes:
    prompt: Its token ids.
    completions: n of them.
  """

  prompt: tuple[int, ...]
  completions: list[Completion]

  @property
  def text(self) -> str:
    """Of the first continuation."""
    return self.completions[0].text

  @property
  def tokens(self) -> list[int]:
    """Of the first continuation."""
    return self.completions[0].tokens


Prompt = str | Sequence[int] | Int[np.ndarray, " T"]


class Engine:
  """Continues many prompts together.

  All programs are compiled when it is made; none is later.

  Args:
    model: The model. Its adapters, if it has some, count as part of it.
    tokenizer: For prompts and answers that are text; without one both are
      token ids.
    config: Sizes; single fields may be given by name instead.
    adapters: Models with LoRA adapters beside the same model, by the names
      that requests may ask for.
    ends: Tokens that end a text, beside the tokenizer's EOS.
    selector: Chooses the pages that queries read; `None` is all.
    layout: `data` copies of the model, each over `tensor` devices that share
      heads and matrices; each copy has the sizes of `config`. `None` is where
      the model is.
    devices: Of the layout; by default all.
    say: Told what takes long.
    **fields: Of `EngineConfig`.

  Raises:
    ValueError: A field is impossible, an adapter does not fit, or the layout
      cannot split the model; names it.
  """

  def __init__(
    self,
    model: Transformer,
    tokenizer: Tokenizer | None = None,
    *,
    config: EngineConfig | None = None,
    adapters: Mapping[str, Transformer] | None = None,
    ends: Iterable[int] = (),
    selector: Selector | None = None,
    layout: Layout | None = None,
    devices: Sequence[jax.Device] | None = None,
    say: Callable[[str], None] | None = None,
    **fields: Any,
  ):
    config = dataclasses.replace(config or EngineConfig(), **fields)
    config.check()
    self.config, self.tokenizer = config, tokenizer
    self.core: EngineCore | Replicas
    self.model_config = cfg = model.cfg
    say = say or logging.getLogger("jaxchunk").info
    length = max_length_of(cfg, config)
    selector = selector or KeepAll()
    states = paged_states(
      cfg,
      page_size=config.page_size,
      kv_dtype=config.kv_dtype,
      beside=selector.beside,
      selector=selector,
      implementation=config.implementation,
    )
    size = page_bytes(cfg, states)
    num_pages = config.num_pages or int(config.kv_gib * _GIB // size)
    if num_pages < 1:
      raise ValueError(
        f"kv_gib={config.kv_gib} holds no page: one takes "
        f"{size / 2**20:.1f} MiB"
      )
    num_pages = min(
      num_pages, config.max_sequences * -(-length // config.page_size)
    )
    shapes = step_shapes(config, length)
    limits = Limits(
      tokens=config.step_tokens,
      sequences=config.max_sequences,
      prompts=config.prompts_at_once,
      shapes=tuple(shape.tokens for shape in shapes),
      slowdown=config.max_slowdown,
    )
    every_end = {*ends}
    if tokenizer is not None and tokenizer.eos_id is not None:
      every_end.add(tokenizer.eos_id)
    self._guides: Guides | None = None
    self._numbers = itertools.count()
    self._boxes: dict[str, collections.deque[Event]] = {}
    beside = adapter_set(cfg, adapters or {})
    self.runners = [
      DeviceRunner(
        model,
        states=states,
        shapes=shapes,
        num_pages=num_pages,
        place=place,
        adapters=beside,
        ends=tuple(sorted(every_end)),
        say=say,
      )
      for place in placements(cfg, model, layout, devices)
    ]
    self.tier = None
    if config.host_gib:
      self.tier = HostTier(int(config.host_gib * _GIB))

    def make_core(number: int, runner: DeviceRunner) -> EngineCore:
      pool = PagePool(num_pages, config.page_size, caching=config.prefix_cache)
      swap = None
      if self.tier is not None:
        swap = PageSwap(
          runner,
          self.tier,
          page_size=config.page_size,
          num_pages=num_pages,
          sharing=config.prefix_cache,
        )
        runner.compile_copies(swap.group)
      cost = runner.measure() if config.max_slowdown else None
      seed = None if config.seed is None else config.seed + number
      return EngineCore(
        runner,
        SCHEDULERS[config.scheduler](limits, pool, swap, cost=cost),
        vocab_size=cfg.vocab_size,
        max_length=length,
        tokenizer=tokenizer,
        ends=every_end,
        adapters={name: n for n, name in enumerate(adapters or {})},
        policy=selector.name,
        swap=swap,
        guides=self._guide,
        seed=seed,
      )

    self.cores = [make_core(*pair) for pair in enumerate(self.runners)]
    several = len(self.cores) > 1
    self.core = Replicas(self.cores) if several else self.cores[0]
    seconds = sum(runner.startup_seconds for runner in self.runners)
    say(
      f"engine: {len(shapes)} steps compiled in {seconds:.1f} s; "
      f"{num_pages:,} pages of {config.page_size} tokens, "
      f"{num_pages * size / _GIB:.2f} GiB; at most {config.max_sequences} "
      f"sequences of {self.core.max_length:,} tokens"
      + (f"; {len(self.cores)} copies" if several else "")
    )

  def _guide(self, guide: Mapping[str, Any]) -> TokenGuide:
    """Makes a guide; the first request for one builds what all share."""
    if self.tokenizer is None:
      raise RequestError("texts of a form need a tokenizer", "guide")
    try:
      if self._guides is None:
        self._guides = Guides(self.tokenizer, self.model_config.vocab_size)
      return self._guides(guide)
    except (ValueError, ImportError) as error:
      raise RequestError(str(error), "guide") from error

  @property
  def max_length(self) -> int:
    """Tokens that a sequence may have."""
    return self.core.max_length

  def generate(
    self,
    prompts: Prompt | Iterable[Prompt],
    params: SamplingParams | Sequence[SamplingParams] | None = None,
    *,
    adapter: str | None = None,
    progress: Callable[[int, int], None] | None = None,
    **fields: Any,
  ) -> list[Answer]:
    """Continues prompts, all together.

    Args:
      prompts: Texts or token ids; one, or several.
      params: How, for all or for each; `None` is the default. Single fields
        of `SamplingParams` may be given by name instead.
      adapter: Its name; `None` is the model as it is.
      progress: Told how many prompts are done, of how many.
      **fields: Of `SamplingParams`.

    Returns:
      An answer for each prompt, in order.

    Raises:
      RequestError: A prompt cannot be served; says why. None is then.
    """
    every = _as_list(prompts)
    each = self._params(params, len(every), fields)
    requests = [
      Request(
        request_id=f"generate-{next(self._numbers)}",
        prompt=self.encode(prompt),
        params=own,
        adapter=adapter,
      )
      for prompt, own in zip(every, each, strict=True)
    ]
    for request in requests:
      self.core.check(request)
    answers = {
      request.request_id: Answer(
        request.prompt, [Completion(i) for i in range(request.params.n)]
      )
      for request in requests
    }
    left = {request.request_id: request.params.n for request in requests}
    done = 0
    for event in self._run(requests):
      sequence = event.sequence
      answer = answers[sequence.request_id]
      answer.completions[sequence.index].add(event)
      if event.finish_reason is None:
        continue
      left[sequence.request_id] -= 1
      done += not left[sequence.request_id]
      if progress is not None and not left[sequence.request_id]:
        progress(done, len(requests))
    return list(answers.values())

  def stream(
    self,
    prompt: Prompt,
    params: SamplingParams | None = None,
    *,
    adapter: str | None = None,
    **fields: Any,
  ) -> Iterator[Event]:
    """Continues one prompt, event by event.

    Args:
      prompt: Text or token ids.
      params: How; `None` is the default, or by `fields`.
      adapter: Its name; `None` is the model as it is.
      **fields: Of `SamplingParams`.

    Returns:
      What each step brings. Closing it early cancels the rest.

    Raises:
      RequestError: The prompt cannot be served; says why.
    """
    request = Request(
      request_id=f"stream-{next(self._numbers)}",
      prompt=self.encode(prompt),
      params=self._params(params, 1, fields)[0],
      adapter=adapter,
    )
    self.core.check(request)
    return self._run([request])

  def _run(self, requests: Sequence[Request]) -> Iterator[Event]:
    """Serves requests; cancels what is left if nobody listens any more.

    Several may run by turns: events go to whom they are for.
    """
    box: collections.deque[Event] = collections.deque()
    left = {request.request_id: request.params.n for request in requests}
    try:
      for request in requests:
        self._boxes[request.request_id] = box
        self.core.add(request)
      while left or box:
        while not box:
          self._step()
        event = box.popleft()
        name = event.sequence.request_id
        left[name] -= event.finish_reason is not None
        if not left[name]:
          del left[name], self._boxes[name]
        yield event
    finally:
      for name in left:
        self._boxes.pop(name, None)
        self.core.cancel(name)
      # What it left under way; others' requests go on when they are asked for.
      while self.core.has_work and not self._boxes:
        self.core.step()

  def _step(self) -> None:
    for event in self.core.step():
      box = self._boxes.get(event.sequence.request_id)
      if box is not None:
        box.append(event)

  def close(self) -> None:
    """Ends the threads that copy to the host; the engine is of no use then."""
    if self.tier is not None:
      self.tier.close()

  def encode(self, prompt: Prompt) -> tuple[int, ...]:
    """Token ids of a prompt.

    Raises:
      ValueError: It is text and there is no tokenizer, or it is empty.
      TypeError: A token is no integer.
    """
    if not isinstance(prompt, str):
      return tuple(operator.index(token) for token in prompt)
    if self.tokenizer is None:
      raise ValueError("a prompt of text needs Engine(model, tokenizer)")
    return tuple(encode_prompt(self.tokenizer, prompt).tolist())

  def _params(
    self, params: Any, number: int, fields: Mapping[str, Any]
  ) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
      one = dataclasses.replace(params or SamplingParams(), **fields)
      return [one] * number
    each = [dataclasses.replace(one, **fields) for one in params]
    if len(each) != number:
      raise ValueError(f"{number} prompts have params for {len(each)}")
    return each


def _as_list(prompts: Prompt | Iterable[Prompt]) -> list[Prompt]:
  if isinstance(prompts, str):
    return [prompts]
  every: list[Any] = list(prompts)
  if every and all(isinstance(one, int | np.integer) for one in every):
    return [every]
  return every


def max_length_of(cfg: ModelConfig, config: EngineConfig) -> int:
  """Tokens that a sequence of an engine may have.

  Raises:
    ValueError: More were asked for than the model was made for.
  """
  made_for = cfg.context_length
  if config.max_length is None:
    return min(made_for or 4096, 32768)
  if made_for is not None and config.max_length > made_for:
    raise ValueError(
      f"max_length={config.max_length} is more than the model was made for, "
      f"{made_for}; jaxchunk.models.context.extend_context extends it"
    )
  return config.max_length


def step_shapes(config: EngineConfig, length: int) -> list[StepShape]:
  """The steps that an engine compiles."""
  powers = [2**n for n in range(config.step_tokens.bit_length())]
  # 12 is no quicker than 16 on CPU.
  between = [power + power // 2 for power in powers if power >= 16]
  sizes = {size for size in powers + between if size < config.step_tokens}
  if config.step_sizes is not None:
    sizes = set(config.step_sizes)
  return [
    StepShape(
      tokens=tokens,
      max_sequences=config.max_sequences,
      prompts=config.prompts_at_once,
      query_block=config.query_block,
      table=-(-length // config.page_size),
    )
    for tokens in sorted({*sizes, config.step_tokens})
  ]
