"""The chat page of `gemma-edge serve`, used as a person would: a real Chromium, server and bundles.

What the page shows is compared with what the server sent, so no test depends on what a model says.
"""

from __future__ import annotations

import base64
import io
import json
import re
import wave
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gemma_edge.benchmarks.output.browser import find_browser
from gemma_edge.export.exporter import export_bundle
from support.audio_clips import write_wav
from support.http_server import ServerProcess, serving
from support.repository import ROOT, read

pytest.importorskip("PIL", reason="the extra images has Pillow")
pytest.importorskip("playwright", reason="the extra dev has playwright")
pytest.importorskip("axe_playwright_python", reason="the extra dev has axe-playwright-python")
pytest.importorskip("uvicorn", reason="the extra serve has uvicorn")
from PIL import Image

from support.pictures import painting

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from support.page_driver import Person

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium or Chrome (tests/install.sh)"),
]
PAGE = ROOT / "runtime" / "server" / "page"
PHONE, DESK = (390, 844), (1440, 900)
EVERY_LOOK = [
    pytest.param(size, dark, id=f"{size[0]}-{'dark' if dark else 'light'}")
    for size in (PHONE, DESK)
    for dark in (False, True)
]
READY = "html[data-ready]"
PITCH = 600  # Hz, of what the microphone hears
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


