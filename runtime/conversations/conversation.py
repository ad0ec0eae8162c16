"""`Conversation`: turns that continue each other, in a context that ends, and in a file for another day."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gemma_edge.runtime.answers import Completion, Stream
from gemma_edge.runtime.conversations.saved_conversation import (
    SavedConversation,
    read_conversation,
    write_conversation,
)
from gemma_edge.runtime.conversations.tool_loop import (
    MAX_STEPS,
    Approve,
    assistant_message,
    completed,
    run_tools,
)
from gemma_edge.runtime.conversations.turns import (
    Forgotten,
    Full,
    Message,
    Overflow,
    Turn,
    forgotten,
    strategy_of,
)
from gemma_edge.runtime.engines.kv_snapshot import ForeignSnapshotError
from gemma_edge.runtime.errors import SessionError, UsageError
from gemma_edge.runtime.media.attachments import Part
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.prompt_builder import bare, whole
from gemma_edge.runtime.prompt.truncation import longest_prompt
from gemma_edge.runtime.usage import Usage


class Conversation:
    """The turns so far, and the options of every answer.

        conversation = Conversation(model, system="Be brief.", overflow="drop-oldest")
        print(conversation.answer("Why is the sky blue?").text)

        stream = conversation.ask("And at night?")
        for piece in stream:
            print(piece, end="")
        conversation.note(stream.completion)

    Any number of conversations share a model: what its KV caches hold is found by what was said. A question
    whose answer is not noted leaves a conversation as it was.

    Args:
        system, tools: as of `Model.generate`, for every answer.
        overflow: what is done when the context is full: "error"; "drop-oldest", which forgets the oldest
            turns but never the system message, the tools and pinned turns; or a function, see `turns.Full`.
        options: further keyword arguments of `Model.generate`.
        report: is told what was forgotten.

    Attributes:
        turns: the oldest first.
        tokens: of all prompts and answers so far: "prompt", "cached" of these, "completion".
    """

    def __init__(
        self,
        model: Model,
        *,
        system: str | None = None,
        tools: Sequence[Any] | None = None,
        overflow: Overflow = "error",
        options: dict[str, Any] | None = None,
        report: Callable[[Forgotten], None] = lambda forgotten: None,
    ) -> None:
        self.model, self.system, self.report = model, system, report
        self.options = {**(options or {}), **({} if tools is None else {"tools": tools})}
        self.turns: list[Turn] = []
        self.tokens = {"prompt": 0, "cached": 0, "completion": 0}
        self._strategy = strategy_of(overflow)
        self._attached: list[Part] = []  # for the turn to come
        self._asked: Turn | None = None
        self._keys: list[int] = []  # of the last prompt

    @property
    def messages(self) -> list[Message]:
        """Those of all turns; a copy."""
        return _messages(self.turns)

    def reset(self) -> None:
        """Forgets the turns; the system message stays."""
        self.turns, self._attached, self._asked, self._keys = [], [], None, []

    def attach(self, path: str | Path) -> None:
        """Adds a file to the next turn. Raises as `Reader.file`."""
        self._attached += self.model.reader.file(path)

    def ask(self, text: str, *, pinned: bool = False) -> Stream:
        """The answer to a further turn; `note` it when it has ended.

        Args:
            pinned: the turn is kept when the context is full.

        Raises:
            As `Model.generate`. The conversation is as it was then.
        """
        return self.go_on(Turn([self._question(text)], pinned))

    def go_on(self, turn: Turn, **changed: Any) -> Stream:
        """The answer to a turn: a new one, or one whose last messages are results of tools.

        Args:
            changed: options that differ for this answer.

        Raises:
            As `Model.generate`. The conversation is as it was then.
        """
        turns, lost = self._fitting([*(other for other in self.turns if other is not turn), turn])
        options = {**self.options, **changed}
        stream = self.model.generate(_messages(turns), stream=True, system=self.system, **options)
        self.turns = turns[:-1]
        self._asked, self._keys = turn, stream.prompt.keys if stream.prompt else []
        if lost:
            self.report(lost)
        return stream

    def run(
        self,
        text: str,
        *,
        pinned: bool = False,
        max_steps: int = MAX_STEPS,
        approve: Approve | None = None,
        read: Callable[[Stream], Completion] = completed,
    ) -> Completion:
        """The answer to a further turn, which is kept, after the tools that it calls were run.

        Args:
            pinned: the turn is kept when the context is full.
            max_steps, approve: see `run_tools`.
            read: reads the stream of an answer to its end, to print it on the way.

        Raises:
            As `run_tools` and `ask`. The conversation is as it was then.
        """
        question = self._question(text)

        def answer(made: list[Message]) -> Completion:
            # A call was asked for, not one after another.
            changed = {"tool_choice": "auto"} if made and self.options.get("tool_choice") else {}
            said = read(self.go_on(Turn([question, *made], pinned), **changed))
            self._count(said.usage)
            return said

        done = run_tools(answer, self.options.get("tools"), max_steps=max_steps, approve=approve)
        self._asked = None
        if len(done.messages) > 1 or done.completion.tool_calls or done.completion.text.strip():
            self.turns.append(Turn([question, *done.messages], pinned))
            self._attached = []
        return done.completion

    def _question(self, text: str) -> Message:
        parts = [*map(whole, self._attached), *([bare(text)] if text else [])]
        return {"role": "user", "content": parts if self._attached else text}

    def note(self, answer: Completion | str) -> None:
        """Keeps the turn and its answer, even one cut short; a turn without an answer is dropped."""
        if isinstance(answer, Completion):
            self._count(answer.usage)
            said = assistant_message(answer)
        else:
            said = {"role": "assistant", "content": answer}
        if self._asked is None or not (said["content"].strip() or "tool_calls" in said):
            return
        self._asked.messages.append(said)
        self.turns.append(self._asked)
        self._attached, self._asked = [], None

    def answer(self, text: str, *, pinned: bool = False) -> Completion:
        """Asks, waits for the answer, and notes it. Raises as `ask`."""
        said = completed(self.ask(text, pinned=pinned))
        self.note(said)
        return said

    def save(self, path: str | Path) -> None:
        """Writes the conversation into a file, whole or not at all, with its KV cache if that is at hand.

        Tools and options are not part of it, nor are files attached to the turn to come.

        Raises:
            OSError: the file cannot be written.
            BusyError: the model is answering in this thread.
        """
        with self.model.queue.turn():
            kv = self.model.prompts.snapshot_of(self._keys) if self._keys else None
        saved = SavedConversation(self.system, self.turns, self.tokens, kv)
        write_conversation(path, saved, _identity(self.model))

    @classmethod
    def load(cls, model: Model, path: str | Path, **options: Any) -> Conversation:
        """The conversation in a file. Its KV cache becomes the model's, so that it goes on at once.

        Args:
            options: of the constructor, but for `system`, which is the file's.

        Raises:
            SessionError: the file is cut short, altered, or of another bundle.
        """
        saved = read_conversation(path, _identity(model), model.reader)
        conversation = cls(model, system=saved.system, **options)
        conversation.turns, conversation.tokens = list(saved.turns), saved.tokens
        if saved.kv and saved.kv[1].position <= model.decoder.context:
            try:
                with model.queue.turn():
                    model.prompts.adopt(*saved.kv)
                conversation._keys = saved.kv[0]
            except ForeignSnapshotError:
                pass  # of another version of the engine: computed again
            except UsageError as error:
                raise SessionError(path, "kv", "a KV cache of this bundle", error) from None
        return conversation

    def _fitting(self, turns: list[Turn]) -> tuple[list[Turn], Forgotten | None]:
        """The turns, or those that the strategy keeps if they leave too little room for an answer."""
        context = self.model.decoder.context
        full = Full(turns, self._tokens, context, longest_prompt(context, self.options.get("max_tokens")))
        if self._strategy is None or self._tokens(turns) <= full.most:
            return turns, None
        kept = list(self._strategy(full))
        return kept, forgotten(full, kept)

    def _tokens(self, turns: Sequence[Turn]) -> int:
        made = self.model.prompt_for(_messages(turns), system=self.system, **self.options)
        return len(made.ids)

    def _count(self, usage: Usage) -> None:
        self.tokens["prompt"] += usage.prompt_tokens
        self.tokens["cached"] += usage.cached_tokens
        self.tokens["completion"] += usage.completion_tokens


def _messages(turns: Sequence[Turn]) -> list[Message]:
    return [message for turn in turns for message in turn.messages]


def _identity(model: Model) -> str:
    return model.bundle.identity if model.bundle else ""
