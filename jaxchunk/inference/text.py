"""A text continued: whole characters as they come, and a clock."""

import dataclasses
import time
from collections.abc import Collection, Iterable, Iterator

from jaxchunk.data.tokenizers import StreamDecoder, Tokenizer
from jaxchunk.inference.engine import Engine, EngineConfig
from jaxchunk.inference.generate import check_tokens
from jaxchunk.inference.output import Event
from jaxchunk.inference.params import SamplingParams
from jaxchunk.inference.prompt import encode_prompt
from jaxchunk.inference.sampling import Sampler
from jaxchunk.models.transformer import Transformer


def stream_text(tokens: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
  """Text of the tokens as they come, never half a character.

  Args:
    tokens: Ids; each is asked for when the text before it has been given.
    tokenizer: What decodes them.

  Yields:
    Pieces of text, none empty; joined, they are the decoded ids.
  """
  decoder = StreamDecoder(tokenizer)
  for token in tokens:
    if piece := decoder.push(token):
      yield piece
  if piece := decoder.flush():
    yield piece


@dataclasses.dataclass
class Clock:
  """Counts tokens that pass, and how long they took.

  Attributes:
    prompt_tokens: Length of the prompt.
    tokens: New tokens so far.
    prefill_seconds: Until the first of them.
    decode_seconds: From the first to the last.
  """

  prompt_tokens: int
  tokens: int = 0
  prefill_seconds: float = 0.0
  decode_seconds: float = 0.0

  def watch(self, events: Iterable[Event]) -> Iterator[Event]:
    """Passes events on; the clock starts with the first request."""
    start = time.perf_counter()
    for event in events:
      now = time.perf_counter()
      if not self.tokens:
        self.prefill_seconds = now - start
      self.tokens += len(event.tokens)
      self.decode_seconds = now - start - self.prefill_seconds
      yield event
    if not self.tokens:
      self.prefill_seconds = time.perf_counter() - start

  def __str__(self) -> str:
    parts = [
      _speed("prefill", self.prompt_tokens, self.prefill_seconds),
      # The first token is prefill's.
      _speed("decode", max(self.tokens - 1, 0), self.decode_seconds),
    ]
    return ", ".join(parts)


def _speed(name: str, tokens: int, seconds: float) -> str:
  text = f"{name}: {tokens:,} tokens in {seconds:.2f} s"
  return f"{text} ({tokens / seconds:,.0f} tokens/s)" if seconds else text


def continue_text(
  model: Transformer,
  tokenizer: Tokenizer,
  prompt: str,
  *,
  max_new_tokens: int,
  sampler: Sampler,
  chunk_size: int,
  seed: int = 0,
  bos: bool = True,
  ends: Collection[int] = (),
) -> tuple[Iterator[str], Clock]:
  """Checks and compiles everything, then gives the text as it comes.

  Args:
    model: The model.
    tokenizer: Its tokenizer.
    prompt: Text to continue.
    max_new_tokens: How many tokens at most; EOS ends the text before.
    sampler: How they are chosen.
    chunk_size: C, prompt tokens that run at a time.
    seed: Of the sampler.
    bos: Put the BOS token first, if the tokenizer has one.
    ends: Ids of other tokens that end the text.

  Returns:
    Pieces of text, without the prompt, and the clock of their tokens, which
    starts when the first is asked for.

  Raises:
    ValueError: An argument is out of range; names it and the remedy.
  """
  ids = encode_prompt(tokenizer, prompt, bos=bos)
  check_tokens(model.cfg, ids[None])
  for name, value in (
    ("max_new_tokens", max_new_tokens),
    ("chunk_size", chunk_size),
  ):
    if value < 1:
      raise ValueError(f"{name}={value} must be a positive integer")
  params = SamplingParams(
    max_tokens=max_new_tokens,
    temperature=sampler.temperature,
    top_k=sampler.top_k,
    top_p=1.0 if sampler.top_p is None else sampler.top_p,
    seed=seed,
  )
  engine = Engine(
    model,
    tokenizer,
    ends=ends,
    max_length=len(ids) + max_new_tokens,
    max_sequences=1,
    step_tokens=chunk_size,
    step_sizes=tuple(sorted({1, chunk_size})),
    num_pages=-(-(len(ids) + max_new_tokens) // EngineConfig.page_size),
    prefix_cache=False,
  )
  clock = Clock(len(ids))

  def pieces() -> Iterator[str]:
    for event in clock.watch(engine.stream(ids, params)):
      if event.text:
        yield event.text

  return pieces(), clock
