"""Derives an encoder's stored weights and the rows of its token ids from the checkpoint."""

from __future__ import annotations

from gemma_edge.export.emit.reference.audio_folding import FoldedAudio, audio_token_table
from gemma_edge.export.emit.reference.reference_vision import vision_token_table
from gemma_edge.export.model.tower import Tower
from gemma_edge.export.model.weight_source import Array, WeightSource
from gemma_edge.runtime.families.gemma3n_vision_config import VisionConfig


def graph_weights(tower: Tower, checkpoint: WeightSource) -> WeightSource:
    """The source of the tensors that an encoder's graph stores."""
    if isinstance(tower.config, VisionConfig):
        return checkpoint
    return FoldedAudio(checkpoint, tower.config)


def token_table(tower: Tower, checkpoint: WeightSource) -> Array:
    """Rows for the modality's own token ids: unscaled inputs of the text model, fp32 (ids, text hidden)."""
    if isinstance(tower.config, VisionConfig):
        return vision_token_table(checkpoint, tower.config)
    return audio_token_table(checkpoint, tower.config)
