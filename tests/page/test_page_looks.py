"""How the chat page looks, to eyes and to screen readers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

import pytest

from page.conftest import DESK, PAGE, PHONE, words
from support.repository import ROOT, read

if TYPE_CHECKING:
    from support.page_driver import Person


MARKDOWN = ROOT / "tests" / "golden" / "markdown.txt"
EVERY_LOOK = [
    pytest.param(size, dark, id=f"{size[0]}-{'dark' if dark else 'light'}")
    for size in (PHONE, DESK)
    for dark in (False, True)
]


@pytest.mark.parametrize(("size", "dark"), EVERY_LOOK)
def test_axe_finds_nothing(visitor: Callable[..., Person], size: tuple[int, int], dark: bool) -> None:
    one = visitor(size, dark=dark)
    found = {"empty": one.violations()}
    one.say("What is the capital of France?")
    found["answered"] = one.violations()
    # Everything that markdown can hold, a call and an error.
    text = json.dumps({"choices": [{"delta": {"content": read(MARKDOWN)}}]})
    call = {"index": 0, "id": "1", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    calls = json.dumps({"choices": [{"delta": {"tool_calls": [call]}}]})
    one.answered_with(200, f"data: {text}\n\ndata: {calls}\n\n")
    one.say("Everything")
    one.page.wait_for_selector(".fault")
    found["everything"] = one.violations()
    one.page.click("#open-settings")
    found["settings"] = one.violations()
    one.page.click("#settings-close")
    one.page.click("#open-actions")
    found["menu"] = one.violations()
    one.page.click("#rename")
    found["rename"] = one.violations()
    one.page.keyboard.press("Escape")
    if size == PHONE:
        one.page.click("#open-sidebar")
        found["drawer"] = one.violations()
    assert {state: violations for state, violations in found.items() if violations} == {}


@pytest.mark.parametrize("width", [320, 390, 768, 1440])
def test_nothing_is_wider_than_the_screen(visitor: Callable[..., Person], width: int) -> None:
    one = visitor((width, 800))
    text = read(MARKDOWN) + "\n\n" + "long" * 200
    one.answered_with(200, f"data: {json.dumps({'choices': [{'delta': {'content': text}}]})}\n\n")
    one.say("Everything " + "x" * 200)
    for part in ("document.documentElement", "document.querySelector('#transcript')"):
        assert one.page.evaluate(f"{part}.scrollWidth - {part}.clientWidth") <= 0, part


def test_a_screen_reader_hears_an_answer_once(anna: Person) -> None:
    anna.page.evaluate("""() => {
        window.said = [];
        new MutationObserver(() => { if (announcer.textContent) said.push(announcer.textContent); })
            .observe(announcer, { childList: true });
    }""")
    anna.say("What is the capital of France?")
    anna.until("said.length >= 2")
    assert [text.split(":")[0] for text in anna.page.evaluate("said")] == ["Waiting for the answer", "Answer"]
    assert words(anna.page.evaluate("said[1]"))[1:] == words(anna.sent()[0])


def test_the_keyboard_is_enough(anna: Person) -> None:
    for _ in range(40):
        anna.page.keyboard.press("Shift+Tab")
        if anna.page.evaluate("document.activeElement.className") == "skip":
            break
    anna.page.keyboard.press("Enter")
    anna.until("document.activeElement.id === 'prompt'")
    anna.say("Hello")
    seen = set()
    for _ in range(40):
        anna.page.keyboard.press("Tab")
        seen.add(anna.page.evaluate("document.activeElement.id || document.activeElement.className"))
    wanted = {"new-conversation", "theme-switch", "open-settings", "open-actions", "conversation", "attach"}
    assert wanted | {"icon-button regenerate", "icon-button edit", "transcript", "microphone"} <= seen


def test_the_drawer_of_a_phone_takes_the_focus_and_gives_it_back(visitor: Callable[..., Person]) -> None:
    one = visitor(PHONE)
    focused = "document.activeElement.id"
    assert one.page.locator("#new-conversation").evaluate("e => !!e.closest('[inert]')")
    one.page.click("#open-sidebar")
    one.until(f"{focused} === 'close-sidebar'")
    assert one.page.locator("#main").evaluate("e => e.inert")
    one.page.keyboard.press("Escape")
    assert one.page.evaluate(focused) == "open-sidebar" and not one.page.locator("#main").evaluate(
        "e => e.inert"
    )


def test_the_page_is_small_and_has_nothing_inline() -> None:
    markup = read(PAGE / "index.html")
    assert re.findall(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=|https?://", markup) == []
    scripts = [path for path in PAGE.iterdir() if path.suffix == ".js"]
    assert [p.name for p in scripts if re.search(r"innerHTML|outerHTML|insertAdjacent|eval\(", read(p))] == []
    assert [p.name for p in scripts if len(read(p).splitlines()) > 400] == []
    assert sum(path.stat().st_size for path in PAGE.iterdir()) < 150_000
