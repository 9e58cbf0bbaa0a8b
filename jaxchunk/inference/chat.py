"""A question to a model that was trained on conversations."""

import dataclasses
from pathlib import Path

from jaxchunk.data.chat import ChatTemplate, RecordError, load_template
from jaxchunk.data.tokenizers import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Chat:
  """How a model is spoken to.

  Attributes:
    template: How a conversation becomes text.
    tokenizer: In which the names of special tokens stand for them.
  """

  template: ChatTemplate
  tokenizer: Tokenizer

  @classmethod
  def load(cls, folder: str | Path) -> "Chat":
    """Reads a tokenizer with its chat template.

    Args:
      folder: Of a run's tokenizer, or of a model of Hugging Face.

    Raises:
      ValueError: It has no template.
      FileNotFoundError: It has no tokenizer.
    """
    tokenizer = load_tokenizer(str(folder), parse_special=True)
    return cls(load_template(None, str(folder)), tokenizer)

  def prompt(self, question: str, *, system: str | None = None) -> str:
    """The text up to where the assistant speaks.

    Args:
      question: What the user says.
      system: What is said before.

    Raises:
      ValueError: The template refuses it.
    """
    messages = [{"role": "user", "content": question}]
    if system is not None:
      messages.insert(0, {"role": "system", "content": system})
    return self.template.render(messages, add_generation_prompt=True)

  def end_of_turn(self) -> frozenset[int]:
    """Ids of the special tokens that end what the assistant says."""
    messages = [
      {"role": "user", "content": "a"},
      {"role": "assistant", "content": "b"},
    ]
    try:
      document = self.template.document(messages)
    except RecordError:
      return frozenset()
    ((start, stop),) = document.trained or ((0, 0),)
    said = self.tokenizer.encode(document.text[start:stop])
    # Special tokens decode to nothing.
    ends = [int(n) for n in said if not self.tokenizer.decode([int(n)])]
    return frozenset(ends[:1])
