"""Token ids to an answer: `Stream` decodes them, finds the end, and leaves a `Completion`."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Collection, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from gemma_edge.runtime.answer_log import AnswerLog
from gemma_edge.runtime.errors import GemmaEdgeError, UsageError
from gemma_edge.runtime.guards import GuardedAnswer
from gemma_edge.runtime.logprobs import TokenLogprob
from gemma_edge.runtime.prompt.call_finder import CallFinder
from gemma_edge.runtime.prompt.tool_calls import ToolCall
from gemma_edge.runtime.usage import GenerationProgress, Usage

if TYPE_CHECKING:
    from types import TracebackType

    from gemma_edge.runtime.prompt.prompt_builder import Prompt


@dataclass(frozen=True)
class Completion:
    """An answer. `finish_reason` is "stop" (end token or stop string), "tool_calls", "length", "cancelled",
    "timeout", or "filtered" (by a guard).

    `logprobs`, if they were asked for, has an entry for each of `usage.completion_tokens`. `tool_calls` are
    the calls that the model asks for; `text` is what it says beside them.
    """

    text: str
    usage: Usage
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] | None = None
    tool_calls: list[ToolCall] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """JSON values: text, finish_reason, usage, and logprobs and tool_calls if there are any."""
        values: dict[str, Any] = {
            "text": self.text,
            "finish_reason": self.finish_reason,
            "usage": asdict(self.usage),
        }
        if self.logprobs is not None:
            values["logprobs"] = [token.to_dict() for token in self.logprobs]
        if self.tool_calls:
            values["tool_calls"] = [call.to_dict() for call in self.tool_calls]
        return values


class TokenText(Protocol):
    """Token ids to text, as `StreamDecoder` does it."""

    def push(self, token_id: int, /) -> str:
        """The text that is complete with this id."""

    def flush(self) -> str:
        """What is left at the end."""


class TokenSource(NamedTuple):
    """The ids of an answer, their text, and the ids that end it."""

    tokens: Generator[int, None, None]
    text: TokenText
    end_ids: Collection[int]


class Cancellation:
    """Whether an answer is to end early: somebody said so, or its time is up.

    Args:
        timeout: seconds from now; None for no limit.

    Raises:
        UsageError: `timeout` is no number above 0.
    """

    def __init__(self, timeout: float | None = None) -> None:
        if timeout is not None and (
            isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0
        ):
            raise UsageError(f"timeout must be a number of seconds above 0, not {timeout!r}")
        self._deadline = math.inf if timeout is None else time.monotonic() + timeout
        self._event = threading.Event()

    def set(self) -> None:
        """Ends the answer; any thread may call it."""
        self._event.set()

    def is_set(self) -> bool:
        """Is the answer to end?"""
        return bool(self.reason)

    @property
    def reason(self) -> str:
        """A `finish_reason`; "" if the answer is to go on."""
        if self._event.is_set():
            return "cancelled"
        return "timeout" if time.monotonic() >= self._deadline else ""


class StopStrings:
    """Finds stop strings in text that comes in pieces, and lets nothing of them through.

    The result does not depend on how the text is cut: the stop string that is complete first counts.

    Raises:
        UsageError: a stop string is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(isinstance(stop, str) and stop for stop in stops):
            raise UsageError("a stop string must be a text of one character or more")
        self._stops = tuple(stops)
        self._held = ""
        self.found = False

    def push(self, text: str) -> str:
        """The text that is now known not to belong to a stop string; "" for good once one is found."""
        if self.found:
            return ""
        self._held += text
        matches = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if matches:
            self.found = True
            return self._held[: min(matches)[1]]
        size = len(self._held)
        longest = min(size, max(map(len, self._stops), default=1) - 1)
        keep = next((n for n in range(longest, 0, -1) if self._may_start(self._held[size - n :])), 0)
        text, self._held = self._held[: size - keep], self._held[size - keep :]
        return text

    def _may_start(self, suffix: str) -> bool:
        return any(stop.startswith(suffix) for stop in self._stops)

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        return "" if self.found else self._held


