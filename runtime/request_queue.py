"""`RequestQueue`: whose turn it is at a model that gives one answer at a time."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Callable, Iterator

from gemma_edge.runtime.errors import BusyError, UsageError

DEFAULT_LIMIT = 16
POLL_S = 0.05  # how late a request that waits sees that it was cancelled
FIRST_SHARE, SHARE = 8, 32  # tokens of an answer's first turn, and of each further one


class RequestQueue:
    """Lets one request in at a time; the others wait, each in its own thread.

    Clients take turns, however many requests each of them has. The requests of one client keep their order.

    Args:
        limit: most requests that wait; 0 refuses a second request at once.
        per_client: most of them that are one client's; default: `limit`.
        shared: answers take turns, too: while others wait, one is interrupted after its first tokens, and
            again and again later. So each of them begins soon; what they take together grows by the copies
            of KV caches. Default: an answer keeps its turn until it ends.

    Raises:
        UsageError: a limit is negative.
    """

    def __init__(
        self, limit: int = DEFAULT_LIMIT, per_client: int | None = None, *, shared: bool = False
    ) -> None:
        if limit < 0 or (per_client is not None and per_client < 0):
            raise UsageError(f"queue must be 0 or more, not {min(limit, per_client or 0)}")
        self.limit, self.per_client = limit, limit if per_client is None else per_client
        self.shared = shared
        self._changed = threading.Condition()
        self._waiting: dict[str, deque[object]] = {}  # tickets by client; the first client is next
        self._inside: object | None = None  # the ticket of the request that was let in
        self._thread: int | None = None
        self._client = ""
        self._coming = 0

    @property
    def waiting(self) -> int:
        """Requests that wait."""
        return sum(self.lengths.values())

    @property
    def lengths(self) -> dict[str, int]:
        """Requests that wait, by client, next client first."""
        with self._changed:
            return {client: len(tickets) for client, tickets in self._waiting.items()}

    @property
    def busy(self) -> bool:
        """Is a request inside?"""
        return self._inside is not None

    def enter(self, client: str = "", cancelled: Callable[[], bool] = lambda: False) -> bool:
        """Waits for this request's turn; `leave` ends the turn.

        Args:
            cancelled: is asked while the request waits; True ends that.

        Returns:
            False if it was cancelled: then there is no turn to end.

        Raises:
            BusyError: too many requests wait, or the turn is this thread's own.
        """
        ticket = object()
        with self._changed:
            if self._inside is None:
                self._let_in(ticket, client)
            else:
                self._check_room(client)
                if not self._wait(ticket, client, cancelled):
                    return False
            self._thread = threading.get_ident()
        return True

    def is_over(self, tokens: int) -> bool:
        """Whether an answer of so many tokens is to give way to a request that waits."""
        due = self.shared and tokens >= FIRST_SHARE and (tokens - FIRST_SHARE) % SHARE == 0
        return due and bool(self._waiting)

    def give_way(self, client: str = "", cancelled: Callable[[], bool] = lambda: False) -> bool:
        """Ends the turn of the request inside, if another one waits, and waits for its next turn.

        Returns:
            False if it was cancelled meanwhile: then there is no turn to end.
        """
        with self._changed:
            if not self._waiting:
                return True
            self.leave()
            if not self._wait(object(), client, cancelled):
                return False
            self._thread = threading.get_ident()
        return True

    def leave(self) -> None:
        """Ends the turn of the request inside; any thread may call it."""
        with self._changed:
            self._inside = self._thread = None
            if not self._waiting:
                return
            if len(self._waiting) > 1 and self._client in self._waiting:
                self._to_the_end(self._client)  # it was its turn just now
            client = next(iter(self._waiting))
            self._let_in(self._waiting[client].popleft(), client)
            self._to_the_end(client)
            self._changed.notify_all()

    @contextlib.contextmanager
    def coming(self) -> Iterator[None]:
        """A request is being prepared. Raises BusyError if there is no room left beside those that wait.

        This bounds the threads that prepare requests.
        """
        with self._changed:
            others = self._coming + sum(map(len, self._waiting.values())) + self.busy
            if others > self.limit:
                raise BusyError(f"the model is busy and {others - 1} requests wait already: try again later")
            self._coming += 1
        try:
            yield
        finally:
            with self._changed:
                self._coming -= 1

    @contextlib.contextmanager
    def turn(self, client: str = "") -> Iterator[None]:
        """A turn as a context. Raises as `enter`."""
        self.enter(client)
        try:
            yield
        finally:
            self.leave()

    def _wait(self, ticket: object, client: str, cancelled: Callable[[], bool]) -> bool:
        self._waiting.setdefault(client, deque()).append(ticket)
        entered = False
        try:
            while self._inside is not ticket and not cancelled():
                self._changed.wait(POLL_S)
            entered = self._inside is ticket
        finally:
            if not entered:
                self._withdraw(ticket, client)
        return entered

    def _withdraw(self, ticket: object, client: str) -> None:
        if self._inside is ticket:  # let in just before Ctrl-C
            self.leave()
            return
        self._waiting[client].remove(ticket)
        if not self._waiting[client]:
            del self._waiting[client]

    def _let_in(self, ticket: object, client: str) -> None:
        self._inside, self._client = ticket, client

    def _to_the_end(self, client: str) -> None:
        if tickets := self._waiting.pop(client):
            self._waiting[client] = tickets

    def _check_room(self, client: str) -> None:
        if not self.limit or self._thread == threading.get_ident():  # the thread would wait for itself
            raise BusyError("the model is still streaming another answer: finish it, or call its cancel()")
        own = len(self._waiting.get(client, ()))
        total = sum(map(len, self._waiting.values()))
        if total >= self.limit:
            raise BusyError(f"the model is busy and {total} requests wait already: try again later")
        if own >= self.per_client:
            raise BusyError(
                f"the model is busy and {own} requests of this client wait already: try again later"
            )
