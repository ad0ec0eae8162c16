"""A .tflite under construction: subgraphs that share buffers, and the weights behind the FlatBuffer.

A FlatBuffer cannot exceed 2 GB, so weights follow it in the same file: the table of a weight's buffer holds
its place (`offset`, `size`) instead of its bytes. Everything is laid out before a weight is read; the
FlatBuffer is packed once, with placeholders of the right size, and the places are written into it. Scales of
channel-wise weights are part of the FlatBuffer, so they are patched in after the weights were streamed.

XNNPACK takes int4 (low nibble first) and int8 weights, signed, around zero, with positive scales: one for
a row in fp32, or for int4 one for a block of a row in fp16, which it cuts to bf16.
"""

from __future__ import annotations

import functools
import math
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import ArrayLike, NDArray

from gemma_edge.export.model.ops import Weight
from gemma_edge.export.model.tensor_spec import Part, TensorSpec
from gemma_edge.export.model.weight_source import WeightSource
from gemma_edge.export.publish import PatchableOutput
from gemma_edge.export.weights.quantize import BlockQuantized, ScaleForm
from gemma_edge.export.weights.recipe import FP32, Precision
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

IDENTIFIER = b"TFL3"
SCHEMA_VERSION = 3
# Block sizes that XNNPACK has kernels for.
BLOCKS = (256, 128, 64, 32)
# Operators of which the engine has several versions; all others are version 1.
VERSIONS = {"FULLY_CONNECTED": 5, "EMBEDDING_LOOKUP": 4}
# Offsets of fields in the vtable of a FlatBuffer table: 4 for the first one, and 2 more for each after it.
BUFFER_OFFSET, BUFFER_SIZE, QUANTIZATION_SCALE = 6, 8, 8

_types = schema.TensorType
DTYPES: dict[str, int] = {
    "float32": _types.FLOAT32,
    "int32": _types.INT32,
    "int8": _types.INT8,
    "bool": _types.BOOL,
}


def stored_precision(wanted: Precision, columns: int) -> Precision:
    """The nearest form that the engine takes: int8 has no blocks, int4 some sizes, which must fill a row."""
    if wanted.bits == 32:
        return FP32
    if wanted.bits == 8 or columns % 2:
        return Precision(8)
    fitting = (b for b in BLOCKS if b <= max(wanted.group, BLOCKS[-1]) and columns % b == 0)
    return Precision(4, next(fitting, 0) if wanted.group else 0)


@dataclass(frozen=True)
class SharedWeight:
    """A weight that any subgraph may use: what is stored, and its buffers' indices."""

    name: str
    stored: StoredTensor
    buffer: int
    scales: int  # of block scales; 0 for none


