"""Derives the weights of an encoder's graph and the rows of its token ids from the checkpoint."""

from __future__ import annotations

import numpy as np

from gemma_edge.export.emit.reference.reference_text import Array, ArrayOps
from gemma_edge.export.export_families import encoder_model
from gemma_edge.export.model.weight_source import WeightSource
from gemma_edge.runtime.families.model_family import EncoderConfig


class FoldedWeights(ArrayOps):
    """A `WeightSource` of the tensors of an encoder's graph, over one of its tensors in a checkpoint.

    It computes those that the checkpoint lacks: they follow from other weights alone.
    """

    def __init__(self, source: WeightSource, encoder: EncoderConfig) -> None:
        self.source, self.encoder, self.model = source, encoder, encoder_model(encoder)
        self.specs, self.eps = self.model.specs(encoder), self.model.eps
        self.config = source.config  # of the text model, as every source has it

    def read(self, name: str) -> Array:
        if name in self.specs or self.model.fold is None:
            return self.source.read(name)
        return np.asarray(self.model.fold(self, self.source, self.encoder, name))

    def rows(self, name: str, start: int, stop: int) -> Array:
        return self.source.rows(name, start, stop) if name in self.specs else self.read(name)[start:stop]

    def token_table(self, first: int = 0) -> Array:
        """Rows for the modality's token ids from `first` up: unscaled inputs of the text model.

        Returns:
            (ids, text hidden), fp32.
        """
        return np.asarray(self.model.token_table(self, self.source, self.encoder, first))


def token_table(source: WeightSource, config: EncoderConfig) -> Array:
    """Rows for all of the modality's own token ids, see `FoldedWeights.token_table`."""
    return FoldedWeights(source, config).token_table()
