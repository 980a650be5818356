"""`GET /metrics`: the same figures as the view's, counted since the start, in Prometheus' text format.

https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import functools
from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector
from starlette.requests import Request
from starlette.responses import Response

from cake.api.handlers import Handler
from cake.cluster_view import ClusterView
from cake.figures import Distribution
from cake.protocol.handshake import describe_spans
from cake.stage_stats import StageStats

OF_STAGES: dict[str, tuple[str, Callable[[StageStats], float]]] = {
    "passes": ("Batches that a stage computed", lambda stats: stats.passes),
    "tokens": ("Tokens that passed a stage", lambda stats: stats.tokens),
    "compute_seconds": ("Seconds that a stage computed", lambda stats: stats.compute_s),
    "network_seconds": ("Seconds that its batches spent on the network", lambda stats: stats.network_s),
    "sent_bytes": ("Bytes sent to a stage", lambda stats: stats.bytes_sent),
    "received_bytes": ("Bytes received from a stage", lambda stats: stats.bytes_received),
}


class Metrics:
    """What Prometheus is told."""

    def __init__(self, view: ClusterView) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(ClusterCollector(view))
        self._requests = Counter(
            "cake_http_requests", "Requests by route and status", ["route", "status"], registry=self._registry
        )

    def counted(self, route: str, handler: Handler) -> Handler:
        """The same, and its answers are counted."""

        @functools.wraps(handler)
        async def counting(request: Request) -> Response:
            response = await handler(request)
            self._requests.labels(route, response.status_code).inc()
            return response

        return counting

    async def answer(self, request: Request) -> Response:
        """All of it."""
        return Response(generate_latest(self._registry), headers={"Content-Type": CONTENT_TYPE_LATEST})


class ClusterCollector(Collector):
    """Reads the figures when it is asked for them."""

    def __init__(self, view: ClusterView) -> None:
        self._view = view

    def collect(self) -> Iterator[Metric]:
        """Every figure as it is now."""
        yield from self._of_answers()
        yield from self._of_stages()
        yield from self._of_nodes()

    def _of_answers(self) -> Iterator[Metric]:
        figures, now = self._view.figures, self._view.standing
        yield CounterMetricFamily("cake_answers", "Answers begun", figures.answers)
        yield CounterMetricFamily("cake_tokens", "Tokens generated", figures.tokens)
        yield CounterMetricFamily("cake_prompt_tokens", "Prompt tokens that were run", figures.prompt_tokens)
        yield CounterMetricFamily(
            "cake_cached_prompt_tokens", "Prompt tokens that the caches held", figures.cached_tokens
        )
        yield CounterMetricFamily("cake_replays", "Sessions told again to stages", figures.replays)
        yield GaugeMetricFamily("cake_requests", "Answers that are being made", now["requests"])
        yield GaugeMetricFamily("cake_waiting_requests", "Requests that wait for their turn", now["waiting"])
        yield GaugeMetricFamily("cake_sessions", "Sessions that stages may hold", now["sessions"])
        yield GaugeMetricFamily(
            "cake_kept_tokens", "Tokens of idle sessions that are kept", self._view.kept_tokens
        )
        yield _histogram("cake_first_token_seconds", "From request to first token", figures.first_token_s)
        yield _histogram("cake_between_tokens_seconds", "From token to token", figures.between_tokens_s)

    def _of_nodes(self) -> Iterator[Metric]:
        up = GaugeMetricFamily("cake_node_up", "Whether a node is there", labels=["node"])
        memory = GaugeMetricFamily(
            "cake_node_memory_used_bytes", "Memory that a node uses where it computes", labels=["node"]
        )
        for node in self._view.snapshot()["nodes"]:
            up.add_metric([node["name"]], node["state"] != "lost")
            if node["memory_used"] is not None:
                memory.add_metric([node["name"]], node["memory_used"])
        yield from (up, memory)

    def _of_stages(self) -> Iterator[Metric]:
        for name, (words, value) in OF_STAGES.items():
            family = CounterMetricFamily(f"cake_stage_{name}", words, labels=["node", "blocks"])
            for stage in self._view.stages:
                family.add_metric([stage.node, describe_spans([stage.blocks])], value(stage.stats))
            yield family


def _histogram(name: str, words: str, seen: Distribution) -> HistogramMetricFamily:
    return HistogramMetricFamily(name, words, buckets=seen.cumulative, sum_value=seen.total)
