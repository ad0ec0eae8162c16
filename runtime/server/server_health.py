"""What /health says: whether the server answers, how quickly, and in how much memory."""

from __future__ import annotations

import time
from typing import Any

from gemma_edge.runtime.host.process_memory import resident_memory
from gemma_edge.runtime.host.temperature import hottest
from gemma_edge.runtime.server.exchange import Exchange
from gemma_edge.runtime.server.model_pool import ModelPool
from gemma_edge.runtime.server.server_options import ServerOptions

# What the server adds to the plan of a bundle: its packages, connections, requests being read.
SERVER_BYTES = 48 << 20


class ServerHealth:
    """Remembers the last answer, and tells how the server is."""

    def __init__(self, options: ServerOptions, pool: ModelPool) -> None:
        self._options, self._pool = options, pool
        self._started = time.monotonic()
        self._last: Exchange | None = None
        self._failed: str | None = None
        self.draining = False

    def ended(self, exchange: Exchange) -> None:
        """Takes note of a request that reached a model."""
        if exchange.model is None or exchange.outcome not in ("ok", "error", "timeout"):
            return
        self._last = exchange
        self._failed = exchange.code or "error" if exchange.outcome == "error" else None

    @property
    def ready(self) -> bool:
        """May a supervisor send requests here?"""
        return not self.draining and bool(self._pool.loaded or len(self._pool.models) > 1)

    @property
    def ceiling(self) -> int:
        """Bytes of anonymous memory that the server should stay below: the plans of the loaded models."""
        if self._options.ceiling is not None:
            return self._options.ceiling
        return SERVER_BYTES + (self._pool.need or self._pool.default.need)

    def report(self, *, requests: int, errors: int) -> dict[str, Any]:
        """The JSON of /health."""
        memory, last = resident_memory(), self._last
        usage = last.completion.usage if last and last.completion else None
        bad, slow = self._problems(memory.anon)
        queues = [served.model.queue for served in self._pool.loaded if served.model is not None]
        return {
            "status": "unhealthy" if bad else "degraded" if slow else "healthy",
            "reasons": bad + slow,
            "model": self._pool.default.name,
            "model_loaded": bool(self._pool.loaded),
            "last_response_s": last and round(last.seconds, 4),
            "memory": {
                "rss_anon_bytes": memory.anon,
                "rss_file_bytes": memory.file,
                "ceiling_bytes": self.ceiling,
            },
            "queue": {
                "running": sum(queue.busy for queue in queues),
                "waiting": sum(queue.waiting for queue in queues),
                "limit": self._options.queue,
            },
            "requests": requests,
            "errors": errors,
            "temperature_c": hottest(),
            "tokens_per_s": usage and usage.decode_tokens_per_s,
            "uptime_s": round(time.monotonic() - self._started, 1),
        }

    def _problems(self, anon: int) -> tuple[list[str], list[str]]:
        """Reasons to be unhealthy, and reasons to be degraded."""
        bad, slow = [], []
        if self.draining:
            bad.append("the server is ending")
        elif not self.ready:
            bad.append("no model is loaded")
        if self._failed:
            bad.append(f"the last answer failed: {self._failed}")
        if self._last and self._last.seconds > self._options.degraded_after_s:
            slow.append(f"the last answer took {self._last.seconds:.1f} s")
        if anon > self.ceiling:
            slow.append("the memory is above the ceiling")
        return bad, slow
