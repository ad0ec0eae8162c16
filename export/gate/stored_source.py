"""`StoredSource`: the weights of a finished bundle as a `WeightSource`, dequantized on use."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.model.ops import Weight
from gemma_edge.export.model.tensor_spec import TensorSpec
from gemma_edge.export.weights.stored_matrix import StoredMatrix
from gemma_edge.export.weights.stored_tensor import StoredTensor
from gemma_edge.runtime.families.model_family import TextConfig

Array = NDArray[np.float32]


@dataclass(frozen=True)
class _Piece:
    """Rows of a checkpoint's tensor within a stored one."""

    stored: StoredMatrix
    first_stored: int
    first: int
    count: int
    factor: float


class StoredSource:
    """Weights by the names that the checkpoint has for them.

    Args:
        tensors: what each stored tensor is made of.
        stored: where it lies.
        specs: of the checkpoint's tensors.
    """

    def __init__(
        self,
        config: TextConfig,
        tensors: Sequence[StoredTensor],
        stored: Mapping[str, StoredMatrix],
        specs: Mapping[str, TensorSpec],
    ) -> None:
        self.config, self.tensors, self.specs = config, tensors, specs
        self.bits = {tensor.name: stored[tensor.name].bits for tensor in tensors}
        self.pieces: dict[str, list[_Piece]] = {}
        for tensor in tensors:
            row = 0
            for weight in tensor.weights:
                count = 1
                if isinstance(weight, Weight):
                    first, stop = weight.rows or (0, _rows(specs[weight.name]))
                    count = stop - first
                    piece = _Piece(stored[tensor.name], row, first, count, weight.factor)
                    self.pieces.setdefault(weight.name, []).append(piece)
                row += count

    def read(self, name: str) -> Array:
        shape = self.specs[name].shape
        return self.rows(name, 0, _rows(self.specs[name])).reshape(shape)

    def rows(self, name: str, start: int, stop: int) -> Array:
        if len(self.specs[name].shape) == 1 and (start, stop) != (0, 1):
            return self.read(name)[start:stop]
        parts = list(self._parts(name, start, stop))
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def _parts(self, name: str, start: int, stop: int) -> Iterator[Array]:
        for piece in sorted(self.pieces[name], key=lambda piece: piece.first):
            first, last = max(start, piece.first), min(stop, piece.first + piece.count)
            if first < last:
                shift = piece.first_stored - piece.first
                rows = piece.stored.rows(first + shift, last + shift)
                yield rows if piece.factor == 1.0 else rows / np.float32(piece.factor)
                start = last


def _rows(spec: TensorSpec) -> int:
    return spec.shape[0] if len(spec.shape) == 2 else 1
