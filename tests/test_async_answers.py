"""Answers for asyncio and for many threads: order, cancellation, errors, and the model free afterwards."""

from __future__ import annotations

import asyncio
import gc
import math
import threading
import time
from collections.abc import Callable

import pytest

from gemma_edge.runtime.answers import Completion
from gemma_edge.runtime.errors import BusyError, UsageError
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.tokenizer import Tokenizer
from support.rule_decoder import RuleDecoder, answers, hash_rule, tiny_model


@pytest.fixture
def model(tokenizer: Tokenizer) -> Model:
    return tiny_model(tokenizer, answers("the answer is 42", tokenizer=tokenizer))


class Gate:
    """A model whose decoder stops within an answer to "hi", until it is let go on.

    Attributes:
        seen: every context that the decoder computed a token for, in order.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.reached, self.go_on = threading.Event(), threading.Event()
        self.seen: list[list[int]] = []
        self.model = tiny_model(tokenizer, self.rule)
        self.at = len(self.model.prompt_ids("hi")) + 5

    def rule(self, ids: list[int]) -> int:
        self.seen.append(list(ids))
        if len(ids) == self.at:
            self.reached.set()
            assert self.go_on.wait(60)
        return hash_rule(ids)


async def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.001)


def test_an_answer_is_awaited_or_iterated_over(model: Model) -> None:
    async def both() -> None:
        completion = await model.agenerate("hi")
        assert (completion.text, completion.finish_reason) == ("the answer is 42", "stop")
        answer = model.agenerate("hi", max_tokens=3)
        pieces = [piece async for piece in answer]
        assert len(pieces) == 3 and "".join(pieces) == answer.completion.text
        assert [piece async for piece in answer] == []
        assert await answer is answer.completion

    asyncio.run(both())


def test_the_first_piece_comes_at_once_and_quick_ones_together(tokenizer: Tokenizer) -> None:
    gate = Gate(tokenizer)

    async def read() -> None:
        answer = gate.model.agenerate("hi", max_tokens=20)
        first = await answer.pieces(math.inf)
        assert first and not gate.go_on.is_set()  # though the answer has not ended
        gate.go_on.set()
        rest = await answer.pieces(math.inf)
        assert len(first) + len(rest) > 10
        assert await answer.pieces(math.inf) == await answer.pieces(math.inf) == []
        assert "".join(first + rest) == answer.completion.text == (await answer).text

    asyncio.run(read())


def test_many_at_once_are_answered_in_order(model: Model) -> None:
    async def all_of_them() -> None:
        done: list[int] = []

        async def ask(number: int) -> None:
            completion = await model.agenerate("hi")
            assert completion.text == "the answer is 42"
            done.append(number)

        await asyncio.gather(*map(ask, range(10)))
        assert sorted(done) == list(range(10))

    asyncio.run(all_of_them())
    assert not model.queue.busy and model.queue.waiting == 0


def test_the_loop_goes_on_while_an_answer_is_computed(tokenizer: Tokenizer) -> None:
    gate = Gate(tokenizer)

    async def ask() -> None:
        task = asyncio.create_task(_whole(gate.model, max_tokens=20))
        await until(gate.reached.is_set)
        assert not task.done()
        gate.go_on.set()
        assert (await task).finish_reason == "length"

    asyncio.run(ask())


async def _whole(model: Model, **options: int) -> Completion:
    return await model.agenerate("hi", **options)  # type: ignore[arg-type]


def test_cancelling_the_task_ends_the_answer_within_a_token(tokenizer: Tokenizer) -> None:
    gate = Gate(tokenizer)

    async def ask() -> None:
        task = asyncio.create_task(_whole(gate.model))
        await until(gate.reached.is_set)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        gate.go_on.set()
        await until(lambda: not gate.model.queue.busy)

    asyncio.run(ask())
    decoder = gate.model.decoder
    assert isinstance(decoder, RuleDecoder) and decoder.position == gate.at


def test_cancelling_one_that_waits_leaves_the_other_alone(tokenizer: Tokenizer) -> None:
    gate = Gate(tokenizer)

    async def ask() -> None:
        first = asyncio.create_task(_whole(gate.model, max_tokens=30))
        await until(gate.reached.is_set)
        second = asyncio.create_task(_whole(gate.model))
        await until(lambda: gate.model.queue.waiting == 1)
        second.cancel()
        await until(lambda: gate.model.queue.waiting == 0)
        gate.go_on.set()
        assert (await first).usage.completion_tokens == 30
        with pytest.raises(asyncio.CancelledError):
            await second

    asyncio.run(ask())


@pytest.mark.parametrize("how", ["break", "with", "cancel", "error"])
def test_leaving_early_frees_the_model(tokenizer: Tokenizer, how: str) -> None:
    model = tiny_model(tokenizer, hash_rule, context=10_000)

    async def fail() -> None:
        async for _ in model.agenerate("hi"):
            raise ZeroDivisionError

    async def leave() -> None:
        if how == "with":
            async with model.agenerate("hi") as answer:
                await anext(answer)
        elif how == "cancel":
            answer = model.agenerate("hi")
            await anext(answer)
            answer.cancel()
            assert (await answer).finish_reason == "cancelled"
        elif how == "break":
            async for _ in model.agenerate("hi"):
                break
        else:
            with pytest.raises(ZeroDivisionError):
                await fail()
        gc.collect()
        await until(lambda: not model.queue.busy)

    asyncio.run(leave())
    assert model.decoder.position < 9_000


def test_errors_are_raised_where_the_answer_is_awaited(model: Model) -> None:
    async def ask() -> None:
        for options in ({"top_p": 7}, {"nonsense": 1}):
            answer = model.agenerate("hi", **options)  # type: ignore[arg-type]
            for _ in range(2):
                with pytest.raises((UsageError, TypeError)):
                    await answer
        assert (await model.agenerate("hi")).text == "the answer is 42"

    asyncio.run(ask())


def test_a_full_queue_refuses_without_a_thread(tokenizer: Tokenizer) -> None:
    gate = Gate(tokenizer)
    gate.model.queue.limit = 2

    async def ask() -> None:
        before = threading.active_count()
        tasks = [asyncio.create_task(_whole(gate.model, max_tokens=10)) for _ in range(50)]
        await until(lambda: sum(task.done() for task in tasks) == 47)
        assert threading.active_count() <= before + 3
        gate.go_on.set()
        done = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(isinstance(result, BusyError) for result in done) == 47

    asyncio.run(ask())


def test_an_answer_of_a_loop_that_is_gone_ends(tokenizer: Tokenizer) -> None:
    gate = Gate(tokenizer)
    answer = gate.model.agenerate("hi")

    async def ask() -> None:
        reading = asyncio.ensure_future(anext(answer))
        await until(gate.reached.is_set)
        assert not reading.cancelled()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(ask())
    loop.close()
    gate.go_on.set()
    asyncio.run(until(lambda: not gate.model.queue.busy))
    assert gate.model.decoder.position <= gate.at + 1


def test_a_time_limit_covers_waiting_and_answering(tokenizer: Tokenizer) -> None:
    gate = Gate(tokenizer)

    async def ask() -> None:
        first = asyncio.create_task(_whole(gate.model, max_tokens=10))
        await until(gate.reached.is_set)
        waited = await gate.model.agenerate("hi", timeout=0.01)
        assert (waited.text, waited.finish_reason) == ("", "timeout")
        assert waited.usage.completion_tokens == 0
        gate.go_on.set()
        await first

    asyncio.run(ask())
    slow = tiny_model(tokenizer, lambda ids: time.sleep(0.01) or hash_rule(ids), context=10_000)  # type: ignore[func-returns-value]
    answer = slow.generate("hi", timeout=0.2)
    assert answer.finish_reason == "timeout" and answer.usage.completion_tokens < 1000


@pytest.mark.parametrize("timeout", [0, -1, float("nan"), "2", True])
def test_a_time_limit_that_cannot_be_is_named(model: Model, timeout: float) -> None:
    with pytest.raises(UsageError, match="timeout must be a number of seconds above 0"):
        model.generate("hi", timeout=timeout)


def test_two_threads_wait_in_order(tokenizer: Tokenizer) -> None:
    gate = Gate(tokenizer)
    prompts = ["hi", "second", "third"]
    done: dict[str, Completion] = {}

    def ask(prompt: str) -> None:
        done[prompt] = gate.model.generate(prompt, max_tokens=10, client=prompt)

    threads = [threading.Thread(target=ask, args=[prompt]) for prompt in prompts]
    for number, thread in enumerate(threads):
        thread.start()
        assert gate.reached.wait(60)
        asyncio.run(until(lambda n=number: gate.model.queue.waiting == n))  # type: ignore[misc]
    gate.go_on.set()
    for thread in threads:
        thread.join(60)
    # Threads may wake in another order than their answers were computed in.
    asked = [gate.model.prompt_ids(prompt) for prompt in prompts]
    assert [ids for ids in gate.seen if ids in asked] == asked
    assert [done[prompt].usage.queued_s is None for prompt in prompts] == [True, False, False]


def test_without_a_queue_a_second_thread_is_refused(tokenizer: Tokenizer) -> None:
    gate = Gate(tokenizer)
    gate.model.queue.limit = 0
    first = threading.Thread(target=lambda: gate.model.generate("hi", max_tokens=10))
    first.start()
    assert gate.reached.wait(60)
    with pytest.raises(UsageError, match="still streaming another answer"):
        gate.model.generate("hi")
    gate.go_on.set()
    first.join(60)


def test_closing_the_model_ends_what_runs_and_what_waits(tokenizer: Tokenizer) -> None:
    gate = Gate(tokenizer)
    model, decoder = gate.model, gate.model.decoder

    async def ask() -> None:
        first = asyncio.create_task(_whole(model))
        await until(gate.reached.is_set)
        second = asyncio.create_task(_whole(model))
        await until(lambda: model.queue.waiting == 1)
        model.close()
        gate.go_on.set()
        assert (await second).finish_reason == "cancelled"
        assert (await first).finish_reason == "cancelled"

    asyncio.run(ask())
    assert decoder.position <= gate.at + 1 and not model.queue.busy
