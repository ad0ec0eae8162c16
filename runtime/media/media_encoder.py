"""`MediaEncoder`: what encoders of images and of audio have in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.engines.engine_registry import engine_for_graph


class MediaEncoder(ABC):
    """One loaded encoder: a context manager that releases it.

    Args:
        path: the graph (.onnx, with its weights beside it, or .tflite).
        threads: of the engine; a thread a physical core if None.
        digest: SHA-256 of a .tflite, if it is known: the file is not read through then.

    Attributes:
        soft_tokens: rows that every image or clip gives.
        hidden_size: values of a row.

    Raises:
        BundleError: missing, damaged, or not an encoder of this kind.
    """

    kind: ClassVar[Kind]
    soft_tokens: int
    hidden_size: int

    def __init__(self, path: str | Path, *, threads: int | None = None, digest: str = "") -> None:
        self.path = Path(path)
        self._graph = engine_for_graph(self.path).load_encoder(
            self.kind, self.path, threads=threads, digest=digest
        )

    @abstractmethod
    def encode(self, *inputs: Any, **named: Any) -> NDArray[np.float32]:
        """Rows f32 (soft_tokens, hidden_size) of `Modality.encoder_inputs`, not to be scaled."""

    def close(self) -> None:
        """Gives the memory of the weights back; `encode` raises ValueError from then on."""
        self._graph.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
