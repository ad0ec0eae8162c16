"""Projects an encoder's output and its token ids into the space of the text model.

`Gemma3nMultimodalEmbedder` of transformers: one for images (`embed_vision.`), one for audio (`embed_audio.`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeVar

from gemma_edge.export.model.ops import BaseOps, Weights
from gemma_edge.export.model.tensor_spec import Part, TensorSpec

T = TypeVar("T")

# Linear layers of encoders: 8 bits in the recipes that quantize.
LINEAR = Part.SMALL
TABLE = "embedding.weight"  # below an embedder's prefix: a row for each of the modality's token ids


def soft_tokens(ops: BaseOps[T], w: Weights, x: T) -> T:
    """(tokens, width) of an encoder -> (tokens, text hidden)."""
    return _project(ops, w, ops.rms_norm(x, w["soft_embedding_norm"]))


def hard_tokens(ops: BaseOps[T], w: Weights, rows: T) -> T:
    """Rows of the embedder's table, (tokens, width) -> (tokens, text hidden)."""
    return _project(ops, w, ops.rms_norm(rows, w["hard_embedding_norm"]))


def _project(ops: BaseOps[T], w: Weights, x: T) -> T:
    return ops.rms_norm(ops.linear(x, w["embedding_projection"]), None)


def embedder_specs(prefix: str, width: int, vocab_size: int, text_hidden: int) -> Iterator[TensorSpec]:
    """The tensors of an embedder: a table of `vocab_size` rows of `width`, its norms and its projection."""
    yield TensorSpec(prefix + TABLE, (vocab_size, width), Part.VECTOR)
    for name in ("hard_embedding_norm", "soft_embedding_norm"):
        yield TensorSpec(f"{prefix}{name}.weight", (width,), Part.VECTOR)
    yield TensorSpec(f"{prefix}embedding_projection.weight", (text_hidden, width), LINEAR)
