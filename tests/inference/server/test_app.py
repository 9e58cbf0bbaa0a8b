"""The HTTP side, with a model that is not there."""

import asyncio
import contextlib
import importlib
import json
import sys

import pytest
from prometheus_client.parser import text_string_to_metric_families

from jaxchunk.inference.server import extra
from jaxchunk.inference.server.app import Limits, loopback
from jaxchunk.inference.server.main import check_address

from .conftest import fake_served, idle, serving

pytestmark = pytest.mark.fast

HELLO = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
JSON = {"Content-Type": "application/json"}


def run(test, served=None, **options):
  async def main():
    async with (
      asyncio.timeout(20),
      serving(served or fake_served(), **options) as (session, service),
    ):
      await test(session, service)

  asyncio.run(main())


async def refused(response):
  """An error's status and inner object; nothing of the code is in it."""
  text = await response.text()
  assert "Traceback" not in text and ".py" not in text
  assert response.content_type == "application/json"
  error = json.loads(text)["error"]
  assert set(error) == {"message", "type", "param", "code"}
  return response.status, error


async def pieces(response):
  """Of an answer that comes as events."""
  assert response.status == 200
  assert response.content_type == "text/event-stream"
  lines = (await response.text()).strip().split("\n\n")
  assert lines.pop() == "data: [DONE]"
  return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_a_completion():
  async def test(session, service):
    body = {"prompt": ["a", "b"], "max_tokens": 7, "n": 2, "logprobs": 2}
    async with session.post("/v1/completions", json=body) as response:
      answer = await response.json()
    assert answer["object"] == "text_completion" and answer["model"] == "tiny"
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2, 3]
    for choice in answer["choices"]:
      assert choice["text"] == "hello h"
      assert choice["finish_reason"] == "length"
      found = choice["logprobs"]
      assert found["tokens"] == list("hello h")
      assert found["text_offset"] == list(range(7))
      assert found["token_logprobs"] == [-0.5] * 7
      assert found["top_logprobs"][0] == {"\0": -1, "\x01": -2, "h": -0.5}
    usage = {"prompt_tokens": 4, "completion_tokens": 28, "total_tokens": 32}
    assert answer["usage"].pop("prompt_tokens_details") == {"cached_tokens": 0}
    assert answer["usage"] == usage
    await idle(service)

  run(test)


def test_a_completion_by_pieces():
  async def test(session, service):
    body = {"prompt": "a", "max_tokens": 7, "echo": True, "stream": True}
    async with session.post("/v1/completions", json=body) as response:
      found = await pieces(response)
    assert "".join(p["choices"][0]["text"] for p in found) == "ahello h"
    assert len({p["id"] for p in found}) == 1
    reasons = [p["choices"][0]["finish_reason"] for p in found]
    assert reasons == [None] * 6 + ["length"] and "usage" not in found[0]
    body |= {"stream_options": {"include_usage": True}, "n": 2, "echo": False}
    async with session.post("/v1/completions", json=body) as response:
      found = await pieces(response)
    assert all(p["usage"] is None for p in found[:-1])
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["completion_tokens"] == 14
    for index in range(2):
      own = [p["choices"][0] for p in found[:-1]]
      texts = [c["text"] for c in own if c["index"] == index]
      assert "".join(texts) == "hello h"

  run(test)


