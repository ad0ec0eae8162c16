"""`Rounding`: how the weights of a file become the integers and scales that it stores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Protocol

from gemma_edge.export.weights.quantize import BlockQuantized, Clip, quantize_stream
from gemma_edge.export.weights.stored_tensor import StoredTensor
from gemma_edge.runtime.artifacts.row_table import Floats


class Rounding(Protocol):
    """Chooses the integers and scales of every quantized tensor."""

    def blocks(self, tensor: StoredTensor, chunks: Iterable[Floats]) -> Iterator[BlockQuantized]:
        """The rows of `tensor` in order, some at a time.

        Args:
            chunks: its weights in fp32, in the same order; read only as far as they are needed.
        """


@dataclass(frozen=True)
class NearestRounding:
    """Every weight to the nearest integer, as `quantize` does it; needs no calibration."""

    clip: Clip = "mse"

    def blocks(self, tensor: StoredTensor, chunks: Iterable[Floats]) -> Iterator[BlockQuantized]:
        precision, form = tensor.precision, tensor.scale_form
        yield from quantize_stream(
            chunks,
            precision.bits,
            precision.group,
            self.clip,
            scale_type=form.type,
            positive=form.positive,
        )
