"""Weights beside an ONNX graph: laid out before any is read, then streamed once, in order.

`ExternalData` is filled while the graph is emitted; every size follows from shape and precision, so offsets,
the plan and the predicted memory are known before the first byte of a checkpoint is touched. `write` then
streams one tensor after the other in row chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.emit.onnx.onnx_package import TensorProto
from gemma_edge.export.model.ops import Weight
from gemma_edge.export.model.tensor_spec import Part, TensorSpec
from gemma_edge.export.model.weight_source import WeightSource
from gemma_edge.export.publish import Output
from gemma_edge.export.weights.recipe import Precision
from gemma_edge.export.weights.rounding import Rounding
from gemma_edge.export.weights.stored_tensor import (
    PAGE,
    SMALL_ALIGNMENT,
    Region,
    StoredTensor,
    pad,
    report,
    row_chunks,
)
from gemma_edge.runtime.artifacts.row_table import SIGN_BITS


class ExternalData:
    """The layout of one data file, and its initializers.

    Args:
        location: its name, relative to the graph.
        specs: the tensors that it is made of.
    """

    def __init__(self, location: str, specs: Mapping[str, TensorSpec]) -> None:
        self.location, self.specs = location, specs
        self.tensors: list[StoredTensor] = []
        self.initializers: list[TensorProto] = []
        self.size = 0
        self._vectors: list[tuple[str, Sequence[Weight | float], tuple[int, ...], Precision]] = []

    def add(
        self,
        name: str,
        weights: Sequence[Weight | float],
        shape: tuple[int, ...],
        part: Part,
        precision: Precision,
    ) -> None:
        """Reserves room for a tensor and names its initializers `name` and, if quantized, `name`_scales.

        Groups are blocks of MatMulNBits. Channel-wise, which is for 8 bits alone, is i8 (columns, rows).

        Norms and scales wait for `finish`: the engine reads these few megabytes from the mapped file in every
        step, and were they strewn between the weights, each would drag the kernel's readahead of its
        neighbours in with it (500 MB a token, measured on E4B under a limit of 3 GiB).
        """
        if part is Part.VECTOR:
            self._vectors.append((name, weights, shape, precision))
        else:
            self._place(name, weights, shape, part, precision)

    def finish(self) -> None:
        """Places what `add` left for the end of the file."""
        for name, weights, shape, precision in self._vectors:
            self._place(name, weights, shape, Part.VECTOR, precision)
        self._vectors = []

    def _place(
        self,
        name: str,
        weights: Sequence[Weight | float],
        shape: tuple[int, ...],
        part: Part,
        precision: Precision,
    ) -> None:
        if precision.bits == 32:
            data = self._region(4 * math.prod(shape))
            self._initializer(name, TensorProto.FLOAT, shape, data)
            stored = StoredTensor(name, tuple(weights), shape, part, precision, data, None)
        else:
            rows, columns = shape
            blocks = precision.blocks(columns)
            dims: tuple[int, ...]
            scale_dims: tuple[int, ...]
            if precision.channelwise:
                integers, dims, scale_dims = TensorProto.INT8, (columns, rows), (rows,)
            else:
                block_bytes = precision.group * precision.bits // 8
                integers, dims = TensorProto.UINT8, (rows, blocks, block_bytes)
                scale_dims = (rows, blocks)
            data = self._region(math.prod(dims))
            scales = self._region(4 * rows * blocks)
            self._initializer(name, integers, dims, data)
            self._initializer(f"{name}_scales", TensorProto.FLOAT, scale_dims, scales)
            stored = StoredTensor(name, tuple(weights), shape, part, precision, data, scales)
        self.tensors.append(stored)

    def _region(self, length: int) -> Region:
        alignment = PAGE if length >= PAGE else SMALL_ALIGNMENT
        offset = math.ceil(self.size / alignment) * alignment
        self.size = offset + length
        return Region(offset, length)

    def _initializer(self, name: str, data_type: int, dims: tuple[int, ...], region: Region) -> None:
        tensor = TensorProto(name=name, data_type=data_type, dims=dims, data_location=TensorProto.EXTERNAL)
        for key, value in (("location", self.location), ("offset", region.offset), ("length", region.length)):
            tensor.external_data.add(key=key, value=str(value))
        self.initializers.append(tensor)

    def chunks(self, source: WeightSource, tensor: StoredTensor) -> Iterator[NDArray[np.float32]]:
        """The values of a tensor, in the order in which they are stored."""
        return row_chunks(source, tensor, self.specs)

    def write(
        self,
        out: Output,
        source: WeightSource,
        rounding: Rounding,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Streams every tensor to `out`; `progress` is given the elements done since its last call."""
        for tensor in self.tensors:
            pad(out, tensor.data.offset)
            if tensor.scales is None:
                for chunk in self.chunks(source, tensor):
                    out.write(np.ascontiguousarray(chunk, dtype="<f4").data)
                    report(progress, chunk.size)
                continue
            sign = np.uint8(SIGN_BITS["signed8"])
            rows: list[NDArray[np.uint8]] = []  # of a channel-wise tensor, at most some MB
            scales: list[NDArray[np.float32]] = []
            for block in rounding.blocks(tensor, self.chunks(source, tensor)):
                if tensor.precision.channelwise:
                    rows.append(block.data[:, 0] ^ sign)
                else:
                    out.write(block.data.data)
                scales.append(block.scales)
                report(progress, len(block.scales) * tensor.shape[-1])
            if rows:
                out.write(np.ascontiguousarray(np.concatenate(rows).T).data)
            pad(out, tensor.scales.offset)
            for scale in scales:
                out.write(np.ascontiguousarray(scale, dtype="<f4").data)
