"""Conversations on the chat page: asked, stopped, edited, kept; settings and tools."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from page.conftest import kept, words

if TYPE_CHECKING:
    from playwright.sync_api import Route

    from support.http_server import ServerProcess
    from support.page_driver import Person


BEGUN = "document.querySelector('.answer .markdown')?.textContent.length > 5"
WEATHER = {
    "name": "weather",
    "description": "The weather in a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "enum": ["Oslo"]}},
        "required": ["city"],
        "additionalProperties": False,
    },
}


def test_an_answer_streams_and_is_what_the_server_sent(anna: Person) -> None:
    assert (
        anna.page.locator("#empty").is_visible() and anna.page.locator("#model-name").inner_text() == "pocket"
    )
    anna.say("What is the capital of France?")
    assert anna.messages() == ["What is the capital of France?"]
    assert words(anna.answers()[0]) == words(anna.sent()[0]) != []
    assert anna.page.input_value("#prompt") == ""
    (request,) = anna.asked()
    assert request["stream"] is True and request["model"] == "pocket"
    assert request["messages"] == [{"role": "user", "content": "What is the capital of France?"}]
    assert re.search(r"\d+ tokens · [\d.]+ tok/s · first after", anna.page.inner_text(".figures"))


def test_the_next_question_sends_the_conversation_so_far(anna: Person) -> None:
    anna.say("Hello")
    anna.say("And now?")
    roles = [(m["role"], m["content"]) for m in anna.asked()[-1]["messages"]]
    assert roles == [("user", "Hello"), ("assistant", anna.sent()[0]), ("user", "And now?")]


def test_meters_show_memory_context_and_speed(anna: Person) -> None:
    anna.page.wait_for_selector("#memory-meter:not([hidden])")
    anna.say("Hello")
    assert re.fullmatch(r"[\d.,]+ of [\d.,]+ [MG]B", anna.page.inner_text("#memory-meter .meter-words"))
    usage = kept(anna)[0]["turns"][1]["usage"]
    assert anna.page.inner_text("#context-meter .meter-words") == f"{usage['total_tokens']} of 1,024 tokens"
    assert anna.page.inner_text("#speed-meter .meter-words").endswith("tok/s")


def test_shift_enter_starts_a_line_and_enter_sends(anna: Person) -> None:
    anna.type("one")
    anna.page.keyboard.press("Shift+Enter")
    anna.say("two")
    assert anna.asked()[0]["messages"][0]["content"] == "one\ntwo"


@pytest.mark.parametrize("how", ["Escape", "#stop"])
def test_an_answer_is_stopped_and_its_beginning_kept(
    anna: Person, chat_server: ServerProcess, how: str
) -> None:
    anna.set(model="text")
    anna.answered_without_end()
    with chat_server.braked():
        anna.ask("Go on")
        anna.until(BEGUN)
        assert anna.page.locator("#send").is_hidden()
        if how == "Escape":
            anna.page.keyboard.press(how)
        else:
            anna.page.click(how)
        anna.wait_for_answer()
    assert "Stopped" in anna.page.inner_text(".figures")
    turn = kept(anna)[0]["turns"][1]
    assert turn["state"] == "stopped" and len(turn["text"]) > 5
    anna.until("fetch('health').then((r) => r.json()).then((h) => h.queue.running === 0)")


def test_answering_again_replaces_the_answer(anna: Person) -> None:
    anna.say("Hello")
    with anna.answering():
        anna.page.click(".regenerate")
    first, second = anna.asked()
    assert first["messages"] == second["messages"]
    assert len(anna.answers()) == 1 and words(anna.answers()[0]) == words(anna.sent()[1])


def test_an_edited_message_replaces_what_follows(anna: Person) -> None:
    anna.say("Hello")
    anna.say("And now?")
    anna.page.locator(".user").first.hover()
    anna.page.locator(".edit").first.click()
    field = anna.page.locator(".edit-form textarea")
    assert field.input_value() == "Hello"
    anna.page.keyboard.press("Escape")
    assert anna.messages() == ["Hello", "And now?"]
    anna.page.locator(".edit").first.click()
    field.fill("Good evening")
    with anna.answering():
        anna.page.keyboard.press("Enter")
    assert anna.messages() == ["Good evening"] and len(anna.answers()) == 1
    assert anna.asked()[-1]["messages"] == [{"role": "user", "content": "Good evening"}]


def test_two_conversations_answer_side_by_side(anna: Person) -> None:
    """One is looked at; the other's answer goes on and is whole when one comes back."""
    anna.answered_without_end()
    anna.set(model="text", max_tokens="40")
    anna.ask("First")
    anna.start_new()
    anna.set(model="pocket")
    anna.say("Second")
    assert anna.messages() == ["Second"]
    anna.open("First")
    anna.wait_for_answer()
    assert anna.messages() == ["First"] and len(words(anna.answers()[0])) > 0
    turns = {c["title"]: [turn["role"] for turn in c["turns"]] for c in kept(anna)}
    assert turns == {"First": ["user", "assistant"], "Second": ["user", "assistant"]}


