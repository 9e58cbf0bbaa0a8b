"""Answers as OpenAI writes them, whole or by pieces."""

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

from jaxchunk.data.tokenizers import Tokenizer, token_bytes
from jaxchunk.inference.output import Event, TokenLogprobs
from jaxchunk.inference.server import errors
from jaxchunk.inference.server.protocol import Job
from jaxchunk.inference.server.tool_calls import ToolText

# In place of -inf, which JSON does not have.
_LOWEST = -9999.0


@dataclasses.dataclass
class Choice:
  """A continuation as far as it has come.

  Attributes:
    index: In the answer.
    texts: Pieces of it.
    logprobs: Of its tokens, if asked for.
    finish_reason: As OpenAI says it.
    new_tokens: That were drawn.
    calls: Of tools.
    cached: Tokens of the prompt that were known, at the first continuation.
    tool_text: Holds calls back; `None` if there are no tools.
    began: Whether a piece was sent.
    offset: Characters of its tokens so far.
  """

  index: int
  texts: list[str] = dataclasses.field(default_factory=list)
  logprobs: list[TokenLogprobs] = dataclasses.field(default_factory=list)
  finish_reason: str | None = None
  new_tokens: int = 0
  cached: int = 0
  calls: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  tool_text: ToolText | None = None
  began: bool = False
  offset: int = 0

  def take(self, event: Event) -> str:
    """Takes in what a step brought; returns its text."""
    piece = event.text
    if self.tool_text is not None:
      piece = self.tool_text.push(piece)
    if event.finish_reason is not None:
      self.finish_reason = event.finish_reason
      self.new_tokens = event.sequence.generated
      # A prompt counts once, however many continuations it has.
      first = event.sequence.index == 0
      self.cached = event.sequence.cached if first else 0
      if self.tool_text is not None:
        rest, self.calls = self.tool_text.finish()
        piece += rest
    if self.calls:
      self.finish_reason = "tool_calls"
    return piece


