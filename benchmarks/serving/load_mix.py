"""The requests of a load: answers that are known, requests that are none, and clients that leave."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from random import Random
from typing import Any

from gemma_edge.benchmarks.serving.load_client import LoadClient, Response
from gemma_edge.runtime.answers import Completion
from gemma_edge.runtime.model import Model

CHAT = "/v1/chat/completions"
# Of 100 requests: how each is asked.
SHARES = {"whole": 35, "stream": 30, "left": 15, "left at once": 6, "malformed": 8, "oversized": 6}
MALFORMED = (
    b"{",
    b"[]",
    b'{"messages": []}',
    b'{"messages": [{"role": "user", "content": "x"}], "bogus": 1}',
    b"\xff",
)
OVERSIZED = 1 << 30
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "set_light",
        "parameters": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]},
    },
}


@dataclass(frozen=True)
class KnownAnswer:
    """A request, and the library's answer to it."""

    body: Mapping[str, Any]
    text: str
    finish_reason: str
    calls: tuple[tuple[str, str], ...]

    def fits(self, response: Response) -> bool:
        """Whether a response is this answer, or the beginning of it if its client left."""
        if response.status != 200:
            return False
        choices = [choice for item in response.body for choice in item.get("choices", ())]
        if not self.body.get("stream"):
            message = choices[0]["message"]
            return (message["content"] or "", choices[0]["finish_reason"], _calls(message)) == self._expected
        deltas = [choice["delta"] for choice in choices]
        text = "".join(delta.get("content") or "" for delta in deltas)
        if not response.complete:
            return self.text.startswith(text)
        calls = tuple(call for delta in deltas for call in _calls(delta))
        return (text, choices[-1]["finish_reason"], calls) == self._expected

    @property
    def _expected(self) -> tuple[str, str, tuple[tuple[str, str], ...]]:
        return self.text, self.finish_reason, self.calls


def _calls(message: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    found = message.get("tool_calls") or ()
    return tuple((call["function"]["name"], call["function"]["arguments"]) for call in found)


def known_answers(model: Model, count: int) -> list[KnownAnswer]:
    """`count` requests with the library's answers: texts, and tools and images where they can be."""
    made = []
    for number in range(count):
        content: Any = f"What is {number % 10} + {number // 10}?"
        options: dict[str, Any] = {"seed": number, "temperature": 0.8, "max_tokens": 8 + number % 24}
        if number % 8 == 1 and "vision" in model.reader.modalities:
            url = {"url": _picture(number)}
            content = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "What is this?"}]
        if number % 8 == 2 and find_spec("llguidance"):
            options |= {"tools": [TOOL], "tool_choice": "auto"}
        messages = [{"role": "user", "content": content}]
        answer: Completion = model.generate(messages, **options)
        calls = tuple((c.name, json.dumps(c.arguments, ensure_ascii=False)) for c in answer.tool_calls)
        body = {"messages": messages, **options}
        made.append(KnownAnswer(body, answer.text, answer.finish_reason, calls))
    return made


def _picture(number: int) -> str:
    from PIL import Image

    data = io.BytesIO()
    colour = (37 * number % 256, 91 * number % 256, 53 * number % 256)
    Image.new("RGB", (32, 32), colour).save(data, "PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()


async def send_one(client: LoadClient, known: Sequence[KnownAnswer], rng: Random) -> tuple[str, bool]:
    """One request of the mix, chosen by `rng`.

    Returns:
        How it was asked, and whether the response is right.
    """
    (kind,) = rng.choices([*SHARES], [*SHARES.values()])
    if kind == "malformed":
        return kind, (await client.ask(CHAT, rng.choice(MALFORMED))).status == 400
    if kind == "oversized":
        response = await client.ask(CHAT, b"{", length=OVERSIZED)
        client.close()
        return kind, response.status == 413
    answer = rng.choice(known)
    stream = kind in ("stream", "left")
    asked = KnownAnswer({**answer.body, "stream": stream}, answer.text, answer.finish_reason, answer.calls)
    leave = {"left": rng.randint(1, 6), "left at once": 0}.get(kind)
    response = await client.ask(CHAT, json.dumps(asked.body).encode(), leave_after=leave)
    return kind, kind == "left at once" or asked.fits(response)