def test_the_conversation_chosen_last_is_shown(anna: Person) -> None:
    """The first of two quick choices must come from the store, the second is at hand."""
    anna.say("First")
    anna.start_new()
    held: list[Route] = []
    anna.page.route("**/v1/chat/completions", lambda route: held.append(route))
    anna.ask("Second")
    anna.until("document.querySelectorAll('.conversation').length === 2")
    anna.page.evaluate("""() => {
        window.entries = [...document.querySelectorAll(".conversation")];
        entries[1].click();
        entries[0].click();
    }""")
    assert len(kept(anna)) == 2  # the store answered this later than the choice
    assert anna.page.inner_text("#title") == "Second" and anna.messages() == ["Second"]
    held[0].continue_()
    anna.wait_for_answer()
    assert len(kept(anna)) == 2
    assert anna.page.evaluate("entries.every((entry) => entry.isConnected)"), "a press on one would be lost"
    assert [c.inner_text() for c in anna.page.locator(".conversation[aria-current]").all()] == ["Second"]


# What is kept


def test_conversations_and_drafts_outlive_the_page(anna: Person) -> None:
    anna.say("Remember this")
    answer = anna.answers()
    anna.type("half a thou")
    anna.reload()
    assert anna.messages() == ["Remember this"] and anna.answers() == answer
    assert anna.page.input_value("#prompt") == "half a thou"
    anna.start_new()
    anna.type("another half")
    anna.open("Remember this")
    anna.until("document.querySelector('#prompt').value === 'half a thou'")
    anna.page.click("#new-conversation")
    anna.until("document.querySelector('#prompt').value === 'another half'")


def test_an_answer_cut_off_by_leaving_is_kept(anna: Person, chat_server: ServerProcess) -> None:
    anna.set(model="text")
    anna.answered_without_end()
    with chat_server.braked():
        anna.ask("Go on")
        anna.until(BEGUN)
        anna.reload()
    assert anna.messages() == ["Go on"] and "Stopped" in anna.page.inner_text(".figures")
    assert anna.page.locator(".regenerate").is_visible()


def test_a_conversation_is_renamed_exported_and_deleted(anna: Person, tmp_path: Path) -> None:
    anna.say("Hello")
    anna.page.click("#open-actions")
    anna.page.click("#rename")
    anna.page.keyboard.type("Of greetings")
    anna.page.keyboard.press("Enter")
    anna.page.wait_for_selector(".conversation:has-text('Of greetings')")
    assert anna.page.inner_text("#title") == "Of greetings"

    anna.page.click("#open-actions")
    with anna.page.expect_download() as download:
        anna.page.click("#export")
    assert download.value.suggested_filename == "Of greetings.json"
    download.value.save_as(tmp_path / "export.json")
    (conversation,) = json.loads((tmp_path / "export.json").read_text())["conversations"]
    assert [turn["role"] for turn in conversation["turns"]] == ["user", "assistant"]

    anna.page.click("#open-actions")
    anna.page.click("#delete")
    anna.page.click("#ask button:has-text('Cancel')")
    assert anna.messages() == ["Hello"]
    anna.page.click("#open-actions")
    anna.page.click("#delete")
    anna.page.click("#ask-yes")
    anna.page.wait_for_selector("#empty:not([hidden])")
    anna.until("document.querySelectorAll('.conversation').length === 0")
    anna.reload()
    assert [c for c in kept(anna) if c["turns"]] == []


