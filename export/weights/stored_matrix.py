"""`StoredMatrix`: a weight as a finished artifact holds it, read back and dequantized some rows at a time."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.weights.stored_tensor import Region
from gemma_edge.runtime.artifacts.row_table import SIGN_BITS, dequantize_blocks

Array = NDArray[np.float32]


@dataclass(frozen=True)
class StoredMatrix:
    """Where a weight lies in a file, and how.

    Attributes:
        path: the file.
        shape: (rows, columns), as the weight was before a row was padded; one axis for a vector.
        bits: 4, 8 or 32.
        data: all rows, one after the other.
        group: weights that share a scale; 0 for a whole row.
        scales: (rows, blocks), one row after the other; None for fp32.
        scale_type: NumPy's name of their type.
        signed: values are in two's complement, else around half their range.
        transposed: bytes are stored column by column.
    """

    path: Path
    shape: tuple[int, ...]
    bits: int
    data: Region
    group: int = 0
    scales: Region | None = None
    scale_type: str = "<f4"
    signed: bool = False
    transposed: bool = False

    @property
    def columns(self) -> int:
        return self.shape[-1]

    @property
    def row_count(self) -> int:
        return self.shape[0] if len(self.shape) == 2 else 1

    @property
    def block(self) -> int:
        """Weights of a row that share a scale, padding included."""
        return self.group or self.columns + self.columns % 2

    def rows(self, start: int, stop: int) -> Array:
        """Rows [start, stop): what the stored numbers stand for, fp32 (stop - start, columns)."""
        if self.transposed:
            stored = np.memmap(self.path, np.uint8, "r", self.data.offset, self.shape[::-1])
            raw = np.ascontiguousarray(stored[:, start:stop].T)
        else:
            raw = self._read(self.data, start, stop, np.dtype(np.uint8))
        if self.scales is None:
            return raw.view("<f4").astype(np.float32, copy=False)
        if self.signed:
            raw = np.bitwise_xor(raw, SIGN_BITS[f"signed{self.bits}"])
        scales = self.scale_values(start, stop)
        blocks = raw.reshape(stop - start, scales.shape[1], -1)
        return dequantize_blocks(blocks, scales, self.bits)[:, : self.columns]

    def values(self, start: int, count: int) -> Array:
        """Values [start, start + count) of an fp32 weight of any number of axes, flat."""
        return np.fromfile(self.path, "<f4", count, offset=self.data.offset + 4 * start)

    def scale_values(self, start: int = 0, stop: int | None = None) -> Array:
        """Scales of rows [start, stop), by default all, fp32 (rows, blocks); none for an fp32 weight."""
        region, stop = self.scales or Region(0, 0), self.row_count if stop is None else stop
        return self._read(region, start, stop, np.dtype(self.scale_type)).astype(np.float32)

    def _read(self, region: Region, start: int, stop: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """(stop - start, values of a row) of `dtype`."""
        row = region.length // self.row_count
        offset = region.offset + start * row
        values = np.fromfile(self.path, dtype, (stop - start) * row // dtype.itemsize, offset=offset)
        return values.reshape(stop - start, -1)
