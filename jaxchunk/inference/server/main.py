"""Runs a server until it is told to stop."""

import asyncio
import os
import signal
from collections.abc import Callable

from jaxchunk.inference.server.app import Limits, Server, loopback
from jaxchunk.inference.server.extra import web
from jaxchunk.inference.server.metrics import Metrics
from jaxchunk.inference.server.served import Served
from jaxchunk.inference.server.service import EngineService


def check_address(host: str, api_key: str | None) -> None:
  """Whether a server may listen there.

  Raises:
    ValueError: Others could reach it and need no key.
  """
  if api_key is None and not loopback(host):
    raise ValueError(
      f"--host={host!r} is open to other machines; set --api_key or "
      "JAXCHUNK_API_KEY, or listen on 127.0.0.1"
    )
  if api_key is not None and not api_key.strip():
    raise ValueError("the API key is empty")


async def serve(
  served: Served,
  *,
  host: str = "127.0.0.1",
  port: int = 8000,
  api_key: str | None = None,
  max_queue: int = 256,
  grace_seconds: float = 30.0,
  limits: Limits | None = None,
  ready: Callable[[str], None] | None = None,
) -> bool:
  """Serves until SIGTERM or SIGINT; then finishes what was begun.

  A second signal ends the process at once.

  Args:
    served: What.
    host: Where to listen.
    port: 0 is any that is free.
    api_key: That clients have to bring.
    max_queue: Continuations that may wait.
    grace_seconds: For what was begun, after the signal.
    limits: Of clients.
    ready: Told the address when it is open.

  Returns:
    Whether all that was begun was finished.

  Raises:
    ValueError: An argument is out of range.
    OSError: The address is taken.
  """
  check_address(host, api_key)
  metrics = Metrics()
  service = EngineService(served.engine, max_queue=max_queue, watch=metrics)
  metrics.read(service)
  # A name that leads to this machine may be another's on the web.
  names = frozenset({"localhost", "127.0.0.1", "::1", host})
  server = Server(
    served,
    service,
    metrics,
    api_key=api_key,
    hosts=names if api_key is None else None,
    limits=limits,
  )
  runner = server.runner()
  await runner.setup()
  try:
    site = web.TCPSite(runner, host, port)
    await site.start()
    service.start()
    stop = _stop_on_signals()
    if ready is not None:
      ready(_address(runner))
    await stop.wait()
    return await service.drain(grace_seconds)
  finally:
    await runner.cleanup()
    await service.stop()


def _address(runner: web.AppRunner) -> str:
  host, port = runner.addresses[0][:2]
  return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _stop_on_signals() -> asyncio.Event:
  """An event that the first signal sets; the second ends the process."""
  loop, stop = asyncio.get_running_loop(), asyncio.Event()

  def on_signal(number: int) -> None:
    if stop.is_set():
      # Nothing may hold it up: neither a step nor a client.
      os._exit(128 + number)
    stop.set()

  for number in (signal.SIGTERM, signal.SIGINT):
    loop.add_signal_handler(number, on_signal, number)
  return stop