def test_a_chat_and_the_bytes_of_its_tokens():
  async def test(session, service):
    body = {**HELLO, "logprobs": True, "top_logprobs": 1}
    async with session.post("/v1/chat/completions", json=body) as response:
      answer = await response.json()
    (choice,) = answer["choices"]
    assert choice["message"]["content"] == "é!"
    assert choice["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == 4
    content = choice["logprobs"]["content"]
    assert [entry["bytes"] for entry in content] == [[0xC3], [0xA9], [33]]
    assert [e["token"] for e in content] == ["bytes:\\xc3", "bytes:\\xa9", "!"]
    assert len(content[0]["top_logprobs"]) == 1
    async with session.post(
      "/v1/chat/completions", json={**body, "stream": True}
    ) as response:
      found = [p["choices"][0] for p in await pieces(response)]
    assert found[0]["delta"] == {"role": "assistant", "content": ""}
    assert [c["delta"].get("content", "") for c in found] == [
      *["", "", "é", "!", ""]
    ]
    assert found[-1]["finish_reason"] == "stop" and found[-1]["delta"] == {}

  run(test, fake_served("é!$"))


def test_calls_of_tools():
  text = 'Well.<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>$'
  tool = {"type": "function", "function": {"name": "f"}}

  async def test(session, service):
    body = {**HELLO, "tools": [tool], "max_tokens": 100}
    async with session.post("/v1/chat/completions", json=body) as response:
      (choice,) = (await response.json())["choices"]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == "Well."
    (call,) = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": '{"a": 1}'}
    body["stream"] = True
    async with session.post("/v1/chat/completions", json=body) as response:
      found = [p["choices"][0] for p in await pieces(response)]
    said = "".join(c["delta"].get("content", "") for c in found)
    assert said == "Well." and found[-1]["finish_reason"] == "tool_calls"
    (call,) = found[-2]["delta"]["tool_calls"]
    assert call["index"] == 0 and call["function"]["name"] == "f"
    # Without tools it is text.
    del body["tools"], body["stream"]
    async with session.post("/v1/chat/completions", json=body) as response:
      (choice,) = (await response.json())["choices"]
    assert choice["message"]["content"] == text[:-1]

  run(test, fake_served(text))


def test_what_is_wrong_is_told_in_json():
  async def test(session, service):
    async def post(data, path="/v1/completions", headers=JSON):
      async with session.post(path, data=data, headers=headers) as response:
        return await refused(response)

    good = json.dumps({"prompt": "a"}).encode()
    assert (await post(b"{"))[0] == 400
    assert (await post(b"\xff"))[0] == 400
    assert (await post(good, headers={"Content-Type": "text/plain"}))[0] == 415
    status, error = await post(b'{"prompt": "a", "model": "x"}')
    assert (status, error["code"]) == (404, "model_not_found")
    status, error = await post(b'{"prompt": [400]}')
    assert (status, error["param"]) == (400, "prompt")
    status, error = await post(
      b'{"prompt": "a", "response_format": {"type": "json_object"}}'
    )
    assert (status, error["param"]) == (400, "response_format")
    status, error = await post(b" " * 2000)
    assert (status, error["code"]) == (413, "body_too_large")
    packed = {**JSON, "Content-Encoding": "gzip"}
    assert (await post(b"no gzip", headers=packed))[0] == 415
    assert (await post(good, "/v1/nothing"))[0] == 404
    async with session.get("/v1/completions") as response:
      assert (await refused(response))[0] == 405

    async def by_pieces():
      for _ in range(30):
        yield b" " * 100

    status, error = await post(by_pieces())
    assert (status, error["code"]) == (413, "body_too_large")

  run(test, limits=Limits(body_bytes=1000))


def test_a_slow_sender_is_given_up():
  async def test(session, service):
    async def slow():
      yield b"{"
      await asyncio.sleep(5)
      yield b"}"

    async with session.post(
      "/v1/completions", data=slow(), headers=JSON
    ) as response:
      status, error = await refused(response)
    assert status == 408 and "0.1 seconds" in error["message"]

  run(test, limits=Limits(body_seconds=0.1))


def test_half_a_head_is_not_waited_for():
  async def test(session, service):
    reader, writer = await asyncio.open_connection(
      session._base_url.host, session._base_url.port
    )
    writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: ")
    # A byte now and then does not keep it open.
    closed = asyncio.create_task(reader.read())
    while not closed.done():
      writer.write(b"a")
      await asyncio.sleep(0.05)
    with contextlib.suppress(ConnectionError):
      await closed
    writer.close()
    with contextlib.suppress(ConnectionError):
      await writer.wait_closed()

  run(test, limits=Limits(idle_seconds=0.3))


def test_a_key_is_asked_for():
  async def test(session, service):
    for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": "é"}):
      for path in ("/v1/models", "/batch"):
        async with session.get(path, headers=headers) as response:
          status, error = await refused(response)
        assert (status, error["code"]) == (401, "invalid_api_key")
    right = {"Authorization": "Bearer geheim-ü"}
    async with session.get("/v1/models", headers=right) as response:
      assert response.status == 200
    for path in ("/health", "/metrics", "/"):
      async with session.get(path) as response:
        assert response.status == 200

  run(test, api_key="geheim-ü")


def test_other_names_of_this_machine_are_refused():
  async def test(session, service):
    headers = {"Host": "evil.example"}
    async with session.get("/v1/models", headers=headers) as response:
      status, error = await refused(response)
    assert (status, error["code"]) == (403, "wrong_host")
    async with session.get("/v1/models") as response:
      assert response.status == 200

  run(test, hosts=frozenset({"127.0.0.1"}))


@pytest.mark.parametrize("stream", [True, False])
def test_who_goes_away_is_not_waited_for(stream):
  async def test(session, service):
    service.engine.runner.seconds = 0.02
    body = {"prompt": "a", "max_tokens": 200, "stream": stream}
    if stream:
      async with session.post("/v1/completions", json=body) as response:
        await response.content.readany()
        response.close()
    else:
      with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
          await session.post("/v1/completions", json=body)
    await idle(service)
    assert service.engine.core.stats.new_tokens < 100
    async with session.get("/metrics") as response:
      assert 'status="499"' in await response.text()

  run(test)


def test_too_many_are_told_to_come_again():
  async def test(session, service):
    service.engine.runner.seconds = 0.05

    async def post():
      body = {"prompt": "a", "max_tokens": 5}
      async with session.post("/v1/completions", json=body) as response:
        if response.status == 429:
          assert response.headers["Retry-After"] == "1"
          assert (await refused(response))[1]["code"] == "overloaded"
        return response.status

    found = await asyncio.gather(*(post() for _ in range(20)))
    assert set(found) == {200, 429} and found.count(200) >= 5

  run(test, max_queue=1)


def test_a_failed_engine_is_told_and_nobody_hangs():
  async def test(session, service):
    runner = service.engine.runner
    runner.seconds = 0.01
    body = {"prompt": "a", "max_tokens": 200}

    async def post(stream):
      async with session.post(
        "/v1/completions", json={**body, "stream": stream}
      ) as response:
        if stream:
          return (await pieces(response))[-1]["error"]["code"]
        return (await refused(response))[1]["code"]

    tasks = [asyncio.create_task(post(stream)) for stream in (True, False)]
    await asyncio.sleep(0.1)
    async with session.get("/health") as response:
      assert (await response.json()) == {"status": "running"}
    runner.error = RuntimeError("the device is lost")
    assert await asyncio.gather(*tasks) == ["engine_failed"] * 2
    async with session.get("/health") as response:
      assert response.status == 503
      assert (await response.json()) == {"status": "failed"}
    assert await post(False) == "engine_failed"

  run(test)


def test_a_shutdown_is_told():
  async def test(session, service):
    service.engine.runner.seconds = 0.02
    body = {"prompt": "a", "max_tokens": 200}

    async def post(stream):
      async with session.post(
        "/v1/completions", json={**body, "stream": stream}
      ) as response:
        if stream:
          return (await pieces(response))[-1]["error"]["code"]
        assert response.headers["Retry-After"]
        return (await refused(response))[1]["code"]

    tasks = [asyncio.create_task(post(stream)) for stream in (True, False)]
    await asyncio.sleep(0.1)
    drain = asyncio.create_task(service.drain(grace=0.2))
    await asyncio.sleep(0.05)
    assert await post(False) == "shutting_down"
    async with session.get("/health") as response:
      assert response.status == 503
    assert not await drain
    assert await asyncio.gather(*tasks) == ["shutting_down"] * 2

  run(test)


def test_models():
  async def test(session, service):
    async with session.get("/v1/models") as response:
      answer = await response.json()
    assert [m["id"] for m in answer["data"]] == ["tiny", "poems"]
    assert answer["data"][1]["parent"] == "tiny"
    async with session.get("/v1/models/poems") as response:
      assert (await response.json())["id"] == "poems"
    async with session.get("/v1/models/x/y") as response:
      assert (await refused(response))[0] == 404

  run(test)


def test_metrics_and_the_batch():
  async def test(session, service):
    service.engine.runner.seconds = 0.01
    body = {"prompt": "a" * 40, "max_tokens": 50}
    posts = [
      asyncio.create_task(session.post("/v1/completions", json=body))
      for _ in range(6)
    ]
    batch, row = {"running": []}, {"new_tokens": 0}
    while len(batch["running"]) < 4 or row["new_tokens"] < 2:
      await asyncio.sleep(0.02)
      async with session.get("/batch") as response:
        batch = await response.json()
      row = (batch["running"] or [row])[0]
    assert batch["waiting"] == 2
    assert row["prompt_tokens"] == 41 and row["pages"] >= 3
    assert row["status"] == "generating" and row["new_tokens"] > 0
    assert batch["pages"]["held"] > 0 and batch["tokens_per_second"] > 0
    for response in await asyncio.gather(*posts):
      await response.read()
    await idle(service)
    async with session.get("/metrics") as response:
      text = await response.text()
    values = {
      sample.name: sample.value
      for family in text_string_to_metric_families(text)
      for sample in family.samples
      if not sample.labels or sample.labels.get("status") == "200"
    }
    assert values["jaxchunk_requests_total"] == 6
    assert values["jaxchunk_generated_tokens_total"] == 300
    assert values["jaxchunk_time_to_first_token_seconds_count"] == 6
    assert values["jaxchunk_time_between_tokens_seconds_count"] == 6 * 49
    assert values["jaxchunk_request_seconds_count"] == 6
    assert values["jaxchunk_pages_held"] == 0
    assert values["jaxchunk_pages_total"] == 64
    assert values["jaxchunk_cached_tokens_total"] > 0
    assert 0 < values["jaxchunk_prefix_hit_ratio"] < 1

  run(test)


def test_the_page_loads_nothing_from_elsewhere():
  async def test(session, service):
    for path in ("/", "/page.css", "/page.js"):
      async with session.get(path) as response:
        text = await response.text()
        policy = response.headers["Content-Security-Policy"]
      assert response.status == 200 and "default-src 'none'" in policy
      assert "http://" not in text and "https://" not in text

  run(test)


@pytest.mark.parametrize(
  ("host", "inside"),
  [
    ("127.0.0.1", True),
    ("127.1.2.3", True),
    ("::1", True),
    ("localhost", True),
    ("0.0.0.0", False),
    ("::", False),
    ("", False),
    ("10.0.0.1", False),
    ("example.org", False),
  ],
)
def test_only_this_machine_needs_no_key(host, inside):
  assert loopback(host) == inside
  if not inside:
    with pytest.raises(ValueError, match="set --api_key"):
      check_address(host, None)
  check_address(host, "key")


def test_what_is_missing_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "aiohttp", None)
  with pytest.raises(ImportError, match=r"pip install 'jaxchunk\[serve\]'"):
    importlib.reload(extra)
