"""The chat page in a real Chromium, and a person who uses it."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, ConsoleMessage, Page, Playwright, Request, Route

from gemma_edge.benchmarks.output.browser import find_browser
from support.processes import wait_for

PHONE, DESK = (390, 844), (1440, 900)
CHAT = "**/v1/chat/completions"
# A failed request is in the console whatever a page does about it.
_FAILED_REQUEST = "Failed to load resource"
# What the browser tells only while it happens: what the server sends, and what the policy forbids.
_WATCH = """
const fetched = fetch;
window.streams = [];
window.fetch = async (address, options) => {
  const response = await fetched(address, options);
  if (!String(address).endsWith("/chat/completions")) return response;
  streams.push(response.clone().text().catch(() => null));
  return response;
};
addEventListener("securitypolicyviolation", (event) => {
  console.error(`CSP: ${event.violatedDirective} ${event.blockedURI}`);
});
"""
# The guidelines' levels A and AA to version 2.2, and axe's best practices.
_AXE_RULES = {
    "runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"],
}


def _text_of(stream: str) -> str:
    lines = [line[6:] for line in stream.splitlines() if line.startswith("data: {")]
    choices = [choice for line in lines for choice in json.loads(line).get("choices", [])]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


@contextlib.contextmanager
def chromium(playwright: Playwright, microphone: Path) -> Iterator[Browser]:
    """A headless Chromium that hears a WAV file when a page records."""
    arguments = [
        "--use-fake-device-for-media-stream",
        "--use-fake-ui-for-media-stream",  # says yes when the page asks for the microphone
        f"--use-file-for-fake-audio-capture={microphone}",
    ]
    if os.geteuid() == 0:
        arguments.append("--no-sandbox")  # Chromium refuses to run as root with it
    browser = playwright.chromium.launch(executable_path=find_browser(), args=arguments, timeout=120_000)
    yield browser
    browser.close()


@dataclass
class Person:
    """Someone with a browser window. What the window tells of is noted, and judged by `leave`.

    Attributes:
        requests: that the page made, oldest first.
        complaints: errors in the console, exceptions and violations of the Content-Security-Policy.
        failures_expected: a test that makes requests fail says so here.
    """

    page: Page
    address: str
    has_touch: bool = False
    requests: list[Request] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    failures_expected: bool = False

    def __post_init__(self) -> None:
        self.page.set_default_timeout(120_000)  # a net: how long a machine takes judges nothing
        self.page.add_init_script(_WATCH)
        self.page.on("request", lambda request: self.requests.append(request))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("console", self._listen)

    def _listen(self, message: ConsoleMessage) -> None:
        if message.type == "error" and not (self.failures_expected and _FAILED_REQUEST in message.text):
            self.complaints.append(message.text)

    def visit(self, ready: str) -> Person:
        """`ready`: what is there once the page is."""
        self.failures_expected = ready == "#key"  # a form to sign in comes with status 401
        self.page.goto(self.address)
        self.page.wait_for_selector(ready)
        return self

    def reload(self) -> None:
        self.page.reload()
        self.page.wait_for_selector("html[data-ready]")

    def leave(self) -> None:
        """Fails for requests to other hosts, and for anything that the browser complained about."""
        own = urlsplit(self.address).netloc
        urls = [urlsplit(request.url) for request in self.requests]
        elsewhere = [url for url in urls if url.scheme not in ("data", "blob") and url.netloc != own]
        self.page.context.close()
        assert self.requests and elsewhere == []
        assert self.complaints == []

    def type(self, text: str) -> None:
        self.page.locator("#prompt").press_sequentially(text)

    def say(self, text: str) -> None:
        """Types a message, sends it and waits for the end of the answer."""
        self.type(text)
        with self.answering():
            if self.has_touch:
                self.page.tap("#send")  # there, Enter starts a line
            else:
                self.page.keyboard.press("Enter")

    @contextlib.contextmanager
    def answering(self) -> Iterator[None]:
        """Waits for the end of the answer that the block asks for."""
        with self.page.expect_request(CHAT):
            yield
        self.wait_for_answer()

    def ask(self, text: str) -> None:
        """Types a message and sends it, and waits for no more than the request."""
        self.type(text)
        with self.page.expect_request(CHAT):
            self.page.keyboard.press("Enter")

    def sent(self) -> list[str]:
        """The texts of the answers, as the server sent them."""
        streams = self.page.evaluate("Promise.all(streams)")
        return [_text_of(stream) for stream in streams if stream is not None]

    def open(self, title: str) -> None:
        """Chooses a conversation in the list, and waits until it is shown."""
        self.page.click(f".conversation:has-text({json.dumps(title)})")
        self.until(f"document.querySelector('#title').textContent === {json.dumps(title)}")

    def start_new(self) -> None:
        """Leaves the conversation for a new one, and waits until that is shown."""
        self.page.click("#new-conversation")
        self.page.wait_for_selector("#empty:not([hidden])")

    @contextlib.contextmanager
    def showing(self, selector: str) -> Iterator[None]:
        """Waits until what the block does has shown an element, for however short a time."""
        self.page.evaluate(
            """(selector) => {
                const there = () => document.querySelector(selector) !== null;
                window.shown = new Promise((resolve) => {
                    new MutationObserver(() => there() && resolve(true)).observe(
                        document, { subtree: true, childList: true, attributes: true });
                    setTimeout(() => resolve(false), 120_000);
                });
            }""",
            selector,
        )
        yield
        assert self.page.evaluate("shown"), f"{selector} was never shown"

    def until(self, expression: str) -> None:
        """Waits for JavaScript to be true. Playwright's own way needs eval, which the policy forbids."""
        wait_for(lambda: self.page.evaluate(expression), f"never true: {expression}")

    def wait_for_answer(self) -> None:
        self.page.wait_for_selector("#send:not([hidden])")

    def answers(self) -> list[str]:
        """The answers as one reads them."""
        return self.page.locator(".answer .markdown").all_inner_texts()

    def messages(self) -> list[str]:
        return self.page.locator(".user .bubble").all_inner_texts()

    def asked(self) -> list[dict[str, Any]]:
        """The bodies of the chat requests."""
        return [
            json.loads(r.post_data or "") for r in self.requests if r.url.endswith("/v1/chat/completions")
        ]

    def set(self, **values: str) -> None:
        """Fills in fields of the settings, and saves."""
        self.page.click("#open-settings")
        for name, value in values.items():
            field = self.page.locator(f"#settings-form [name={name}]")
            if name in ("model", "theme"):
                field.select_option(value)
            else:
                field.fill(value)
        self.page.click("#settings-form [type=submit]")
        self.page.wait_for_selector("#settings", state="hidden")

    def answered_with(self, status: int, body: str | bytes = "{}", **headers: str) -> None:
        """The next chat requests get this answer in place of the server's."""
        self.failures_expected = True
        names = {name.replace("_", "-"): value for name, value in headers.items()}

        def answer(route: Route) -> None:
            route.fulfill(status=status, body=body, headers=names)

        self.page.route(CHAT, answer)

    def answered_without_end(self) -> None:
        """The next answers do not end by themselves: the tokens that end them are ruled out."""
        self.changed_request(logit_bias={"1": -100, "106": -100})

    def changed_request(self, **fields: Any) -> None:
        """The next chat requests have these fields, too."""

        def change(route: Route) -> None:
            body = json.loads(route.request.post_data or "")
            route.continue_(post_data=json.dumps({**body, **fields}))

        self.page.route(CHAT, change)

    def answered_by_the_server(self) -> None:
        self.page.unroute(CHAT)

    def violations(self) -> list[str]:
        """What axe-core has against the page as it is now."""
        found = Axe().run(self.page, options=_AXE_RULES).response["violations"]
        return [f"{v['id']}: {node['target']} {node['failureSummary']}" for v in found for node in v["nodes"]]


def person(browser: Browser, address: str, size: Sequence[int] = DESK, *, dark: bool = False) -> Person:
    """A window of that size: a phone's has a touch screen."""
    phone = size[0] < 600
    context = browser.new_context(
        viewport={"width": size[0], "height": size[1]},
        color_scheme="dark" if dark else "light",
        has_touch=phone,
        is_mobile=phone,
        reduced_motion="reduce",
    )
    return Person(context.new_page(), address, has_touch=phone)
