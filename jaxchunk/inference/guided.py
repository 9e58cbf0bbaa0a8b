"""Texts of a form: JSON by a schema, a regular expression, one of some choices.

The work is llguidance's, which says in well under a millisecond which tokens
may come next; the engine draws among them.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import UInt32

from jaxchunk.data.tokenizers import ByteTokenizer, JsonTokenizer, Tokenizer

KINDS = ("json", "json_object", "regex", "choice")


class Guides:
  """Makes the guides of requests.

  Args:
    tokenizer: Of the texts, with an EOS token.
    vocab_size: Of the model, which may have more tokens.

  Raises:
    ImportError: llguidance is not installed.
    ValueError: The tokenizer has no EOS.
  """

  def __init__(self, tokenizer: Tokenizer, vocab_size: int):
    try:
      import llguidance
    except ImportError as error:
      raise ImportError(
        "texts of a form need llguidance: pip install 'jaxchunk[serve]'"
      ) from error
    if tokenizer.eos_id is None:
      raise ValueError("texts of a form need a tokenizer with an EOS token")
    self._library, self._vocab_size = llguidance, vocab_size
    self._tokenizer = _wrapped(llguidance, tokenizer, vocab_size)
    self._eos = tokenizer.eos_id

  def __call__(self, guide: Mapping[str, Any]) -> "TokenGuide":
    """The guide of one text.

    Args:
      guide: One of `KINDS` and what belongs to it, as `SamplingParams.guide`.

    Raises:
      ValueError: It is none of them, or its grammar is wrong; says where.
    """
    matcher = self._library.LLMatcher
    grammar = _grammar(matcher, guide)
    made = matcher(self._tokenizer, grammar)
    if made.is_error():
      raise ValueError(f"guide: {made.get_error()}")
    return TokenGuide(made, self._vocab_size, self._eos)


class TokenGuide:
  """Follows one text; see `sequence.Guide`."""

  def __init__(self, matcher: Any, vocab_size: int, eos: int):
    self._matcher, self._eos = matcher, eos
    self._mask = np.zeros((1, -(-vocab_size // 32)), np.int32)

  def allowed(self) -> UInt32[np.ndarray, " w"]:
    """One bit for each token that may come next, the lowest first."""
    mask = np.frombuffer(self._matcher.compute_bitmask(), np.uint32)
    words = self._mask.shape[1]
    allowed = np.zeros(words, np.uint32)
    allowed[: min(words, len(mask))] = mask[:words]
    if not allowed.any():
      allowed[self._eos // 32] = np.uint32(1) << np.uint32(self._eos % 32)
    return allowed

  def accept(self, token: int) -> bool:
    """Takes a token in; whether the text may go on."""
    if not self._matcher.consume_token(token):
      return False
    return not self._matcher.is_stopped()


def _grammar(matcher: Any, guide: Mapping[str, Any]) -> str:
  kinds = [kind for kind in KINDS if kind in guide]
  if len(kinds) != 1 or len(guide) != 1:
    raise ValueError(
      f"guide={dict(guide)!r} must have one key, out of {list(KINDS)}"
    )
  kind = kinds[0]
  value = guide[kind]
  if kind == "json_object":
    value = {"type": "object"}
  if kind in ("json", "json_object"):
    schema = value if isinstance(value, str) else json.dumps(value)
    # Or a text may go on for ever between two brackets.
    compact = {"whitespace_flexible": False}
    grammar: str = matcher.grammar_from_json_schema(schema, defaults=compact)
  elif kind == "regex":
    grammar = matcher.grammar_from_regex(value)
  else:
    if not isinstance(value, Sequence) or isinstance(value, str) or not value:
      raise ValueError(f"guide: choice={value!r} must be a list of texts")
    quoted = " | ".join(json.dumps(str(text)) for text in value)
    grammar = matcher.grammar_from_lark(f"start: {quoted}")
  return grammar


def _wrapped(library: Any, tokenizer: Tokenizer, vocab_size: int) -> Any:
  """A tokenizer as llguidance has it."""
  if isinstance(tokenizer, JsonTokenizer):
    return library.LLTokenizer(
      tokenizer.definition,
      n_vocab=vocab_size,
      eos_token=tokenizer.eos_id,
    )
  if not isinstance(tokenizer, ByteTokenizer):
    raise ValueError(
      "texts of a form need a tokenizer.json or the byte tokenizer, not "
      f"{type(tokenizer).__name__}"
    )
  wrapper = library.TokenizerWrapper(_Bytes(tokenizer, vocab_size))
  return library.LLTokenizer(wrapper, n_vocab=vocab_size)


class _Bytes:
  """What llguidance asks of a tokenizer in Python."""

  def __init__(self, tokenizer: ByteTokenizer, vocab_size: int):
    self.eos_token_id, self.bos_token_id = tokenizer.eos_id, tokenizer.bos_id
    self.tokens = [bytes([n]) for n in range(256)]
    self.tokens += [f"<{n}>".encode() for n in range(256, vocab_size)]
    self.special_token_ids = list(range(256, vocab_size))

  def __call__(self, text: str | bytes) -> list[int]:
    return list(text.encode() if isinstance(text, str) else text)
