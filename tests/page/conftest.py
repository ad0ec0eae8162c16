"""The chat page of `gemma-edge serve`, used as a person would: a real Chromium, server and bundles.

What the page shows is compared with what the server sent, so no test depends on what a model says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from gemma_edge.benchmarks.output.browser import find_browser
from gemma_edge.export.exporter import export_bundle
from support.audio_clips import write_wav
from support.http_server import ServerProcess, serving
from support.repository import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from support.page_driver import Person

PAGE = ROOT / "runtime" / "server" / "page"
PHONE, DESK = (390, 844), (1440, 900)
READY = "html[data-ready]"
PITCH = 600  # Hz, of what the microphone hears


@pytest.fixture(scope="package")
def models(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two bundles: Pocket, which sees and hears, and one for text with room for long answers."""
    folder = tmp_path_factory.mktemp("models")
    export_bundle(
        ROOT / "pocket" / "checkpoint",
        folder / "pocket",
        recipe="int4",
        context=1024,
        verify=False,
        calibrate="none",
    )
    export_bundle(tiny_checkpoint, folder / "text", context=4096, chunk=64, verify=False, calibrate="none")
    return folder


@pytest.fixture(scope="package")
def chat_server(models: Path) -> Iterator[ServerProcess]:
    pytest.importorskip("uvicorn", reason="the extra serve has uvicorn")
    with serving("--models", models, brakes=True) as server:
        yield server


@pytest.fixture(scope="package")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """A Chromium whose microphone hears a tone."""
    if find_browser() is None:
        pytest.skip("no Chromium or Chrome (tests/install.sh)")
    for module in ("playwright", "axe_playwright_python"):
        pytest.importorskip(module, reason=f"the extra dev has {module}")
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
