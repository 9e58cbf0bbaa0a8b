"""Bodies of requests, right and wrong."""

import json

import hypothesis
import pytest
from hypothesis import strategies as st

from jaxchunk.inference.server.errors import ApiError
from jaxchunk.inference.server.fields import read_object
from jaxchunk.inference.server.protocol import read_chat, read_completion
from jaxchunk.inference.server.tool_calls import ToolText, split_calls

from .conftest import fake_served

pytestmark = pytest.mark.fast

SERVED = fake_served()
HELLO = [{"role": "user", "content": "Hi"}]
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {}}}


def completion(**fields):
  return read_completion({"model": "tiny", "prompt": "ab"} | fields, SERVED)


def chat(**fields):
  return read_chat({"model": "tiny", "messages": HELLO} | fields, SERVED)


def refusal(read, message=None, **fields):
  with pytest.raises(ApiError, match=message) as caught:
    read(**fields)
  body = caught.value.body["error"]
  assert set(body) == {"message", "type", "param", "code"}
  return caught.value


def test_a_plain_completion():
  job = completion()
  assert [r.prompt for r in job.requests] == [(257, 97, 98)]
  assert job.params.max_tokens == 16 and job.params.temperature == 1
  assert job.job_id.startswith("cmpl-") and not job.stream


@pytest.mark.parametrize(
  ("prompt", "ids"),
  [
    (["a", "b"], [(257, 97), (257, 98)]),
    ([1, 2, 3], [(1, 2, 3)]),
    ([[1, 2], [3]], [(1, 2), (3,)]),
    (["a", [4]], [(257, 97), (4,)]),
  ],
)
def test_forms_of_prompts(prompt, ids):
  job = completion(prompt=prompt)
  assert [r.prompt for r in job.requests] == ids
  assert len({r.request_id for r in job.requests}) == len(ids)


def test_all_fields_arrive():
  job = completion(
    max_tokens=5,
    temperature=0.5,
    top_p=0.9,
    n=2,
    best_of=2,
    seed=-1,
    stop=["x", "y"],
    presence_penalty=0.1,
    frequency_penalty=-0.2,
    logit_bias={"65": -100, "66": 2.5},
    logprobs=3,
    top_k=7,
    min_p=0.05,
    repetition_penalty=1.1,
    min_tokens=2,
    ignore_eos=True,
    stop_token_ids=[9],
    priority=-3,
    stream=True,
    stream_options={"include_usage": True},
    user="somebody",
    metadata={"a": "b"},
    store=False,
    service_tier="auto",
  )
  params = job.params
  assert (params.max_tokens, params.n, params.seed) == (5, 2, 2**32 - 1)
  assert params.stop == ("x", "y") and params.stop_token_ids == (9,)
  assert params.logit_bias == {65: -100, 66: 2.5} and params.logprobs == 3
  assert (params.top_k, params.min_p, params.top_p) == (7, 0.05, 0.9)
  assert params.repetition_penalty == 1.1 and params.min_tokens == 2
  assert params.ignore_eos and job.requests[0].priority == -3
  assert job.stream and job.include_usage


def test_null_is_as_if_it_were_absent():
  names = "max_tokens temperature top_p n seed stop logit_bias logprobs echo"
  names += " suffix best_of stream stream_options response_format top_k"
  job = completion(**dict.fromkeys(names.split()))
  assert job.params == completion().params


def test_a_model_is_an_adapter_or_the_default():
  assert completion(model="poems").requests[0].adapter == "poems"
  assert completion(model=None).model == "tiny"
  error = refusal(completion, model="gpt-9")
  assert error.status == 404 and error.code == "model_not_found"
  assert "['tiny', 'poems']" in error.message


