"""Conversations to text, and which part of the text is trained on.

A chat template is the program that a tokenizer brings along to lay out a
conversation. It is run in jinja2's sandbox: it comes from elsewhere.

Where the template marks what the assistant says (`{% generation %}`), that is
taken. Elsewhere a turn is what it adds to the text of the turns before it and
of the prompt that asks for it, which is checked to be there.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

from jaxchunk.data.cache import atomic_write, read_json, write_json
from jaxchunk.data.files import hash_parts

Format = Literal["text", "messages", "sharegpt", "prompt_completion"]
TrainOn = Literal["all", "assistant", "last"]
Problem = Literal[
  "bad_record", "no_assistant_turn", "template_error", "special_tokens"
]
Message = Mapping[str, Any]
Span = tuple[int, int]

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Who may speak."""

_SHAREGPT = {
  "system": "system",
  "human": "user",
  "user": "user",
  "gpt": "assistant",
  "chatgpt": "assistant",
  "model": "assistant",
  "assistant": "assistant",
  "tool": "tool",
  "function": "tool",
  "observation": "tool",
}
# No characters of Unicode; a text that has them all the same is refused.
TEMPLATE = "chat_template.jinja"
"""Of a template beside a tokenizer."""

_BEGIN, _END = _MARKS = ("\U0010fffe", "\U0010ffff")
CHATML = (
  "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
  "{% if message['role'] == 'assistant' %}"
  "{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
  "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}"
  "{% endfor %}"
  "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A common layout, for tokenizers without one: `chat_template="chatml"`."""


class RecordError(ValueError):
  """A record cannot be trained on.

  Attributes:
    problem: Why, in a word.
  """

  def __init__(self, problem: Problem, message: str):
    super().__init__(message)
    self.problem: Problem = problem


@dataclasses.dataclass(frozen=True)
class Document:
  """A text, and which of its characters are trained on.

  Attributes:
    text: The text.
    trained: Stretches `[start, stop)` of characters; `None` is all of it.
    enclosed: Whether BOS and EOS may be put around it; a chat template has
      its own.
  """

  text: str
  trained: tuple[Span, ...] | None = None
  enclosed: bool = False


# What jinja2 asks for is a set.
_TAGS = {"generation"}


class _Generation(jinja2.ext.Extension):
  """`{% generation %}...{% endgeneration %}`: what the assistant says."""

  tags = _TAGS

  def parse(self, parser: Any) -> jinja2.nodes.Node:
    line = next(parser.stream).lineno
    body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
    call = self.call_method("_marked")
    return jinja2.nodes.CallBlock(call, [], [], body).set_lineno(line)

  def _marked(self, caller: Any) -> str:
    return f"{_BEGIN}{caller()}{_END}"


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
  """How a conversation becomes text.

  Attributes:
    source: The template, in jinja2.
    tokens: Names of special tokens that it may use, `{"bos_token": "<s>"}`.
    name: What to call it in a message.
  """

  source: str
  tokens: Mapping[str, str] = dataclasses.field(default_factory=dict)
  name: str = "the chat template"

  def __post_init__(self) -> None:
    _compiled(self.source, self.name)

  @property
  def fingerprint(self) -> str:
    """Hash of all that decides the text."""
    return hash_parts("chat", self.source, json.dumps(dict(self.tokens)))

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Writes it beside a tokenizer, where `load_template` finds it."""
    with atomic_write(Path(folder) / TEMPLATE) as file:
      file.write(self.source.encode())
    path = Path(folder) / "tokenizer_config.json"
    config = read_json(path) if path.is_file() else {}
    write_json(path, {**self.tokens, **config})

  def render(
    self,
    messages: Sequence[Message],
    *,
    tools: Any = None,
    add_generation_prompt: bool = False,
  ) -> str:
    """The text of a conversation.

    The date is not told to the template, so that a text is always the same.

    Args:
      messages: Each with `role` and `content`.
      tools: Descriptions of tools, as the template wants them.
      add_generation_prompt: End with what asks the assistant to speak.

    Raises:
      RecordError: The template fails on them, or refuses them.
    """
    marked = self._marked(messages, tools, add_generation_prompt)
    return marked.replace(_BEGIN, "").replace(_END, "")

  def document(
    self,
    messages: Sequence[Message],
    *,
    tools: Any = None,
    train_on: TrainOn = "assistant",
    first: int = 0,
  ) -> Document:
    """The text of a conversation and what is trained on.

    Args:
      messages: Each with `role` and `content`.
      tools: As in `render`.
      train_on: "assistant": what it says; "last": only its last turn; "all".
      first: Turns before this one are not trained on.

    Raises:
      RecordError: There is no such turn, or the template fails, or its text
        of a turn changes with the turns behind it.
    """
    check_messages(messages)
    turns = [n for n, m in enumerate(messages) if m["role"] == "assistant"]
    turns = [n for n in turns if n >= first]
    if not turns:
      raise RecordError("no_assistant_turn", "has no turn of the assistant")
    turns = turns[-1:] if train_on == "last" else turns
    marked = self._marked(messages, tools, False)
    text = marked.replace(_BEGIN, "").replace(_END, "")
    if train_on == "all":
      return Document(text)
    spans = _marked_spans(marked)
    if spans:
      number = sum(m["role"] == "assistant" for m in messages)
      if len(spans) != number:
        raise RecordError(
          "template_error",
          f"{self.name} marks {len(spans)} generations for {number} turns of "
          "the assistant",
        )
      spans = spans[-len(turns) :]
    else:
      spans = [self._added(messages, turn, tools, text) for turn in turns]
    return Document(text, tuple(spans))

  def _marked(self, messages: Any, tools: Any, prompt: bool) -> str:
    template = _compiled(self.source, self.name)
    if any(mark in t for t in _texts([messages, tools]) for mark in _MARKS):
      raise RecordError("bad_record", "contains U+10FFFE or U+10FFFF")
    try:
      return template.render(
        messages=list(messages),
        tools=tools,
        documents=None,
        add_generation_prompt=prompt,
        **self.tokens,
      )
    except RecordError:
      raise
    except Exception as error:  # A template may do anything.
      raise RecordError(
        "template_error", f"{self.name} fails on it: {error}"
      ) from error

  def _added(
    self, messages: Sequence[Message], turn: int, tools: Any, text: str
  ) -> Span:
    """What a turn adds to the text that comes before it."""
    before = self.render(
      messages[:turn], tools=tools, add_generation_prompt=True
    )
    after = self.render(messages[: turn + 1], tools=tools)
    if not (text.startswith(before) and text.startswith(after)):
      raise RecordError(
        "template_error",
        f"{self.name} lays out turn {turn + 1} in another way when more turns "
        "follow; mark what is trained on by {% generation %} in the template, "
        "or train on the last turn alone, data.train_on='last'",
      )
    # Line ends behind the token that ends the turn are the next turn's.
    return len(before), max(len(before), len(after.rstrip("\n")))


@functools.lru_cache(maxsize=32)
def _compiled(source: str, name: str) -> jinja2.Template:
  environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, jinja2.ext.loopcontrols],
  )
  environment.filters["tojson"] = _to_json
  environment.globals["raise_exception"] = _raise
  try:
    return environment.from_string(source)
  except jinja2.TemplateSyntaxError as error:
    raise ValueError(
      f"{name} is not a jinja2 template: line {error.lineno}: {error}"
    ) from None


def _to_json(value: Any, **options: Any) -> str:
  # Not for HTML, as jinja2's own is.
  return json.dumps(value, **{"ensure_ascii": False, **options})


def _raise(message: str) -> None:
  raise RecordError(
    "template_error", f"the chat template refuses it: {message}"
  )


def _marked_spans(marked: str) -> list[Span]:
  spans, position, rest = [], 0, marked
  while _BEGIN in rest:
    plain, _, rest = rest.partition(_BEGIN)
    inside, _, rest = rest.partition(_END)
    start = position + len(plain)
    position = start + len(inside)
    spans.append((start, position))
  return spans


def check_messages(messages: Any) -> None:
  """Checks that a conversation is a list of messages by known roles.

  Raises:
    RecordError: It is not; says which message and what it may be.
  """
  if not isinstance(messages, Sequence) or isinstance(messages, str):
    raise RecordError(
      "bad_record", f"has {type(messages).__name__}, not a list of messages"
    )
  for number, message in enumerate(messages, 1):
    if not isinstance(message, Mapping) or "role" not in message:
      raise RecordError(
        "bad_record", f"message {number} is no object with a role"
      )
    if str(message["role"]) not in ROLES:
      raise RecordError(
        "bad_record",
        f"message {number} has the role {message['role']!r}; it may be one of "
        f"{list(ROLES)}",
      )
    content = message.get("content")
    if not isinstance(content, str | list | None):
      raise RecordError(
        "bad_record",
        f"the content of message {number} is {type(content).__name__}, not a "
        "string",
      )


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a record becomes a document.

  Attributes:
    format: What the record has: `messages` (and perhaps `tools`),
      `conversations` as ShareGPT has them, or `prompt` and `completion`,
      strings or lists of messages.
    template: Of conversations.
    train_on: Which turns are trained on.
    forbidden: Texts of special tokens that a record must not contain.
  """

  format: Format
  template: ChatTemplate | None
  train_on: TrainOn
  forbidden: tuple[str, ...] = ()

  @property
  def fingerprint(self) -> str:
    """Hash of all that decides the document."""
    template = self.template.fingerprint if self.template else ""
    return hash_parts(self.format, self.train_on, template, *self.forbidden)

  def document(self, record: Mapping[str, Any]) -> Document:
    """The document of a record.

    Raises:
      RecordError: It cannot be made; says why.
    """
    match self.format:
      case "messages":
        messages, first = _field(record, "messages"), 0
      case "sharegpt":
        turns = _field(record, "conversations")
        if not isinstance(turns, list):
          raise RecordError("bad_record", "has no list of conversations")
        messages, first = [_of_sharegpt(turn) for turn in turns], 0
      case _:
        prompt = _field(record, "prompt")
        completion = _field(record, "completion")
        if isinstance(prompt, str) and isinstance(completion, str):
          return self._plain(prompt, completion)
        check_messages(prompt)
        check_messages(completion)
        messages, first = [*prompt, *completion], len(prompt)
    check_messages(messages)
    for text in _texts([messages, record.get("tools")]):
      self._check_text(text)
    if self.template is None:
      raise RecordError("template_error", "is a conversation without template")
    return self.template.document(
      [_plain_message(m) for m in messages],
      tools=record.get("tools"),
      train_on=self.train_on,
      first=first,
    )

  def _plain(self, prompt: str, completion: str) -> Document:
    if not completion:
      raise RecordError("no_assistant_turn", "has an empty completion")
    text = prompt + completion
    self._check_text(text)
    if self.train_on == "all":
      return Document(text, enclosed=True)
    return Document(text, ((len(prompt), len(text)),), enclosed=True)

  def _check_text(self, text: str) -> None:
    found = next((token for token in self.forbidden if token in text), None)
    if found is not None:
      raise RecordError(
        "special_tokens",
        f"contains {found!r}, a special token of the tokenizer; set "
        "data.parse_special to allow it",
      )


def _texts(value: Any) -> Iterator[str]:
  """Every string in a nested value, keys too."""
  if isinstance(value, str):
    yield value
  elif isinstance(value, Mapping):
    for key, inner in value.items():
      yield from _texts([key, inner])
  elif isinstance(value, list | tuple):
    for inner in value:
      yield from _texts(inner)


def _field(record: Mapping[str, Any], name: str) -> Any:
  if record.get(name) is None:
    raise RecordError(
      "bad_record",
      f"has no field {name!r}, only {sorted(record)}; set data.format",
    )
  return record[name]


def _of_sharegpt(turn: Any) -> Message:
  if not isinstance(turn, Mapping) or not {"from", "value"} <= set(turn):
    raise RecordError("bad_record", "has a turn without 'from' and 'value'")
  if str(turn["from"]) not in _SHAREGPT:
    raise RecordError(
      "bad_record",
      f"has a turn from {turn['from']!r}; it may be one of {list(_SHAREGPT)}",
    )
  return {"role": _SHAREGPT[str(turn["from"])], "content": turn["value"]}


def _plain_message(message: Any) -> Any:
  """Without fields that are null: parquet gives every message every field."""
  if not isinstance(message, Mapping):
    return message
  return {k: v for k, v in message.items() if v is not None or k == "content"}


def load_template(spec: str | None, tokenizer: str) -> ChatTemplate:
  """The chat template by name, from a file, or from a tokenizer's folder.

  Args:
    spec: "chatml", the path of a file, or `None` for the tokenizer's own.
    tokenizer: As `data.tokenizer`.

  Raises:
    ValueError: There is none, or it is not a template.
  """
  folder = Path(tokenizer).expanduser()
  folder = folder if folder.is_dir() else folder.parent
  path = folder / "tokenizer_config.json"
  config = read_json(path) if path.is_file() else {}
  tokens = {
    name: value["content"] if isinstance(value, dict) else value
    for name, value in config.items()
    if name.endswith("_token") and isinstance(value, str | dict)
  }
  if spec == "chatml":
    return ChatTemplate(CHATML, tokens, "'chatml'")
  if spec is not None:
    path = Path(spec).expanduser()
    if not path.is_file():
      raise ValueError(
        f"data.chat_template {spec!r} is not a file; it is 'chatml', the path "
        "of a jinja2 template, or None for the tokenizer's own"
      )
    return ChatTemplate(path.read_text(encoding="utf-8"), tokens, str(path))
  path = folder / TEMPLATE
  if path.is_file():
    return ChatTemplate(path.read_text(encoding="utf-8"), tokens, str(path))
  source = config.get("chat_template")
  if isinstance(source, list):
    named = {entry["name"]: entry["template"] for entry in source}
    source = named.get("default")
  if not isinstance(source, str):
    raise ValueError(
      f"data.tokenizer {tokenizer!r} has no chat template; set "
      "data.chat_template to 'chatml' or the path of one"
    )
  name = f"chat_template of {folder / 'tokenizer_config.json'}"
  return ChatTemplate(source, tokens, name)