def test_a_deleted_conversation_does_not_come_back_with_its_answer(
    anna: Person, chat_server: ServerProcess
) -> None:
    anna.set(model="text")
    anna.answered_without_end()
    with chat_server.braked():
        anna.ask("Go on")
        anna.until(BEGUN)
        anna.page.click("#open-actions")
        anna.page.click("#delete")
        anna.page.click("#ask-yes")
        anna.page.wait_for_selector("#empty:not([hidden])")
    anna.until("fetch('health').then((r) => r.json()).then((h) => h.queue.running === 0)")
    assert [c for c in kept(anna) if c["turns"]] == []


# Settings


def test_settings_go_into_the_request(anna: Person) -> None:
    anna.set(
        system="Answer in one word.", temperature="0.5", top_p="0.9", top_k="3", max_tokens="7", seed="11"
    )
    anna.say("Hello")
    (request,) = anna.asked()
    assert request["messages"][0] == {"role": "system", "content": "Answer in one word."}
    chosen = {name: request[name] for name in ("temperature", "top_p", "top_k", "max_tokens", "seed")}
    assert chosen == {"temperature": 0.5, "top_p": 0.9, "top_k": 3, "max_tokens": 7, "seed": 11}
    anna.reload()
    anna.start_new()
    anna.page.click("#open-settings")
    assert anna.page.input_value("#temperature") == "0.5"
    anna.page.click("#settings-defaults")
    anna.page.click("#settings-form [type=submit]")
    anna.say("Hello")
    assert "temperature" not in anna.asked()[-1]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{oops", "The tools are not JSON"),
        ('[{"description": "nameless"}]', 'Tool 1 has no "name"'),
        ("[3]", 'Tool 1 has no "name"'),
        ("[null]", 'Tool 1 has no "name"'),
    ],
)
def test_tools_that_are_none_are_refused_in_a_sentence(anna: Person, text: str, sentence: str) -> None:
    anna.page.click("#open-settings")
    anna.page.fill("#tools", text)
    anna.page.click("#settings-form [type=submit]")
    assert sentence in anna.page.inner_text("#tools-error")
    assert anna.page.locator("#settings").is_visible() and anna.page.input_value("#tools") == text


def test_the_theme_is_switched_and_kept(anna: Person) -> None:
    ground = "getComputedStyle(document.body).backgroundColor"
    light = anna.page.evaluate(ground)
    anna.page.click("#theme-switch")
    dark = anna.page.evaluate(ground)
    assert dark != light and anna.page.get_attribute("#theme-switch", "aria-pressed") == "true"
    anna.reload()
    assert anna.page.evaluate(ground) == dark
    anna.set(theme="system")
    assert anna.page.evaluate(ground) == light


# Tools


def test_a_call_is_shown_and_its_result_sent_back(anna: Person) -> None:
    """The model is made to call, perhaps several times: what it would do of itself is not the page's."""
    anna.set(tools=json.dumps([WEATHER]))
    anna.changed_request(tool_choice="required")
    anna.say("What is the weather in Oslo?")
    anna.answered_by_the_server()
    calls = anna.page.locator(".call").count()
    assert set(anna.page.locator(".call-name").all_inner_texts()) == {"Calls weather"}
    assert json.loads(anna.page.locator(".call pre").first.inner_text()) == {"city": "Oslo"}
    for field in anna.page.locator(".results textarea").all():
        field.fill('{"celsius": 4}')
    with anna.answering():
        anna.page.click(".results button")
    request = anna.asked()[-1]
    assert request["tools"] == [{"type": "function", "function": WEATHER}]
    _, call, result, *others = request["messages"]
    assert call["role"] == "assistant" and call["content"] is None
    assert call["tool_calls"][0]["function"]["name"] == "weather"
    assert result == {
        "role": "tool",
        "tool_call_id": call["tool_calls"][0]["id"],
        "content": '{"celsius": 4}',
    }
    assert len(others) == calls - 1 and anna.page.locator(".tool").count() == calls
    assert anna.page.locator(".results").count() == 0
