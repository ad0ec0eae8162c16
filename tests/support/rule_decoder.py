"""A decoder that follows a rule in the place of weights, and a model around it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.engines.decoder import check_fit, check_truncation
from gemma_edge.runtime.engines.kv_snapshot import EveryPosition, ForeignSnapshotError, KvSnapshot, Ring
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.tokenizer import Tokenizer
from gemma_edge.runtime.sampling import Sampling
from support.tiny_tokenizer import END_OF_TURN, EOS

Array = NDArray[np.float32]
Rule = Callable[[list[int]], int]
LAYOUT = "ids"


class IdTable:
    """Rows that are the ids themselves, so that the decoder can see what it is fed."""

    def lookup(self, ids: NDArray[np.int64]) -> Array:
        return np.asarray(ids, np.float32).reshape(-1, 1)


class RuleDecoder:
    """A decoder whose likeliest next token is a function of all the ids it was fed.

    Args:
        window: how many of the latest ids its KV cache keeps; None for all of them.
        verify_rows: see `Decoder`.
    """

    def __init__(
        self,
        rule: Rule,
        *,
        context: int = 512,
        chunk: int = 16,
        vocab_size: int = 315,
        window: int | None = None,
        verify_rows: Sequence[int] = (),
    ) -> None:
        self.rule, self.context, self.chunk, self.vocab_size = rule, context, chunk, vocab_size
        self.kept = EveryPosition() if window is None else Ring(window)
        self.verify_rows = verify_rows
        self.ids: list[int] = []
        self.calls: list[int] = []  # tokens of each forward call since the last `reset` or `calls.clear()`
        self.broken = False  # answer with NaN

    @property
    def position(self) -> int:
        return len(self.ids)

    def reset(self) -> None:
        self.ids.clear()

    def earliest_at(self, position: int) -> int:
        return self.kept.earliest_at(position)

    def can_verify(self, rows: int) -> bool:
        behind = self.position + rows
        return behind <= self.context and self.earliest_at(behind) <= self.position

    def truncate(self, position: int) -> None:
        check_truncation(self, position)
        del self.ids[position:]

    def snapshot(self) -> KvSnapshot:
        ids = {"ids": np.array(self.ids, np.int32)}
        return KvSnapshot(LAYOUT, self.position, self.earliest_at(self.position), ids)

    def snapshot_bytes(self, position: int) -> int:
        return 4 * position

    def restore(self, snapshot: KvSnapshot) -> None:
        check_fit(self, snapshot)
        if snapshot.layout != LAYOUT:
            raise ForeignSnapshotError("the KV snapshot is of another model or engine")
        if snapshot.arrays.keys() != {"ids"} or snapshot.arrays["ids"].shape != (snapshot.position,):
            raise UsageError("the KV snapshot is damaged")
        self.ids = snapshot.arrays["ids"].tolist()

    def forward(self, embeddings: Array, per_layer: Array, n_logits: int = 1) -> Array:
        assert embeddings.dtype == np.float32 and np.array_equal(embeddings, per_layer)
        assert 1 <= len(embeddings) <= self.chunk
        assert n_logits in (0, 1) or n_logits == len(embeddings) <= max(self.verify_rows)
        self.ids += [int(i) for i in embeddings[:, 0]]
        self.calls.append(len(embeddings))
        assert len(self.ids) <= self.context
        logits = np.zeros((n_logits, self.vocab_size), np.float32)
        for row in range(1, n_logits + 1):
            seen = self.ids[: len(self.ids) - n_logits + row]
            logits[row - 1, self.rule(seen)] = np.nan if self.broken else 10.0
        if not n_logits:
            self.rule(self.ids)
        return logits


class RowDecoder(RuleDecoder):
    """Decodes by the embeddings alone: rows of attachments are not those of the per-layer table."""

    def forward(self, embeddings: Array, per_layer: Array, n_logits: int = 1) -> Array:
        return super().forward(embeddings, embeddings, n_logits)


def hash_rule(ids: list[int]) -> int:
    """A token that depends on every id and its place, and is never an end token or a special one."""
    state = 7
    for i in ids:
        state = (state * 31 + i + 1) % 1_000_003
    return 264 + state % 35


def answers(*texts: str, tokenizer: Tokenizer) -> Rule:
    """Answers the n-th model turn of a conversation with the n-th text, then <end_of_turn>."""
    header = tokenizer.encode("<start_of_turn>model\n", bos=False)
    scripts = [[*tokenizer.encode(text, bos=False), END_OF_TURN] for text in texts]

    def rule(ids: list[int]) -> int:
        turns = [n for n in range(len(ids)) if ids[n : n + len(header)] == header]
        at = len(ids) - (turns[-1] + len(header)) if turns else 0
        script = scripts[(len(turns) - 1) % len(scripts)]
        return script[min(at, len(script) - 1)]

    return rule


def tiny_model(
    tokenizer: Tokenizer,
    rule: Rule,
    *,
    context: int = 512,
    chunk: int = 16,
    end_ids: Sequence[int] = (EOS, END_OF_TURN),
) -> Model:
    """A model that follows `rule` greedily."""
    decoder = RuleDecoder(rule, context=context, chunk=chunk)
    return Model(
        decoder, IdTable(), IdTable(), tokenizer, sampling=Sampling(temperature=0.0), end_ids=end_ids
    )
