"""`Exchange`: one request and what became of it; its line in the access log."""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_edge.runtime.answers import Completion
from gemma_edge.runtime.errors import GemmaEdgeError, printable
from gemma_edge.runtime.host.process_memory import resident_memory

LOG_MODE = 0o600


@dataclass
class Exchange:
    """One request.

    Attributes:
        route: the path that matched; "other" for one that none did.
        client: the name of its key, or its address.
        outcome: "ok", "refused" (the request is wrong), "busy" (429), "client_left", "timeout", "error", or
            "draining" (the server is ending).
        ttft_s: from the request's arrival to the first piece of its answer.
    """

    route: str = "other"
    client: str = ""
    started: float = field(default_factory=time.perf_counter)
    time: float = field(default_factory=time.time)
    status: int = 0
    outcome: str = "ok"
    code: str | None = None
    model: str | None = None
    prompt_sha256: str | None = None
    completion: Completion | None = None
    ttft_s: float | None = None
    seconds: float = 0.0

    def hash_prompt(self, prompt: Any) -> None:
        """Keeps the hash of a prompt, and nothing else of it."""
        digest = hashlib.sha256()
        for part in _parts(prompt):
            digest.update(len(part).to_bytes(8, "little") + part)
        self.prompt_sha256 = digest.hexdigest()

    def answered(self, completion: Completion) -> None:
        self.completion = completion
        if completion.finish_reason == "timeout":
            self.outcome = "timeout"

    def end(self) -> None:
        """Sets `seconds`, and the outcome where nobody did."""
        self.seconds = time.perf_counter() - self.started
        if self.outcome == "ok" and self.code is not None:
            self.outcome = "busy" if self.status == 429 else "refused" if self.status < 500 else "error"

    def line(self) -> dict[str, Any]:
        """The line of the access log: no text of the prompt or the answer is in it."""
        usage = self.completion.usage if self.completion else None
        return {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(self.time))
            + f".{int(self.time % 1 * 1000):03}Z",
            "route": self.route,
            "client": self.client,
            "model": self.model,
            "status": self.status,
            "outcome": self.outcome,
            "code": self.code,
            "seconds": round(self.seconds, 4),
            "ttft_s": None if self.ttft_s is None else round(self.ttft_s, 4),
            "prompt_tokens": usage and usage.prompt_tokens,
            "cached_tokens": usage and usage.cached_tokens,
            "completion_tokens": usage and usage.completion_tokens,
            "tokens_per_s": usage and usage.decode_tokens_per_s and round(usage.decode_tokens_per_s, 2),
            "finish_reason": self.completion and self.completion.finish_reason,
            "prompt_sha256": self.prompt_sha256,
            "rss_anon_bytes": resident_memory().anon,
        }


def _parts(value: Any) -> list[bytes]:
    """A prompt as bytes: texts, attachments and structure."""
    if isinstance(value, bytes):
        return [value]
    if isinstance(value, dict):
        return [b"{", *(part for item in value.items() for part in _parts(item))]
    if isinstance(value, list | tuple):
        return [b"[", *(part for item in value for part in _parts(item))]
    return [str(value).encode("utf-8", "surrogatepass")]


class AccessLog:
    """A file that gets a line of JSON for each request. Only its owner may read it.

    Raises:
        GemmaEdgeError: the file cannot be opened.
    """

    def __init__(self, path: str | Path) -> None:
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, LOG_MODE)
        except OSError as error:
            raise GemmaEdgeError(f"--access-log {printable(path)}: {error.strerror}") from None
        self._file = open(descriptor, "ab", buffering=0)  # noqa: SIM115 (it stays open)
        self._lock = threading.Lock()

    def write(self, exchange: Exchange) -> None:
        line = json.dumps(exchange.line(), separators=(",", ":")).encode() + b"\n"
        with self._lock:
            self._file.write(line)

    def close(self) -> None:
        self._file.close()
