"""`Residency`: a decoder and its encoders, of which memory holds only those that are needed now."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.closed_model import CLOSED
from gemma_edge.runtime.engines.cores import release_free_memory
from gemma_edge.runtime.engines.decoder import Decoder
from gemma_edge.runtime.engines.deferred_decoder import DeferredDecoder
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.host.available_memory import available_memory
from gemma_edge.runtime.media.attachments import Attachment

Rows = NDArray[np.float32]

SPARE_BYTES = 64 << 20  # left free beside an encoder and the decoder: rows, and file pages of a step


class AttachmentEncoder(Protocol):
    """Makes rows of attachments; `runtime.media.encoder_pool.Encoders` does."""

    def encode(
        self, attachments: Sequence[Attachment], cancelled: Callable[[], bool] = ...
    ) -> Mapping[int, Rows] | None:
        """Rows by `Attachment.key`, each f32 (soft_tokens, hidden); None if `cancelled` says so."""

    def needed_bytes(self, attachments: Sequence[Attachment]) -> int:
        """Memory that `encode` takes at its peak; 0 if it has the rows already."""

    def close(self) -> None:
        """Gives the memory of loaded encoders back."""


class Residency:
    """See the module.

    Args:
        decoder: a `DeferredDecoder` is loaded and released as memory allows, any other stays.
        encoders: None for a model that takes text alone.
    """

    def __init__(self, decoder: Decoder, encoders: AttachmentEncoder | None = None) -> None:
        self.decoder, self.encoders = decoder, encoders

    def make_room(self, attachments: Sequence[Attachment], spare: Callable[[], None] = lambda: None) -> None:
        """Gives up what encoding needs more than the memory that is free: first what `spare` frees, then the
        decoder and what its cache holds.
        """
        if self._short_for(attachments):
            spare()
        if isinstance(self.decoder, DeferredDecoder) and self.decoder.loaded and self._short_for(attachments):
            self.decoder.release()

    def _short_for(self, attachments: Sequence[Attachment]) -> bool:
        need = self.encoders.needed_bytes(attachments) if self.encoders is not None else 0
        room = available_memory() if need else None
        return room is not None and room < need + SPARE_BYTES

    def encode(
        self, attachments: Sequence[Attachment], cancelled: Callable[[], bool] = lambda: False
    ) -> Mapping[int, Rows] | None:
        """Rows of attachments; see `AttachmentEncoder.encode`.

        Raises:
            UsageError: the model has no encoders.
        """
        if not attachments:
            return {}
        if self.encoders is None:
            raise UsageError("this model was made without encoders: it takes text alone")
        return self.encoders.encode(attachments, cancelled)

    def close(self) -> None:
        """Gives all memory back; any later use raises a UsageError."""
        if self.encoders is not None:
            self.encoders.close()
        self.decoder = self.encoders = CLOSED
        gc.collect()  # an engine's buffers may be in a cycle
        release_free_memory()

    def load_decoder(self) -> None:
        """Loads a decoder that is not in memory."""
        if isinstance(self.decoder, DeferredDecoder):
            self.decoder.load()
