"""`PleTable`: per-layer embedding rows of tokens, read from ple.bin.

Gemma 3n gives every layer an embedding of its own for each token. The table is as large as the rest of
the model, but a token needs one row of it, so it stays in flash.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.artifacts.row_table import Floats, RowTable
from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig


class PleTable:
    """The per-layer embedding table of a bundle.

    Args:
        path: ple.bin.
        layout: its layout in the manifest; `scale` must be sqrt(hidden_size_per_layer_input).
        config: the model that the table belongs to.

    Raises:
        BundleError: as `RowTable`, or the table is not one of this model.
    """

    def __init__(self, path: str | Path, layout: Mapping[str, Any], config: Gemma3nConfig) -> None:
        self._table = RowTable(path, layout)
        for field, expected, got in (
            ("layout.rows", config.vocab_size_per_layer_input, self._table.rows),
            ("layout.columns", config.ple_row_size, self._table.columns),
            ("layout.scale", config.ple_scale, self._table.layout.scale),
        ):
            if not math.isclose(expected, got, rel_tol=1e-6):
                self.close()
                raise BundleError(path, field, expected, got, "The table belongs to another model.")

    @property
    def row_bytes(self) -> int:
        """Bytes read from the file for one token."""
        return self._table.row_bytes

    def lookup(self, ids: Sequence[int] | NDArray[Any]) -> Floats:
        """Scaled rows of token `ids`: (tokens, layers * hidden_size_per_layer_input), layer by layer.

        Image and audio soft tokens have no row: ids outside the table use row 0, as the reference does.
        """
        wanted = np.asarray(ids, np.int64)
        inside = (wanted >= 0) & (wanted < self._table.rows)
        return self._table.lookup(np.where(inside, wanted, 0))

    def close(self) -> None:
        """Closes the file; the table cannot be used any more."""
        self._table.close()
