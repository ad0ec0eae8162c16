"""`AnswerResponse`: sends a model's answer, whole or in pieces, and ends it when its reader leaves."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Sequence
from contextlib import aclosing
from typing import Any

from starlette.types import Receive, Scope, Send

from gemma_edge.runtime.answers import Completion
from gemma_edge.runtime.engines.cores import release_free_memory
from gemma_edge.runtime.logprobs import TokenLogprob
from gemma_edge.runtime.server.answer_format import AnswerFormat, event
from gemma_edge.runtime.server.api_error import ApiError, as_api_error
from gemma_edge.runtime.server.asked import Asked
from gemma_edge.runtime.server.exchange import Exchange
from gemma_edge.runtime.server.model_pool import ModelPool, ServedModel
from gemma_edge.runtime.server.server_metrics import ServerMetrics
from gemma_edge.runtime.server.server_options import ServerOptions

LOG = logging.getLogger("gemma_edge.server")
WAITING = b": waiting\n\n"
TOGETHER_S = 0.025  # pieces that come within it are one event: nobody reads more than forty events a second
IDLE_S = 0.5
STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-store"),
    (b"x-accel-buffering", b"no"),  # nginx would collect the pieces
]
DRAINED = ApiError(503, "the server is ending", code="shutting_down", headers={"Retry-After": "2"})
LATE = ApiError(
    503, "the model was busy until the deadline", code="deadline_exceeded", headers={"Retry-After": "5"}
)


class Running:
    """The answers that are being computed, so that the end of the server can end them.

    When there were none for a while, memory that they freed goes back to the system.
    """

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[Any]] = set()
        self._tidying: asyncio.TimerHandle | None = None
        self.ended = False

    def __len__(self) -> int:
        return len(self._tasks)

    def end(self) -> None:
        """Cancels all of them: their readers get the error DRAINED."""
        self.ended = True
        for task in self._tasks:
            task.cancel()

    async def unless_left(self, receive: Receive, work: Coroutine[Any, Any, None]) -> bool:
        """Does the work; cancels it when the client leaves, and returns False."""
        task, left = asyncio.ensure_future(work), asyncio.ensure_future(_left(receive))
        self._tasks.add(task)
        self._tidy_when_idle()
        try:
            await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                return False
            task.result()
            return True
        finally:
            self._tasks.discard(task)
            for each in (task, left):
                each.cancel()
            await asyncio.gather(task, left, return_exceptions=True)
            self._tidy_when_idle()

    def _tidy_when_idle(self) -> None:
        if self._tidying:
            self._tidying.cancel()
        idle = not self._tasks
        self._tidying = asyncio.get_running_loop().call_later(IDLE_S, release_free_memory) if idle else None


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class AnswerResponse:
    """An ASGI application that answers one request.

    Args:
        served: the model that is asked, one of `pool`.
        form: writes the answer as its route has it.
        exchange: learns what became of the request.
        running: knows this answer while it is computed.
    """

    def __init__(
        self,
        pool: ModelPool,
        served: ServedModel,
        asked: Asked,
        form: AnswerFormat,
        exchange: Exchange,
        *,
        options: ServerOptions,
        metrics: ServerMetrics,
        running: Running,
    ) -> None:
        self._pool, self._served, self._asked, self._form = pool, served, asked, form
        self._exchange, self._options, self._metrics, self._running = exchange, options, metrics, running
        self._completion: Completion | None = None
        self._logprobs: Sequence[TokenLogprob] = ()
        self._sent_logprobs = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ApiError if nothing was sent yet."""
        work = self._stream(send) if self._asked.stream else self._send_whole(send)
        if not await self._running.unless_left(receive, work):
            self._exchange.outcome = "client_left"

    async def _send_whole(self, send: Send) -> None:
        async with aclosing(self._pieces()) as pieces:
            await self._guarded(self._read(pieces))
        assert self._completion is not None
        await send_json(send, self._form.whole(self._completion))
        self._exchange.status = 200

    async def _read(self, pieces: AsyncGenerator[str, None]) -> None:
        async for _ in pieces:
            pass

    async def _guarded(self, work: Awaitable[Any]) -> Any:
        """The work; its cancellation by the end of the server is an ApiError."""
        try:
            return await work
        except asyncio.CancelledError:
            if self._running.ended:
                raise DRAINED from None
            raise

    async def _stream(self, send: Send) -> None:
        opened = False

        async def open_stream() -> None:
            nonlocal opened
            if not opened:
                opened = True
                self._exchange.status = 200
                await send({"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS})

        async def write(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        async def waiting() -> None:
            await open_stream()
            await write(WAITING)

        async with aclosing(self._pieces()) as pieces:
            try:
                await self._guarded(self._send_pieces(pieces, open_stream, write, waiting))
            except (ApiError, Exception) as error:
                if not opened:
                    raise
                failed = as_api_error(error)
                self._exchange.code = failed.code
                self._exchange.outcome = "draining" if failed is DRAINED else "error"
                if failed.status == 500:
                    LOG.error("an answer failed", exc_info=error)
                await write(event(failed.body))
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _send_pieces(
        self,
        pieces: AsyncGenerator[str, None],
        open_stream: Callable[[], Awaitable[None]],
        write: Callable[[bytes], Awaitable[None]],
        waiting: Callable[[], Awaitable[None]],
    ) -> None:
        first = await self._first(pieces, waiting)
        await open_stream()
        head = self._form.first()
        if first is not None:
            await write(head + self._form.piece(first, self._new_logprobs()))
            async for piece in pieces:
                await write(self._form.piece(piece, self._new_logprobs()))
        else:
            await write(head)
        assert self._completion is not None
        await write(self._form.last(self._completion, self._new_logprobs()))

    async def _first(
        self, pieces: AsyncGenerator[str, None], waiting: Callable[[], Awaitable[None]]
    ) -> str | None:
        """The first piece, None if there is none; comments keep the connection alive until then."""
        coming = asyncio.ensure_future(anext(pieces, None))
        try:
            while not (await asyncio.wait((coming,), timeout=self._options.keepalive_s))[0]:
                await waiting()
            return coming.result()
        finally:
            if not coming.done():
                coming.cancel()
                await asyncio.gather(coming, return_exceptions=True)

    async def _pieces(self) -> AsyncGenerator[str, None]:
        """The answer's pieces, quick ones joined; afterwards `_completion` is there.

        Raises:
            ApiError, GemmaEdgeError: there is no answer.
        """
        exchange = self._exchange
        options = {**self._asked.options, "client": exchange.client, "timeout": self._options.deadline_s}
        pause_s = TOGETHER_S if self._asked.stream else math.inf
        async with (
            self._pool.use(self._served) as model,
            model.agenerate(self._asked.prompt, **options) as answer,
        ):
            last = 0.0
            while pieces := await answer.pieces(pause_s):
                now = time.perf_counter()
                if exchange.ttft_s is None:
                    exchange.ttft_s = now - exchange.started
                    self._metrics.first_piece(exchange.ttft_s)
                else:
                    self._metrics.next_pieces(now - last, len(pieces))
                last = now
                self._logprobs = answer.logprobs  # grows in the answer's thread
                yield "".join(pieces)
            self._completion = completion = answer.completion
            self._logprobs = completion.logprobs or ()
        exchange.answered(completion)
        if completion.finish_reason == "timeout" and not completion.usage.completion_tokens:
            raise LATE

    def _new_logprobs(self) -> list[TokenLogprob]:
        start, self._sent_logprobs = self._sent_logprobs, len(self._logprobs)
        return list(self._logprobs[start : self._sent_logprobs])


async def send_json(send: Send, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
    """Sends a value as JSON."""
    body = json.dumps(data, ensure_ascii=False).encode()
    made = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    pairs = [(name.lower().encode(), value.encode("latin-1")) for name, value in made.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
