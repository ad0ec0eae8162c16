"""A plain HTTP client for load: asyncio streams, connections that are kept, and answers that can be left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

LIMIT = 1 << 22  # bytes of a line


@dataclass
class Response:
    """What came back.

    Attributes:
        body: of a stream: the data of its events; otherwise the JSON.
        first_s, last_s: seconds from the request to the first and to the last piece of text.
        complete: False for one that was left.
    """

    status: int = 0
    body: list[Any] = field(default_factory=list)
    first_s: float | None = None
    last_s: float = 0.0
    seconds: float = 0.0
    complete: bool = False


class LoadClient:
    """One client, one connection at a time."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ask(
        self, path: str, body: bytes, *, leave_after: int | None = None, length: int | None = None
    ) -> Response:
        """Sends a request and reads its response.

        Args:
            leave_after: events of a stream to read before the connection is closed; 0 for none at all.
            length: what Content-Length says; default: the truth.
        """
        reader, writer = await self._connection()
        head = (
            f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
        )
        started = time.perf_counter()
        writer.write(head.encode() + body)
        await writer.drain()
        response = Response()
        if leave_after == 0:
            self.close()
            return response
        response.status, headers = await self._head(reader)
        if "content-length" in headers:
            data = await reader.readexactly(int(headers["content-length"]))
            response.body = [json.loads(data)]
            response.complete = True
        else:
            async for item in self._events(reader):
                response.body.append(item)
                if _has_text(item):
                    response.last_s = time.perf_counter() - started
                    response.first_s = response.first_s or response.last_s
                if leave_after is not None and len(response.body) >= leave_after:
                    self.close()
                    return response
            response.complete = True
        response.seconds = time.perf_counter() - started
        if headers.get("connection") == "close":
            self.close()
        return response

    def close(self) -> None:
        """Closes the connection; the next request opens another."""
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._reader is None or self._writer is None or self._reader.at_eof() or self._writer.is_closing():
            self.close()
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port, limit=LIMIT)
        return self._reader, self._writer

    async def _head(self, reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
        status = int((await reader.readline()).split()[1])
        headers = {}
        while (line := await reader.readline()) not in (b"\r\n", b""):
            name, _, value = line.decode("latin-1").partition(":")
            headers[name.strip().lower()] = value.strip()
        return status, headers

    async def _events(self, reader: asyncio.StreamReader) -> AsyncIterator[Any]:
        """The data of a chunked stream's events; the server sends each event in one chunk or several."""
        held = b""
        while size := int((await reader.readline()).strip() or b"0", 16):
            held += await reader.readexactly(size)
            await reader.readline()
            *events, held = held.split(b"\n\n")
            for event in events:
                if event.startswith(b"data: {"):
                    yield json.loads(event[6:])
        with contextlib.suppress(asyncio.IncompleteReadError):
            await reader.readline()


def _has_text(event: Any) -> bool:
    choices = event.get("choices") or [{}]
    return bool(choices[0].get("delta", {}).get("content") or choices[0].get("text"))
