"""Whose turn it is: order, fairness, limits, cancellation."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from random import Random

import pytest

from gemma_edge.runtime.errors import BusyError, UsageError
from gemma_edge.runtime.request_queue import FIRST_SHARE, SHARE, RequestQueue


def until(true: Callable[[], bool]) -> None:
    """Waits for what other threads do."""
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.001)


class Requests:
    """Threads that wait in a queue; `served` lists them in the order of their turns."""

    def __init__(self, queue: RequestQueue) -> None:
        self.queue, self.served, self.threads = queue, list[str](), list[threading.Thread]()

    def add(self, name: str, client: str, cancelled: Callable[[], bool] = lambda: False) -> None:
        """Starts a request; it waits when this returns."""
        waiting = self.queue.waiting

        def request() -> None:
            if self.queue.enter(client, cancelled):
                self.served.append(name)
                self.queue.leave()

        self.threads.append(threading.Thread(target=request))
        self.threads[-1].start()
        until(lambda: self.queue.waiting == waiting + 1)

    def join(self) -> list[str]:
        for thread in self.threads:
            thread.join(60)
            assert not thread.is_alive()
        return self.served


def test_requests_of_one_client_keep_their_order() -> None:
    queue = RequestQueue(8)
    requests = Requests(queue)
    assert queue.enter()
    for name in "abcde":
        requests.add(name, "")
    assert queue.waiting == 5 and queue.busy
    queue.leave()
    assert requests.join() == list("abcde")
    assert queue.waiting == 0 and not queue.busy


def test_clients_take_turns() -> None:
    queue = RequestQueue(16)
    requests = Requests(queue)
    assert queue.enter("greedy")
    for name in ("g1", "g2", "g3", "g4"):
        requests.add(name, "greedy")
    requests.add("a1", "a")
    requests.add("b1", "b")
    requests.add("a2", "a")
    assert queue.lengths == {"greedy": 4, "a": 2, "b": 1}
    queue.leave()
    # The greedy client was served last, so the others come first.
    assert requests.join() == ["a1", "b1", "g1", "a2", "g2", "g3", "g4"]


def test_a_full_queue_refuses() -> None:
    queue = RequestQueue(3, per_client=2)
    requests = Requests(queue)
    assert queue.enter()
    requests.add("a1", "a")
    requests.add("a2", "a")
    refused: list[BaseException] = []

    def ask(client: str) -> None:
        try:
            queue.enter(client)
        except BusyError as error:
            refused.append(error)

    for client in "ab":
        if client == "b":
            requests.add("c1", "c")
        thread = threading.Thread(target=ask, args=client)
        thread.start()
        thread.join(60)
    assert [str(error) for error in refused] == [
        "the model is busy and 2 requests of this client wait already: try again later",
        "the model is busy and 3 requests wait already: try again later",
    ]
    queue.leave()
    assert requests.join() == ["a1", "c1", "a2"]


def test_a_request_that_is_cancelled_leaves_the_others_in_order() -> None:
    queue = RequestQueue(8)
    requests = Requests(queue)
    cancelled = threading.Event()
    assert queue.enter()
    requests.add("a", "a")
    requests.add("b", "b", cancelled.is_set)
    requests.add("c", "c")
    cancelled.set()
    until(lambda: queue.lengths == {"a": 1, "c": 1})
    queue.leave()
    assert requests.join() == ["a", "c"]


def test_an_interrupted_wait_leaves_no_trace() -> None:
    queue = RequestQueue(8)
    asked = threading.Event()

    def ctrl_c() -> bool:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        return False

    def hold() -> None:
        assert queue.enter()

    holder = threading.Thread(target=hold)
    holder.start()
    holder.join(60)
    with pytest.raises(KeyboardInterrupt):
        queue.enter("", ctrl_c)
    assert queue.waiting == 0 and queue.busy
    queue.leave()
    assert queue.enter() and queue.busy


def test_many_threads_that_come_and_go() -> None:
    queue = RequestQueue(6, per_client=3)
    inside = threading.Semaphore(1)
    outcomes: Counter[str] = Counter()

    def work(seed: int) -> None:
        rng = Random(seed)
        for _ in range(60):
            patience = rng.choice((0, 1, 5, 10**6))
            asked = iter(range(10**7))
            try:
                if not queue.enter(str(rng.randrange(4)), lambda: next(asked) >= patience):  # noqa: B023
                    outcomes["gave up"] += 1
                    continue
            except BusyError:
                outcomes["refused"] += 1
                continue
            assert inside.acquire(blocking=False), "two are inside"
            time.sleep(rng.choice((0, 0, 1e-4, 1e-3)))
            inside.release()
            queue.leave()
            outcomes["served"] += 1

    threads = [threading.Thread(target=work, args=[seed]) for seed in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert outcomes.total() == 12 * 60 and min(outcomes[name] for name in ("served", "refused", "gave up"))
    assert not queue.busy and queue.waiting == 0 and queue.lengths == {}


@pytest.mark.parametrize("limit", [0, 5])
def test_a_thread_does_not_wait_for_itself(limit: int) -> None:
    queue = RequestQueue(limit)
    assert queue.enter()
    with pytest.raises(BusyError, match="still streaming another answer"):
        queue.enter()
    with pytest.raises(BusyError), queue.turn():
        pass
    queue.leave()
    with queue.turn():
        assert queue.busy
    assert not queue.busy


def test_a_negative_limit_is_refused() -> None:
    with pytest.raises(UsageError, match="queue must be 0 or more, not -1"):
        RequestQueue(-1)


def test_a_shared_turn_ends_behind_those_that_wait() -> None:
    queue = RequestQueue(2, shared=True)
    requests = Requests(queue)
    assert queue.enter()
    assert queue.give_way()  # nobody waits: it goes on
    assert not queue.is_over(FIRST_SHARE)
    for name in "ab":  # so the queue is full, which does not turn away one that was inside
        requests.add(name, "")
    tokens = [count for count in range(1, 80) if queue.is_over(count)]
    assert tokens == [FIRST_SHARE, FIRST_SHARE + SHARE, FIRST_SHARE + 2 * SHARE]
    assert queue.give_way() and requests.join() == ["a", "b"] and queue.busy
    queue.leave()
    assert not queue.busy


def test_clients_take_turns_with_an_answer_that_gives_way() -> None:
    queue = RequestQueue(8, shared=True)
    requests = Requests(queue)
    assert queue.enter("many")
    for name, client in (("a", "many"), ("b", "many"), ("c", "one")):
        requests.add(name, client)
    assert queue.give_way("many")
    assert requests.served[0] == "c" and sorted(requests.join()) == ["a", "b", "c"]
    queue.leave()


def test_an_answer_that_gave_way_can_be_cancelled() -> None:
    queue, cancelled = RequestQueue(1, shared=True), threading.Event()
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        assert queue.enter()
        entered.set()
        leave.wait(60)
        queue.leave()

    assert queue.enter()
    thread = threading.Thread(target=other)
    thread.start()
    until(lambda: queue.waiting == 1)
    cancelled.set()
    assert not queue.give_way("", cancelled.is_set)
    assert entered.wait(60) and queue.busy and queue.waiting == 0
    leave.set()
    thread.join(60)
    assert not queue.busy


def test_answers_are_not_interrupted_unless_told() -> None:
    queue = RequestQueue(2)
    requests = Requests(queue)
    assert queue.enter()
    requests.add("a", "")
    assert not any(map(queue.is_over, range(100)))
    queue.leave()
    requests.join()
