"""Guards: what may veto a prompt, and an answer while it streams.

A guard is a function of a stage, "prompt" or "answer", and a text. It returns False to end the answer; its
`finish_reason` is "filtered" then. A hook for rules of yours, and no promise of safety.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

Stage = Literal["prompt", "answer"]
Guard = Callable[[Stage, str], bool]


class GuardedAnswer:
    """Holds back the text of an answer until every guard has passed it.

    A guard sees the text of all messages as the prompt, and the answer from its beginning. It sees no
    attachments. A guard with an attribute `interval` sees the answer whenever it has that many more
    characters, and at its end; another one sees it at every piece.

    Args:
        prompt: what the messages say.
    """

    def __init__(self, guards: Sequence[Guard], prompt: str) -> None:
        self._guards, self._prompt = guards, prompt
        self._interval = max((getattr(guard, "interval", 1) for guard in guards), default=1)
        self._text = ""
        self._passed = 0  # characters
        self.refused = False

    def admit(self) -> bool:
        """Whether the guards pass the prompt."""
        self._ask("prompt", self._prompt)
        return not self.refused

    def push(self, text: str) -> str:
        """What may be shown now; "" for good once a guard refused."""
        if not self._guards:
            return text
        self._text += text
        return self._pass() if len(self._text) - self._passed >= self._interval else ""

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        return self._pass() if len(self._text) > self._passed else ""

    def _pass(self) -> str:
        self._ask("answer", self._text)
        if self.refused:
            return ""
        text, self._passed = self._text[self._passed :], len(self._text)
        return text

    def _ask(self, stage: Stage, text: str) -> None:
        self.refused = self.refused or not all(guard(stage, text) for guard in self._guards)


def guards_of(option: Guard | Sequence[Guard] | None) -> Sequence[Guard]:
    """The option `guard` as a list."""
    return () if option is None else (option,) if callable(option) else tuple(option)


def said_in(prompt: str | Sequence[Mapping[str, Any]]) -> str:
    """The text of a prompt's messages, an empty line between them."""
    if isinstance(prompt, str):
        return prompt
    texts: list[str] = []
    for message in prompt:
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content or ()
        texts += [part["text"] for part in parts if part.get("type") == "text"]
    return "\n\n".join(texts)