WRONG = [
  ({"prompt": None}, "prompt", "prompt is null"),
  ({"prompt": ""}, "prompt", "empty"),
  ({"prompt": []}, "prompt", "empty"),
  ({"prompt": [""]}, "prompt", r"prompt\[0\] is empty"),
  ({"prompt": [[]]}, "prompt", r"prompt\[0\] is empty"),
  ({"prompt": 5}, "prompt", "prompt is an integer"),
  ({"prompt": [1, "a"]}, "prompt", r"prompt\[0\] is an integer"),
  ({"prompt": [True, False]}, "prompt", "a boolean"),
  ({"prompt": [-1]}, "prompt", "no token ids"),
  ({"prompt": ["a"] * 2049}, "prompt", "more than 2048"),
  ({"prompt": [2**70]}, "prompt", "no token ids"),
  ({"prompt": "a" * 300}, "prompt", "301 tokens.* at most 256"),
  ({"max_tokens": 300}, "max_tokens", "3 tokens and 300 more"),
  ({"max_tokens": 0}, "max_tokens", "from 1 to"),
  ({"max_tokens": "5"}, "max_tokens", "is a string, not an integer"),
  ({"max_tokens": 5.0}, "max_tokens", "is a number, not an integer"),
  ({"max_tokens": 10**40}, "max_tokens", "many digits"),
  ({"temperature": -0.1}, "temperature", "from 0 to"),
  ({"temperature": 1e9}, "temperature", "from 0 to"),
  ({"temperature": float("inf")}, "temperature", "larger than any"),
  ({"temperature": True}, "temperature", "boolean"),
  ({"temperature": "hot"}, "temperature", "string"),
  ({"top_p": 0}, "top_p", "from 1e-06 to 1"),
  ({"top_p": 1.5}, "top_p", "from 1e-06 to 1"),
  ({"min_p": -1}, "min_p", "from 0 to 1"),
  ({"top_k": -2}, "top_k", "from -1"),
  ({"repetition_penalty": 0}, "repetition_penalty", "from 0.01 to 100"),
  ({"presence_penalty": 1e300}, "presence_penalty", "from -100"),
  ({"n": 0}, "n", "from 1 to 128"),
  ({"n": 1000}, "n", "from 1 to 128"),
  ({"best_of": 3}, "best_of", "must be n=1"),
  ({"logprobs": True}, "logprobs", "boolean"),
  ({"logprobs": 21}, "logprobs", "from 0 to 20"),
  ({"echo": True, "logprobs": 1}, "echo", "not supported"),
  ({"suffix": "x"}, "suffix", "not supported"),
  ({"stop": ["a"] * 17}, "stop", "more than 16"),
  ({"stop": [""]}, "stop", "none of them empty"),
  ({"stop": "a" * 300}, "stop", "256 characters"),
  ({"stop": {"a": 1}}, "stop", "an object, not an array"),
  ({"stop_token_ids": ["a"]}, "stop_token_ids", "array of integers"),
  ({"stop_token_ids": [-5]}, "stop_token_ids", "token ids"),
  ({"logit_bias": {"x": 1}}, "logit_bias", "no token id"),
  ({"logit_bias": {"5": 101}}, "logit_bias", "-100 to 100"),
  ({"logit_bias": {"5": None}}, "logit_bias", "-100 to 100"),
  ({"logit_bias": {str(n): 1 for n in range(301)}}, "logit_bias", "300"),
  ({"min_tokens": 20}, "min_tokens", "more than max_tokens"),
  ({"stream": "yes"}, "stream", "not a boolean"),
  ({"stream_options": {}}, "stream_options", "stream=true"),
  ({"response_format": {"type": "xml"}}, "response_format.type", "xml"),
  ({"response_format": "json"}, "response_format", "a string"),
  (
    {"response_format": {"type": "json_schema"}},
    "response_format",
    "needs a schema",
  ),
  ({"structured_outputs": {}}, "structured_outputs", "one of"),
  ({"temprature": 1}, "temprature", "do you mean 'temperature'"),
  ({"model": 5}, "model", "not a string"),
]


@pytest.mark.parametrize(("fields", "param", "message"), WRONG)
def test_a_wrong_completion_is_named(fields, param, message):
  error = refusal(completion, message, **fields)
  assert error.status == 400 and error.kind == "invalid_request_error"
  assert error.param == param


