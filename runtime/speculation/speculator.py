"""`Speculator`: the logits behind each token of an answer, several of them from one call of the decoder.

A call feeds the token that was picked and a draft of those to come, and gives the logits behind each. While
the sampler picks what was drafted, these serve; the rest of the draft is taken back out of the KV cache. So
every token is picked from the model's own logits of its own place, by the sampler's own rules: the answer's
distribution, and with a seed the answer, are those of plain decoding.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.engines.decoder import Decoder
from gemma_edge.runtime.speculation.cost_curve import CostCurve, MachineCosts
from gemma_edge.runtime.speculation.draft_policy import DraftPolicy
from gemma_edge.runtime.speculation.prompt_lookup import PromptLookup

Floats = NDArray[np.float32]
MOST_DRAFT = 15


class DecoderFeed(Protocol):
    """How an answer's tokens reach the decoder, and what its KV cache holds stays known."""

    @property
    def decoder(self) -> Decoder:
        """The decoder, for its position and what it verifies."""

    def feed(self, ids: Sequence[int]) -> Floats:
        """Appends tokens; logits behind each, f32 (T, V)."""

    def take_back(self, position: int) -> None:
        """Takes the KV cache back to a position."""


class Speculator:
    """See the module. It belongs to one answer.

    Args:
        keys: of the prompt, and of what else the answer may repeat; see `PromptLookup`.
        end_ids: ids that end the answer.
        fitting: how many of some tokens a constraint lets follow; see `Constraint.fitting`.

    Attributes:
        drafted, accepted: tokens that were verified, and those that the sampler picked as well.
    """

    def __init__(
        self,
        feed: DecoderFeed,
        costs: MachineCosts,
        keys: Sequence[int],
        end_ids: Collection[int],
        fitting: Callable[[Sequence[int]], int],
    ) -> None:
        self._feed, self._costs, self._end_ids, self._fitting = feed, costs, end_ids, fitting
        self._lookup, self._policy = PromptLookup(keys), DraftPolicy()
        self._guessed: list[int] = []  # what may come; the first ones are the draft
        self._match = 0  # length of the match that they come from
        self._draft = 0  # how many of them were verified
        self._used = 0  # how many of them were picked
        self._size = 0  # rows of the last call, its padding included; 0 for none
        self._position = 0  # behind the token of the last call
        self._logits = np.empty((0, 0), np.float32)
        self.drafted = self.accepted = 0

    @property
    def speedup(self) -> float | None:
        """Decode steps that plain decoding takes, over those that were taken, by the measured costs; None
        without a draft.
        """
        return round(self._policy.speedup, 3) if self.drafted else None

    def after(self, token: int, left: int) -> Floats:
        """The logits behind a token that was picked, f32 (V,).

        Args:
            left: tokens that the answer may still have.
        """
        if self._used < len(self._guessed):
            self._policy.observe(self._match + self._used, token == self._guessed[self._used])
        self._lookup.extend([token])
        if self._used < self._draft and token == self._guessed[self._used]:
            self._used += 1
            self.accepted += 1
        else:
            self.finish()
            self._step(token, left)
        return self._logits[self._used]

    def finish(self) -> None:
        """Takes what was drafted in vain out of the KV cache."""
        if not self._size:
            return
        self._policy.step(self._size, self._used + 1)
        self._size, unused = 0, self._draft - self._used
        self._guessed, self._draft = [], 0
        if unused:
            self._feed.take_back(self._position + self._used)
        self._used = 0

    def _step(self, token: int, left: int) -> None:
        match, rows = self._lookup.match(), 1
        self._guessed, self._match = [], 0
        if match:
            self._guessed, self._match = self._lookup.draft(match, MOST_DRAFT, self._end_ids), match.length
            rows = self._rows(token, left)
        logits = self._feed.feed([token, *self._guessed[: rows - 1]])
        self._logits, self._draft, self._used = logits, rows - 1, 0
        self._position = self._feed.decoder.position - self._draft
        sizes = self._feed.decoder.verify_rows if rows > 1 else ()
        self._size = next((size for size in sizes if size >= rows), rows)
        self.drafted += self._draft

    def _rows(self, token: int, left: int) -> int:
        """How many rows the next call is to have."""
        decoder = self._feed.decoder
        sizes = [size for size in decoder.verify_rows if decoder.can_verify(size)]
        most = min(1 + len(self._guessed), left)
        if self._policy.rows(self._match, most, sizes) == 1:
            return 1
        most = min(most, 1 + self._fitting(self._guessed[: most - 1]))
        if self._policy.costs is None and (known := self._costs.curve):
            self._policy.costs = known
        elif self._policy.costs is None:
            if len(sizes) < len(decoder.verify_rows):
                return 1  # the end of a window or of the context is near: measured later
            self._policy.costs = self._measured(token, sizes)
        return self._policy.rows(self._match, most, sizes)

    def _measured(self, token: int, sizes: Sequence[int]) -> CostCurve:
        """The machine's costs, measured with tokens that are taken back."""
        position = self._feed.decoder.position

        def seconds(rows: int) -> float:
            started = time.perf_counter()
            self._feed.feed([token] * rows)
            taken = time.perf_counter() - started
            self._feed.take_back(position)
            return taken

        return self._costs.measure(seconds, sizes)
