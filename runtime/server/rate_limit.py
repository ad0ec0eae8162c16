"""`SlidingWindow`: how many requests each client made within the last seconds."""

from __future__ import annotations

import time
from collections import OrderedDict, deque
from collections.abc import Callable

from gemma_edge.runtime.server.server_options import Rate

MOST_CLIENTS = 4096  # the one that asked longest ago is forgotten: memory is bounded


class SlidingWindow:
    """Lets each client make `rate.requests` within any `rate.seconds`.

    Args:
        clock: seconds, for tests.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._times: OrderedDict[str, deque[float]] = OrderedDict()

    def wait(self, client: str, rate: Rate) -> float:
        """Seconds until the client may ask again; 0 if it may now, and then the request is counted."""
        now = self._clock()
        times = self._recent(client, rate, now)
        if len(times) >= rate.requests:
            return max(times[0] + rate.seconds - now, 1e-3)
        times.append(now)
        return 0.0

    def full(self, client: str, rate: Rate) -> bool:
        """Whether `wait` would refuse the client, without counting a request."""
        return len(self._recent(client, rate, self._clock())) >= rate.requests

    def _recent(self, client: str, rate: Rate, now: float) -> deque[float]:
        times = self._times.setdefault(client, deque())
        self._times.move_to_end(client)
        if len(self._times) > MOST_CLIENTS:
            self._times.popitem(last=False)
        while times and times[0] <= now - rate.seconds:
            times.popleft()
        return times
