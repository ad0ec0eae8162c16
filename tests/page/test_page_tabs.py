"""One conversation in two tabs of a browser: each sees what the other did, and neither loses anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from page.conftest import READY, kept

if TYPE_CHECKING:
    from support.page_driver import Person

EVENTS = (
    'data: {"choices": [{"index": 0, "delta": {"content": "Late"}, "finish_reason": null}]}\n\n'
    'data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}\n\ndata: [DONE]\n\n'
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
    second.until(
        "document.querySelectorAll('.user').length === 2 && document.querySelector('.last .figures')"
    )
    assert second.answers() == first.answers() and second.page.input_value("#prompt") == "half a thou"
    second.page.fill("#prompt", "")
    second.say("And then?")
    first.until("document.querySelectorAll('.user').length === 3 && document.querySelector('.last .figures')")
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
    first.type("Mine")
    first.page.keyboard.press("Enter")
    first.page.wait_for_selector(".user:has-text('Mine')")
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
    anna.until("new Promise((done) => setTimeout(() => done(true), 400))")  # the draft is saved
    other = another_tab(anna)
    other.page.fill("#prompt", "Another")
    anna.type("lo")
    anna.page.keyboard.press("Enter")
    anna.wait_for_answer()
    other.until("document.querySelectorAll('.conversation').length === 1")
    assert other.messages() == [] and other.page.input_value("#prompt") == "Another"
    other.page.keyboard.press("Enter")
    other.wait_for_answer()
    assert sorted(questions(anna)) == [["Another"], ["Hello"]]