@pytest.fixture(scope="module")
def models(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two bundles: Pocket, which sees and hears, and one for text with room for long answers."""
    folder = tmp_path_factory.mktemp("models")
    export_bundle(
        ROOT / "pocket" / "checkpoint", folder / "pocket", recipe="int4", context=1024, verify=False
    )
    export_bundle(tiny_checkpoint, folder / "text", context=4096, chunk=64, verify=False)
    return folder


@pytest.fixture(scope="module")
def chat_server(models: Path) -> Iterator[ServerProcess]:
    with serving("--models", models) as server:
        yield server


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    from support.page_driver import chromium

    time = np.arange(48_000 * 2) / 48_000
    tone = (0.5 * np.sin(2 * np.pi * PITCH * time)).astype(np.float32)
    heard = write_wav(tmp_path_factory.mktemp("microphone") / "tone.wav", tone, rate=48_000)
    with sync_playwright() as playwright, chromium(playwright, heard) as found:
        yield found


@pytest.fixture
def visitor(browser: Browser, chat_server: ServerProcess) -> Iterator[Callable[..., Person]]:
    """Opens a window on the page, as wide as asked for. In the end all of them are judged."""
    from support.page_driver import person

    people = []

    def visit(
        size: tuple[int, int] = DESK, *, dark: bool = False, url: str = chat_server.url, ready: str = READY
    ) -> Person:
        people.append(person(browser, url, size, dark=dark))
        return people[-1].visit(ready)

    yield visit
    for one in people:
        one.leave()


@pytest.fixture
def anna(visitor: Callable[..., Person]) -> Person:
    return visitor()


def words(text: str) -> list[str]:
    """What is left of a text, however it is set."""
    return re.findall(r"\w+", text)


def kept(person: Person) -> list[dict[str, Any]]:
    """The conversations that the browser keeps."""
    return person.page.evaluate("""async () => {
        const { openStore } = await import(new URL("store.js", document.baseURI));
        const store = await openStore();
        return Promise.all((await store.list()).map(({ id }) => store.get(id)));
    }""")


# A conversation


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
def test_an_answer_is_stopped_and_its_beginning_kept(anna: Person, how: str) -> None:
    anna.set(model="text")
    anna.answered_without_end()
    anna.type("Go on")
    anna.page.keyboard.press("Enter")
    anna.until("document.querySelector('.answer .markdown')?.textContent.length > 5")
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
    anna.page.click(".regenerate")
    anna.wait_for_answer()
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
    anna.page.keyboard.press("Enter")
    anna.wait_for_answer()
    assert anna.messages() == ["Good evening"] and len(anna.answers()) == 1
    assert anna.asked()[-1]["messages"] == [{"role": "user", "content": "Good evening"}]


def test_two_conversations_answer_side_by_side(anna: Person) -> None:
    """One is looked at; the other's answer goes on and is whole when one comes back."""
    anna.answered_without_end()
    anna.set(model="text", max_tokens="40")
    anna.type("First")
    anna.page.keyboard.press("Enter")
    anna.page.click("#new-conversation")
    anna.set(model="pocket")
    anna.say("Second")
    assert anna.messages() == ["Second"]
    anna.page.click(".conversation:has-text('First')")
    anna.wait_for_answer()
    assert anna.messages() == ["First"] and len(words(anna.answers()[0])) > 0
    turns = {c["title"]: [turn["role"] for turn in c["turns"]] for c in kept(anna)}
    assert turns == {"First": ["user", "assistant"], "Second": ["user", "assistant"]}


# What is kept


def test_conversations_and_drafts_outlive_the_page(anna: Person) -> None:
    anna.say("Remember this")
    answer = anna.answers()
    anna.type("half a thou")
    anna.reload()
    assert anna.messages() == ["Remember this"] and anna.answers() == answer
    assert anna.page.input_value("#prompt") == "half a thou"
    anna.page.click("#new-conversation")
    anna.type("another half")
    anna.page.click(".conversation")
    anna.until("document.querySelector('#prompt').value === 'half a thou'")
    anna.page.click("#new-conversation")
    anna.until("document.querySelector('#prompt').value === 'another half'")


def test_an_answer_cut_off_by_leaving_is_kept(anna: Person) -> None:
    anna.set(model="text")
    anna.answered_without_end()
    anna.type("Go on")
    anna.page.keyboard.press("Enter")
    anna.until("document.querySelector('.answer .markdown')?.textContent.length > 5")
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
    assert anna.page.locator(".conversation").count() == 0
    anna.reload()
    assert [c for c in kept(anna) if c["turns"]] == []


def test_a_deleted_conversation_does_not_come_back_with_its_answer(anna: Person) -> None:
    anna.set(model="text")
    anna.answered_without_end()
    anna.type("Go on")
    anna.page.keyboard.press("Enter")
    anna.until("document.querySelector('.answer .markdown')?.textContent.length > 5")
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
    anna.page.click("#new-conversation")
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
    anna.page.click(".results button")
    anna.wait_for_answer()
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


# Pictures and sound


def attached(person: Person) -> list[dict[str, Any]]:
    """The parts of the last message that was sent."""
    parts: list[dict[str, Any]] = person.asked()[-1]["messages"][-1]["content"]
    return parts


def samples_of(part: dict[str, Any]) -> Any:
    """What a part of sound holds, as 16-bit samples. It must be 16 kHz, one channel."""
    assert part["input_audio"]["format"] == "wav"
    with wave.open(io.BytesIO(base64.b64decode(part["input_audio"]["data"]))) as file:
        assert (file.getframerate(), file.getnchannels(), file.getsampwidth()) == (16_000, 1, 2)
        return np.frombuffer(file.readframes(file.getnframes()), "<i2")


def pitch_of(samples: Any) -> float:
    """The loudest frequency, in Hz."""
    return float(np.argmax(np.abs(np.fft.rfft(samples))) * 16_000 / len(samples))


def picture_of(part: dict[str, Any]) -> Image.Image:
    kind, data = part["image_url"]["url"].split(";base64,")
    assert kind in ("data:image/png", "data:image/jpeg")
    return Image.open(io.BytesIO(base64.b64decode(data)))


def test_pictures_and_sound_go_before_the_text(anna: Person, tmp_path: Path) -> None:
    picture = tmp_path / "small.png"
    Image.fromarray(painting(64, 48)).save(picture)
    time = np.arange(44_100) / 44_100
    tone = np.stack([0.5 * np.sin(2 * np.pi * 440 * time), 0 * time], axis=1).astype(np.float32)
    sound = write_wav(tmp_path / "stereo.wav", tone, rate=44_100)
    anna.page.set_input_files("#files", [picture, sound])
    anna.page.wait_for_selector("#attachments li:nth-child(2)")
    anna.say("What is this?")
    image, audio, text = attached(anna)
    assert image["image_url"]["url"].endswith(base64.b64encode(picture.read_bytes()).decode()), "as it is"
    samples = samples_of(audio)
    assert abs(len(samples) - 16_000) <= 2 and abs(pitch_of(samples) - 440) <= 2
    assert text == {"type": "text", "text": "What is this?"}
    assert anna.page.locator(".user .attachment").count() == 2
    assert anna.page.locator("#attachments li").count() == 0
    assert words(anna.answers()[0]), "the server took them"


def test_a_large_picture_is_made_smaller(anna: Person, tmp_path: Path) -> None:
    Image.fromarray(painting(3000, 1500)).save(tmp_path / "large.webp")
    anna.page.set_input_files("#files", tmp_path / "large.webp")
    anna.page.wait_for_selector("#attachments li")
    anna.say("What is this?")
    assert picture_of(attached(anna)[0]).size == (1024, 512)


@pytest.mark.parametrize("event", ["paste", "drop"])
def test_a_picture_is_pasted_and_dropped(anna: Person, event: str, tmp_path: Path) -> None:
    Image.fromarray(painting(40, 30)).save(tmp_path / "p.png")
    data = base64.b64encode((tmp_path / "p.png").read_bytes()).decode()
    anna.page.evaluate(
        """([event, data]) => {
            const carried = new DataTransfer();
            const bytes = Uint8Array.from(atob(data), (c) => c.charCodeAt(0));
            carried.items.add(new File([bytes], "p.png", { type: "image/png" }));
            const target = document.querySelector("#prompt");
            target.dispatchEvent(event === "paste"
                ? new ClipboardEvent("paste", { clipboardData: carried, bubbles: true })
                : new DragEvent("drop", { dataTransfer: carried, bubbles: true, cancelable: true }));
        }""",
        [event, data],
    )
    anna.page.wait_for_selector("#attachments img")
    anna.page.keyboard.press("Escape")
    anna.page.focus("#prompt")
    anna.say("")
    (image,) = attached(anna)
    assert picture_of(image).size == (40, 30)


def test_an_attachment_is_taken_back(anna: Person, tmp_path: Path) -> None:
    Image.fromarray(painting(40, 30)).save(tmp_path / "p.png")
    anna.page.set_input_files("#files", tmp_path / "p.png")
    anna.page.click("#attachments [aria-label='Remove p.png']")
    assert anna.page.locator("#send").is_disabled()
    anna.say("Hello")
    assert attached(anna) == "Hello"


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("notes.txt", "notes.txt is neither a picture nor a recording"),
        ("broken.png", "broken.png: this browser cannot open the picture"),
        ("broken.mp3", "broken.mp3: this browser cannot decode it"),
    ],
)
def test_a_file_that_is_none_is_said(anna: Person, name: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"not what its name says")
    anna.type("kept")
    anna.page.set_input_files("#files", tmp_path / name)
    anna.page.wait_for_selector("#toast.shown")
    assert sentence in anna.page.inner_text("#toast") and anna.page.input_value("#prompt") == "kept"
    assert anna.page.locator("#attachments li").count() == 0


