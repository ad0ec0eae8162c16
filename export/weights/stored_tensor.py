"""A weight as a file stores it: the place of its bytes, and the rows they hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.model.ops import Weight
from gemma_edge.export.model.tensor_spec import Part, TensorSpec
from gemma_edge.export.model.weight_source import WeightSource, read_weight
from gemma_edge.export.publish import Output
from gemma_edge.export.weights.quantize import FP32_SCALES, ScaleForm
from gemma_edge.export.weights.recipe import Precision
from gemma_edge.runtime.errors import CheckpointError

# mmap works in pages; a large tensor that starts on one shares no page with its neighbour.
PAGE = 4096
SMALL_ALIGNMENT = 64
CHUNK_ELEMENTS = 1 << 20  # elements of a weight in memory at once, per worker
MAX_QUANTIZED = 2.0**18  # of a trained model, some tens; a scale in float16 is at most 65,504, for -8 to 7


@dataclass(frozen=True)
class Region:
    """Bytes [offset, offset + length) of the data file."""

    offset: int
    length: int


@dataclass(frozen=True)
class StoredTensor:
    """One initializer: fp32, or packed blocks followed by their fp32 scales.

    Its rows come from one weight or from several, one after the other; a number stands for a row of it.
    """

    name: str
    weights: tuple[Weight | float, ...]
    shape: tuple[int, ...]
    part: Part
    precision: Precision
    data: Region
    scales: Region | None
    scale_form: ScaleForm = FP32_SCALES

    @property
    def blocks(self) -> int:
        """Quantization blocks in a row."""
        return self.precision.blocks(self.shape[-1])

    @property
    def bytes(self) -> int:
        return self.data.length + (self.scales.length if self.scales else 0)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def row_chunks(
    source: WeightSource, tensor: StoredTensor, specs: Mapping[str, TensorSpec]
) -> Iterator[NDArray[np.float32]]:
    """The rows of a stored tensor, in chunks of about CHUNK_ELEMENTS."""
    columns = tensor.shape[-1]
    step = max(1, CHUNK_ELEMENTS // columns)
    for weight in tensor.weights:
        if not isinstance(weight, Weight):
            yield np.full((1, columns), weight, dtype=np.float32)
            continue
        shape = specs[weight.name].shape
        if len(shape) == 1:
            yield read_weight(source, weight)[None]
            continue
        start, stop = weight.rows or (0, shape[0])
        for row in range(start, stop, step):
            rows = read_weight(source, replace(weight, rows=(row, min(row + step, stop))))
            yield rows if tensor.precision.bits == 32 else check_magnitude(source, weight.name, rows)


def check_magnitude(source: object, name: str, rows: NDArray[np.float32]) -> NDArray[np.float32]:
    """`rows` of a tensor that is quantized. Raises CheckpointError where no scale can stand for them."""
    largest = max(rows.max(initial=0), -rows.min(initial=0))
    if largest > MAX_QUANTIZED:
        path, expected = getattr(source, "path", "weights"), f"weights of at most {MAX_QUANTIZED:g}"
        raise CheckpointError(path, name, expected, f"{largest:.3g}", "The weights are damaged.")
    return rows


def pad(out: Output, offset: int) -> None:
    out.write(bytes(offset - out.tell()))


def report(progress: Callable[[int], None] | None, elements: int) -> None:
    if progress:
        progress(elements)
