"""The HTTP side: routes, keys, limits, and answers by pieces."""

import asyncio
import concurrent.futures
import dataclasses
import hmac
import ipaddress
import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from jaxchunk.inference.server import answers, pages, protocol
from jaxchunk.inference.server.errors import ApiError
from jaxchunk.inference.server.extra import web
from jaxchunk.inference.server.fields import read_object
from jaxchunk.inference.server.metrics import CONTENT_TYPE, Metrics
from jaxchunk.inference.server.served import Served
from jaxchunk.inference.server.service import EngineService, Stream

_LOG = logging.getLogger("jaxchunk")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Read = Callable[[Mapping[str, Any], Served], protocol.Job]

# HTTP has no number for a client that went away; this is nginx's.
_GONE = 499


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
  """What clients may do.

  Attributes:
    body_bytes: Of a request's body.
    body_seconds: For which a body may take to arrive.
    write_seconds: For which a client may leave a piece unread.
    idle_seconds: For which a connection may bring nothing.
    rest_seconds: For which the rest of a refused body is read, so that the
      client sees why.
  """

  body_bytes: int = 8 * 2**20
  body_seconds: float = 30.0
  write_seconds: float = 60.0
  idle_seconds: float = 75.0
  rest_seconds: float = 2.0


class Server:
  """Handles requests.

  Args:
    served: What there is.
    service: Runs it.
    metrics: Counts.
    api_key: That clients have to bring; `None` is none.
    hosts: Names by which alone clients may call the server; `None` is any.
    limits: Of clients.
  """

  def __init__(
    self,
    served: Served,
    service: EngineService,
    metrics: Metrics,
    *,
    api_key: str | None = None,
    hosts: frozenset[str] | None = None,
    limits: Limits | None = None,
  ):
    self.served, self.service, self.metrics = served, service, metrics
    self._key = None if api_key is None else api_key.encode()
    self._hosts, self._limits = hosts, limits or Limits()
    # Long prompts take a while to read; the loop goes on meanwhile.
    self._readers = concurrent.futures.ThreadPoolExecutor(
      2, thread_name_prefix="jaxchunk-read"
    )

  def app(self) -> web.Application:
    """With all routes."""
    app = web.Application(
      middlewares=[self._guard], client_max_size=self._limits.body_bytes
    )
    app.router.add_post("/v1/completions", self._completions)
    app.router.add_post("/v1/chat/completions", self._chat)
    app.router.add_get("/v1/models", self._models)
    app.router.add_get("/v1/models/{model:.+}", self._model)
    app.router.add_get("/health", self._health)
    app.router.add_get("/metrics", self._metrics)
    app.router.add_get("/batch", self._batch)
    pages.add_routes(app)
    app.on_cleanup.append(self._clean_up)
    return app

  def runner(self, *, send_seconds: float = 5.0) -> web.AppRunner:
    """What sites are made of.

    Args:
      send_seconds: For answers under way when it is cleaned up.
    """
    return web.AppRunner(
      self.app(),
      # Who goes away is not waited for.
      handler_cancellation=True,
      access_log=None,
      auto_decompress=False,
      shutdown_timeout=send_seconds,
      keepalive_timeout=self._limits.idle_seconds,
      lingering_time=self._limits.rest_seconds,
    )

  async def _clean_up(self, _: web.Application) -> None:
    self._readers.shutdown(wait=False, cancel_futures=True)

  @web.middleware
  async def _guard(
    self, request: web.Request, handler: Handler
  ) -> web.StreamResponse:
    """Checks who asks, counts, and turns what goes wrong into JSON."""
    route = request.match_info.route.resource
    endpoint = "unknown" if route is None else route.canonical
    try:
      self._check_caller(request)
      response = await handler(request)
    except ApiError as error:
      response = _refusal(error)
    except web.HTTPException as error:
      response = _refusal(_of_http(error, self._limits.body_bytes))
    except (asyncio.CancelledError, ConnectionError):
      self.metrics.answered(endpoint, _GONE)
      raise
    except Exception:
      _LOG.exception("%s failed", endpoint)
      response = _refusal(
        ApiError(500, "the server failed; its log says why", "server_error")
      )
    self.metrics.answered(endpoint, response.status)
    return response

  def _check_caller(self, request: web.Request) -> None:
    """Whether a caller may ask.

    Without a key a page of another origin must not get at the server by a
    name that leads to this machine.
    """
    if self._hosts is not None and _host_name(request) not in self._hosts:
      raise ApiError(
        403,
        f"this server is not called {request.host[:200]!r}; use one of "
        f"{sorted(self._hosts)}, or start it with --api_key",
        "permission_error",
        code="wrong_host",
      )
    guarded = request.path.startswith("/v1/") or request.path == "/batch"
    if self._key is None or not guarded:
      return
    given = request.headers.get("Authorization", "")
    kind, _, key = given.partition(" ")
    sent = key.strip().encode("utf-8", "surrogateescape")
    if kind.lower() != "bearer" or not hmac.compare_digest(sent, self._key):
      raise ApiError(
        401,
        "the API key is wrong or missing; send the header 'Authorization: "
        "Bearer KEY'",
        "authentication_error",
        code="invalid_api_key",
      )

  async def _completions(self, request: web.Request) -> web.StreamResponse:
    return await self._answer(request, protocol.read_completion, answers.Writer)

  async def _chat(self, request: web.Request) -> web.StreamResponse:
    return await self._answer(request, protocol.read_chat, answers.ChatWriter)

  async def _answer(
    self, request: web.Request, read: Read, kind: type[answers.Writer]
  ) -> web.StreamResponse:
    body = await self._body(request)
    loop = asyncio.get_running_loop()
    job = await loop.run_in_executor(
      self._readers, lambda: read(read_object(body), self.served)
    )
    try:
      stream = await self.service.submit(job.requests)
    except ValueError as error:
      raise protocol.of_value_error(error) from None
    writer = kind(job, self.served.tokenizer)
    async with stream:
      if job.stream:
        return await self._send_pieces(request, stream, writer)
      async for event in stream:
        writer.add(event)
    self.metrics.finished(loop.time() - stream.began)
    return _json(writer.answer())

  async def _body(self, request: web.Request) -> bytes:
    if request.content_type != "application/json":
      raise ApiError(
        415,
        f"the body is said to be {request.content_type[:80]!r}; send the header"
        " 'Content-Type: application/json'",
      )
    if packed := request.headers.get("Content-Encoding"):
      raise ApiError(
        415, f"the body is packed by {packed[:80]!r}; send it as it is"
      )
    most = self._limits.body_bytes
    if request.content_length is not None and request.content_length > most:
      raise _too_large(most)
    seconds = self._limits.body_seconds
    try:
      async with asyncio.timeout(seconds):
        return await request.read()
    except TimeoutError:
      raise ApiError(
        408, f"the body did not arrive within {seconds:g} seconds"
      ) from None

  async def _send_pieces(
    self, request: web.Request, stream: Stream, writer: answers.Writer
  ) -> web.StreamResponse:
    response = web.StreamResponse(
      headers={
        "Content-Type": "text/event-stream; charset=utf-8",
        "Cache-Control": "no-cache",
        "X-Accel-Buffering": "no",
      }
    )
    await response.prepare(request)
    try:
      async for event in stream:
        data = b"".join(map(_event, writer.pieces(event)))
        if data:
          await self._write(request, response, data)
      if writer.job.include_usage:
        await self._write(request, response, _event(writer.last_piece()))
      self.metrics.finished(asyncio.get_running_loop().time() - stream.began)
    except ApiError as error:
      # Headers are gone; what is left is to say so in the stream.
      await self._write(request, response, _event(error.body))
    await self._write(request, response, b"data: [DONE]\n\n")
    await response.write_eof()
    return response

  async def _write(
    self, request: web.Request, response: web.StreamResponse, data: bytes
  ) -> None:
    try:
      async with asyncio.timeout(self._limits.write_seconds):
        await response.write(data)
    except TimeoutError:
      if request.transport is not None:
        request.transport.abort()
      raise ConnectionResetError("the client reads nothing") from None

  async def _models(self, request: web.Request) -> web.StreamResponse:
    every = [self._describe(name) for name in self.served.names]
    return _json({"object": "list", "data": every})

  async def _model(self, request: web.Request) -> web.StreamResponse:
    name = request.match_info["model"]
    self.served.adapter(name)
    return _json(self._describe(name))

  def _describe(self, name: str) -> dict[str, Any]:
    adapter = self.served.adapter(name) is not None
    return {
      "id": name,
      "object": "model",
      "created": self.served.created,
      "owned_by": "jaxchunk",
      "parent": self.served.name if adapter else None,
      "max_model_len": self.served.engine.max_length,
    }

  async def _health(self, request: web.Request) -> web.StreamResponse:
    state = self.service.state
    status = 200 if state == "running" else 503
    return _json({"status": state}, status=status)

  async def _metrics(self, request: web.Request) -> web.StreamResponse:
    headers = {"Content-Type": CONTENT_TYPE}
    return web.Response(body=self.metrics.text(), headers=headers)

  async def _batch(self, request: web.Request) -> web.StreamResponse:
    return _json(pages.batch(self.service, self.served))