def test_the_microphone_records_16_khz_wav(anna: Person) -> None:
    anna.page.click("#microphone")
    anna.until("document.querySelector('#recording-time').textContent >= '0:02'")
    anna.page.click("#recording-done")
    anna.page.wait_for_selector("#attachments .sound")
    anna.say("What is said?")
    audio, _ = attached(anna)
    samples = samples_of(audio)
    # The clip repeats every two seconds, which bends the tone a little.
    assert len(samples) > 24_000 and abs(pitch_of(samples) - PITCH) <= 5
    assert anna.page.locator("#recording").is_hidden()


@pytest.mark.parametrize("how", ["Escape", "#recording-cancel"])
def test_a_recording_is_cancelled(anna: Person, how: str) -> None:
    anna.page.click("#microphone")
    anna.page.wait_for_selector("#recording:not([hidden])")
    if how == "Escape":
        anna.page.keyboard.press(how)
    else:
        anna.page.click(how)
    anna.page.wait_for_selector("#recording", state="hidden")
    assert anna.page.locator("#attachments li").count() == 0


def test_a_model_for_text_alone_hides_what_it_does_not_take(anna: Person) -> None:
    assert anna.page.locator("#attach").is_visible() and anna.page.locator("#microphone").is_visible()
    anna.set(model="text")
    assert anna.page.locator("#attach").is_hidden() and anna.page.locator("#microphone").is_hidden()
    assert anna.page.inner_text("#model-name") == "text"
    assert anna.page.locator("#suggestions li").count() == 2


