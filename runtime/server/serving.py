"""Runs the server: sockets, signals, the end without losing an answer."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
from collections.abc import Callable, Generator, Mapping
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from gemma_edge.runtime.engines.cores import share_heap_arenas
from gemma_edge.runtime.errors import GemmaEdgeError
from gemma_edge.runtime.server.api_error import ApiError
from gemma_edge.runtime.server.application import Application
from gemma_edge.runtime.server.model_pool import ServedModel
from gemma_edge.runtime.server.server_options import ServerOptions

LOG = logging.getLogger("gemma_edge.server")
FIRST_FD = 3  # systemd's protocol of socket units
GRACE_S = 0.5  # for a request that was sent before its client saw the end
LAST_S = 2.0  # for the readers of answers that were ended to take their errors
BACKLOG = 128
CONTROL = "\0"


class BoundedProtocol(H11Protocol):
    """uvicorn's protocol, with a limit on the time of headers, and an end that loses no request.

    Attributes:
        header_seconds: that a request's line and headers may take.
        ending: the server ends: an open connection may bring one request more, at once.
    """

    header_seconds = 10.0
    ending = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._late = self.loop.call_later(GRACE_S if self.ending else self.header_seconds, self._end)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None:
            self._late.cancel()
            self.cycle.keep_alive = self.cycle.keep_alive and not self.ending

    def connection_lost(self, exc: Exception | None) -> None:
        self._late.cancel()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        if self.cycle is not None and not self.cycle.response_complete:
            super().shutdown()
        else:  # a request may be on its way
            self._late.cancel()
            self._late = self.loop.call_later(GRACE_S, self._end)

    def _end(self) -> None:
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()


class Serving(uvicorn.Server):
    """The server of an application.

    Args:
        app: what is served.
        find_models: the bundles as they are now, for SIGHUP; raises BundleError.
        ready: is told the URL when the server listens.
    """

    def __init__(
        self,
        app: Application,
        find_models: Callable[[], Mapping[str, ServedModel]],
        ready: Callable[[str], None] = lambda url: None,
    ) -> None:
        self.app, self._find_models, self._ready = app, find_models, ready
        options = app.options

        class Protocol(BoundedProtocol):
            header_seconds = options.limits.header_seconds

        self._protocol = Protocol
        super().__init__(
            uvicorn.Config(
                app,
                http=self._protocol,
                ws="none",
                loop="asyncio",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=bool(options.trusted_proxies),
                forwarded_allow_ips=list(options.trusted_proxies),
                limit_concurrency=options.connections,
                h11_max_incomplete_event_size=options.limits.header_bytes,
                timeout_graceful_shutdown=int(options.drain_s + LAST_S) + 1,
            )
        )
        self._reloading: asyncio.Task[None] | None = None

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """Serves until a signal ends it.

        Raises:
            ApiError: the model cannot be loaded.
        """
        if len(self.app.pool.models) == 1:
            await self.app.pool.preload()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        listening = self.servers[0].sockets[0]
        self._ready(url_of(listening))
        notify("READY=1")

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        loop = asyncio.get_running_loop()
        handlers: dict[int, Callable[[], None]] = {
            signal.SIGTERM: self.drain,
            signal.SIGINT: self.drain,
            signal.SIGHUP: self.reload,
        }
        for number, handler in handlers.items():
            loop.add_signal_handler(number, handler)
        try:
            yield
        finally:
            for number in handlers:
                loop.remove_signal_handler(number)

    def drain(self) -> None:
        """Finishes what runs and refuses the rest; a second signal ends at once."""
        if self.should_exit:
            self.app.running.end()
            self.force_exit = True
            return
        LOG.info("ending: %d answers run", len(self.app.running))
        notify("STOPPING=1")
        self.should_exit = self.app.health.draining = self._protocol.ending = True
        asyncio.get_running_loop().call_later(self.app.options.drain_s, self.app.running.end)

    def reload(self) -> None:
        """Takes the bundles as they are now, without losing a request; a damaged bundle changes nothing."""
        if self._reloading is None or self._reloading.done():
            self._reloading = asyncio.ensure_future(self._reload())

    async def _reload(self) -> None:
        try:
            models = await asyncio.to_thread(self._find_models)
            await self.app.pool.reload(models)
            LOG.info("reloaded: %s", ", ".join(models))
        except (GemmaEdgeError, ApiError, OSError) as error:
            LOG.error("not reloaded: %s", error)


def run_server(serving: Serving) -> None:
    """Runs until a signal ends it.

    Raises:
        GemmaEdgeError: the address is in use, or the model cannot be loaded.
    """
    share_heap_arenas()  # each answer has a thread of its own
    sockets = inherited_sockets() or [listen(serving.app.options)]
    try:
        asyncio.run(serving.serve(sockets))
    except ApiError as error:
        raise GemmaEdgeError(error.message) from None


def listen(options: ServerOptions) -> socket.socket:
    """A socket that listens. Raises GemmaEdgeError."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((options.host, options.port))
        made.listen(BACKLOG)
    except OSError as error:
        made.close()
        where = f"{options.host}:{options.port}"
        raise GemmaEdgeError(f"cannot listen on {where}: {error.strerror} (--host, --port)") from None
    return made


def inherited_sockets(environ: Mapping[str, str] = os.environ) -> list[socket.socket]:
    """The sockets that systemd passes to a unit with a socket unit; none without one."""
    if environ.get("LISTEN_PID") != str(os.getpid()) or not environ.get("LISTEN_FDS", "").isdecimal():
        return []
    return [socket.socket(fileno=FIRST_FD + n) for n in range(int(environ["LISTEN_FDS"]))]


def notify(state: str, environ: Mapping[str, str] = os.environ) -> None:
    """Tells systemd the state of a unit of Type=notify; nothing happens elsewhere."""
    address = environ.get("NOTIFY_SOCKET")
    if not address:
        return
    path = CONTROL + address[1:] if address.startswith("@") else address
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as made:
        made.sendto(state.encode(), path)


def url_of(listening: socket.socket) -> str:
    """Where a browser finds a socket."""
    if listening.family == socket.AF_UNIX:
        return f"unix:{listening.getsockname()}"
    host, port = listening.getsockname()[:2]
    if host in ("0.0.0.0", "::"):
        host = socket.gethostname()
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/"


def find_bundles(path: Path, is_bundle: Callable[[Path], bool]) -> dict[str, Path]:
    """The bundles directly below a folder, by name."""
    found = sorted(entry for entry in path.iterdir() if not entry.name.startswith(".") and is_bundle(entry))
    return {served_name(entry): entry for entry in found}


def served_name(path: Path) -> str:
    """A bundle's name for clients: its folder's, or its file's without the suffix."""
    return path.stem if path.is_file() else path.name
