"""Prefill and decode: prompt ids to token ids.

`TokenGenerator` knows nothing of text: it feeds ids, and rows of attachments in the place of their soft
tokens, to the decoder, and keeps the KV cache for the next prompt that starts the same way. `answers` turns
its ids into text.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.errors import GemmaEdgeError, UsageError
from gemma_edge.runtime.prompt.prompt_builder import Prompt
from gemma_edge.runtime.request_queue import RequestQueue
from gemma_edge.runtime.residency import Residency
from gemma_edge.runtime.reuse.prompt_cache import PromptCache, Start
from gemma_edge.runtime.sampling import Sampler
from gemma_edge.runtime.speculation.cost_curve import MachineCosts
from gemma_edge.runtime.speculation.speculator import Speculator
from gemma_edge.runtime.usage import GenerationProgress

if TYPE_CHECKING:
    from gemma_edge.runtime.engines.decoder import Decoder

Floats = NDArray[np.float32]
APART = -1  # between predicted ids and a prompt: no id, so that no draft goes beyond it


class Table(Protocol):
    """Rows by token id, scaled: the token embeddings or the per-layer embeddings."""

    def lookup(self, ids: NDArray[np.int64], /) -> Floats:
        """f32 (T, columns) of int64 (T,)."""


class TokenGenerator:
    """A decoder, its two tables, and what is known of the prompts that it was fed.

    Args:
        residency: the decoder, and the encoders of attachments if there are any.
        embeddings: rows (T, hidden).
        per_layer: rows (T, layers * ple width).
        queue: where streams wait while another one is running; default: none may.
        cache: KV caches of earlier prompts; None for the decoder's own alone.
        costs: of calls that verify drafts, on this machine; None to measure them once they are needed.
    """

    def __init__(
        self,
        residency: Residency,
        embeddings: Table,
        per_layer: Table,
        queue: RequestQueue | None = None,
        cache: PromptCache | None = None,
        costs: MachineCosts | None = None,
    ) -> None:
        self.residency, self.embeddings, self.per_layer = residency, embeddings, per_layer
        self.cache = cache or PromptCache(residency.decoder)
        self._ended: tuple[list[int], Floats] | None = None  # keys and logits of the last prompt
        self.queue = queue or RequestQueue(0)
        self.costs = costs or MachineCosts()

    @property
    def decoder(self) -> Decoder:
        return self.residency.decoder

    def reset(self) -> None:
        """Forgets all prompts: the KV cache is empty then, and memory holds no snapshot."""
        self._ended = None
        self.cache.reset()

    def stream_tokens(
        self,
        prompt: Sequence[int] | Prompt,
        sampler: Sampler,
        *,
        max_tokens: int | None = None,
        end_ids: Collection[int] = (),
        cancelled: Callable[[], bool] = lambda: False,
        progress: GenerationProgress | None = None,
        client: str = "",
        speculate: bool = False,
        predicted: Sequence[int] = (),
    ) -> Generator[int, None, None]:
        """Token ids that continue `prompt`, up to and including one of `end_ids`, if it comes to that.

        The arguments are checked at once; the work begins with the first `next`. Abandoning the iterator
        (`close`, or dropping it) frees the generator for the next prompt.

        Args:
            prompt: ids, bos included. What of it a cache already holds is not computed again.
            max_tokens: at most this many; None, or too many, for as many as the context has room for.
            cancelled: asked before every call of the decoder, and while the stream waits; True ends it.
            progress: is filled while the stream runs.
            client: whose turn it is, if several wait; see `RequestQueue`.
            speculate: verify drafts of several tokens at once, where the decoder can; see `Speculator`.
            predicted: ids that the answer may repeat: drafts come from there, too.

        Raises:
            UsageError: the prompt is empty or leaves no room in the context.
            BusyError: another stream is running, and this one cannot wait: raised by the first `next`.
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
                f"it is {len(ids) + 1 - context} too long{takes and f' ({takes})'}. Shorten it, let a part "
                "be left out (--truncate), or load the bundle with a larger context (--context)."
            )
        if max_tokens is not None and max_tokens < 1:
            raise UsageError(f"max_tokens must be 1 or more, not {max_tokens}")
        room = context - len(ids)
        limit = room if max_tokens is None else min(max_tokens, room)
        progress = progress or GenerationProgress()
        progress.prompt_tokens, progress.soft_tokens = len(ids), prompt.soft_tokens
        ends = frozenset(end_ids)
        known = [*predicted, *([APART] if predicted else []), *prompt.keys] if speculate else None
        return self._tokens(prompt, sampler, limit, ends, cancelled, progress, client, known)

    def _tokens(
        self,
        prompt: Prompt,
        sampler: Sampler,
        limit: int,
        end_ids: frozenset[int],
        cancelled: Callable[[], bool],
        progress: GenerationProgress,
        client: str,
        known: Sequence[int] | None,  # where drafts come from; None for none
    ) -> Generator[int, None, None]:
        started = time.perf_counter()
        if not self.queue.enter(client, cancelled):
            return
        progress.queued_s = time.perf_counter() - started
        logits: Floats | None = None
        speculator: Speculator | None = None
        inside = True
        try:
            logits = self._prefill(prompt, cancelled, progress)
            if known is not None:
                speculator = Speculator(self, self.costs, known, end_ids, sampler.fitting)
            history = set(prompt.ids)
            started = time.perf_counter()
            while logits is not None:
                token = sampler.pick(logits, history)
                history.add(token)
                progress.mask_s = sampler.mask_s
                seconds = time.perf_counter() - started
                if progress.completion_tokens:
                    progress.decode_s += seconds
                else:
                    progress.first_token_s = seconds
                progress.completion_tokens += 1
                yield token
                if token in end_ids or progress.completion_tokens >= limit or cancelled():
                    return
                if not speculator and self.queue.is_over(progress.completion_tokens):
                    inside = False  # an error in there ends the turn
                    inside = self._give_way(client, cancelled, progress)
                    if not inside:
                        return
                started = time.perf_counter()
                left = limit - progress.completion_tokens
                if speculator:
                    logits = speculator.after(token, left)
                    progress.drafted_tokens = speculator.drafted
                    progress.accepted_tokens = speculator.accepted
                    progress.speedup = speculator.speedup
                else:
                    logits = self.feed([token])[-1]
        except GemmaEdgeError:
            if logits is not None and not np.isfinite(logits.max()):
                self._ended = None
                self.cache.distrust()
            raise
        finally:
            try:
                if speculator:
                    speculator.finish()
            finally:
                if inside:
                    self.queue.leave()

    def _give_way(self, client: str, cancelled: Callable[[], bool], progress: GenerationProgress) -> bool:
        """Lets requests that wait have a turn, and goes on behind them. Without room for what the KV cache
        holds, the answer goes on at once.

        Returns:
            False if it was cancelled meanwhile. Then, and after an error, it has no turn to end.
        """
        inside, parked = True, None
        try:
            if not (parked := self.cache.park()):
                return True
            started, inside = time.perf_counter(), False
            inside = self.queue.give_way(client, cancelled)
            progress.queued_s += time.perf_counter() - started
            if inside:
                self.residency.load_decoder()
                self.cache.resume(parked)
            return inside
        except BaseException:
            if inside:
                self.queue.leave()
            raise
        finally:
            if parked:
                parked.pinned = False

    def feed(self, ids: Sequence[int]) -> Floats:
        """Appends tokens to the KV cache; the logits behind each, f32 (T, V)."""
        return self._feed(Prompt(list(ids)), wanted=len(ids))

    def take_back(self, position: int) -> None:
        """Takes the KV cache back to a position; see `Decoder.truncate`."""
        self.cache.take_back(position)

    def _prefill(
        self, prompt: Prompt, cancelled: Callable[[], bool], progress: GenerationProgress
    ) -> Floats | None:
        """Logits of the prompt's last token, f32 (V,), with the prompt in the cache; None when cancelled."""
        while True:  # until the decoder takes what was found: a file may not be what it says
            start = self._find(prompt, progress)
            rows = self._encoded(prompt, start.tokens, cancelled, progress)
            if rows is None or cancelled():
                return None
            self.residency.load_decoder()
            started = time.perf_counter()
            begun = self.cache.begin(start, prompt.keys)
            progress.restore_s += time.perf_counter() - started
            if begun:
                break
        progress.cached_tokens, progress.restored_from = start.tokens, start.place
        started = time.perf_counter()
        logits = self._feed_from(start, prompt, rows, cancelled)
        progress.prefill_s = time.perf_counter() - started
        return logits

    def _find(self, prompt: Prompt, progress: GenerationProgress) -> Start:
        """Where the prompt can begin, once there is room for its encoders."""
        started = time.perf_counter()
        # A last token is fed for its logits, unless it was the last token of the last prompt.
        again = self._ended is not None and self._ended[0] == prompt.keys
        keys = prompt.keys if again else prompt.keys[:-1]
        start = self.cache.find(keys)
        if needed := prompt.after(start.tokens):
            self.residency.make_room(needed, self.cache.pool.clear)
            if not start.snapshot:
                start = self.cache.find(keys)
        progress.restore_s += time.perf_counter() - started
        return start

    def _feed_from(
        self, start: Start, prompt: Prompt, rows: Mapping[int, Floats], cancelled: Callable[[], bool]
    ) -> Floats | None:
        """Feeds the rest of a prompt, keeping snapshots on the way; the logits as of `_prefill`."""
        total, at = len(prompt.ids), start.tokens
        if at == total and self._ended:
            return self._ended[1].copy()
        cuts, logits = self.cache.cuts(prompt, start), None
        while at < total:
            if cancelled():
                return None
            stop = min([at + self.decoder.chunk, total, *(cut for cut in cuts if cut > at)])
            fed = self._feed(prompt, at, stop, rows=rows, wanted=int(stop == total))
            logits = fed[-1] if len(fed) else None
            at = stop
            if at in cuts:
                self.cache.keep(whole=at == total)
        if logits is not None:
            self._ended = list(prompt.keys), logits.copy()
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

    def _feed(
        self,
        prompt: Prompt,
        start: int = 0,
        stop: int | None = None,
        *,
        rows: Mapping[int, Floats] | None = None,
        wanted: int = 1,
    ) -> Floats:
        """Appends ids[start:stop] to the cache; logits of the last `wanted`, f32 (wanted, V)."""
        held = self.cache.feeding()  # an error or Ctrl-C in between leaves it unknown
        ids = np.asarray(prompt.ids[start:stop], np.int64)
        embeddings, per_layer = self.embeddings.lookup(ids), self.per_layer.lookup(ids)
        for item in prompt.placed:
            first, last = max(item.start, start), min(item.stop, start + len(ids))
            if rows and first < last:
                soft = rows[item.attachment.key][first - item.start : last - item.start]
                embeddings[first - start : last - start] = soft
        logits: Floats = self.decoder.forward(embeddings, per_layer, n_logits=wanted)
        held.extend(prompt.keys[start:stop])
        self.cache.fed(held)
        return logits