# Markdown

RENDERED = [
    ("a **b** *c* ~~d~~ `e`", "<p>a <strong>b</strong> <em>c</em> <del>d</del> <code>e</code></p>"),
    ("***a***", "<p><strong><em>a</em></strong></p>"),
    ("**a *b* c**", "<p><strong>a <em>b</em> c</strong></p>"),
    ("*a **b** c*", "<p><em>a <strong>b</strong> c</em></p>"),
    ("snake_case_name and 2 * 3 * 4", "<p>snake_case_name and 2 * 3 * 4</p>"),
    ("`` a ` b ``", "<p><code>a ` b</code></p>"),
    (r"\*no\* `\*`", r"<p>*no* <code>\*</code></p>"),
    ("# a\n## b", "<h3>a</h3><h4>b</h4>"),
    ("### a\n## b\n##### c", "<h3>a</h3><h4>b</h4><h5>c</h5>"),
    ("> # a", "<blockquote><p><strong>a</strong></p></blockquote>"),
    ("a\nb\n\nc", "<p>a<br>b</p><p>c</p>"),
    ("- a\n- b\n  - c\n- d", "<ul><li>a</li><li>b<ul><li>c</li></ul></li><li>d</li></ul>"),
    ("1. a\n2. b", "<ol><li>a</li><li>b</li></ol>"),
    ("3) a", '<ol start="3"><li>a</li></ol>'),
    ("1. a\n   - b\n2. c", "<ol><li>a<ul><li>b</li></ul></li><li>c</li></ol>"),
    ("- a\n\n- b", "<ul><li><p>a</p></li><li><p>b</p></li></ul>"),
    ("> a\n> b", "<blockquote><p>a<br>b</p></blockquote>"),
    ("a\n\n---\n\nb", "<p>a</p><hr><p>b</p>"),
    ("2 < 3 && <b>x</b>", "<p>2 &lt; 3 &amp;&amp; &lt;b&gt;x&lt;/b&gt;</p>"),
    ("a | b", "<p>a | b</p>"),
    ("[a](javascript:alert(1))", "<p>[a](javascript:alert(1))</p>"),
    ("[a](data:text/html,x) [b](//x.example)", "<p>[a](data:text/html,x) [b](//x.example)</p>"),
    ("**open", "<p>**open</p>"),
    ("", ""),
]
LINK = '<a href="{0}" target="_blank" rel="noopener noreferrer">{1}</a>'


@pytest.fixture
def rendered(anna: Person) -> Callable[[str], str]:
    """Markdown as the page's HTML."""
    return lambda text: anna.page.evaluate(
        """async (text) => {
            const { renderMarkdown } = await import(new URL("markdown.js", document.baseURI));
            const place = document.createElement("div");
            renderMarkdown(place, text);
            return place.innerHTML;
        }""",
        text,
    )


def test_markdown_becomes_nodes(rendered: Callable[[str], str]) -> None:
    assert {text: rendered(text) for text, _ in RENDERED} == dict(RENDERED)
    for text, target, label in [
        ("[a](https://x.example/b)", "https://x.example/b", "a"),
        ('[a](https://x.example/b "title")', "https://x.example/b", "a"),
        ("[a](https://x.example/b_(c))", "https://x.example/b_(c)", "a"),
        ("https://x.example/b", "https://x.example/b", "https://x.example/b"),
        ("<https://x.example/>", "https://x.example/", "https://x.example/"),
        ("![a](https://x.example/p.png)", "https://x.example/p.png", "a"),
    ]:
        assert rendered(text) == f"<p>{LINK.format(target, label)}</p>"
    table = rendered("| a | b |\n|---|--:|\n| `1|2` | 3 |\n| 4 |")
    assert '<th>a</th><th class="end">b</th>' in table
    assert '<td><code>1|2</code></td><td class="end">3</td>' in table
    assert '<td>4</td><td class="end"></td>' in table


