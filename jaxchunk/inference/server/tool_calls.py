"""Calls of tools in a text, as models in the manner of Hermes write them.

<tool_call>
{"name": "weather", "arguments": {"city": "Bern"}}
</tool_call>
"""

import json
import re
import uuid
from typing import Any

_OPEN = "<tool_call>"
_CALL = re.compile(r"<tool_call>(.*?)</tool_call>", re.DOTALL)


class ToolText:
  """Text as it comes, held back from where a call may begin."""

  def __init__(self) -> None:
    self._held = ""

  def push(self, text: str) -> str:
    """Takes text; returns what is certainly none of a call."""
    self._held += text
    place = self._held.find(_OPEN)
    if place < 0:
      place = len(self._held) - _overlap(self._held)
    text, self._held = self._held[:place], self._held[place:]
    return text

  def finish(self) -> tuple[str, list[dict[str, Any]]]:
    """The rest of the text, without its calls, and these."""
    held, self._held = self._held, ""
    return split_calls(held)


def split_calls(text: str) -> tuple[str, list[dict[str, Any]]]:
  """Takes calls out of a text.

  A text with a call that cannot be read stays as it is.

  Args:
    text: Whole.

  Returns:
    What is left, and the calls as OpenAI writes them.
  """
  calls = []
  for match in _CALL.finditer(text):
    call = _parse(match[1])
    if call is None:
      return text, []
    calls.append(call)
  if not calls:
    return text, []
  return _CALL.sub("", text).strip(), calls


def _parse(text: str) -> dict[str, Any] | None:
  try:
    value = json.loads(text)
  except (ValueError, RecursionError):
    return None
  if not isinstance(value, dict) or not isinstance(value.get("name"), str):
    return None
  arguments = value.get("arguments", {})
  if not isinstance(arguments, str):
    arguments = json.dumps(arguments, ensure_ascii=False)
  return {
    "id": f"call_{uuid.uuid4().hex[:24]}",
    "type": "function",
    "function": {"name": value["name"], "arguments": arguments},
  }


def _overlap(text: str) -> int:
  """How much of the end of a text may begin a call."""
  for size in range(min(len(_OPEN) - 1, len(text)), 0, -1):
    if text.endswith(_OPEN[:size]):
      return size
  return 0
