"""Prometheus metrics of the server."""

from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.registry import Collector

from megatron_vita.inference.server.service.service import EngineService

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters and histograms of one server, in a registry of their own."""

    def __init__(self, service: EngineService) -> None:
        # In the global registry several servers of one process would clash.
        self._registry = CollectorRegistry()
        self._registry.register(_EngineCollector(service))
        self.requests = Counter(
            "vita_requests",
            "Chat requests by HTTP status; 499: the client went away.",
            ["status"],
            registry=self._registry,
        )
        self.first_token = Histogram(
            "vita_time_to_first_token_seconds",
            "From the start of a request to its first token.",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.total = Histogram(
            "vita_request_seconds",
            "From the start of a request to the end of its answer.",
            buckets=_SECONDS,
            registry=self._registry,
        )

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """Collector of the engine's statistics as of its last step."""

    def __init__(self, service: EngineService) -> None:
        self._service = service

    def collect(self) -> Iterable[GaugeMetricFamily | CounterMetricFamily]:
        """See prometheus_client."""
        now = self._service.statistics
        yield GaugeMetricFamily(
            "vita_requests_running", "Requests in the engine's batch.", now.running
        )
        yield GaugeMetricFamily(
            "vita_requests_waiting", "Requests that wait for room in the batch.", now.waiting
        )
        yield GaugeMetricFamily(
            "vita_cache_tokens", "Room of the key-value cache.", now.cache_tokens
        )
        yield GaugeMetricFamily(
            "vita_cache_tokens_used", "Tokens that the cache holds.", now.cache_tokens_used
        )
        yield GaugeMetricFamily(
            "vita_engine_up", "1, or 0 when the engine has failed.", self._service.failure is None
        )
        yield CounterMetricFamily(
            "vita_prompt_tokens", "Tokens of prompts.", now.prompt_tokens_total
        )
        yield CounterMetricFamily(
            "vita_cached_tokens", "Those found in the cache.", now.cached_tokens_total
        )
        yield CounterMetricFamily(
            "vita_completion_tokens", "Tokens of answers.", now.completion_tokens_total
        )
