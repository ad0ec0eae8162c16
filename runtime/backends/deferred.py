"""A decoder that is loaded when it is first fed, so that what comes before has its memory."""

from __future__ import annotations

from collections.abc import Callable

from gemma_edge.runtime.backends import Array, Decoder


class DeferredDecoder:
    """See `Decoder`.

    Args:
        load: makes the decoder; called once.
        context, chunk: those of the decoder that it will make.
    """

    def __init__(self, load: Callable[[], Decoder], *, context: int, chunk: int) -> None:
        self._load = load
        self._decoder: Decoder | None = None
        self.context, self.chunk, self.position = context, chunk, 0

    def load(self) -> Decoder:
        """The decoder, loaded by now. Raises what loading it raises."""
        if self._decoder is None:
            self._decoder = self._load()
            self.context, self.chunk = self._decoder.context, self._decoder.chunk
        return self._decoder

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
