"""`ServerOptions`: how `serve` behaves; `Limits`: what one request may take."""

from __future__ import annotations

from dataclasses import dataclass, field

from gemma_edge.runtime.request_queue import DEFAULT_LIMIT


@dataclass(frozen=True)
class Limits:
    """What one request may take. Each is enforced while the request is read, before the engine sees it.

    Attributes:
        body_bytes: of a request, headers not counted.
        body_seconds: to send it in.
        header_bytes, header_seconds: of the request's line and headers.
        values: members and elements that its JSON may have, and so the memory that it parses to.
        messages: of a chat.
        parts: images, recordings and texts, of one message.
        text_characters: of all messages together; default: 64 for each token of the model's context.
        depth: of nested objects and lists: schemas, arguments of tools.
        tools: that may be offered.
        image_pixels: of one image, by its header.
        audio_seconds: of one recording.
        max_tokens: of an answer; None for what the context holds.
    """

    body_bytes: int = 32 << 20
    body_seconds: float = 30.0
    header_bytes: int = 16 << 10
    header_seconds: float = 10.0
    values: int = 500_000
    messages: int = 50
    parts: int = 32
    text_characters: int | None = None
    depth: int = 32
    tools: int = 32
    image_pixels: int = 16 << 20
    audio_seconds: float = 600.0
    max_tokens: int | None = None


@dataclass(frozen=True)
class Rate:
    """At most `requests` within any `seconds`."""

    requests: int
    seconds: float


@dataclass(frozen=True)
class ServerOptions:
    """How the server behaves.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        hosts: names that a request's Host header may have, beside this machine's own.
        origins: web origins, beside the server's own, whose pages may use it ("https://app.example").
        rate: of POST requests, for each client that has none of its own; None for no limit.
        queue: requests that wait for a model; further ones get 429.
        deadline_s: an answer that is not complete by then ends.
        drain_s: after SIGTERM, answers that are not complete by then end.
        keepalive_s: a stream that waits sends a comment so often.
        degraded_after_s: an answer that takes longer makes /health say "degraded".
        ceiling: bytes of anonymous memory that the server should stay below; None for the plan's.
        connections: open at a time; further ones get 503.
        trusted_proxies: addresses whose X-Forwarded-For and -Proto count.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    hosts: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    rate: Rate | None = None
    queue: int = DEFAULT_LIMIT
    deadline_s: float = 600.0
    drain_s: float = 30.0
    keepalive_s: float = 5.0
    degraded_after_s: float = 5.0
    ceiling: int | None = None
    connections: int = 256
    trusted_proxies: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)
