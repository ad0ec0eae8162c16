"""One conversation in two tabs of a browser: each sees what the other did, and neither loses anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from page.conftest import READY, kept
from support.processes import wait_for

if TYPE_CHECKING:
    from support.page_driver import Person

EVENTS = (
    'data: {"choices": [{"index": 0, "delta": {"content": "Late"}, "finish_reason": null}]}\n\n'
    'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
)


def answered(questions: int) -> str:
    """JavaScript: is the last of so many questions answered, to its end?"""
    return (
        f"document.querySelectorAll('.user').length === {questions}"
        " && document.querySelector('.answer.last:not(.busy)') !== null"
    )


def another_tab(person: Person) -> Person:
    from support.page_driver import Person

    return Person(person.page.context.new_page(), person.address).visit(READY)


@pytest.fixture
def tabs(anna: Person) -> tuple[Person, Person]:
    """Two tabs that show a conversation of one question."""
    anna.say("Hello")
    other = another_tab(anna)
    assert other.messages() == anna.messages() == ["Hello"] and other.answers() == anna.answers()
    return anna, other


def questions(person: Person) -> list[list[str]]:
    """Of each conversation that the browser keeps."""
    return [[t["text"] for t in c["turns"] if t["role"] == "user"] for c in kept(person) if c["turns"]]


def test_a_conversation_goes_on_in_both(tabs: tuple[Person, Person]) -> None:
    first, second = tabs
    second.type("half a thou")
    first.say("And now?")
    second.until(answered(2))
    assert second.answers() == first.answers() and second.page.input_value("#prompt") == "half a thou"
    second.page.fill("#prompt", "")
    second.say("And then?")
    first.until(answered(3))
    assert questions(first) == [["Hello", "And now?", "And then?"]]
    assert second.asked()[-1]["messages"] == first.asked()[-1]["messages"] + [
        {"role": "assistant", "content": first.sent()[-1]},
        {"role": "user", "content": "And then?"},
    ]
    assert second.complaints == []


def test_two_answers_at_the_same_time_become_two_conversations(tabs: tuple[Person, Person]) -> None:
    first, second = tabs
    held: list[Any] = []
    first.page.route("**/v1/chat/completions", lambda route: held.append(route))  # its answer comes late
    first.ask("Mine")
    second.until("document.querySelectorAll('.user').length === 2")
    second.say("Yours")
    held[0].fulfill(status=200, body=EVENTS, headers={"Content-Type": "text/event-stream"})
    first.wait_for_answer()
    assert first.answers()[-1] == "Late" and first.page.inner_text("#title") == "Hello (2)"
    assert sorted(questions(first)) == [["Hello", "Mine"], ["Hello", "Mine", "Yours"]]
    assert second.messages() == ["Hello", "Mine", "Yours"] and second.complaints == []


def test_a_conversation_deleted_in_one_is_gone_in_the_other(tabs: tuple[Person, Person]) -> None:
    first, second = tabs
    second.type("half a thou")
    first.page.click("#open-actions")
    first.page.click("#delete")
    first.page.click("#ask-yes")
    second.page.wait_for_selector("#empty:not([hidden])")
    assert second.page.input_value("#prompt") == "half a thou"
    assert questions(second) == [] and second.complaints == []


def test_a_conversation_begun_in_one_leaves_the_other_at_its_own(anna: Person) -> None:
    anna.type("Hel")
    wait_for(lambda: [c["draft"]["text"] for c in kept(anna)] == ["Hel"], "the draft was never saved")
    other = another_tab(anna)
    other.page.fill("#prompt", "Another")
    anna.say("lo")
    other.until("document.querySelectorAll('.conversation').length === 1")
    assert other.messages() == [] and other.page.input_value("#prompt") == "Another"
    with other.answering():
        other.page.keyboard.press("Enter")
    assert sorted(questions(anna)) == [["Another"], ["Hello"]]
