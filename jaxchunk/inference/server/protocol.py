"""Bodies of OpenAI's completions and chat completions, to requests.

What a body may have is OpenAI's, with the names of vLLM for what goes beyond:
`top_k`, `min_p`, `repetition_penalty`, `min_tokens`, `ignore_eos`,
`stop_token_ids`, `priority`, `structured_outputs`.
"""

import dataclasses
import re
import uuid
from collections.abc import Mapping
from typing import Any

from jaxchunk.data.chat import ChatTemplate, RecordError
from jaxchunk.inference.core import Request, RequestError
from jaxchunk.inference.params import MAX_LOGPROBS, SamplingParams
from jaxchunk.inference.prompt import encode_prompt
from jaxchunk.inference.server.errors import ApiError, invalid
from jaxchunk.inference.server.fields import Fields, is_integer, kind_of
from jaxchunk.inference.server.messages import read_messages, read_tools
from jaxchunk.inference.server.served import Served

MAX_STOPS = 16
"""Stop texts of a request."""

MAX_STOP_LENGTH = 256
"""Characters of a stop text."""

MAX_PROMPTS = 2048
"""Prompts of a request; OpenAI's."""

DEFAULT_TOKENS = 16
"""Of a completion that does not say how many; OpenAI's."""

_COMMON = """
model n stream stream_options stop max_tokens temperature top_p seed
presence_penalty frequency_penalty logit_bias logprobs response_format
top_k min_p repetition_penalty min_tokens ignore_eos stop_token_ids priority
structured_outputs
"""
# They change nothing about the text.
_HARMLESS = """
user metadata store service_tier safety_identifier prompt_cache_key
prompt_cache_retention parallel_tool_calls
"""
_BOTH = (_COMMON + _HARMLESS).split()
_COMPLETION = (*_BOTH, "prompt", "best_of", "echo")
_CHAT = (
  *_BOTH,
  "messages",
  "tools",
  "tool_choice",
  "max_completion_tokens",
  "top_logprobs",
)
_NO_COMPLETION = {
  "suffix": "suffix is not supported: the models here only go on behind a text"
}
_NO_CHAT = {
  "audio": "audio is not supported; this server writes text",
  "functions": "functions is not supported; use tools",
  "function_call": "function_call is not supported; use tool_choice",
  "modalities": "modalities is not supported; this server writes text",
  "prediction": "prediction is not supported",
  "reasoning_effort": "reasoning_effort is not supported",
  "verbosity": "verbosity is not supported",
  "web_search_options": "web_search_options is not supported",
}
# Fields of SamplingParams that clients know by another name.
_RENAMED = {"guide": "response_format"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """What a body asks for.

  Attributes:
    job_id: Of the answer.
    model: As the client named it.
    requests: One for each prompt.
    stream: Whether the answer comes by pieces.
    include_usage: Whether the last piece tells how many tokens there were.
    echo: Texts to put before the continuations, one for each prompt.
    tools: Whether the text may call some.
  """

  job_id: str
  model: str
  requests: tuple[Request, ...]
  stream: bool = False
  include_usage: bool = False
  echo: tuple[str, ...] | None = None
  tools: bool = False

  @property
  def params(self) -> SamplingParams:
    """Of all its requests."""
    return self.requests[0].params

  @property
  def prompt_tokens(self) -> int:
    """Of all prompts together."""
    return sum(len(request.prompt) for request in self.requests)


def read_completion(body: Mapping[str, Any], served: Served) -> Job:
  """The body of /v1/completions.

  Raises:
    ApiError: It is wrong; says what and the remedy.
  """
  fields = Fields(body)
  fields.check_names(_COMPLETION, _NO_COMPLETION)
  model, adapter = _model(fields, served)
  prompts = _prompts(fields, served)
  echo = fields.boolean("echo")
  logprobs = fields.integer("logprobs", 0, MAX_LOGPROBS)
  if echo and logprobs is not None:
    raise invalid(
      "echo with logprobs is not supported: a prompt's own are not computed",
      "echo",
    )
  params = _sampling(fields, logprobs)
  best_of = fields.integer("best_of")
  if best_of not in (None, params.n):
    raise invalid(
      f"best_of={best_of} must be n={params.n}, or left out", "best_of"
    )
  longest = max(map(len, prompts))
  if params.max_tokens is None:
    room = max(served.engine.max_length - longest, 1)
    params = _replaced(params, max_tokens=min(DEFAULT_TOKENS, room))
  job = _job("cmpl", fields, model, adapter, prompts, params, served)
  if not echo:
    return job
  return dataclasses.replace(job, echo=_texts_of(fields, prompts, served))


def read_chat(body: Mapping[str, Any], served: Served) -> Job:
  """The body of /v1/chat/completions.

  Raises:
    ApiError: It is wrong; says what and the remedy.
  """
  fields = Fields(body)
  fields.check_names(_CHAT, _NO_CHAT)
  model, adapter = _model(fields, served)
  messages, tools = read_messages(fields), read_tools(fields)
  wanted = fields.boolean("logprobs")
  top = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
  if top is not None and not wanted:
    raise invalid("top_logprobs needs logprobs=true", "top_logprobs")
  params = _sampling(fields, (top or 0) if wanted else None)
  more = fields.integer("max_completion_tokens", 1, 2**31 - 1)
  if more is not None:
    params = _replaced(params, max_tokens=more)
  if served.template is None:
    raise invalid(
      "the model has no chat template; use /v1/completions, or start the "
      "server with --chat_template"
    )
  prompt = _render(served.template, messages, tools, served)
  job = _job("chatcmpl", fields, model, adapter, [prompt], params, served)
  return dataclasses.replace(job, tools=tools is not None)


def of_value_error(error: ValueError) -> ApiError:
  """What a client is told of a request that the engine refuses."""
  param = error.param if isinstance(error, RequestError) else None
  return invalid(str(error), _RENAMED.get(param or "", param))


def _model(fields: Fields, served: Served) -> tuple[str, str | None]:
  model = fields.text("model") or served.name
  return model, served.adapter(model)


def _job(
  prefix: str,
  fields: Fields,
  model: str,
  adapter: str | None,
  prompts: list[tuple[int, ...]],
  params: SamplingParams,
  served: Served,
) -> Job:
  job_id = f"{prefix}-{uuid.uuid4().hex}"
  priority = fields.integer("priority", -(2**31), 2**31 - 1) or 0
  stream = fields.boolean("stream")
  options = fields.object("stream_options")
  if options is not None:
    options.check_names(("include_usage", "include_obfuscation"))
    if not stream:
      raise invalid("stream_options needs stream=true", "stream_options")
  field = "messages" if prefix == "chatcmpl" else "prompt"
  for prompt in prompts:
    _check_length(prompt, params, served.engine.max_length, field)
  return Job(
    job_id=job_id,
    model=model,
    requests=tuple(
      Request(
        request_id=f"{job_id}-{number}",
        prompt=prompt,
        params=params,
        priority=priority,
        adapter=adapter,
      )
      for number, prompt in enumerate(prompts)
    ),
    stream=stream,
    include_usage=options is not None and options.boolean("include_usage"),
  )


def _check_length(
  prompt: tuple[int, ...], params: SamplingParams, most: int, field: str
) -> None:
  more = params.max_tokens
  if len(prompt) >= most:
    raise invalid(
      f"the prompt has {len(prompt)} tokens; with one to follow at most "
      f"{most} fit",
      field,
      "context_length_exceeded",
    )
  if more is not None and len(prompt) + more > most:
    raise invalid(
      f"the prompt has {len(prompt)} tokens and {more} more are asked for; "
      f"together at most {most} fit",
      "max_tokens",
      "context_length_exceeded",
    )


def _prompts(fields: Fields, served: Served) -> list[tuple[int, ...]]:
  value = fields.get("prompt")
  if isinstance(value, str) or (
    isinstance(value, list) and value and all(map(is_integer, value))
  ):
    return [_encode(value, "prompt", served)]
  if not isinstance(value, list) or not value:
    what = "empty" if value == [] else kind_of(value)
    raise invalid(
      f"prompt is {what}; it must be a text, texts, token ids, or lists of "
      "these",
      "prompt",
    )
  if len(value) > MAX_PROMPTS:
    raise invalid(
      f"prompt has {len(value)} prompts, more than {MAX_PROMPTS}", "prompt"
    )
  return [
    _encode(one, f"prompt[{number}]", served)
    for number, one in enumerate(value)
  ]


def _encode(prompt: Any, where: str, served: Served) -> tuple[int, ...]:
  if isinstance(prompt, list) and prompt and all(map(is_integer, prompt)):
    wrong = [n for n in prompt if not 0 <= n < 2**31]
    if wrong:
      raise invalid(f"{where} has numbers that are no token ids", "prompt")
    return tuple(prompt)
  if prompt in ("", []):
    raise invalid(
      f"{where} is empty; write some text, or the id of a token to begin with",
      "prompt",
    )
  if not isinstance(prompt, str):
    raise invalid(
      f"{where} is {kind_of(prompt)}; it must be a text or token ids", "prompt"
    )
  tokenizer = served.tokenizer
  if tokenizer is None:
    raise invalid("this server has no tokenizer; send token ids", "prompt")
  ids = tuple(encode_prompt(tokenizer, prompt).tolist())
  # The text may begin with BOS itself.
  twice = tokenizer.bos_id is not None and ids[:2] == (tokenizer.bos_id,) * 2
  return ids[1:] if twice else ids


def _texts_of(
  fields: Fields, prompts: list[tuple[int, ...]], served: Served
) -> tuple[str, ...]:
  """Texts of prompts, as they were sent where they were text."""
  value = fields.get("prompt")
  sent = value if isinstance(value, list) else [value]
  if served.tokenizer is None:
    raise invalid("echo needs a server with a tokenizer", "echo")
  if is_integer(sent[0]):
    sent = [sent]
  return tuple(
    one if isinstance(one, str) else served.tokenizer.decode(ids)
    for one, ids in zip(sent, prompts, strict=True)
  )


def _render(
  template: ChatTemplate,
  messages: list[dict[str, Any]],
  tools: list[Any] | None,
  served: Served,
) -> tuple[int, ...]:
  tokenizer = served.tokenizer
  if tokenizer is None:
    raise invalid("this server has no tokenizer; use /v1/completions")
  try:
    text = template.render(messages, tools=tools, add_generation_prompt=True)
  except RecordError as error:
    raise invalid(f"messages: {error}", "messages") from None
  ids = tuple(tokenizer.encode(text).tolist())
  if not ids:
    raise invalid("the chat template makes an empty text of it", "messages")
  return ids


def _sampling(fields: Fields, logprobs: int | None) -> SamplingParams:
  n = fields.integer("n", 1, 128)
  given = {
    "max_tokens": fields.integer("max_tokens", 1, 2**31 - 1),
    "min_tokens": fields.integer("min_tokens", 0, 2**31 - 1),
    "n": n,
    "temperature": fields.number("temperature"),
    "top_p": fields.number("top_p"),
    "min_p": fields.number("min_p"),
    "presence_penalty": fields.number("presence_penalty"),
    "frequency_penalty": fields.number("frequency_penalty"),
    "repetition_penalty": fields.number("repetition_penalty"),
  }
  top_k, seed = fields.integer("top_k", -1, 2**31 - 1), fields.integer("seed")
  given = {name: value for name, value in given.items() if value is not None}
  return _replaced(
    SamplingParams(),
    **given,
    # Both 0 and -1 mean all.
    top_k=top_k if top_k is not None and top_k > 0 else None,
    seed=None if seed is None else seed % 2**32,
    stop=_stops(fields),
    stop_token_ids=fields.integers("stop_token_ids"),
    ignore_eos=fields.boolean("ignore_eos"),
    logprobs=logprobs,
    logit_bias=_biases(fields),
    guide=_guide(fields),
  )


def _replaced(params: SamplingParams, **changes: Any) -> SamplingParams:
  try:
    params = dataclasses.replace(params, **changes)
  except ValueError as error:
    # Messages begin with the field.
    match = re.match(r"[a-z_]+", str(error))
    raise invalid(str(error), match and match[0]) from None
  if params.max_tokens is not None and params.min_tokens > params.max_tokens:
    raise invalid(
      f"min_tokens={params.min_tokens} is more than max_tokens="
      f"{params.max_tokens}",
      "min_tokens",
    )
  return params


def _stops(fields: Fields) -> tuple[str, ...]:
  value = fields.get("stop")
  stops = [value] if isinstance(value, str) else fields.array("stop") or []
  if not all(isinstance(stop, str) and stop for stop in stops):
    raise invalid("stop must be texts, none of them empty", "stop")
  if len(stops) > MAX_STOPS:
    raise invalid(f"stop has {len(stops)} texts, more than {MAX_STOPS}", "stop")
  if any(len(stop) > MAX_STOP_LENGTH for stop in stops):
    raise invalid(
      f"stop has a text of more than {MAX_STOP_LENGTH} characters", "stop"
    )
  return tuple(stops)


def _biases(fields: Fields) -> dict[int, float]:
  biases = fields.object("logit_bias")
  if biases is None:
    return {}
  found = {}
  for name in biases.values:
    if not re.fullmatch(r"[0-9]{1,10}", name):
      raise invalid(
        f"logit_bias has {name[:40]!r}, which is no token id", "logit_bias"
      )
    value = biases.number(name)
    if value is None or not -100 <= value <= 100:
      raise invalid(
        f"logit_bias of token {name} must be from -100 to 100", "logit_bias"
      )
    found[int(name)] = value
  return found


def _guide(fields: Fields) -> dict[str, Any] | None:
  form, outputs = fields.object("response_format"), None
  outputs = fields.object("structured_outputs")
  if form is not None and outputs is not None:
    raise invalid(
      "response_format and structured_outputs exclude each other",
      "structured_outputs",
    )
  if outputs is not None:
    return _of_outputs(outputs)
  if form is None:
    return None
  kind = form.text("type")
  if kind == "text":
    return None
  if kind == "json_object":
    return {"json_object": True}
  if kind != "json_schema":
    raise invalid(
      f"response_format.type is {str(kind)[:80]!r}; it must be 'text', "
      "'json_object' or 'json_schema'",
      "response_format.type",
    )
  inner = form.object("json_schema")
  schema = None if inner is None else inner.object("schema")
  if schema is None:
    raise invalid(
      "response_format.json_schema needs a schema", "response_format"
    )
  return {"json": dict(schema.values)}


def _of_outputs(outputs: Fields) -> dict[str, Any] | None:
  outputs.check_names(("json", "regex", "choice", "json_object"))
  given = {name: v for name, v in outputs.values.items() if v is not None}
  if len(given) != 1:
    raise invalid(
      "structured_outputs must have one of 'json', 'regex', 'choice' and "
      "'json_object'",
      "structured_outputs",
    )
  if "choice" in given and not (
    outputs.array("choice")
    and all(isinstance(one, str) for one in given["choice"])
  ):
    raise invalid(
      "structured_outputs.choice must be texts", "structured_outputs.choice"
    )
  outputs.text("regex")
  return given if outputs.boolean("json_object", True) else None
