"""What a server tells Prometheus."""

from collections.abc import Callable, Iterator

from jaxchunk.inference.server.extra import (
  prometheus_client,
  prometheus_registry,
)
from jaxchunk.inference.server.extra import prometheus_core as core
from jaxchunk.inference.server.service import EngineService, Snapshot

CONTENT_TYPE = prometheus_client.CONTENT_TYPE_LATEST

_SHORT = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
_LONG = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
# Name, meaning, and how it is read from a snapshot.
_GAUGES: tuple[tuple[str, str, Callable[[Snapshot], float]], ...] = (
  ("running", "Continuations that run.", lambda s: len(s.rows)),
  ("waiting", "Continuations that wait for room.", lambda s: s.waiting),
  ("pages_held", "Pages that a continuation holds.", lambda s: s.pages_held),
  ("pages_total", "Pages for keys and values.", lambda s: s.pages_total),
  (
    "prefix_hit_ratio",
    "Of the full pages of prompts, those that were known.",
    lambda s: s.pages_found / max(s.pages_asked, 1),
  ),
)
_COUNTERS: tuple[tuple[str, str, Callable[[Snapshot], float]], ...] = (
  ("steps", "Steps of the engine.", lambda s: s.stats.steps),
  (
    "prompt_tokens",
    "Tokens of prompts that were computed.",
    lambda s: s.stats.prompt_tokens,
  ),
  (
    "cached_tokens",
    "Tokens of prompts that were known.",
    lambda s: s.stats.cached_tokens,
  ),
  ("generated_tokens", "New tokens.", lambda s: s.stats.new_tokens),
  (
    "preemptions",
    "Continuations that lost their pages.",
    lambda s: s.stats.preemptions,
  ),
)


class _EngineCollector(prometheus_registry.Collector):
  """Reads the engine when it is asked."""

  def __init__(self, service: EngineService):
    self._service = service

  def collect(self) -> Iterator[core.Metric]:
    snapshot = self._service.snapshot
    for name, meaning, read in _GAUGES:
      yield core.GaugeMetricFamily(f"jaxchunk_{name}", meaning, read(snapshot))
    for name, meaning, read in _COUNTERS:
      yield core.CounterMetricFamily(
        f"jaxchunk_{name}", meaning, read(snapshot)
      )
    yield core.GaugeMetricFamily(
      "jaxchunk_open",
      "Continuations that were taken and have not ended.",
      self._service.num_open,
    )
    yield core.GaugeMetricFamily(
      "jaxchunk_up",
      "1 while the engine runs and takes requests.",
      float(self._service.state == "running"),
    )


class Metrics:
  """Counts and times; a registry of its own, nothing global."""

  def __init__(self) -> None:
    self._registry = prometheus_client.CollectorRegistry()
    self._requests = prometheus_client.Counter(
      "jaxchunk_requests",
      "Answers by endpoint and status.",
      ("endpoint", "status"),
      registry=self._registry,
    )
    self._first = self._histogram(
      "time_to_first_token", "From a request to its first token.", _LONG
    )
    self._next = self._histogram(
      "time_between_tokens", "From a token to the next.", _SHORT
    )
    self._whole = self._histogram(
      "request", "From a request to the end of its answer.", _LONG
    )

  def _histogram(
    self, name: str, meaning: str, buckets: tuple[float, ...]
  ) -> prometheus_client.Histogram:
    return prometheus_client.Histogram(
      f"jaxchunk_{name}_seconds",
      meaning,
      buckets=buckets,
      registry=self._registry,
    )

  def read(self, service: EngineService) -> None:
    """Tells of an engine too."""
    self._registry.register(_EngineCollector(service))

  def answered(self, endpoint: str, status: int) -> None:
    """An answer was sent, or nobody listened: 499."""
    self._requests.labels(endpoint, str(status)).inc()

  def first_token(self, seconds: float) -> None:
    """From a request to the first token of a continuation."""
    self._first.observe(seconds)

  def next_token(self, seconds: float) -> None:
    """From a token to the next of the same continuation."""
    self._next.observe(seconds)

  def finished(self, seconds: float) -> None:
    """From a request to the end of its answer."""
    self._whole.observe(seconds)

  def text(self) -> bytes:
    """All of it in Prometheus' format."""
    return prometheus_client.generate_latest(self._registry)
