"""Conversations as OpenAI writes them, to what chat templates take."""

import json
import re
from typing import Any

from jaxchunk.data.chat import ROLES
from jaxchunk.inference.server.errors import ApiError, invalid
from jaxchunk.inference.server.fields import Fields, kind_of

_KEPT = ("role", "content", "name", "tool_call_id", "tool_calls")
# Parts of earlier answers that clients send back as they came.
_IGNORED = (
  "annotations",
  "audio",
  "function_call",
  "reasoning",
  "reasoning_content",
  "refusal",
)
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")


def read_messages(fields: Fields) -> list[dict[str, Any]]:
  """The field `messages`.

  Raises:
    ApiError: It is no conversation; says which message and why.
  """
  messages = fields.array("messages")
  if not messages:
    raise invalid("messages must have one message at least", "messages")
  return [
    _message(message, f"messages[{number}]")
    for number, message in enumerate(messages)
  ]


def _message(message: Any, where: str) -> dict[str, Any]:
  if not isinstance(message, dict):
    raise invalid(f"{where} is {kind_of(message)}, not an object", where)
  fields = Fields(message, f"{where}.")
  fields.check_names((*_KEPT, *_IGNORED))
  role = fields.text("role")
  if role not in ROLES:
    raise invalid(
      f"{where}.role is {str(role)[:80]!r}; it must be one of {list(ROLES)}",
      f"{where}.role",
    )
  kept: dict[str, Any] = {"role": role}
  for name in ("name", "tool_call_id"):
    if (value := fields.text(name)) is not None:
      kept[name] = value
  calls = fields.array("tool_calls")
  if calls:
    kept["tool_calls"] = [
      _call(call, f"{where}.tool_calls[{n}]") for n, call in enumerate(calls)
    ]
  kept["content"] = _content(fields, empty=role == "assistant")
  return kept


def _content(fields: Fields, *, empty: bool) -> str:
  content, name = fields.get("content"), fields.name("content")
  if content is None and empty:
    return ""
  if isinstance(content, str):
    return content
  if not isinstance(content, list):
    raise invalid(
      f"{name} is {kind_of(content)}, not a string or an array of parts", name
    )
  texts = []
  for number, part in enumerate(content):
    at = f"{name}[{number}]"
    if not isinstance(part, dict):
      raise invalid(f"{at} is {kind_of(part)}, not an object", at)
    own = Fields(part, f"{at}.")
    kind = own.text("type")
    if kind != "text":
      raise invalid(
        f"{at} has the type {str(kind)[:80]!r}; this server reads parts of the "
        "type 'text'",
        at,
      )
    texts.append(own.text("text") or "")
  return "\n".join(texts)


def _call(call: Any, where: str) -> dict[str, Any]:
  """A call of a tool, its arguments as an object, as templates want them."""
  if not isinstance(call, dict):
    raise invalid(f"{where} is {kind_of(call)}, not an object", where)
  fields = Fields(call, f"{where}.")
  function = fields.object("function")
  if function is None:
    raise invalid(f"{where} has no function", where)
  name = _function_name(function)
  arguments = function.get("arguments")
  if isinstance(arguments, str):
    try:
      arguments = json.loads(arguments or "{}")
    except (ValueError, RecursionError):
      raise _no_arguments(function) from None
  if not isinstance(arguments, dict):
    raise _no_arguments(function)
  kept = {"function": {"name": name, "arguments": arguments}}
  return {"id": fields.text("id") or "", "type": "function", **kept}


def _no_arguments(function: Fields) -> ApiError:
  name = function.name("arguments")
  return invalid(f"{name} must be a JSON object as a string", name)


def _function_name(function: Fields) -> str:
  name = function.text("name")
  if name is None or not _NAME.fullmatch(name):
    raise invalid(
      f"{function.name('name')} must be 1 to 64 letters, digits, '_', '.' or "
      "'-'",
      function.name("name"),
    )
  return name


def read_tools(fields: Fields) -> list[Any] | None:
  """The fields `tools` and `tool_choice`: what a template is told.

  Raises:
    ApiError: They are wrong, or a call would have to be forced.
  """
  tools, choice = fields.array("tools"), fields.get("tool_choice")
  for number, tool in enumerate(tools or []):
    where = f"tools[{number}]"
    if not isinstance(tool, dict):
      raise invalid(f"{where} is {kind_of(tool)}, not an object", where)
    own = Fields(tool, f"{where}.")
    if own.text("type") != "function":
      raise invalid(f"{where}.type must be 'function'", f"{where}.type")
    function = own.object("function")
    if function is None:
      raise invalid(f"{where} has no function", where)
    _function_name(function)
    function.object("parameters")
  if choice not in (None, "auto", "none"):
    raise invalid(
      "tool_choice must be 'auto' or 'none': this server leaves it to the "
      "model whether it calls a tool. response_format can force a form",
      "tool_choice",
    )
  if choice == "auto" and not tools:
    raise invalid("tool_choice needs tools", "tool_choice")
  return tools if tools and choice != "none" else None
