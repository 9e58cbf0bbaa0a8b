"""What a request asks for."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

MAX_LOGPROBS = 20
"""Likeliest tokens that can be reported beside each token."""

MAX_BIASES = 300
"""Tokens whose logits a request may move."""

_LARGEST_BIAS = 1e4


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingParams:
  """How the continuation of a prompt is chosen, and where it ends.

  Logits are changed in the order of the fields from `logit_bias` to `min_p`.

  Attributes:
    max_tokens: How many new tokens at most; `None` is as many as fit.
    min_tokens: Before so many neither `stop` nor the end of the text counts.
    n: How many continuations.
    seed: Of the draws; continuation i draws by `seed + i`. The same seed gives
      the same tokens whatever else runs, but where two are equally likely up to
      rounding. `None` is a new one each time.
    stop: Texts that end a continuation; they are not part of it.
    stop_token_ids: Likewise tokens.
    ignore_eos: Go on behind the end of the text.
    logprobs: With each token report its log-probability and those of so many
      of the likeliest; of the model, before anything below. `None` is none.
    logit_bias: Added to the logits of these tokens.
    repetition_penalty: Logits of tokens that were in the prompt or came since
      are divided by it where positive, multiplied where negative.
    presence_penalty: Taken from the logits of tokens that came since.
    frequency_penalty: Likewise, times how often they came.
    temperature: Logits are divided by it; 0 takes the likeliest token.
    top_k: Only the k likeliest tokens; `None` is all.
    top_p: Only the likeliest tokens that together have at least this
      probability; 1 is all.
    min_p: Only tokens at least so many times as likely as the likeliest.
    guide: What the text must be: `{"json": schema}`, `{"regex": pattern}`,
      `{"choice": [...]}`, or `{"json_object": True}`; `None` is anything.

  Raises:
    ValueError: A field is out of range; names it and its value.
  """

  max_tokens: int | None = None
  min_tokens: int = 0
  n: int = 1
  seed: int | None = None
  stop: tuple[str, ...] = ()
  stop_token_ids: tuple[int, ...] = ()
  ignore_eos: bool = False
  logprobs: int | None = None
  logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
  repetition_penalty: float = 1.0
  presence_penalty: float = 0.0
  frequency_penalty: float = 0.0
  temperature: float = 1.0
  top_k: int | None = None
  top_p: float = 1.0
  min_p: float = 0.0
  guide: Mapping[str, Any] | None = None

  def __post_init__(self) -> None:
    for name, low, high in _INTEGERS:
      value = getattr(self, name)
      if value is None and name in _OPTIONAL:
        continue
      if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"{name}={value!r} must be an integer")
      if not low <= value <= high:
        raise ValueError(f"{name}={value} must be from {low} to {high}")
    for name, least, most in _NUMBERS:
      value = getattr(self, name)
      if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}={value!r} must be a number")
      if not least <= value <= most:
        raise ValueError(f"{name}={value} must be from {least:g} to {most:g}")
    self._check_stops()
    self._check_biases()

  def _check_stops(self) -> None:
    if isinstance(self.stop, str) or not all(
      isinstance(text, str) and text for text in self.stop
    ):
      raise ValueError(f"stop={self.stop!r} must be texts, none of them empty")
    if not all(
      isinstance(token, int) and token >= 0 for token in self.stop_token_ids
    ):
      raise ValueError(
        f"stop_token_ids={self.stop_token_ids!r} must be token ids"
      )

  def _check_biases(self) -> None:
    if len(self.logit_bias) > MAX_BIASES:
      raise ValueError(
        f"logit_bias has {len(self.logit_bias)} tokens, more than {MAX_BIASES}"
      )
    for token, value in self.logit_bias.items():
      if not isinstance(token, int) or token < 0:
        raise ValueError(f"logit_bias has {token!r}, which is no token id")
      number = isinstance(value, int | float) and not math.isnan(value)
      if not number or (abs(value) > _LARGEST_BIAS and value != -math.inf):
        raise ValueError(
          f"logit_bias of token {token} is {value!r}, not from "
          f"-{_LARGEST_BIAS:g} to {_LARGEST_BIAS:g}, nor -inf"
        )

  @property
  def greedy(self) -> bool:
    """Whether the likeliest token is always taken."""
    return self.temperature == 0

  @property
  def counts_tokens(self) -> bool:
    """Whether a draw depends on the tokens so far."""
    return (
      self.repetition_penalty != 1
      or self.presence_penalty != 0
      or self.frequency_penalty != 0
    )


_LARGE = 2**31 - 1
_OPTIONAL = ("max_tokens", "seed", "logprobs", "top_k")
_INTEGERS = (
  ("max_tokens", 1, _LARGE),
  ("min_tokens", 0, _LARGE),
  ("n", 1, 128),
  ("seed", 0, 2**32 - 1),
  ("logprobs", 0, MAX_LOGPROBS),
  ("top_k", 1, _LARGE),
)
_NUMBERS = (
  ("repetition_penalty", 0.01, 100),
  ("presence_penalty", -100, 100),
  ("frequency_penalty", -100, 100),
  ("temperature", 0, 100),
  ("top_p", 1e-6, 1),
  ("min_p", 0, 1),
)
