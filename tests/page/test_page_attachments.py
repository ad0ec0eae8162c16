"""Pictures and sound on the chat page: chosen, pasted, dropped, recorded."""

from __future__ import annotations

import base64
import io
import wave
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from page.conftest import PITCH, words
from support.audio_clips import write_wav

pytest.importorskip("PIL", reason="the extra images has Pillow")
from PIL import Image

from support.pictures import painting

if TYPE_CHECKING:
    from support.page_driver import Person


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
    with anna.showing("#toast.shown"):
        anna.page.set_input_files("#files", tmp_path / name)
    assert sentence in (anna.page.text_content("#toast") or "") and anna.page.input_value("#prompt") == "kept"
    assert anna.page.locator("#attachments li").count() == 0


def test_the_microphone_records_16_khz_wav(anna: Person) -> None:
    anna.page.click("#microphone")
    anna.until("document.querySelector('#recording-time').textContent >= '0:02'")
    anna.page.click("#recording-done")
    anna.page.wait_for_selector("#attachments .sound")
    anna.say("What is said?")
    audio, _ = attached(anna)
    samples = samples_of(audio)
    # The clip repeats every two seconds, and a busy machine loses samples; most quarters are whole.
    quarters = samples[: len(samples) // 4000 * 4000].reshape(-1, 4000)
    assert len(samples) > 24_000 and abs(np.median([pitch_of(each) for each in quarters]) - PITCH) <= 5
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
