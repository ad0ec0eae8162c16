"""What the chat page says when something goes wrong, and keys."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from page.conftest import kept, words
from support.http_server import serving

if TYPE_CHECKING:
    from support.page_driver import Person


def test_a_full_queue_is_said_and_trying_again_works(anna: Person) -> None:
    anna.answered_with(429, '{"error": {"message": "queue"}}', Retry_After="7")
    anna.type("Important words")
    anna.page.keyboard.press("Enter")
    anna.page.wait_for_selector(".fault")
    assert "Try again in 7 seconds" in anna.page.inner_text(".fault")
    assert anna.messages() == ["Important words"]
    anna.answered_by_the_server()
    with anna.answering():
        anna.page.click(".fault button")
    assert anna.page.locator(".fault").count() == 0
    assert anna.messages() == ["Important words"] and words(anna.answers()[0])


@pytest.mark.parametrize(
    ("status", "body", "sentence"),
    [
        (401, "{}", "You are signed out. Reload the page"),
        (413, "<html>", "too large for the server"),
        (502, "<html>Bad gateway</html>", "cannot answer now"),
        (503, '{"error": {"message": "the server is shutting down"}}', "the server is shutting down"),
        (418, "[]", "status 418"),
        (200, 'data: {"choices": [{"delta": {"content": "Half"}}]}\n\n', "broke off"),
        (200, "data: {nonsense\n\n", "broke off"),
        (200, 'data: {"error": {"message": "out of memory"}}\n\n', "out of memory"),
        (200, "", "broke off"),
    ],
)
def test_what_goes_wrong_is_a_sentence(anna: Person, status: int, body: str, sentence: str) -> None:
    anna.answered_with(status, body, Content_Type="text/event-stream")
    anna.type("Important words")
    anna.page.keyboard.press("Enter")
    anna.page.wait_for_selector(".fault")
    assert sentence in anna.page.inner_text(".fault") and anna.messages() == ["Important words"]
    assert anna.answers()[0] == ("Half" if "Half" in body else "")
    assert kept(anna)[0]["turns"][0]["text"] == "Important words"


def test_a_refused_message_is_left_out_of_the_next_request(anna: Person) -> None:
    anna.failures_expected = True
    anna.page.fill("#prompt", "word " * 1100)
    anna.page.keyboard.press("Enter")
    anna.page.wait_for_selector(".fault")
    fault = anna.page.inner_text(".fault")
    assert "1024" in fault or "1,024" in fault, "the server's own sentence"
    anna.say("Hello")
    assert anna.asked()[-1]["messages"] == [{"role": "user", "content": "Hello"}]
    assert words(anna.answers()[-1])


def test_a_server_that_is_gone_is_said_and_nothing_is_lost(
    visitor: Callable[..., Person], models: Path
) -> None:
    with serving("--models", models) as server:
        ben = visitor(url=server.url)
        ben.failures_expected = True
        ben.type("half a thought")
    ben.page.keyboard.press("Enter")
    ben.page.wait_for_selector(".fault")
    assert "gemma-edge serve is running" in ben.page.inner_text(".fault")
    assert ben.messages() == ["half a thought"]
    ben.type("more")
    assert ben.page.input_value("#prompt") == "more"


def test_a_server_with_a_key_lets_in_who_has_it(visitor: Callable[..., Person], models: Path) -> None:
    key = "a-key-of-sixteen-characters"
    with serving(models / "pocket", "--api-key", key) as server:
        ben = visitor(url=server.url, ready="#key")
        found = ben.violations()
        ben.page.fill("#key", "another-of-sixteen-characters")
        with ben.page.expect_response("**/login") as refused:
            ben.page.keyboard.press("Enter")
        assert refused.value.status == 401, refused.value.all_headers()
        ben.page.wait_for_selector("text=This key is not known")
        ben.page.fill("#key", key)
        ben.page.keyboard.press("Enter")
        ben.page.wait_for_selector("html[data-ready]")
        ben.say("Hello")
        assert words(ben.answers()[0]) == words(ben.sent()[0]) != []
        ben.type("half a thou")
        ben.page.context.clear_cookies()
        ben.page.keyboard.press("Enter")
        ben.page.wait_for_selector(".fault")
        ben.page.click(".fault button")
        ben.page.fill("#key", key)
        ben.page.keyboard.press("Enter")
        ben.page.wait_for_selector("html[data-ready]")
        assert ben.messages() == ["Hello", "half a thou"]
        ben.page.click("#open-settings")
        ben.page.click("#sign-out")
        ben.page.wait_for_selector("#key")
        assert found == []
