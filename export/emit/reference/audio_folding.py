"""Constant-folds the weight-only parts of the audio encoder."""

from __future__ import annotations

import numpy as np

from gemma_edge.export.emit.reference.reference_text import Array, ArrayOps
from gemma_edge.export.model.gemma3n import gemma3n_audio as audio
from gemma_edge.export.model.gemma3n import modality_embedder as embedder
from gemma_edge.export.model.gemma3n.gemma3n_audio_tensors import (
    EMBEDDER,
    PADDING,
    PER_DIM_SCALE,
    POSITION_PROJECTION,
    POSITIONS,
    QUERY_SCALE,
    audio_specs,
    layer_of,
)
from gemma_edge.export.model.ops import Weight, Weights
from gemma_edge.export.model.weight_source import WeightSource
from gemma_edge.runtime.families.gemma3n_audio_config import RMS_NORM_EPS, AudioConfig


class FoldedAudio:
    """A `WeightSource` of `folded_specs(config)` over one of `audio_specs(config)`."""

    def __init__(self, source: WeightSource, config: AudioConfig) -> None:
        self.source, self.audio = source, config
        self.config = source.config  # of the text model, as every source has it

    def read(self, name: str) -> Array:
        if name.endswith(QUERY_SCALE):
            return audio.query_scale(self.audio, self.source.read(layer_of(name) + PER_DIM_SCALE))
        if name.endswith(POSITIONS):
            weight = Weight(layer_of(name) + POSITION_PROJECTION)
            return _CheckpointOps(self.source, self.audio).linear(
                audio.relative_positions(self.audio), weight
            )
        if name == PADDING:
            # Whatever is padded has the embedding of the last id of the vocabulary, an audio one.
            return audio_token_table(self.source, self.audio, self.audio.vocab_size - 1)[0]
        return self.source.read(name)

    def rows(self, name: str, start: int, stop: int) -> Array:
        if name.endswith((QUERY_SCALE, POSITIONS)) or name == PADDING:
            return self.read(name)[start:stop]
        return self.source.rows(name, start, stop)


def audio_token_table(source: WeightSource, config: AudioConfig, first: int = 0) -> Array:
    """Embeddings of the audio ids `vocab_offset + first` and up, which replace those of the text table.

    Returns:
        (vocab_size - first, text hidden) fp32: rows of the text model's input, not to be scaled.
    """
    rows = source.rows(EMBEDDER + embedder.TABLE, first, config.vocab_size)
    return np.asarray(embedder.hard_tokens(_CheckpointOps(source, config), Weights(EMBEDDER), rows))


class _CheckpointOps(ArrayOps):
    """`BaseOps` over the checkpoint's own tensors."""

    def __init__(self, source: WeightSource, config: AudioConfig) -> None:
        self.source, self.specs, self.eps = source, audio_specs(config), RMS_NORM_EPS
