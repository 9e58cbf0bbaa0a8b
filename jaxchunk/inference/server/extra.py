"""What the extra `serve` brings, or how to get it."""

__all__ = [
  "prometheus_client",
  "prometheus_core",
  "prometheus_registry",
  "web",
]

try:
  import prometheus_client
  from aiohttp import web
  from prometheus_client import core as prometheus_core
  from prometheus_client import registry as prometheus_registry
except ImportError as error:
  raise ImportError(
    f"the server needs aiohttp and prometheus-client ({error}); install them "
    "with: pip install 'jaxchunk[serve]'"
  ) from error
