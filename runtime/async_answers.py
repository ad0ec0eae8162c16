"""`AsyncAnswer`: an answer for asyncio, computed in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from gemma_edge.runtime.answers import Completion, Stream
from gemma_edge.runtime.errors import GemmaEdgeError
from gemma_edge.runtime.logprobs import TokenLogprob
from gemma_edge.runtime.request_queue import RequestQueue

if TYPE_CHECKING:
    from types import TracebackType

Item = str | Completion | BaseException
Result = TypeVar("Result")


class AsyncAnswer(AsyncIterator[str]):
    """An answer that can be awaited, or iterated over piece by piece.

        completion = await model.agenerate("Why is the sky blue?")
        async for piece in model.agenerate("And the sea?"):
            print(piece, end="")

    The work begins with the first await. Cancelling the task that waits for the answer ends the answer within
    one token; so do `cancel`, leaving an `async with` block, and dropping the object. The thread runs ahead
    of its reader: a slow one holds up nobody else.

    Args:
        begin: makes the stream; called in the thread.
        queue: where the request is going to wait.
    """

    def __init__(self, begin: Callable[[], Stream], queue: RequestQueue) -> None:
        self._begin, self._queue = begin, queue
        self._work: _Work | None = None
        self._completion: Completion | None = None

    @property
    def completion(self) -> Completion:
        """The whole answer.

        Raises:
            GemmaEdgeError: it has not ended.
        """
        if self._completion is None:
            raise GemmaEdgeError("the answer is not complete: await it, or read it to its end")
        return self._completion

    @property
    def logprobs(self) -> Sequence[TokenLogprob]:
        """Those of the tokens so far; empty unless they were asked for."""
        return () if self._work is None else self._work.logprobs

    def cancel(self) -> None:
        """Ends the answer; to be called in the loop's thread."""
        if self._work is not None:
            self._work.cancel()

    async def __anext__(self) -> str:
        """The next piece.

        Raises:
            As `Model.generate`.
        """
        if self._completion is not None:
            raise StopAsyncIteration
        work = self._started()
        item = await self._waiting(work.take())
        if isinstance(item, str):
            return item
        if isinstance(item, Completion):
            self._completion = item
            raise StopAsyncIteration
        work.arrived.append(item)  # for whoever asks again
        raise item

    async def pieces(self, pause_s: float) -> list[str]:
        """The next pieces: the first one at once, later all that came meanwhile; none at the end.

        A reader that writes each of these lists wakes up once every `pause_s`, however quick the model is.

        Args:
            pause_s: seconds from one call to the next; the end of the answer ends them early.

        Raises:
            As `Model.generate`.
        """
        if self._work is not None and self._completion is None:
            await self._waiting(self._work.pause(pause_s))
        try:
            first = await anext(self)
        except StopAsyncIteration:
            return []
        return [first, *self._started().ready()]

    def __await__(self) -> Generator[Any, None, Completion]:
        return self._whole().__await__()

    async def _whole(self) -> Completion:
        while await self.pieces(math.inf):
            pass
        return self.completion

    def _started(self) -> _Work:
        if self._work is None:
            self._work = _Work(self._begin, self._queue)
        return self._work

    async def _waiting(self, work: Awaitable[Result]) -> Result:
        """Waits; the cancellation of that ends the answer."""
        try:
            return await work
        except asyncio.CancelledError:
            self.cancel()
            raise

    async def __aenter__(self) -> AsyncAnswer:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        self.cancel()


class _Work:
    """The thread of an answer, and what it has sent: pieces, then a `Completion` or an error.

    The thread refers to this object and not to the `AsyncAnswer`, so that dropping that one is noticed.
    """

    def __init__(self, begin: Callable[[], Stream], queue: RequestQueue) -> None:
        self.arrived: deque[Item] = deque()
        self._loop = asyncio.get_running_loop()
        self._awake = asyncio.Event()
        self._awaited = False  # somebody waits for whatever comes next
        self._cancelled = threading.Event()
        self._stream: Stream | None = None
        with contextlib.ExitStack() as preparing:
            preparing.enter_context(queue.coming())
            threading.Thread(
                target=self._run, args=(begin, preparing.pop_all()), name="gemma-edge answer"
            ).start()

    @property
    def logprobs(self) -> Sequence[TokenLogprob]:
        return () if self._stream is None else self._stream.logprobs

    async def take(self) -> Item:
        """The next item."""
        while not self.arrived:
            self._awake.clear()
            self._awaited = True
            if not self.arrived:  # nothing came in between
                await self._awake.wait()
        self._awaited = False
        return self.arrived.popleft()

    def ready(self) -> list[str]:
        """The pieces that are there."""
        found: list[str] = []
        while self.arrived and isinstance(piece := self.arrived[0], str):
            found.append(piece)
            self.arrived.popleft()
        return found

    async def pause(self, seconds: float) -> None:
        """Waits so long, or until the answer ends: pieces wake nobody."""
        self._awake.clear()
        if self.arrived and not isinstance(self.arrived[-1], str):
            return
        timer = self._loop.call_later(seconds, self._awake.set)
        try:
            await self._awake.wait()
        finally:
            timer.cancel()

    def cancel(self) -> None:
        self._cancelled.set()
        if self._stream is not None:
            self._stream.cancel()

    def _run(self, begin: Callable[[], Stream], preparing: contextlib.ExitStack) -> None:
        try:
            with preparing:
                self._stream = begin()
            if self._cancelled.is_set():
                self._stream.cancel()
            for piece in self._stream:
                self._send(piece)
            self._send(self._stream.completion)
        except BaseException as error:
            self._send(error)

    def _send(self, item: Item) -> None:
        self.arrived.append(item)
        if self._loop.is_closed():  # nobody waits any more
            self.cancel()
        elif self._awaited or not isinstance(item, str):
            self._awaited = False
            with contextlib.suppress(RuntimeError):  # it was closed just now
                self._loop.call_soon_threadsafe(self._awake.set)  # takes as long as a quick model's token