def loopback(host: str) -> bool:
  """Whether a host's name or number is this machine alone."""
  if host == "localhost":
    return True
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return False


def _host_name(request: web.Request) -> str:
  """The name in the header `Host`, without a port."""
  host = request.host
  if host.startswith("["):
    return host[1:].partition("]")[0]
  return host.partition(":")[0]


def _event(value: Mapping[str, Any]) -> bytes:
  return b"data: " + _dump(value) + b"\n\n"


def _dump(value: Mapping[str, Any]) -> bytes:
  return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def _json(value: Mapping[str, Any], *, status: int = 200) -> web.Response:
  return web.Response(
    body=_dump(value), status=status, content_type="application/json"
  )


def _refusal(error: ApiError) -> web.Response:
  response = _json(error.body, status=error.status)
  response.headers.update(error.headers)
  if error.status == 401:
    response.headers["WWW-Authenticate"] = "Bearer"
  return response


def _too_large(most: int) -> ApiError:
  return ApiError(
    413,
    f"the body has more than {most:,} bytes; send less, or start the server "
    "with a larger --max_body_mb",
    code="body_too_large",
  )


def _of_http(error: web.HTTPException, most: int) -> ApiError:
  if isinstance(error, web.HTTPRequestEntityTooLarge):
    return _too_large(most)
  if isinstance(error, web.HTTPNotFound):
    return ApiError(404, "there is nothing at this address", code="not_found")
  if isinstance(error, web.HTTPMethodNotAllowed):
    allowed = ", ".join(sorted(error.allowed_methods))
    return ApiError(405, f"this address takes {allowed} only")
  return ApiError(error.status, error.reason)