def test_the_default_length_is_what_fits():
  assert completion(prompt="a" * 250).params.max_tokens == 5


def test_echo_has_the_text_of_the_prompt():
  assert completion(echo=True).echo == ("ab",)
  assert completion(echo=True, prompt=[[72, 105], [72]]).echo == ("Hi", "H")
  assert completion(echo=True, prompt=[72, 105]).echo == ("Hi",)


@pytest.mark.parametrize(
  ("form", "guide"),
  [
    ({"type": "text"}, None),
    ({"type": "json_object"}, {"json_object": True}),
    (
      {"type": "json_schema", "json_schema": {"name": "a", "schema": {"b": 1}}},
      {"json": {"b": 1}},
    ),
  ],
)
def test_a_response_format_is_a_guide(form, guide):
  assert chat(response_format=form).params.guide == guide


def test_structured_outputs_are_guides():
  given = {"structured_outputs": {"regex": "a+"}}
  assert completion(**given).params.guide == {"regex": "a+"}
  given = {"structured_outputs": {"choice": ["a", "b"]}}
  assert completion(**given).params.guide == {"choice": ["a", "b"]}


def test_a_chat_is_laid_out():
  job = chat(
    messages=[
      {"role": "system", "content": "Be brief."},
      {
        "role": "user",
        "content": [
          {"type": "text", "text": "a"},
          {"type": "text", "text": "b"},
        ],
      },
    ],
    max_completion_tokens=7,
    logprobs=True,
    top_logprobs=2,
  )
  text = bytes(job.requests[0].prompt).decode()
  assert text == "system:Be brief.\nuser:a\nb\nassistant:"
  assert job.params.max_tokens == 7 and job.params.logprobs == 2
  assert chat().params.max_tokens is None
  assert chat(logprobs=True).params.logprobs == 0


def test_tools_reach_the_template():
  job = chat(tools=[TOOL])
  assert job.tools
  assert bytes(job.requests[0].prompt).startswith(b'[{"type": "function"')
  job = chat(tools=[TOOL], tool_choice="none")
  assert not job.tools and b"weather" not in bytes(job.requests[0].prompt)


def test_an_earlier_answer_may_come_back():
  call = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Bern"}'},
  }
  answer = {"role": "assistant", "content": None, "tool_calls": [call]}
  answer |= {"refusal": None, "annotations": [], "audio": None}
  told = {"role": "tool", "tool_call_id": "call_1", "content": "rain"}
  job = chat(messages=[*HELLO, answer, told])
  assert b"tool:rain" in bytes(job.requests[0].prompt)


