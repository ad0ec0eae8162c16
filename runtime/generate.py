"""Prefill, decode and streaming: prompt ids to token ids, token ids to text.

`TokenGenerator` knows nothing of text: it feeds ids, and rows of attachments in the place of their soft
tokens, to the decoder, and keeps the KV cache for the next prompt that starts the same way. `Stream` knows
nothing of the decoder: it turns ids into text and looks for the end.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.errors import GemmaEdgeError, UsageError
from gemma_edge.runtime.prompt.prompt_builder import Prompt
from gemma_edge.runtime.residency import Residency
from gemma_edge.runtime.sampling import Sampler

if TYPE_CHECKING:
    from types import TracebackType

    from gemma_edge.runtime.engines.decoder import Decoder
    from gemma_edge.runtime.prompt.tokenizer import StreamDecoder

Floats = NDArray[np.float32]


class Table(Protocol):
    """Rows by token id, scaled: the token embeddings or the per-layer embeddings."""

    def lookup(self, ids: NDArray[np.int64], /) -> Floats:
        """f32 (T, columns) of int64 (T,)."""


@dataclass(frozen=True)
class Usage:
    """What a completion took. A rate is None where nothing was measured.

    `completion_tokens` counts every token sampled, the end token included. `cached_tokens` of the prompt were
    in the KV cache already; `soft_tokens` of it stand for images and clips, and `encode_s` is what their
    encoders took, loading included. The time to the first token has everything in it but the loading of the
    decoder. Times are seconds of work: those in which the caller holds the stream do not
    count.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    time_to_first_token_s: float | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    soft_tokens: int = 0
    encode_s: float | None = None


@dataclass(frozen=True)
class Completion:
    """An answer. `finish_reason` is "stop" (end token or stop string), "length" or "cancelled"."""

    text: str
    usage: Usage
    finish_reason: str

    def to_dict(self) -> dict[str, Any]:
        """JSON values: text, finish_reason, usage."""
        return {"text": self.text, "finish_reason": self.finish_reason, "usage": asdict(self.usage)}


