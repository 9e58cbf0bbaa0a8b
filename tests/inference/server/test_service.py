"""The thread that runs an engine, and those that wait for it."""

import asyncio

import pytest

from jaxchunk.inference.core import Request, RequestError
from jaxchunk.inference.params import SamplingParams
from jaxchunk.inference.server.errors import ApiError
from jaxchunk.inference.server.service import EngineService

from .conftest import fake_engine, idle

pytestmark = pytest.mark.fast


def request(name="a", *, tokens=5, **fields):
  params = SamplingParams(max_tokens=tokens, temperature=0, **fields)
  return Request(request_id=name, prompt=(1, 2, 3), params=params)


def run(test, **options):
  """Runs a coroutine with a service."""

  async def main():
    engine = fake_engine(**options.pop("engine", {}))
    service = EngineService(engine, **options)
    service.start()
    try:
      async with asyncio.timeout(20):
        await test(service)
    finally:
      await service.stop()
    assert not service._thread.is_alive()

  asyncio.run(main())


async def text_of(stream):
  async with stream:
    return "".join([event.text async for event in stream])


def test_requests_run_together():
  async def test(service):
    streams = [await service.submit(request(str(n))) for n in range(4)]
    texts = await asyncio.gather(*map(text_of, streams))
    assert texts == ["hello"] * 4
    assert max(service.engine.runner.plans) > 1
    await idle(service)

  run(test)


def test_continuations_of_one_request_come_in_one_stream():
  async def test(service):
    stream = await service.submit([request("a", n=2), request("b")])
    async with stream:
      ends = [e async for e in stream if e.finish_reason is not None]
    assert len(ends) == 3 and service.num_open == 0
    assert not service._streams and not service._left

  run(test)


def test_one_that_is_wrong_refuses_all_with_it():
  async def test(service):
    wrong = Request(request_id="b", prompt=(999,))
    with pytest.raises(RequestError, match="token 999"):
      await service.submit([request("a"), wrong])
    assert service.num_open == 0
    guided = request("c", guide={"json_object": True})
    with pytest.raises(RequestError, match="guides no texts"):
      await service.submit([request("a"), guided])
    await idle(service)
    assert await text_of(await service.submit(request("a"))) == "hello"

  run(test)


def test_a_guide_that_breaks_is_its_requests_own_trouble():
  async def test(service):
    def broken(guide):
      raise KeyError("no such schema")

    service.engine.core._guides = broken
    with pytest.raises(KeyError, match="no such schema"):
      await service.submit(request("a", guide={"json": {}}))
    assert await text_of(await service.submit(request("b"))) == "hello"

  run(test)


def test_the_queue_is_bounded():
  async def test(service):
    service.engine.runner.seconds = 0.01
    streams = [await service.submit(request(str(n))) for n in range(6)]
    with pytest.raises(ApiError, match="2 continuations wait") as caught:
      await service.submit(request("more"))
    assert caught.value.status == 429 and caught.value.retry_after
    with pytest.raises(ApiError, match="at most 6") as caught:
      await service.submit(request("much more", n=7))
    assert caught.value.status == 400
    await asyncio.gather(*map(text_of, streams))
    assert await text_of(await service.submit(request("later"))) == "hello"

  run(test, max_queue=2)


def test_closing_a_stream_cancels_it():
  async def test(service):
    service.engine.runner.seconds = 0.02
    stream = await service.submit(request(tokens=200))
    async with stream:
      await anext(stream)
    await idle(service)
    assert service.engine.core.stats.new_tokens < 100

  run(test)


def test_waiting_for_admission_may_be_given_up():
  async def test(service):
    service.engine.runner.seconds = 0.1
    first = await service.submit(request("a", tokens=3))
    # The thread is in a step now.
    await asyncio.sleep(0.05)
    task = asyncio.create_task(service.submit(request("b", tokens=200)))
    await asyncio.sleep(0.01)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
      await task
    await text_of(first)
    await idle(service)

  run(test)


def test_a_drain_lets_finish_what_runs():
  async def test(service):
    service.engine.runner.seconds = 0.005
    stream = await service.submit(request(tokens=20))
    task = asyncio.create_task(text_of(stream))
    drain = asyncio.create_task(service.drain(grace=10))
    await asyncio.sleep(0)
    with pytest.raises(ApiError) as caught:
      await service.submit(request("b"))
    assert caught.value.status == 503 and caught.value.retry_after
    assert await drain
    assert len(await task) == 20

  run(test)


def test_a_drain_ends_what_takes_too_long():
  async def test(service):
    service.engine.runner.seconds = 0.02
    stream = await service.submit(request(tokens=250))
    async with stream:
      assert not await service.drain(grace=0.1)
      reasons = [event.finish_reason async for event in stream]
    assert reasons[-1] == "cancelled" and len(reasons) < 100
    await idle(service)

  run(test)


@pytest.mark.parametrize("moment", ["while it runs", "before"])
def test_when_the_engine_fails_nobody_waits(moment, caplog):
  async def test(service):
    runner = service.engine.runner
    runner.seconds = 0.01
    if moment == "before":
      runner.error = RuntimeError("the device is lost")
    stream = await service.submit([request("a", tokens=200), request("b")])
    other = await service.submit(request("c", tokens=200))
    runner.error = RuntimeError("the device is lost")
    for one in (stream, other):
      with pytest.raises(ApiError, match="has failed") as caught:
        await text_of(one)
      assert caught.value.status == 503
    assert service.state == "failed" and service.num_open == 0
    with pytest.raises(ApiError, match="has failed"):
      await service.submit(request("d"))
    assert await service.drain(grace=1)

  async def tolerant(service):
    try:
      await test(service)
    except ApiError as error:
      # The second came after the failure.
      assert moment == "before" and error.status == 503

  run(tolerant)
  assert "the device is lost" in caplog.text


def test_nothing_turns_while_nothing_runs():
  async def test(service):
    await text_of(await service.submit(request()))
    await idle(service)
    steps = []
    service._step = lambda: steps.append(1)
    await asyncio.sleep(0.2)
    assert not steps

  run(test)


def test_a_queue_cannot_be_negative():
  with pytest.raises(ValueError, match="max_queue=-1"):
    asyncio.run(asyncio.sleep(0, EngineService(fake_engine(), max_queue=-1)))
