"""OpenAI's own client, unchanged, and a real engine."""

import openai
import pytest

from jaxchunk.inference.server.served import Served

from .conftest import TEMPLATE, Background

PROMPTS = ["Once upon a time", "import os", "é", "0123456789" * 10]
HELLO = [{"role": "user", "content": "Who are you?"}]


@pytest.fixture(name="expected", scope="module")
def fixture_expected(real_engine):
  """What the engine says without a server."""
  chat = TEMPLATE.render(HELLO, add_generation_prompt=True)
  ids = real_engine.tokenizer.encode(chat)
  answers = real_engine.generate(
    [*PROMPTS, ids.tolist()], temperature=0, max_tokens=20
  )
  return [answer.text for answer in answers]


@pytest.fixture(name="server", scope="module")
def fixture_server(real_engine, expected):
  served = Served(engine=real_engine, name="tiny", template=TEMPLATE)
  with Background(served, api_key="secret") as server:
    yield server


@pytest.fixture(name="client", scope="module")
def fixture_client(server):
  with openai.OpenAI(
    base_url=f"{server.address}/v1",
    api_key="secret",
    max_retries=0,
    timeout=30,
  ) as client:
    yield client


def test_models(client):
  assert [model.id for model in client.models.list()] == ["tiny"]
  assert client.models.retrieve("tiny").owned_by == "jaxchunk"


def test_completions_are_the_engines(client, expected):
  answer = client.completions.create(
    model="tiny", prompt=PROMPTS, temperature=0, max_tokens=20
  )
  assert [choice.text for choice in answer.choices] == expected[:-1]
  assert answer.usage.completion_tokens == 80
  assert answer.usage.prompt_tokens == sum(
    1 + len(prompt.encode()) for prompt in PROMPTS
  )


def test_completions_by_pieces(client, expected):
  texts = [""] * len(PROMPTS)
  for piece in client.completions.create(
    model="tiny", prompt=PROMPTS, temperature=0, max_tokens=20, stream=True
  ):
    for choice in piece.choices:
      texts[choice.index] += choice.text
  assert texts == expected[:-1]


def test_a_chat(client, expected):
  options = {"model": "tiny", "messages": HELLO, "temperature": 0}
  answer = client.chat.completions.create(**options, max_completion_tokens=20)
  (choice,) = answer.choices
  assert choice.message.content == expected[-1]
  assert (choice.message.role, choice.finish_reason) == ("assistant", "length")
  with client.chat.completions.create(
    **options,
    max_tokens=20,
    stream=True,
    stream_options={"include_usage": True},
  ) as stream:
    pieces = list(stream)
  assert pieces[-1].usage == answer.usage
  said = "".join(p.choices[0].delta.content or "" for p in pieces[:-1])
  assert said == expected[-1]
  assert pieces[-2].choices[0].finish_reason == "length"


def test_log_probabilities(client, real_engine):
  answer = client.chat.completions.create(
    model="tiny",
    messages=HELLO,
    temperature=0,
    max_tokens=4,
    logprobs=True,
    top_logprobs=3,
  )
  content = answer.choices[0].logprobs.content
  assert len(content) == 4
  for entry in content:
    assert len(entry.top_logprobs) == 3 and entry.logprob < 0
    # The likeliest was taken.
    assert entry.bytes == entry.top_logprobs[0].bytes
    assert entry.logprob == pytest.approx(entry.top_logprobs[0].logprob)
  answer = client.completions.create(
    model="tiny", prompt="a", max_tokens=4, temperature=0, logprobs=2
  )
  found = answer.choices[0].logprobs
  assert len(found.tokens) == len(found.token_logprobs) == 4
  assert all(len(top) == 2 for top in found.top_logprobs)


def test_several_continuations(client):
  def draw(seed):
    answer = client.completions.create(
      model="tiny", prompt="a", n=3, max_tokens=8, seed=seed, temperature=1.5
    )
    return [choice.text for choice in answer.choices]

  assert draw(1) == draw(1) != draw(2)
  assert len(set(draw(1))) == 3


def test_fields_beyond_openai(client):
  answer = client.completions.create(
    model="tiny",
    prompt="a",
    max_tokens=8,
    extra_body={"top_k": 1, "min_p": 0.1, "ignore_eos": True, "priority": 1},
  )
  again = client.completions.create(
    model="tiny", prompt="a", max_tokens=8, temperature=0
  )
  assert answer.choices[0].text == again.choices[0].text


def test_a_stop_text_is_left_out(client, expected):
  stop = expected[1][3:5]
  answer = client.completions.create(
    model="tiny", prompt=PROMPTS[1], max_tokens=20, temperature=0, stop=stop
  )
  (choice,) = answer.choices
  assert choice.finish_reason == "stop"
  assert choice.text == expected[1].split(stop)[0]


def test_errors_are_those_of_the_client(client, server):
  def create(**fields):
    options = {"model": "tiny", "prompt": "a", "max_tokens": 2} | fields
    return client.completions.create(**options)

  with pytest.raises(openai.NotFoundError, match="there is no model 'gpt-9'"):
    create(model="gpt-9")
  with pytest.raises(openai.BadRequestError, match="temperature") as caught:
    create(temperature=-1)
  assert caught.value.param == "temperature"
  assert caught.value.type == "invalid_request_error"
  with pytest.raises(openai.BadRequestError, match="at most 256") as caught:
    create(prompt="a" * 300)
  assert caught.value.code == "context_length_exceeded"
  with (
    openai.OpenAI(
      base_url=f"{server.address}/v1", api_key="wrong", max_retries=0
    ) as other,
    pytest.raises(openai.AuthenticationError, match="API key is wrong"),
  ):
    other.models.list()


def test_nothing_is_left_behind(client, server):
  assert server.service.num_open == 0
  assert server.service.snapshot.pages_held == 0
