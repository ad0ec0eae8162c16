"""`Usage`: what an answer took; `GenerationProgress`: the counters that it is made of."""

from __future__ import annotations

from dataclasses import dataclass

WAITED_S = 1e-3  # a free model takes microseconds


@dataclass(frozen=True)
class Usage:
    """What a completion took. A rate is None where nothing was measured.

    `completion_tokens` counts every token sampled, the end token included. `cached_tokens` of the prompt were
    in a KV cache already; if that was a snapshot, `restored_from` says where it lay, "memory" or "disk", and
    `restore_s` how long it took. `soft_tokens` of it stand for images and clips, and `encode_s` is what their
    encoders took, loading included. `queued_s` is how long the request waited for others. The time to the
    first token has everything in it but that and the loading of the decoder. `mask_s_per_token` is what a
    constraint took of each token: to say which tokens may follow, and to go on behind the one picked. Times
    are seconds of work: those in which the caller holds the stream do not count.

    `drafted_tokens` were guessed from the prompt and the answer, and verified several at once;
    `accepted_tokens` of them became part of the answer. `speedup` is how many decode steps the answer takes
    without them, for each that it took, by the measured cost of a call of several tokens.
    """

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    time_to_first_token_s: float | None
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    soft_tokens: int = 0
    encode_s: float | None = None
    queued_s: float | None = None
    mask_s_per_token: float | None = None
    restored_from: str | None = None
    restore_s: float | None = None
    drafted_tokens: int = 0
    accepted_tokens: int = 0
    speedup: float | None = None


@dataclass
class GenerationProgress:
    """Counters and seconds of one generation, filled while it runs."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    soft_tokens: int = 0
    tokenize_s: float = 0.0  # the template and reading attachments included
    queued_s: float = 0.0
    encode_s: float = 0.0
    prefill_s: float = 0.0
    restored_from: str | None = None
    restore_s: float = 0.0  # looking for a snapshot included
    first_token_s: float = 0.0  # sampling it, after the prefill
    decode_s: float = 0.0  # tokens after the first
    mask_s: float = 0.0  # of these: the constraint's part
    drafted_tokens: int = 0
    accepted_tokens: int = 0  # of these
    speedup: float | None = None  # over plain decoding, in decode steps

    def usage(self) -> Usage:
        started = self.completion_tokens > 0
        prefilled, decoded = self.prompt_tokens - self.cached_tokens, self.completion_tokens - 1
        return Usage(
            self.prompt_tokens,
            self.cached_tokens,
            self.completion_tokens,
            self._first_s() if started else None,
            prefilled / self.prefill_s if started and self.prefill_s else None,
            decoded / self.decode_s if decoded > 0 and self.decode_s else None,
            self.soft_tokens,
            self.encode_s or None,
            self.queued_s if self.queued_s >= WAITED_S else None,
            self.mask_s / self.completion_tokens if self.mask_s else None,
            self.restored_from,
            self.restore_s if self.restored_from else None,
            self.drafted_tokens,
            self.accepted_tokens,
            self.speedup,
        )

    def _first_s(self) -> float:
        return self.tokenize_s + self.restore_s + self.encode_s + self.prefill_s + self.first_token_s
