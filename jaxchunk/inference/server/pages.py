"""The page at /, and what it shows of the batch."""

import importlib.resources
from collections.abc import Awaitable, Callable
from typing import Any

from jaxchunk.inference.server.extra import web
from jaxchunk.inference.server.served import Served
from jaxchunk.inference.server.service import EngineService

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]

_FILES = {
  "/": ("page.html", "text/html"),
  "/page.css": ("page.css", "text/css"),
  "/page.js": ("page.js", "text/javascript"),
}
# Nothing comes from anywhere else, and no script but the page's own runs.
_HEADERS = {
  "Content-Security-Policy": (
    "default-src 'none'; script-src 'self'; style-src 'self'; "
    "connect-src 'self'; img-src 'self' data:; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
  ),
  "X-Content-Type-Options": "nosniff",
  "Referrer-Policy": "no-referrer",
  "Cache-Control": "no-cache",
}


def add_routes(app: web.Application) -> None:
  """Adds the page and its files."""
  folder = importlib.resources.files("jaxchunk.inference.server") / "static"
  for path, (name, kind) in _FILES.items():
    app.router.add_get(path, _page((folder / name).read_bytes(), kind))


def _page(body: bytes, kind: str) -> Handler:
  """Hands out a file."""

  async def handle(_: web.Request) -> web.StreamResponse:
    return web.Response(
      body=body, content_type=kind, charset="utf-8", headers=_HEADERS
    )

  return handle


def batch(service: EngineService, served: Served) -> dict[str, Any]:
  """What runs, as JSON."""
  snapshot = service.snapshot
  rows = [
    {
      "id": row.request_id,
      "index": row.index,
      "model": served.name if row.adapter < 0 else served.adapters[row.adapter],
      "status": "prompt" if row.computed < row.prompt_tokens else "generating",
      "prompt_tokens": row.prompt_tokens,
      "computed_tokens": row.computed,
      "new_tokens": row.new_tokens,
      "pages": row.pages,
      "preemptions": row.preemptions,
    }
    for row in snapshot.rows
  ]
  stats = snapshot.stats
  return {
    "state": service.state,
    "running": rows,
    "waiting": snapshot.waiting,
    "max_sequences": service.engine.config.max_sequences,
    "pages": {
      "held": snapshot.pages_held,
      "total": snapshot.pages_total,
      "size": snapshot.page_size,
    },
    "tokens_per_second": round(service.tokens_per_second(), 1),
    "steps": stats.steps,
    "new_tokens": stats.new_tokens,
    "cached_tokens": stats.cached_tokens,
    "preemptions": stats.preemptions,
  }
