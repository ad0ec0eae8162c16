"""`AudioOps`: the operations of the audio encoder, beyond `BaseOps`.

Feature maps are (time, frequency, channels), sequences (tokens, width). `valid` is (tokens, 1): 1 where a
token belongs to the clip, 0 where it is padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, TypeVar

from gemma_edge.export.model.ops import BaseOps, Weight

T = TypeVar("T")


@dataclass(frozen=True)
class LocalWindow:
    """What a query sees: itself, `past` tokens before and `future` ones after it. Computed `chunk` queries at
    a time; the chunk does not change the result.
    """

    heads: int
    chunk: int
    past: int
    future: int

    @property
    def context(self) -> int:
        """Keys that some query of a chunk sees."""
        return self.past + self.chunk + self.future

    @property
    def span(self) -> int:
        """Keys that one query sees."""
        return self.past + self.future + 1


class AudioOps(BaseOps[T], Protocol[T]):
    """The operations of the audio encoder."""

    def convolve(self, x: T, weight: Weight, stride: tuple[int, int]) -> T:
        """Convolution of (time, frequency, in) with a weight (out, in, kernel time, kernel frequency).

        Padded with a zero bin below and above, and with kernel - 1 frames of zeros at the end: the result
        has ceil(time / stride) frames, and each sees only later ones.
        """

    def cumulative_norm(self, x: T, weight: Weight, eps: float) -> T:
        """Group norm of (time, frequency, channels), whose statistics grow with time.

        The mean of a frame is over all frames up to it, and its variance is the mean, over the same frames,
        of each one's squared distances from its own cumulative mean. `weight` (channels,).
        """

    def flatten(self, x: T, width: int) -> T:
        """(time, frequency, channels) -> (time, width = frequency * channels)."""

    def causal_convolve(self, x: T, weight: Weight) -> T:
        """(tokens, width) with a kernel for each column: weight (width, 1, kernel), zeros before."""

    def local_attention(
        self, q: T, k: T, v: T, positions: Weight, valid: T, window: LocalWindow, cap: float
    ) -> T:
        """Attention of every token to a window around it: (tokens, width) each -> (tokens, width).

        A logit is q (k + p), through cap * tanh(logit / cap), where p is the row of `positions` (span, width)
        for the distance: row 0 for the token `past` before the query. Keys that are not valid are not seen.
        """

    def clip(self, x: T, limit: float) -> T:
        """To [-limit, limit]."""

    def sigmoid(self, x: T) -> T: ...

    def every(self, x: T, step: int) -> T:
        """Rows 0, step, 2 step ..."""

    def fill(self, x: T, valid: T, weight: Weight, count: int) -> T:
        """(tokens, width) -> (count, width): `weight` (width,) for rows that are not valid, or missing."""