class Writer:
  """Writes a job's answer.

  Args:
    job: What was asked for.
    tokenizer: Names tokens; `None` leaves them numbers.
  """

  whole = piece = "text_completion"

  def __init__(self, job: Job, tokenizer: Tokenizer | None):
    self.job, self._tokenizer = job, tokenizer
    self._created = int(time.time())
    n = job.params.n
    self.choices = [
      Choice(index, tool_text=ToolText() if job.tools else None)
      for index in range(n * len(job.requests))
    ]
    self._first = {
      request.request_id: number * n
      for number, request in enumerate(job.requests)
    }

  def _take(self, event: Event) -> tuple[Choice, str]:
    if event.finish_reason == "cancelled":
      raise errors.cut_off()
    sequence = event.sequence
    choice = self.choices[self._first[sequence.request_id] + sequence.index]
    return choice, choice.take(event)

  def add(self, event: Event) -> None:
    """Takes in what a step brought, for the whole answer.

    Raises:
      ApiError: The continuation was cancelled.
    """
    choice, text = self._take(event)
    choice.texts.append(text)
    choice.logprobs += event.logprobs

  def answer(self) -> dict[str, Any]:
    """The whole answer."""
    return {
      **self._head(self.whole),
      "choices": [self._whole(choice) for choice in self.choices],
      "usage": self.usage(),
    }

  def pieces(self, event: Event) -> Iterator[dict[str, Any]]:
    """What is to be sent of what a step brought.

    Raises:
      ApiError: The continuation was cancelled.
    """
    choice, text = self._take(event)
    for part in self._parts(choice, text, event.logprobs):
      head = self._head(self.piece)
      usage = {"usage": None} if self.job.include_usage else {}
      yield {**head, "choices": [{"index": choice.index, **part}], **usage}

  def last_piece(self) -> dict[str, Any]:
    """Tells how many tokens there were."""
    return {**self._head(self.piece), "choices": [], "usage": self.usage()}

  def usage(self) -> dict[str, Any]:
    """How many tokens there were, and how many of the prompt's were known."""
    prompt = self.job.prompt_tokens
    new = sum(choice.new_tokens for choice in self.choices)
    return {
      "prompt_tokens": prompt,
      "completion_tokens": new,
      "total_tokens": prompt + new,
      "prompt_tokens_details": {
        "cached_tokens": sum(choice.cached for choice in self.choices)
      },
    }

  def _head(self, kind: str) -> dict[str, Any]:
    return {
      "id": self.job.job_id,
      "object": kind,
      "created": self._created,
      "model": self.job.model,
    }

  def _echo(self, choice: Choice) -> str:
    if self.job.echo is None or choice.began:
      return ""
    return self.job.echo[choice.index // self.job.params.n]

  def _whole(self, choice: Choice) -> dict[str, Any]:
    return {
      "index": choice.index,
      "text": self._echo(choice) + "".join(choice.texts),
      "logprobs": self._logprobs(choice, choice.logprobs),
      "finish_reason": choice.finish_reason,
    }

  def _parts(
    self, choice: Choice, text: str, logprobs: Sequence[TokenLogprobs]
  ) -> Iterator[dict[str, Any]]:
    text = self._echo(choice) + text
    choice.began = True
    if text or logprobs or choice.finish_reason is not None:
      yield {
        "text": text,
        "logprobs": self._logprobs(choice, logprobs),
        "finish_reason": choice.finish_reason,
      }

  def _logprobs(
    self, choice: Choice, found: Sequence[TokenLogprobs]
  ) -> dict[str, Any] | None:
    if self.job.params.logprobs is None:
      return None
    offsets, names = [], []
    for one in found:
      names.append(self._name(one.token)[0])
      offsets.append(choice.offset)
      choice.offset += len(names[-1])
    return {
      "tokens": names,
      "token_logprobs": [finite(one.logprob) for one in found],
      "top_logprobs": [
        {self._name(token)[0]: finite(value) for token, value in _tops(one)}
        for one in found
      ],
      "text_offset": offsets,
    }

  def _name(self, token: int) -> tuple[str, list[int] | None]:
    """A token's text and bytes."""
    if self._tokenizer is None:
      return f"token_id:{token}", None
    data = token_bytes(self._tokenizer, token)
    if not data:
      return f"token_id:{token}", []
    try:
      return data.decode(), list(data)
    except UnicodeDecodeError:
      text = "".join(f"\\x{byte:02x}" for byte in data)
      return f"bytes:{text}", list(data)


class ChatWriter(Writer):
  """Writes the answer of a chat."""

  whole, piece = "chat.completion", "chat.completion.chunk"

  def _whole(self, choice: Choice) -> dict[str, Any]:
    text = "".join(choice.texts)
    message: dict[str, Any] = {
      "role": "assistant",
      "content": None if choice.calls and not text else text,
      "refusal": None,
    }
    if choice.calls:
      message["tool_calls"] = choice.calls
    return {
      "index": choice.index,
      "message": message,
      "logprobs": self._logprobs(choice, choice.logprobs),
      "finish_reason": choice.finish_reason,
    }

  def _parts(
    self, choice: Choice, text: str, logprobs: Sequence[TokenLogprobs]
  ) -> Iterator[dict[str, Any]]:
    plain = {"logprobs": None, "finish_reason": None}
    if not choice.began:
      choice.began = True
      yield {"delta": {"role": "assistant", "content": ""}, **plain}
    if text or logprobs:
      found = self._logprobs(choice, logprobs)
      yield {"delta": {"content": text}, **plain, "logprobs": found}
    if choice.calls:
      calls = [{"index": n, **call} for n, call in enumerate(choice.calls)]
      yield {"delta": {"tool_calls": calls}, **plain}
    if choice.finish_reason is not None:
      reason = {"finish_reason": choice.finish_reason}
      yield {"delta": {}, **plain, **reason}

  def _logprobs(
    self, choice: Choice, found: Sequence[TokenLogprobs]
  ) -> dict[str, Any] | None:
    asked = self.job.params.logprobs
    if asked is None:
      return None
    entries = [
      {
        **self._entry(one.token, one.logprob),
        "top_logprobs": [self._entry(*pair) for pair in one.top],
      }
      for one in found
    ]
    return {"content": entries, "refusal": None}

  def _entry(self, token: int, logprob: float) -> dict[str, Any]:
    name, data = self._name(token)
    return {"token": name, "logprob": finite(logprob), "bytes": data}


def _tops(one: TokenLogprobs) -> Sequence[tuple[int, float]]:
  """The likeliest tokens, and the one that came, as OpenAI has it."""
  if any(token == one.token for token, _ in one.top):
    return one.top
  return (*one.top, (one.token, one.logprob)) if one.top else ()


def finite(value: float) -> float:
  """A number that JSON has."""
  return value if math.isfinite(value) else _LOWEST
