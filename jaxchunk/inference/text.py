"""Between text and tokens: prompts in, a stream of whole characters out."""

import dataclasses
import itertools
import time
from collections.abc import Collection, Iterable, Iterator

import numpy as np

from jaxchunk.data.tokenizers import Ids, StreamDecoder, Tokenizer
from jaxchunk.inference.generate import generate, warm_up
from jaxchunk.inference.sampling import Sampler
from jaxchunk.models.transformer import Transformer


def encode_prompt(tokenizer: Tokenizer, text: str, *, bos: bool = True) -> Ids:
  """Ids of a prompt, as a document of training begins.

  Args:
    tokenizer: The model's.
    text: May be empty where BOS comes first.
    bos: Put the BOS token first, if the tokenizer has one.

  Returns:
    At least one id, int32.

  Raises:
    ValueError: There would be none.
  """
  begin = [tokenizer.bos_id] if bos and tokenizer.bos_id is not None else []
  ids = np.concatenate([np.asarray(begin, np.int32), tokenizer.encode(text)])
  if not ids.size:
    reason = "has no BOS token" if bos else "was told to leave out BOS"
    raise ValueError(
      f"the prompt is empty and the tokenizer {reason} to begin with; write "
      "some text"
    )
  return ids


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

  def watch(self, tokens: Iterable[int]) -> Iterator[int]:
    """Passes the tokens on; the clock starts with the first request."""
    start = time.perf_counter()
    for token in tokens:
      now = time.perf_counter()
      if not self.tokens:
        self.prefill_seconds = now - start
      self.tokens += 1
      self.decode_seconds = now - start - self.prefill_seconds
      yield token
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
  tokens = generate(
    model,
    ids,
    max_new_tokens=max_new_tokens,
    sampler=sampler,
    chunk_size=chunk_size,
    seed=seed,
    eos_id=tokenizer.eos_id,
  )
  warm_up(
    model,
    prompt_tokens=len(ids),
    max_new_tokens=max_new_tokens,
    sampler=sampler,
    chunk_size=chunk_size,
  )
  tokens = itertools.takewhile(lambda token: token not in ends, tokens)
  clock = Clock(len(ids))
  return stream_text(clock.watch(tokens), tokenizer), clock