def test_code_is_coloured_copied_and_unchanged(anna: Person) -> None:
    code = 'def f(x):  # <b>\n    return "a\\"b" if x else 0x1F\n\n\tpass'
    block = {"choices": [{"delta": {"content": f"```python\n{code}\n```\n"}}]}
    anna.answered_with(200, f"data: {json.dumps(block)}\n\ndata: [DONE]\n\n")
    anna.say("Code")
    assert anna.page.locator("figure code").text_content() == code.replace("\t", "    ")
    kinds = anna.page.eval_on_selector_all("figure code span", "spans => spans.map((s) => s.className)")
    assert set(kinds) == {"code-keyword", "code-comment", "code-string", "code-number"}
    anna.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    anna.page.click("[aria-label='Copy code']")
    anna.page.wait_for_selector("figure .done")
    assert anna.page.evaluate("navigator.clipboard.readText()") == code.replace("\t", "    ")


@pytest.mark.parametrize(
    "text",
    [
        "<img src=x onerror=alert(1)> <script>alert(1)</script>",
        '[x](https://a.example/" onclick="alert(1))',
        "```html\n<script>alert(1)</script>",
        "<https://a.example/<script>>",
        "| <b> |\n|---|\n| <script>alert(1)</script> |",
        "&lt;script&gt;",
    ],
)
def test_no_text_becomes_markup(anna: Person, rendered: Callable[[str], str], text: str) -> None:
    tags, attributes = anna.page.evaluate(
        """(markup) => {
            const all = [...new DOMParser().parseFromString(markup, "text/html").body.querySelectorAll("*")];
            return [all.map((e) => e.localName), all.flatMap((e) => e.getAttributeNames())];
        }""",
        rendered(text),
    )
    assert set(tags) <= set(
        "p a code pre figure figcaption span button svg use div table thead tbody tr th td".split()
    )
    assert "on" not in {name[:2] for name in attributes}


@pytest.mark.parametrize(
    "piece",
    ["*", "**a ", "_", "`", "[", "[a](", "> ", "- ", "  - ", "|", "~~", "<", "1. ", "\\", "# ", "***", "h"],
)
def test_no_text_takes_long(anna: Person, rendered: Callable[[str], str], piece: str) -> None:
    """Whatever a model repeats: a hang would end the test run."""
    for text in (piece * 20_000, (piece + "\n") * 5_000, "".join(" " * n + piece + "\n" for n in range(300))):
        assert rendered(text)


def test_a_stream_keeps_the_nodes_that_do_not_change(anna: Person) -> None:
    same = anna.page.evaluate("""async () => {
        const { renderMarkdown } = await import(new URL("markdown.js", document.baseURI));
        const place = document.createElement("div");
        renderMarkdown(place, "one\\n\\ntwo");
        const [one, two] = place.children;
        renderMarkdown(place, "one\\n\\ntwo and more");
        return [place.children[0] === one, place.children[1] === two, place.children.length];
    }""")
    assert same == [True, False, 2]


# Errors


def test_a_full_queue_is_said_and_trying_again_works(anna: Person) -> None:
    anna.answered_with(429, '{"error": {"message": "queue"}}', Retry_After="7")
    anna.type("Important words")
    anna.page.keyboard.press("Enter")
    anna.page.wait_for_selector(".fault")
    assert "Try again in 7 seconds" in anna.page.inner_text(".fault")
    assert anna.messages() == ["Important words"]
    anna.answered_by_the_server()
    anna.page.click(".fault button")
    anna.page.wait_for_selector(".fault", state="detached")
    anna.wait_for_answer()
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


# How it looks, to eyes and to screen readers


@pytest.mark.parametrize(("size", "dark"), EVERY_LOOK)
def test_axe_finds_nothing(visitor: Callable[..., Person], size: tuple[int, int], dark: bool) -> None:
    one = visitor(size, dark=dark)
    found = {"empty": one.violations()}
    one.say("What is the capital of France?")
    found["answered"] = one.violations()
    # Everything that markdown can hold, a call and an error.
    text = json.dumps(
        {"choices": [{"delta": {"content": read(Path(__file__).parent / "golden/markdown.txt")}}]}
    )
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
    text = read(Path(__file__).parent / "golden/markdown.txt") + "\n\n" + "long" * 200
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
    assert anna.page.evaluate("document.activeElement.id") == "prompt"
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