class Stream(Iterator[str]):
    """An answer on its way: an iterator of pieces of text, none empty.

    Once it has ended, `completion` is there; its text is what the pieces join to. `cancel` or `close`, from
    any thread, ends it early and frees the model; so does leaving a `for` loop over it, and dropping it. To
    take some pieces and go on later, call `next`. `prompt` is what it answers.
    """

    def __init__(
        self,
        tokens: Generator[int, None, None],
        text: TokenText,
        stops: StopStrings,
        end_ids: Collection[int],
        progress: GenerationProgress,
        cancelled: Cancellation,
        *,
        logprobs: list[TokenLogprob] | None = None,
        guarded: GuardedAnswer | None = None,
        prompt: Prompt | None = None,
        log: AnswerLog | None = None,
        calls: CallFinder | None = None,
    ) -> None:
        self.prompt = prompt
        self._answer = _Answer(progress, cancelled, logprobs, calls or CallFinder(()), log)
        # It must not refer to the stream: in a cycle of references, dropping the stream would free nothing.
        self._pieces = _pieces(tokens, text, stops, guarded or GuardedAnswer((), ""), end_ids, self._answer)

    def __iter__(self) -> Iterator[str]:
        yield from self._pieces  # a loop drops this generator when it ends, by `break` too: that closes both

    def __next__(self) -> str:
        return next(self._pieces)

    @property
    def completion(self) -> Completion:
        """The whole answer.

        Raises:
            GemmaEdgeError: the stream has not ended.
        """
        if self._answer.completion is None:
            raise GemmaEdgeError("the answer is not complete: read the stream to its end, or cancel it")
        return self._answer.completion

    @property
    def logprobs(self) -> Sequence[TokenLogprob]:
        """Those of the tokens so far; empty unless they were asked for."""
        return self._answer.logprobs or ()

    def cancel(self) -> None:
        """Ends the answer; nothing happens to one that has ended.

        An answer that is being computed in another thread, or below a signal handler, ends at its next token.
        """
        self._answer.cancelled.set()
        try:
            self._pieces.close()
        except ValueError:  # running now: it will see the event
            return
        if self._answer.completion is None:  # it never began
            self._answer.finish("cancelled")

    close = cancel

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()


class _Answer:
    """What a stream and its generator share."""

    def __init__(
        self,
        progress: GenerationProgress,
        cancelled: Cancellation,
        logprobs: list[TokenLogprob] | None,
        calls: CallFinder,
        log: AnswerLog | None,
    ) -> None:
        self.progress, self.cancelled, self.logprobs, self.calls = progress, cancelled, logprobs, calls
        self.log = log
        self.emitted: list[str] = []
        self.completion: Completion | None = None

    def finish(self, reason: str) -> None:
        logprobs = None if self.logprobs is None else tuple(self.logprobs)
        calls = [] if reason == "filtered" else list(self.calls.calls)
        reason = "tool_calls" if calls else reason
        self.completion = Completion("".join(self.emitted), self.progress.usage(), reason, logprobs, calls)
        self.ended(reason)

    def ended(self, reason: str, error: BaseException | None = None) -> None:
        if self.log is not None:
            self.log.ended(reason, error)


def _pieces(
    tokens: Generator[int, None, None],
    text: TokenText,
    stops: StopStrings,
    guarded: GuardedAnswer,
    end_ids: Collection[int],
    answer: _Answer,
) -> Generator[str, None, None]:
    def emit(piece: str) -> Iterator[str]:
        if piece:
            answer.emitted.append(piece)
            yield piece

    reason, calls = "", answer.calls
    try:
        for token in tokens if guarded.admit() else ():
            if token in end_ids:
                reason = "stop"
                break
            yield from emit(calls.push(guarded.push(stops.push(text.push(token)))))
            if stops.found or guarded.refused:
                break
        reason = "stop" if stops.found else reason or answer.cancelled.reason or "length"
        if not guarded.refused:
            rest = stops.push(text.flush())
            yield from emit(calls.push(guarded.push(rest + stops.flush()) + guarded.flush()))
        if not guarded.refused:
            yield from emit(calls.flush(find=not answer.cancelled.reason))
        answer.finish("filtered" if guarded.refused else "stop" if stops.found else reason)
    except GeneratorExit:
        answer.finish(reason or "cancelled")
        raise
    except BaseException as error:
        answer.ended("error", error)
        raise
    finally:
        tokens.close()