@dataclass
class GenerationProgress:
    """Counters and seconds of one generation, filled while it runs."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    soft_tokens: int = 0
    tokenize_s: float = 0.0  # the template and reading attachments included
    encode_s: float = 0.0
    prefill_s: float = 0.0
    first_token_s: float = 0.0  # sampling it, after the prefill
    decode_s: float = 0.0  # tokens after the first

    def usage(self) -> Usage:
        started = self.completion_tokens > 0
        prefilled, decoded = self.prompt_tokens - self.cached_tokens, self.completion_tokens - 1
        return Usage(
            self.prompt_tokens,
            self.cached_tokens,
            self.completion_tokens,
            self.tokenize_s + self.encode_s + self.prefill_s + self.first_token_s if started else None,
            prefilled / self.prefill_s if started and self.prefill_s else None,
            decoded / self.decode_s if decoded > 0 and self.decode_s else None,
            self.soft_tokens,
            self.encode_s or None,
        )


class TokenGenerator:
    """A decoder, its two tables, and the ids that its KV cache holds.

    Args:
        residency: the decoder, and the encoders of attachments if there are any.
        embeddings: rows (T, hidden).
        per_layer: rows (T, layers * ple width).
    """

    def __init__(self, residency: Residency, embeddings: Table, per_layer: Table) -> None:
        self.residency, self.embeddings, self.per_layer = residency, embeddings, per_layer
        self._cached: list[int] | None = None  # keys of a Prompt; None: not known, as after an error
        self._busy = threading.Lock()

    @property
    def decoder(self) -> Decoder:
        return self.residency.decoder

    def reset(self) -> None:
        """Forgets the conversation: the KV cache is empty then."""
        self._cached = None
        self.decoder.reset()
        self._cached = []

    def stream_tokens(
        self,
        prompt: Sequence[int] | Prompt,
        sampler: Sampler,
        *,
        max_tokens: int | None = None,
        end_ids: Collection[int] = (),
        cancelled: Callable[[], bool] = lambda: False,
        progress: GenerationProgress | None = None,
    ) -> Generator[int, None, None]:
        """Token ids that continue `prompt`, up to and including one of `end_ids`, if it comes to that.

        The arguments are checked at once; the work begins with the first `next`. Abandoning the iterator
        (`close`, or dropping it) frees the generator for the next prompt.

        Args:
            prompt: ids, bos included. What of it the cache already holds is not computed again.
            max_tokens: at most this many; None, or too many, for as many as the context has room for.
            cancelled: asked before every call of the decoder; True ends the stream.
            progress: is filled while the stream runs.

        Raises:
            UsageError: the prompt is empty or leaves no room in the context; another stream is running.
            GemmaEdgeError: the logits hold NaN.
        """
        if not isinstance(prompt, Prompt):
            prompt = Prompt([int(i) for i in prompt])
        ids, context = prompt.ids, self.decoder.context
        if not ids:
            raise UsageError("the prompt is empty")
        if len(ids) >= context:
            takes = prompt.takes()
            raise UsageError(
                f"the prompt has {len(ids)} tokens, but the context of {context} must hold it and a new one: "
                f"it is {len(ids) + 1 - context} too long{takes and f' ({takes})'}. Shorten it, or load the "
                "bundle with a larger context (--context)."
            )
        if max_tokens is not None and max_tokens < 1:
            raise UsageError(f"max_tokens must be 1 or more, not {max_tokens}")
        room = context - len(ids)
        limit = room if max_tokens is None else min(max_tokens, room)
        progress = progress or GenerationProgress()
        progress.prompt_tokens, progress.soft_tokens = len(ids), prompt.soft_tokens
        return self._tokens(prompt, sampler, limit, frozenset(end_ids), cancelled, progress)

    def _tokens(
        self,
        prompt: Prompt,
        sampler: Sampler,
        limit: int,
        end_ids: frozenset[int],
        cancelled: Callable[[], bool],
        progress: GenerationProgress,
    ) -> Generator[int, None, None]:
        if not self._busy.acquire(blocking=False):
            raise UsageError("the model is still streaming another answer: finish it, or call its cancel()")
        try:
            logits = self._prefill(prompt, cancelled, progress)
            history = set(prompt.ids)
            started = time.perf_counter()
            while logits is not None:
                token = sampler.pick(logits, history)
                history.add(token)
                seconds = time.perf_counter() - started
                if progress.completion_tokens:
                    progress.decode_s += seconds
                else:
                    progress.first_token_s = seconds
                progress.completion_tokens += 1
                yield token
                if token in end_ids or progress.completion_tokens >= limit or cancelled():
                    return
                started = time.perf_counter()
                logits = self._feed(Prompt([token]))
        finally:
            self._busy.release()

    def _prefill(
        self, prompt: Prompt, cancelled: Callable[[], bool], progress: GenerationProgress
    ) -> Floats | None:
        """Logits of the prompt's last token, f32 (V,), with the prompt in the cache; None when cancelled."""
        reused = self._reusable(prompt.keys)
        if needed := prompt.after(reused):
            self.residency.make_room(needed)
            reused = self._reusable(prompt.keys)
        if not reused:
            self.reset()
        progress.cached_tokens = reused
        rows = self._encoded(prompt, reused, cancelled, progress)
        if rows is None or cancelled():
            return None
        self.residency.load_decoder()
        started = time.perf_counter()
        logits = None
        for start in range(reused, len(prompt.ids), self.decoder.chunk):
            if cancelled():
                return None
            stop = start + self.decoder.chunk
            logits = self._feed(prompt, start, stop, rows=rows, wanted=stop >= len(prompt.ids))
        progress.prefill_s = time.perf_counter() - started
        return logits

    def _encoded(
        self, prompt: Prompt, reused: int, cancelled: Callable[[], bool], progress: GenerationProgress
    ) -> Mapping[int, Floats] | None:
        """Rows of the attachments that are not in the cache; None when cancelled."""
        needed = prompt.after(reused)
        if not needed:
            return {}
        started = time.perf_counter()
        rows = self.residency.encode(needed, cancelled)
        progress.encode_s = time.perf_counter() - started
        return rows

    def _reusable(self, keys: list[int]) -> int:
        """Tokens in the cache that are the start of a prompt: all that are there, or none.

        A sliding window's cache cannot be rolled back, so a cache that differs anywhere is of no use; and one
        token must be left to feed, for its logits.
        """
        cached = self._cached
        if cached is None or self.decoder.position != len(cached) or len(cached) >= len(keys):
            return 0
        return len(cached) if keys[: len(cached)] == cached else 0

    def _feed(
        self,
        prompt: Prompt,
        start: int = 0,
        stop: int | None = None,
        *,
        rows: Mapping[int, Floats] | None = None,
        wanted: bool = True,
    ) -> Floats | None:
        """Appends ids[start:stop] to the cache; logits of the last, f32 (V,), if they are wanted."""
        known, self._cached = self._cached or [], None  # an error or Ctrl-C in between leaves it unknown
        ids = np.asarray(prompt.ids[start:stop], np.int64)
        embeddings, per_layer = self.embeddings.lookup(ids), self.per_layer.lookup(ids)
        for item in prompt.placed:
            first, last = max(item.start, start), min(item.stop, start + len(ids))
            if rows and first < last:
                soft = rows[item.attachment.key][first - item.start : last - item.start]
                embeddings[first - start : last - start] = soft
        logits: Floats = self.decoder.forward(embeddings, per_layer, n_logits=int(wanted))
        known.extend(prompt.keys[start:stop])
        self._cached = known
        return logits[-1] if wanted else None


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
    any thread, ends it early and frees the model; so does dropping it.
    """

    def __init__(
        self,
        tokens: Generator[int, None, None],
        text: StreamDecoder,
        stops: StopStrings,
        end_ids: Collection[int],
        progress: GenerationProgress,
        cancelled: threading.Event,
    ) -> None:
        self._answer = _Answer(progress, cancelled)
        # It must not refer to the stream: in a cycle of references, dropping the stream would free nothing.
        self._pieces = _pieces(tokens, text, stops, end_ids, self._answer)

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

    def __init__(self, progress: GenerationProgress, cancelled: threading.Event) -> None:
        self.progress, self.cancelled = progress, cancelled
        self.emitted: list[str] = []
        self.completion: Completion | None = None

    def finish(self, reason: str) -> None:
        self.completion = Completion("".join(self.emitted), self.progress.usage(), reason)


def _pieces(
    tokens: Generator[int, None, None],
    text: StreamDecoder,
    stops: StopStrings,
    end_ids: Collection[int],
    answer: _Answer,
) -> Generator[str, None, None]:
    def emit(piece: str) -> Iterator[str]:
        if piece:
            answer.emitted.append(piece)
            yield piece

    reason = ""
    try:
        for token in tokens:
            if token in end_ids:
                reason = "stop"
                break
            yield from emit(stops.push(text.push(token)))
            if stops.found:
                break
        reason = reason or ("cancelled" if answer.cancelled.is_set() else "length")
        yield from emit(stops.push(text.flush()))
        yield from emit(stops.flush())
        answer.finish("stop" if stops.found else reason)
    except GeneratorExit:
        answer.finish(reason or "cancelled")
        raise
    finally:
        tokens.close()
