"""`TokenRows`: embeddings of all token ids, including those of images and audio."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.artifacts.modalities import Modality
from gemma_edge.runtime.artifacts.row_table import RowTable

Floats = NDArray[np.float32]


class TokenRows:
    """The text model's table, with those of modalities in the place of their own ids.

    Ids of a modality, such as the one that ends an image, have rows of their own, which are not scaled.

    Args:
        text: rows of every id, scaled.
        modalities: of the bundle; without any this is `text`.
    """

    def __init__(self, text: RowTable, modalities: Sequence[Modality]) -> None:
        self.text = text
        self.tables = [(modality.ids, modality.token_table()) for modality in modalities]

    def lookup(self, ids: NDArray[np.int64]) -> Floats:
        """f32 (T, hidden) of int64 (T,)."""
        rows = self.text.lookup(ids)
        for own, table in self.tables:
            here = (ids >= own.start) & (ids < own.stop)
            if here.any():
                rows[here] = table.lookup(ids[here] - own.start)
        return rows
