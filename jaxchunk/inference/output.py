"""From drawn tokens to text, as far as it is certain."""

import dataclasses
from typing import Literal

from jaxchunk.data.tokenizers import StreamDecoder, Tokenizer
from jaxchunk.inference.sequence import Sequence

FinishReason = Literal["stop", "length", "cancelled"]


@dataclasses.dataclass(frozen=True)
class TokenLogprobs:
  """Log-probabilities at one place, by the model alone.

  Attributes:
    token: The token that came.
    logprob: Its own.
    top: The likeliest tokens with theirs, as many as were asked for.
  """

  token: int
  logprob: float
  top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Event:
  """What a step brought for a sequence.

  Attributes:
    sequence: Which.
    tokens: New ones; a token that ends the text is not among them.
    text: New text, as far as it is certain.
    logprobs: Of the new tokens, if asked for.
    finish_reason: Why it ended; `None` while it goes on.
    time: By the engine's clock, in seconds.
  """

  sequence: Sequence
  tokens: tuple[int, ...]
  text: str
  logprobs: tuple[TokenLogprobs, ...]
  finish_reason: FinishReason | None
  time: float


class TextStream:
  """Text of tokens as they come, and whether a stop text is in it.

  Text is held back while it may be half a character or the beginning of a
  stop text.

  Args:
    tokenizer: What decodes; `None` gives no text.
    stop: Texts that end it.
  """

  def __init__(self, tokenizer: Tokenizer | None, stop: tuple[str, ...] = ()):
    self._decoder = None if tokenizer is None else StreamDecoder(tokenizer)
    self._stop = stop
    self._held = ""
    self.stopped = False

  def push(self, token: int, *, watch: bool = True) -> str:
    """Takes a token; returns the text that is certain now.

    Args:
      token: The next one.
      watch: Whether stop texts count already.
    """
    if self._decoder is None:
      return ""
    return self._add(self._decoder.push(token), watch)

  def flush(self) -> str:
    """The rest, at the end of the text."""
    if self._decoder is None or self.stopped:
      return ""
    text = self._add(self._decoder.flush(), True)
    if not self.stopped:
      text, self._held = text + self._held, ""
    return text

  def _add(self, text: str, watch: bool) -> str:
    self._held += text
    if not watch:
      text, self._held = self._held, ""
      return text
    places = [self._held.find(stop) for stop in self._stop]
    found = [place for place in places if place >= 0]
    if found:
      self.stopped = True
      text, self._held = self._held[: min(found)], ""
      return text
    kept = max(map(self._overlap, self._stop), default=0)
    cut = len(self._held) - kept
    text, self._held = self._held[:cut], self._held[cut:]
    return text

  def _overlap(self, stop: str) -> int:
    """How much of the end of the text may begin a stop text."""
    most = min(len(stop) - 1, len(self._held))
    for size in range(most, 0, -1):
      if self._held.endswith(stop[:size]):
        return size
    return 0