class Graph:
    """One subgraph. An edge is the index of a tensor; `shapes` has the shape of each."""

    def __init__(self, file: TfliteFile, name: str) -> None:
        self.file, self.name = file, name
        self.tensors: list[Any] = []
        self.shapes: list[tuple[int, ...]] = []
        self.operators: list[Any] = []
        self.inputs: dict[str, int] = {}
        self.outputs: dict[str, int] = {}
        self.known: dict[object, int] = {}
        self.weights: dict[int, SharedWeight] = {}

    def tensor(
        self, shape: Sequence[int], dtype: int = _types.FLOAT32, buffer: int = 0, name: str = ""
    ) -> int:
        tensor = schema.TensorT()
        tensor.shape, tensor.type, tensor.buffer = np.array(shape, np.int32), dtype, buffer
        tensor.name = name or f"{self.name}/{len(self.tensors)}"
        self.tensors.append(tensor)
        self.shapes.append(tuple(shape))
        return len(self.tensors) - 1

    def dtype(self, edge: int) -> str:
        """The type of an edge, a key of `DTYPES`."""
        return next(name for name, code in DTYPES.items() if code == self.tensors[edge].type)

    def input(self, name: str, shape: Sequence[int], dtype: str = "float32") -> int:
        self.inputs[name] = self.activation(shape, dtype, f"{self.name}_{name}")
        return self.inputs[name]

    def activation(self, shape: Sequence[int], dtype: str, name: str = "") -> int:
        """A tensor that is computed. An int8 one stands for its integers."""
        edge = self.tensor(shape, DTYPES[dtype], name=name)
        if dtype == "int8":
            self.tensors[edge].quantization = schema.QuantizationParametersT()
            self.tensors[edge].quantization.scale = np.ones(1, np.float32)
            self.tensors[edge].quantization.zeroPoint = np.zeros(1, np.int64)
        return edge

    def constant(self, value: ArrayLike, dtype: str = "float32", name: str = "") -> int:
        """A small constant inside the FlatBuffer, one for each value and name."""
        array = np.asarray(value, dtype)
        key = (array.shape, dtype, array.tobytes(), name)
        if key not in self.known:
            self.known[key] = self.tensor(
                array.shape, DTYPES[dtype], self.file.constant(array), name and f"{self.name}/{name}"
            )
        return self.known[key]

    def weight(
        self,
        name: str,
        weights: Sequence[Weight | float],
        shape: tuple[int, ...],
        part: Part,
        precision: Precision,
    ) -> int:
        """A weight, stored once in the file however many subgraphs use it."""
        if name in self.known:
            return self.known[name]
        shared = self.file.weight(name, weights, shape, part, precision)
        bits = shared.stored.precision.bits
        dtype = {32: _types.FLOAT32, 8: _types.INT8, 4: _types.INT4}[bits]
        quantization = None
        if bits != 32:
            quantization = schema.QuantizationParametersT()
            if shared.scales:
                details = schema.BlockwiseQuantizationT()
                details.scales = self.tensor(
                    (shape[0], shared.stored.blocks), _types.FLOAT16, shared.scales, f"{name}_scales"
                )
                details.zeroPoints, details.blockSize = -1, shared.stored.precision.group
                quantization.detailsType = schema.QuantizationDetails.BlockwiseQuantization
                quantization.details = details
            else:
                quantization.scale = np.ones(shape[0], np.float32)
                quantization.zeroPoint = np.zeros(shape[0], np.int64)
        edge = self.tensor(shape, dtype, shared.buffer, name)
        self.tensors[edge].quantization = quantization
        self.weights[edge] = shared
        self.known[name] = edge
        return edge

    def kernel(
        self, weight: Weight, spec: TensorSpec, order: tuple[int, ...], shape: tuple[int, ...] | None = None
    ) -> int:
        """A convolution's fp32 weight, its axes in another order than the checkpoint's, seen as `shape`."""
        self.file.orders[weight.name] = order
        shape = shape or tuple(spec.shape[axis] for axis in order)
        return self.weight(weight.name, [weight], shape, spec.part, FP32)

    def op(
        self,
        code: str,
        inputs: Sequence[int],
        shape: Sequence[int],
        options: str = "",
        dtype: str = "float32",
        **values: Any,
    ) -> int:
        """Appends an operator and returns its one output. `options` is the schema's name of its options."""
        operator = schema.OperatorT()
        operator.opcodeIndex = self.file.opcode(code)
        operator.inputs, out = list(inputs), self.activation(shape, dtype)
        operator.outputs = [out]
        if options:
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, options)
            operator.builtinOptions = getattr(schema, f"{options}T")()
            for key, value in values.items():
                setattr(operator.builtinOptions, key, value)
        self.operators.append(operator)
        return out

    def finish(self) -> Any:
        """The schema's subgraph, without what no output depends on."""
        needed = set(self.outputs.values())
        kept = []
        for operator in reversed(self.operators):
            if needed.intersection(operator.outputs):
                needed.update(i for i in operator.inputs if i >= 0)
                kept.append(operator)
        for edge in [e for e in needed if e in self.weights and self.weights[e].scales]:
            needed.add(self.tensors[edge].quantization.details.scales)
        needed.update(self.inputs.values())
        order = sorted(needed)
        place = {edge: i for i, edge in enumerate(order)} | {-1: -1}
        for operator in kept:
            operator.inputs = [place[i] for i in operator.inputs]
            operator.outputs = [place[i] for i in operator.outputs]
        for edge in order:
            if edge in self.weights and self.weights[edge].scales:
                details = self.tensors[edge].quantization.details
                details.scales = place[details.scales]
        graph = schema.SubGraphT()
        graph.name, graph.tensors = self.name, [self.tensors[i] for i in order]
        graph.operators = kept[::-1]
        graph.inputs = [place[i] for i in self.inputs.values()]
        graph.outputs = [place[i] for i in self.outputs.values()]
        self.weights = {place[i]: w for i, w in self.weights.items() if i in place}
        self.inputs = {name: place[i] for name, i in self.inputs.items()}
        self.outputs = {name: place[i] for name, i in self.outputs.items()}
        return graph


