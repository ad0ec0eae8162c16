"""`ServerMetrics`: what the server counts and measures, for Prometheus, /health and the alerts."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from time import monotonic
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from gemma_edge.runtime.host.process_memory import resident_memory
from gemma_edge.runtime.host.temperature import hottest
from gemma_edge.runtime.server.exchange import Exchange

TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)
SECONDS_BUCKETS = (0.01, 0.05, 0.1, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
MOST_RECENT = 500  # answers that a window may hold: memory is bounded
ANSWERS = ("client_left", "ok", "timeout", "error", "draining")  # outcomes of requests that reached a model


@dataclass(frozen=True, slots=True)
class Recent:
    """What the alerts look at, of one answer: when it ended, on the monotonic clock, and how."""

    at: float
    seconds: float
    outcome: str
    tokens_per_s: float | None


class ServerMetrics:
    """See the module; for the event loop's thread."""

    def __init__(self, queue_length: Callable[[], int] = lambda: 0) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # series that nobody reads
        self.registry = CollectorRegistry()
        kinds: dict[str, Any] = {"registry": self.registry, "namespace": "gemma_edge"}
        self.requests = Counter("requests", "Requests by route and outcome", ["route", "outcome"], **kinds)
        self.rejections = Counter("rejections", "Requests refused, by reason", ["reason"], **kinds)
        self.tokens = Counter(
            "tokens", "Tokens of prompts (cached ones apart) and answers", ["kind"], **kinds
        )
        self.cache_hits = Counter(
            "cache_hits", "Answers whose prompt began with tokens in the cache", **kinds
        )
        self.seconds = Histogram(
            "request_seconds", "Whole requests", ["route"], buckets=SECONDS_BUCKETS, **kinds
        )
        self._ttft = Histogram("time_to_first_token_seconds", "First pieces", buckets=TTFT_BUCKETS, **kinds)
        self._gaps = Histogram("inter_token_seconds", "Between pieces", buckets=TOKEN_BUCKETS, **kinds)
        self.alerts = Gauge("alert", "1 while a threshold of the alerts is crossed", ["name"], **kinds)
        memory = Gauge("resident_memory_bytes", "RssAnon and RssFile", ["kind"], **kinds)
        memory.labels("anon").set_function(lambda: resident_memory().anon)
        memory.labels("file").set_function(lambda: resident_memory().file)
        Gauge("queue_length", "Requests that wait", **kinds).set_function(queue_length)
        if hottest() is not None:
            Gauge("temperature_celsius", "The hottest zone", **kinds).set_function(lambda: hottest() or 0.0)
        self.recent: deque[Recent] = deque(maxlen=MOST_RECENT)
        self.total = self.errors = 0
        self.first_piece = self._ttft.observe

    def next_pieces(self, seconds: float, count: int) -> None:
        """Observes the pieces of an answer that came in these seconds, evenly spread."""
        for _ in range(count):
            self._gaps.observe(seconds / count)

    def ended(self, exchange: Exchange) -> None:
        """Counts a request that ended."""
        self.total += 1
        self.errors += exchange.outcome == "error"
        self.requests.labels(exchange.route, exchange.outcome).inc()
        self.seconds.labels(exchange.route).observe(exchange.seconds)
        if exchange.outcome in ("refused", "busy"):
            self.rejections.labels(exchange.code or str(exchange.status)).inc()
        usage = exchange.completion.usage if exchange.completion else None
        if usage is not None:
            self.tokens.labels("prompt").inc(usage.prompt_tokens - usage.cached_tokens)
            self.tokens.labels("cached").inc(usage.cached_tokens)
            self.tokens.labels("answer").inc(usage.completion_tokens)
            self.cache_hits.inc(usage.cached_tokens > 0)
        if exchange.model is not None and exchange.outcome in ANSWERS:
            rate = usage.decode_tokens_per_s if usage else None
            self.recent.append(Recent(monotonic(), exchange.seconds, exchange.outcome, rate))

    def render(self) -> tuple[bytes, str]:
        """The text that Prometheus reads, and its type."""
        return generate_latest(self.registry), CONTENT_TYPE_LATEST
