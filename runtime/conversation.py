"""`Conversation`: turns that continue each other, and files attached to the next one."""

from __future__ import annotations

from typing import Any

from gemma_edge.runtime.answers import Stream
from gemma_edge.runtime.media.attachments import Part
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.prompt_builder import bare, whole


class Conversation:
    """The turns so far, and the options of every answer.

        conversation = Conversation(model, system="Be brief.")
        stream = conversation.ask("Why is the sky blue?")
        for piece in stream:
            print(piece, end="")
        conversation.note(stream.completion.text)

    Args:
        options: keyword arguments of `Model.generate`.
    """

    def __init__(
        self, model: Model, *, system: str | None = None, options: dict[str, Any] | None = None
    ) -> None:
        self.model, self.system, self.options = model, system, options or {}
        self.messages: list[dict[str, Any]] = []
        self._attached: list[Part] = []  # for the turn to come
        self._asked: dict[str, Any] = {}

    def reset(self) -> None:
        """Forgets the turns; the system message stays."""
        self.messages, self._attached = [], []
        self.model.reset()

    def attach(self, path: str) -> None:
        """Adds a file to the next turn. Raises as `Reader.file`."""
        self._attached += self.model.reader.file(path)

    def ask(self, text: str) -> Stream:
        """The answer to a further turn; `note` it when it has ended."""
        parts = [*map(whole, self._attached), *([bare(text)] if text else [])]
        self._asked = {"role": "user", "content": parts if self._attached else text}
        turns = [*self.messages, self._asked]
        return self.model.generate(turns, stream=True, system=self.system, **self.options)

    def note(self, answer: str) -> None:
        """Keeps the turn and its answer, even one cut short; a turn without an answer is dropped."""
        if answer.strip():
            self.messages += [self._asked, {"role": "assistant", "content": answer}]
            self._attached = []
