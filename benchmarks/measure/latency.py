"""End to end as MLPerf measures it: time to first token, and the gaps between tokens.

Unlike the kernel tests, everything a user waits for is in it: the chat template and the tokenizer, prefill,
sampling, and turning each token back into text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from time import perf_counter_ns
from typing import TYPE_CHECKING

from gemma_edge.benchmarks.records.run_report import Latency, Percentiles
from gemma_edge.runtime.errors import UsageError

if TYPE_CHECKING:  # importing the runtime is part of what the worker measures
    from gemma_edge.runtime.model import Model

_TEXT = (
    "The lighthouse keeper wrote down the weather every morning: the wind and where it came from, the height "
    "of the waves against the third step, and whether the far shore could be seen. After forty years the "
    "notebooks filled a wall. Nobody had asked for them, but when the harbour was rebuilt they were what the "
    "engineers trusted, because the same person had looked at the same step every day. "
)


@dataclass(frozen=True)
class Request:
    """One answer: tokens of the prompt, and nanoseconds from the request to each token's text."""

    prompt_tokens: int
    stamps_ns: tuple[int, ...]

    @property
    def ttft_ms(self) -> float:
        return self.stamps_ns[0] / 1e6

    @property
    def gaps_ms(self) -> list[float]:
        return [(b - a) / 1e6 for a, b in zip(self.stamps_ns, self.stamps_ns[1:], strict=False)]


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all are not above (nearest rank): always one of them."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]


def prompt_text(model: Model, n_tokens: int) -> str:
    """A text that, as a user's turn, makes a prompt of `n_tokens` tokens, or a few less.

    Raises:
        UsageError: the chat template alone is longer.
    """
    frame = len(model.prompt_ids("a")) - 1
    if n_tokens <= frame:
        raise UsageError(
            f"a prompt of {n_tokens} tokens has no room for text: the chat template takes {frame}"
        )
    text = _TEXT
    while len(model.prompt_ids(text)) < n_tokens:
        text += text
    # The longest beginning that fits: a longer text never has fewer tokens, but for a merge at its end.
    low, high = 1, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        if len(model.prompt_ids(text[:middle])) <= n_tokens:
            low = middle
        else:
            high = middle - 1
    return text[:low]


def measure_request(model: Model, text: str, n_tokens: int, seed: int) -> Request:
    """Answers `text` with exactly `n_tokens` tokens, sampled as the bundle says, from an empty KV cache.

    End tokens do not end it: the same number of tokens is measured every time.
    """
    from gemma_edge.runtime.prompt.tokenizer import StreamDecoder

    model.reset()
    stamps = []
    start = perf_counter_ns()
    ids = model.prompt_ids(text)
    pieces = StreamDecoder(model.tokenizer)
    for token in model.stream_tokens(ids, sampling=replace(model.sampling, seed=seed), max_tokens=n_tokens):
        pieces.push(token)
        stamps.append(perf_counter_ns() - start)
    return Request(len(ids), tuple(stamps))


def measure_latency(model: Model, n_prompt: int, n_tokens: int, requests: int) -> list[Request]:
    """`requests` answers after one that is not measured."""
    text = prompt_text(model, n_prompt)
    return [measure_request(model, text, n_tokens, seed) for seed in range(requests + 1)][1:]


def summarize(requests: Sequence[Request]) -> Latency:
    """Time to first token and gaps between tokens, with P50, P90 and P99 and every sample."""
    first = [request.ttft_ms for request in requests]
    gaps = [gap for request in requests for gap in request.gaps_ms]
    return Latency(
        prompt_tokens=requests[0].prompt_tokens,
        answer_tokens=len(requests[0].stamps_ns),
        requests=len(requests),
        ttft_ms=percentiles(first),
        itl_ms=percentiles(gaps) if gaps else None,
        samples_ttft_ms=[round(value, 3) for value in first],
        samples_itl_ms=[round(value, 3) for value in gaps],
        decode_tps=round(1000 * len(gaps) / sum(gaps), 3) if gaps else None,
    )


def percentiles(values: Sequence[float]) -> Percentiles:
    """P50, P90 and P99."""
    return Percentiles(*(round(percentile(values, percent), 3) for percent in (50, 90, 99)))