class TfliteFile:
    """One .tflite: add graphs, then `write` it. A plan needs `tensors` and `size`, and packs no FlatBuffer.

    Args:
        specs: the tensors that its weights come from.
    """

    def __init__(self, specs: Mapping[str, TensorSpec]) -> None:
        self.specs = specs
        self.orders: dict[str, tuple[int, ...]] = {}  # of the axes of convolutions' weights
        self.graphs: list[Graph] = []
        self.tensors: list[StoredTensor] = []
        self.size = 0  # bytes behind the FlatBuffer
        self._shared: dict[str, SharedWeight] = {}
        self._buffers: list[bytes | Region] = [b""]
        self._constants: dict[bytes, int] = {}
        self._opcodes: list[str] = []
        self._scale_places: dict[str, list[int]] = {}

    def graph(self, name: str) -> Graph:
        """A new subgraph, whose signature has the same name."""
        self.graphs.append(Graph(self, name))
        return self.graphs[-1]

    def constant(self, array: NDArray[Any]) -> int:
        raw = array.tobytes()
        if raw not in self._constants:
            self._buffers.append(raw)
            self._constants[raw] = len(self._buffers) - 1
        return self._constants[raw]

    def opcode(self, code: str) -> int:
        if code not in self._opcodes:
            self._opcodes.append(code)
        return self._opcodes.index(code)

    def weight(
        self,
        name: str,
        weights: Sequence[Weight | float],
        shape: tuple[int, ...],
        part: Part,
        precision: Precision,
    ) -> SharedWeight:
        if name not in self._shared:
            precision = stored_precision(precision, shape[-1])
            data = self._region(math.prod(shape) * precision.bits // 8)
            scales, buffers = None, [len(self._buffers), 0]
            self._buffers.append(data)
            if precision.group:
                scales = self._region(2 * shape[0] * precision.blocks(shape[-1]))
                buffers[1] = len(self._buffers)
                self._buffers.append(scales)
            form = ScaleForm("bfloat16" if precision.group else "float32", positive=True)
            stored = StoredTensor(name, tuple(weights), shape, part, precision, data, scales, form)
            self.tensors.append(stored)
            self._shared[name] = SharedWeight(name, stored, *buffers)
        return self._shared[name]

    def _region(self, length: int) -> Region:
        alignment = PAGE if length >= PAGE else SMALL_ALIGNMENT
        offset = math.ceil(self.size / alignment) * alignment
        self.size = offset + length
        return Region(offset, length)

    # Packing. -------------------------------------------------------------------------------------

    @functools.cached_property
    def head(self) -> bytearray:
        """The FlatBuffer, packed when it is first asked for, with every place in the file; ends with a page.

        No graph may be added then.
        """
        model = schema.ModelT()
        model.version, model.description = SCHEMA_VERSION, "gemma-edge"
        model.subgraphs = [graph.finish() for graph in self.graphs]
        model.signatureDefs = [_signature(graph, i) for i, graph in enumerate(self.graphs)]
        model.operatorCodes = [_operator_code(code) for code in self._opcodes]
        model.buffers = [_buffer(content) for content in self._buffers]
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(model.Pack(builder), IDENTIFIER)
        packed = builder.Output()
        head = bytearray(math.ceil(len(packed) / PAGE) * PAGE)
        head[: len(packed)] = packed
        root = schema.Model.GetRootAs(head)
        for index, content in enumerate(self._buffers):
            if isinstance(content, Region):
                table = root.Buffers(index)._tab
                for field, value in (
                    (BUFFER_OFFSET, len(head) + content.offset),
                    (BUFFER_SIZE, content.length),
                ):
                    struct.pack_into("<Q", head, table.Pos + table.Offset(field), value)
        for index, graph in enumerate(self.graphs):
            for edge, weight in graph.weights.items():
                if weight.stored.precision.channelwise:
                    table = root.Subgraphs(index).Tensors(edge).Quantization()._tab
                    place = table.Vector(table.Offset(QUANTIZATION_SCALE))
                    self._scale_places.setdefault(weight.name, []).append(place)
        return head

    @property
    def file_bytes(self) -> int:
        """Size of the whole file."""
        return len(self.head) + self.size

    def row_layout(self, name: str, file: str, scale: float) -> dict[str, Any]:
        """How `runtime.rows.RowTable` reads the rows of a weight from this file."""
        stored = self._shared[name].stored
        rows, columns = stored.shape
        layout: dict[str, Any] = {
            "file": file,
            "rows": rows,
            "columns": columns,
            "encoding": "float32",
            "data": {"offset": len(self.head) + stored.data.offset, "stride": stored.data.length // rows},
            "scale": scale,
        }
        if stored.precision.bits == 32:
            return layout
        layout |= {"encoding": f"signed{stored.precision.bits}", "group": stored.precision.group}
        if stored.scales:
            place = len(self.head) + stored.scales.offset
            layout["scales"] = {"offset": place, "stride": 2 * stored.blocks, "dtype": "float16"}
        else:
            layout["scales"] = {"offset": self._scale_places[name][0], "stride": 4, "dtype": "float32"}
        return layout

    def write(
        self,
        out: PatchableOutput,
        source: WeightSource,
        rounding: Rounding,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Writes the file, one weight in memory at a time; `progress` is given the elements done."""
        out.write(self.head)
        for name, shared in self._shared.items():
            stored = shared.stored
            pad(out, len(self.head) + stored.data.offset)
            if stored.precision.bits == 32:
                for chunk in self.chunks(source, stored):
                    out.write(np.ascontiguousarray(chunk, dtype="<f4").data)
                    report(progress, chunk.size)
                continue
            blocks = rounding.blocks(stored, self.chunks(source, stored))
            scales = list(_stream(out, stored, blocks, progress))
            if stored.scales:
                pad(out, len(self.head) + stored.scales.offset)
                for scale in scales:
                    out.write(scale.data)
            else:
                raw = np.concatenate(scales).astype("<f4").tobytes()
                for place in self._scale_places[name]:
                    self.head[place : place + len(raw)] = raw
        if self._scale_places:
            out.patch(0, self.head)

    def chunks(self, source: WeightSource, tensor: StoredTensor) -> Iterator[NDArray[np.float32]]:
        """The values of a weight, in the order in which they are stored."""
        order = self.orders.get(tensor.name)
        if order is None:
            yield from row_chunks(source, tensor, self.specs)
        else:
            yield source.read(tensor.name).transpose(order)


def _stream(
    out: PatchableOutput,
    stored: StoredTensor,
    blocks: Iterator[BlockQuantized],
    progress: Callable[[int], None] | None,
) -> Iterator[NDArray[Any]]:
    """Writes the integers of a weight; yields its scales as they will be stored."""
    bits, group = stored.precision.bits, stored.precision.group
    # From an unsigned value around the middle of its range to two's complement.
    sign = np.uint8(0x88 if bits == 4 else 0x80)
    columns = stored.shape[-1]
    for block in blocks:
        out.write(
            np.bitwise_xor(block.data.reshape(len(block.data), -1)[:, : columns * bits // 8], sign).data
        )
        yield block.scales.astype("<f2" if group else "<f4")
        report(progress, len(block.scales) * columns)


def _buffer(content: bytes | Region) -> Any:
    buffer = schema.BufferT()
    if isinstance(content, Region):
        buffer.offset, buffer.size = 1, 1  # not 0, which would leave the fields out
    elif content:
        buffer.data = np.frombuffer(content, np.uint8)
    return buffer


def _operator_code(name: str) -> Any:
    code = schema.OperatorCodeT()
    code.builtinCode = getattr(schema.BuiltinOperator, name)
    code.deprecatedBuiltinCode = min(code.builtinCode, 127)
    code.version = VERSIONS.get(name, 1)
    return code


def _signature(graph: Graph, index: int) -> Any:
    signature = schema.SignatureDefT()
    signature.signatureKey, signature.subgraphIndex = graph.name, index
    signature.inputs, signature.outputs = (
        [_map(*item) for item in d.items()] for d in (graph.inputs, graph.outputs)
    )
    return signature


def _map(name: str, edge: int) -> Any:
    entry = schema.TensorMapT()
    entry.name, entry.tensorIndex = name, edge
    return entry