WRONG_CHATS = [
  ({"messages": []}, "messages", "one message at least"),
  ({"messages": None}, "messages", "one message at least"),
  ({"messages": "Hi"}, "messages", "a string, not an array"),
  ({"messages": ["Hi"]}, "messages[0]", "not an object"),
  ({"messages": [{"content": "a"}]}, "messages[0].role", "must be one of"),
  (
    {"messages": [{"role": "user"}]},
    "messages[0].content",
    "null, not a string",
  ),
  (
    {"messages": [{"role": "user", "content": 5}]},
    "messages[0].content",
    "an integer",
  ),
  (
    {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
    "messages[0].content[0]",
    "image_url",
  ),
  (
    {"messages": [{"role": "user", "content": "a", "contents": "b"}]},
    "messages[0].contents",
    "do you mean 'content'",
  ),
  (
    {"messages": [{"role": "user", "content": "\U0010fffe"}]},
    "messages",
    "contains U",
  ),
  (
    {"messages": [{"role": "user", "content": "a" * 300}]},
    "messages",
    "at most",
  ),
  ({"top_logprobs": 2}, "top_logprobs", "logprobs=true"),
  ({"logprobs": 2}, "logprobs", "not a boolean"),
  ({"tool_choice": "required", "tools": [TOOL]}, "tool_choice", "'auto' or"),
  ({"tool_choice": "auto"}, "tool_choice", "needs tools"),
  ({"tools": [{"type": "x"}]}, "tools[0].type", "function"),
  ({"tools": "all"}, "tools", "not an array"),
  ({"functions": []}, "functions", "use tools"),
  ({"modalities": ["audio"]}, "modalities", "not supported"),
  ({"prompt": "a"}, "prompt", "no field 'prompt'"),
]


@pytest.mark.parametrize(("fields", "param", "message"), WRONG_CHATS)
def test_a_wrong_chat_is_named(fields, param, message):
  error = refusal(chat, message, **fields)
  assert (error.status, error.param) == (400, param)


@pytest.mark.parametrize(
  ("body", "message"),
  [
    (b"", "not JSON"),
    (b"{", "not JSON"),
    (b"[]", "an array, not an object"),
    (b'{"a": NaN}', "it has NaN"),
    (b'{"a": -Infinity}', "it has -Infinity"),
    (b'{"a": "\xff"}', "not UTF-8: byte 7 is 0xff"),
    (b'{"a": "\\ud800"}', "surrogate"),
    (b'{"\\uDFFF": 1}', "surrogate"),
    (b'{"a": ' + b"9" * 5000 + b"}", "not JSON"),
    (b'{"a": ' + b"[" * 70 + b"]" * 70 + b"}", "nested"),
    (b"[" * 100_000, "nested"),
    (b'{"a":' * 100_000, "nested"),
  ],
)
def test_what_is_no_json_is_refused(body, message):
  with pytest.raises(ApiError, match=message) as caught:
    read_object(body)
  assert caught.value.status == 400


def test_a_pair_of_surrogates_is_a_character():
  body = json.dumps({"a": "😀"}).encode()
  assert b"\\ud83d" in body and read_object(body) == {"a": "😀"}


NAMES = """
prompt messages model n stream stream_options stop max_tokens temperature top_p
seed presence_penalty frequency_penalty logit_bias logprobs response_format
top_k min_p repetition_penalty min_tokens ignore_eos stop_token_ids priority
best_of structured_outputs echo suffix tools tool_choice max_completion_tokens
user top_logprobs functions nonsense
"""
INNER = "role content type text name function arguments schema json 65"
NUMBERS = st.one_of(
  st.integers(-3, 300), st.integers(), st.floats(allow_nan=False)
)
VALUES = st.recursive(
  st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=5)),
  lambda inner: st.one_of(
    st.lists(inner, max_size=4),
    st.dictionaries(
      st.sampled_from(INNER.split()),
      inner,
      max_size=4,
    ),
  ),
  max_leaves=8,
)


@pytest.mark.parametrize("read", [completion, chat])
@hypothesis.settings(deadline=None, max_examples=300)
@hypothesis.given(
  fields=st.dictionaries(st.sampled_from(NAMES.split()), VALUES)
)
def test_whatever_comes_is_a_job_or_an_error(read, fields):
  try:
    job = read(**fields)
  except ApiError as error:
    assert 400 <= error.status < 500 and error.message
    json.dumps(error.body)
  else:
    assert all(len(request.prompt) < 256 for request in job.requests)


CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def test_calls_are_taken_out_of_texts():
  text, calls = split_calls(f"I look.\n{CALL}\n{CALL}")
  assert text == "I look."
  assert [c["function"] for c in calls] == [
    {"name": "f", "arguments": '{"a": 1}'}
  ] * 2
  assert calls[0]["id"] != calls[1]["id"]
  for other in ("no call", "<tool_call>{]</tool_call>", CALL[:-3]):
    assert split_calls(other) == (other, [])


@pytest.mark.parametrize("size", [1, 3, 100])
def test_calls_are_held_back_from_pieces(size):
  text, tool_text, shown = f"a < b <tool{CALL}", ToolText(), ""
  for start in range(0, len(text), size):
    shown += tool_text.push(text[start : start + size])
  rest, calls = tool_text.finish()
  assert shown + rest == "a < b <tool" and len(calls) == 1
