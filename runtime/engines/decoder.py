"""`Decoder`: the protocol of a loaded text model.

A decoder turns embeddings into logits and keeps the KV cache. It knows nothing about tokens, prompts or
sampling: its caller looks up the rows of both embedding tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.engines.kv_snapshot import KvSnapshot
from gemma_edge.runtime.errors import UsageError

Array = NDArray[np.float32]


class Decoder(Protocol):
    """One loaded model with one KV cache."""

    context: int  # tokens that the KV cache holds
    chunk: int  # most tokens that one call takes; bounds the memory of activations
    position: int  # tokens in the cache
    verify_rows: Sequence[int]  # ascending, 2 or more: calls of so many tokens give all logits at a low price

    def earliest_at(self, position: int) -> int:
        """The least position that `truncate` can go back to from another, beside 0: a window keeps what it
        sees. A decoder that is not loaded says 0.
        """

    def can_verify(self, rows: int) -> bool:
        """Whether the next call can be one of so many tokens, one of `verify_rows`, that `truncate` takes all
        of them back. The context and the window of a cache may be in the way.
        """

    def forward(self, embeddings: Array, per_layer: Array, n_logits: int = 1) -> Array:
        """Appends T tokens to the cache and returns the logits of the last `n_logits` of them.

        An engine may be quicker when none are asked for, as in all calls of a prompt but the last.

        Args:
            embeddings: f32 (T, hidden), 1 <= T <= chunk, scaled.
            per_layer: f32 (T, layers * ple width), scaled rows of the per-layer table.
            n_logits: 0 to T.

        Returns:
            f32 (n_logits, vocab), the caller's to keep.

        Raises:
            UsageError: the cache has no room for T more tokens.
        """

    def reset(self) -> None:
        """Empties the cache."""

    def truncate(self, position: int) -> None:
        """Takes the cache back to a position, as if the tokens from there on had never been fed.

        Raises:
            UsageError: `can_truncate` says no.
        """

    def snapshot(self) -> KvSnapshot:
        """A copy of what the cache holds."""

    def snapshot_bytes(self, position: int) -> int:
        """What a snapshot at a position takes; 0 where the decoder is not loaded."""

    def restore(self, snapshot: KvSnapshot) -> None:
        """Puts the cache where a snapshot was taken, bit for bit.

        Raises:
            UsageError: it is of another model or engine, or longer than the context; nothing is changed then.
        """


def can_truncate(decoder: Decoder, position: int) -> bool:
    """Whether `Decoder.truncate` can take the cache back to a position."""
    return position == 0 or decoder.earliest_at(decoder.position) <= position <= decoder.position


def check_truncation(decoder: Decoder, position: int) -> None:
    """Raises UsageError where `can_truncate` says no."""
    if not can_truncate(decoder, position):
        raise UsageError(
            f"a cache of {decoder.position} tokens cannot go back to {position}: its windows have moved on, "
            f"and reach back to {decoder.earliest_at(decoder.position)}"
        )


def check_fit(decoder: Decoder, snapshot: KvSnapshot) -> None:
    """Raises UsageError for a snapshot that is longer than the decoder's context."""
    if not 0 <= snapshot.position <= decoder.context:
        raise UsageError(
            f"a KV snapshot of {snapshot.position} tokens does not fit a context of {decoder.context}"
        )


def check_room(decoder: Decoder, tokens: int, n_logits: int) -> None:
    """Whether `Decoder.forward` can take this call.

    Raises:
        UsageError: the cache has no room for `tokens` more.
        ValueError: not a call that the protocol allows.
    """
    if not 0 <= n_logits <= tokens <= decoder.chunk or not tokens:
        raise ValueError(
            f"0 <= n_logits ({n_logits}) <= tokens ({tokens}) <= chunk ({decoder.chunk}) does not hold"
        )
    if decoder.position + tokens > decoder.context:
        raise UsageError(f"{decoder.position} + {tokens} tokens do not fit a context of {decoder.context}")
