"""`Encoders`: attachments to rows of the text model's input, with no encoder in memory longer than needed.

An encoder is loaded when a prompt has something for it and released before the next one is: at most one of
them is in memory at a time, and none while the answer is decoded, unless they are to be kept.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.modalities import Kind, Modality
from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.media.attachments import MODALITY, Attachment
from gemma_edge.runtime.media.audio_encoder import AudioEncoder
from gemma_edge.runtime.media.encoded_files import EncodedFiles
from gemma_edge.runtime.media.image_encoder import VisionEncoder
from gemma_edge.runtime.media.media_encoder import MediaEncoder

Rows = NDArray[np.float32]

ENCODERS: dict[Kind, type[MediaEncoder]] = {"vision": VisionEncoder, "audio": AudioEncoder}
KEPT_BYTES = 32 << 20  # rows of attachments that a later prompt may repeat: 16 images


@dataclass(frozen=True)
class Encoded:
    """What was done for one attachment: seconds of preprocessing and encoding, loading not counted."""

    attachment: Attachment
    seconds: float

    def __str__(self) -> str:
        item = self.attachment
        return f"{item.kind} {item.name}: {item.soft_tokens} tokens, {self.seconds:.1f} s"


def load_encoder(bundle: Bundle, modality: Modality, *, threads: int | None = None) -> MediaEncoder:
    """The encoder of a bundle's modality, loaded.

    Raises:
        BundleError: it is damaged, or of another model.
    """
    path, digest = bundle.file(modality.graph), bundle.files[modality.graph].sha256
    encoder = ENCODERS[modality.kind](path, threads=threads, digest=digest)
    expected = (modality.soft_tokens, int(modality.tokens["columns"]))
    if (got := (encoder.soft_tokens, encoder.hidden_size)) != expected:
        encoder.close()
        raise BundleError(path, "soft_tokens", f"(1, *{expected})", f"(1, *{got})")
    return encoder


class Encoders:
    """The encoders of a bundle.

    Args:
        modalities: the bundle's.
        load: loads the encoder of one, as `load_encoder` does.
        keep: leave an encoder loaded once it is.
        report: is told of every attachment that was encoded.
        files: what earlier processes encoded; None to keep nothing on disk.
    """

    def __init__(
        self,
        modalities: Mapping[str, Modality],
        load: Callable[[Modality], MediaEncoder],
        *,
        keep: bool = False,
        report: Callable[[Encoded], None] = lambda encoded: None,
        files: EncodedFiles | None = None,
    ) -> None:
        self.files = files
        self.modalities, self.load, self.keep, self.report = modalities, load, keep, report
        self._loaded: dict[str, MediaEncoder] = {}
        self._rows: OrderedDict[int, Rows] = OrderedDict()  # the last used at the end

    def encode(
        self, attachments: Sequence[Attachment], cancelled: Callable[[], bool] = lambda: False
    ) -> dict[int, Rows] | None:
        """The rows of attachments by their `key`, each f32 (soft_tokens, hidden), not to be scaled.

        Images come first, whatever their order, so that each encoder is loaded once. What was encoded lately
        is not encoded again.

        Returns:
            None if `cancelled`, which is asked before every one of them.

        Raises:
            BundleError: an encoder is damaged, or of another model.
        """
        self._recall(attachments)
        found = {item.key: self._rows[item.key] for item in attachments if item.key in self._rows}
        try:
            for kind, name in MODALITY.items():
                todo = {item.key: item for item in attachments if item.kind == kind and item.key not in found}
                for key, item in todo.items():
                    if cancelled():
                        return None
                    found[key] = self._encode(self._load(name), item)
                if not self.keep:
                    self._release(name)
        finally:
            if not self.keep:
                self.close()
        for key, rows in found.items():
            self._remember(key, rows)
        return found

    def needed_bytes(self, attachments: Sequence[Attachment]) -> int:
        """Memory that `encode` takes at its peak; 0 if the rows of all of them are kept."""
        self._recall(attachments)
        kinds = {MODALITY[item.kind] for item in attachments if item.key not in self._rows}
        found = [self.modalities[kind] for kind in kinds]
        return max((modality.resident + modality.activations for modality in found), default=0)

    def close(self) -> None:
        """Gives the memory of loaded encoders back; the next prompt loads what it needs."""
        for name in list(self._loaded):
            self._release(name)

    def _load(self, name: str) -> MediaEncoder:
        if name not in self._loaded:
            self._loaded[name] = self.load(self.modalities[name])
        return self._loaded[name]

    def _release(self, name: str) -> None:
        if encoder := self._loaded.pop(name, None):
            encoder.close()

    def _encode(self, encoder: MediaEncoder, item: Attachment) -> Rows:
        started = time.perf_counter()
        rows = encoder.encode(*self.modalities[MODALITY[item.kind]].encoder_inputs(item.data))
        self.report(Encoded(item, time.perf_counter() - started))
        if self.files:
            self.files.store(item, rows)
        return rows

    def _recall(self, attachments: Sequence[Attachment]) -> None:
        """Remembers the rows that files have and memory has not."""
        if self.files is None:
            return
        for item in attachments:
            columns = int(self.modalities[MODALITY[item.kind]].tokens["columns"])
            if item.key not in self._rows and (rows := self.files.find(item, columns)) is not None:
                self._remember(item.key, rows)

    def _remember(self, key: int, rows: Rows) -> None:
        self._rows[key] = rows
        self._rows.move_to_end(key)
        while sum(kept.nbytes for kept in self._rows.values()) > KEPT_BYTES:
            self._rows.popitem(last=False)
