"""A decoder that loads when it is first fed, and can be released in between."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence

from gemma_edge.runtime.engines.cores import release_free_memory
from gemma_edge.runtime.engines.decoder import Array, Decoder
from gemma_edge.runtime.engines.kv_snapshot import KvSnapshot


class DeferredDecoder:
    """See `Decoder`.

    Args:
        load: makes the decoder; called when it is needed and not there.
        context, chunk: those of the decoder that it will make.
    """

    def __init__(self, load: Callable[[], Decoder], *, context: int, chunk: int) -> None:
        self._load = load
        self._decoder: Decoder | None = None
        self.context, self.chunk, self.position = context, chunk, 0
        self.verify_rows: Sequence[int] = ()  # while it is not loaded

    def load(self) -> Decoder:
        """The decoder, loaded by now. Raises what loading it raises."""
        if self._decoder is None:
            self._decoder = self._load()
            self.verify_rows = self._decoder.verify_rows
        return self._decoder

    @property
    def loaded(self) -> bool:
        return self._decoder is not None

    def release(self) -> None:
        """Gives its memory back; what the KV cache held is lost."""
        self._decoder, self.position, self.verify_rows = None, 0, ()
        gc.collect()  # an engine's buffers may be in a cycle
        release_free_memory()

    def forward(self, embeddings: Array, per_layer: Array, n_logits: int = 1) -> Array:
        decoder = self.load()
        try:
            return decoder.forward(embeddings, per_layer, n_logits)
        finally:
            self.position = decoder.position

    def reset(self) -> None:
        if self._decoder is not None:
            self._decoder.reset()
        self.position = 0

    def earliest_at(self, position: int) -> int:
        return self._decoder.earliest_at(position) if self._decoder is not None else 0

    def can_verify(self, rows: int) -> bool:
        return self._decoder is not None and self._decoder.can_verify(rows)

    def truncate(self, position: int) -> None:
        if position != self.position:
            self.load().truncate(position)
            self.position = position

    def snapshot(self) -> KvSnapshot:
        return self.load().snapshot()

    def snapshot_bytes(self, position: int) -> int:
        return self._decoder.snapshot_bytes(position) if self._decoder is not None else 0

    def restore(self, snapshot: KvSnapshot) -> None:
        decoder = self.load()
        try:
            decoder.restore(snapshot)
        finally:
            self.position = decoder.position
