"""`Gate`: which requests are let in, by Host, Origin, key and rate."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Collection
from http.cookies import CookieError, SimpleCookie
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from gemma_edge.runtime.errors import printable
from gemma_edge.runtime.server.api_error import ApiError, too_many
from gemma_edge.runtime.server.exchange import Exchange
from gemma_edge.runtime.server.keyring import Key, Keyring, presented
from gemma_edge.runtime.server.rate_limit import SlidingWindow
from gemma_edge.runtime.server.server_options import Rate, ServerOptions

COOKIE = "gemma_edge_session"
WRONG_KEYS = Rate(30, 60)  # of one address
METHODS, HEADERS = "GET, POST, OPTIONS", "authorization, content-type"
PREFLIGHT_S = "600"


class Gate:
    """Checks a request before `app` sees it; raises ApiError for one that stays out.

    What it finds out is in the scope: "key" (a `Key` or None), and the client of "exchange". To an allowed
    page of another site it adds "response_headers".

    Args:
        public: paths that need no key.
        window: counts requests; default: a new one.
    """

    def __init__(
        self,
        app: ASGIApp,
        options: ServerOptions,
        keyring: Keyring,
        *,
        public: Collection[str] = (),
        window: SlidingWindow | None = None,
    ) -> None:
        self.app, self.options, self.keyring, self.public = app, options, keyring, frozenset(public)
        self._window = window or SlidingWindow()
        self._hosts = host_names(options)
        self._loopback = is_loopback(options.host)
        self._origins = frozenset(origin.rstrip("/").lower() for origin in options.origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange: Exchange = scope["exchange"]
        exchange.client = address(scope)
        headers = Headers(scope=scope)
        most = self.options.limits.header_bytes
        if sum(len(name) + len(value) for name, value in headers.raw) + len(scope["raw_path"]) > most:
            raise ApiError(431, f"the headers are larger than {most:,} bytes", code="headers_too_large")
        self._check_host(headers)
        foreign = self._foreign_origin(headers, scope)
        if foreign is not None:
            scope["response_headers"] |= {
                "access-control-allow-origin": foreign,
                "vary": "Origin",
                "cross-origin-resource-policy": "cross-origin",
            }
            if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
                await _preflight(send)
                return
        key = self._key(headers, scope)
        scope["key"] = key
        if key:
            exchange.client = key.name
        rate = (key.rate if key else None) or self.options.rate
        counts = scope["method"] == "POST"  # the page's files and its looks at /health do not
        if rate and counts and (wait := self._window.wait(exchange.client, rate)):
            raise too_many(
                f"more than {rate.requests} requests in {rate.seconds:g} s", "rate_limit_exceeded", wait
            )
        await self.app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        """DNS rebinding: another site's name may lead a browser here, but not by one of ours."""
        hosts = headers.getlist("host")
        name = host_of(hosts[0]) if len(hosts) == 1 else None
        if name is None or not (name in self._hosts or self._is_own_address(name)):
            shown = printable(", ".join(hosts), 80) or "none"
            raise ApiError(
                403, f"Host {shown} is not one of this server's names (--allow-host)", code="host_not_allowed"
            )

    def _is_own_address(self, name: str) -> bool:
        try:
            found = ipaddress.ip_address(name)
        except ValueError:
            return False
        return found.is_loopback if self._loopback else True  # an address is no name that DNS could rebind

    def _foreign_origin(self, headers: Headers, scope: Scope) -> str | None:
        """The allowed origin of another site's page; None for our own, and for what is no browser.

        Raises:
            ApiError: the page of another site asks.
        """
        origin = headers.get("origin")
        if origin is None:
            return None
        if origin.lower() in self._origins:
            return origin
        try:
            parts = urlsplit(origin)
            own = parts.scheme in ("http", "https") and parts.netloc.lower() == headers["host"].lower()
        except ValueError:
            own = False
        if not own:
            raise ApiError(
                403,
                f"pages of {printable(origin, 80)} may not use this server (--cors)",
                code="origin_not_allowed",
            )
        return None

    def _key(self, headers: Headers, scope: Scope) -> Key | None:
        if not self.keyring:
            return None
        given, cookie = presented(headers), _cookie(headers)
        found = self.keyring.find(given) if given is not None else None
        if found is None and given is None and cookie is not None:
            found = self.keyring.find_cookie(cookie)
        if found is not None or scope["path"] in self.public:
            return found
        client = address(scope)
        if self._window.full(f"wrong {client}", WRONG_KEYS):
            raise too_many("too many wrong keys from this address", "too_many_wrong_keys", WRONG_KEYS.seconds)
        if given is not None:
            self.wrong_key(client)
        text = "this key is not known" if given is not None else "a key is needed: Authorization: Bearer KEY"
        raise ApiError(401, text, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})

    def wrong_key(self, client: str) -> None:
        """Counts a wrong key of an address; further ones are not even looked at for a while."""
        if self._window.wait(f"wrong {client}", WRONG_KEYS):
            raise too_many("too many wrong keys from this address", "too_many_wrong_keys", WRONG_KEYS.seconds)


def host_names(options: ServerOptions) -> frozenset[str]:
    """Names that a request's Host may have."""
    names = {"localhost", options.host.lower(), *(name.lower() for name in options.hosts)}
    if not is_loopback(options.host):
        own = socket.gethostname().lower()
        names |= {own, f"{own.partition('.')[0]}.local"}
    return frozenset(names)


def is_loopback(host: str) -> bool:
    """Whether a server that listens there is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def host_of(header: str) -> str | None:
    """The name in a Host header, without its port; None for one that is malformed."""
    name, port = header, ""
    if header.startswith("["):
        name, bracket, port = header[1:].partition("]")
        port = port.removeprefix(":") if bracket else "x"
    elif ":" in header:
        name, _, port = header.rpartition(":")
    if port and not (port.isascii() and port.isdecimal() and len(port) <= 5):
        return None
    return name.lower().removesuffix(".") or None


def address(scope: Scope) -> str:
    """Who asks, without a port; "local" for a Unix socket."""
    client = scope.get("client")
    return str(client[0]) if client else "local"


def _cookie(headers: Headers) -> str | None:
    try:
        morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return None
    return morsel.value if morsel else None


async def _preflight(send: Send) -> None:
    headers = {
        "access-control-allow-methods": METHODS,
        "access-control-allow-headers": HEADERS,
        "access-control-max-age": PREFLIGHT_S,
    }
    made = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": 204, "headers": made})
    await send({"type": "http.response.body", "body": b""})
