"""Reads a .tflite and checks it from end to end before an engine sees it.

Engines map a model and follow what it says: one wrong offset is a segmentation fault. `read_tflite` walks
every table an engine would walk and refuses, with a `BundleError`, a file whose offsets, sizes, types or
indices do not hold together; `check_decoder` and `embedding_table` refuse one of another model. Weights
are not read: gigabytes of them cost nothing here.

Weights lie behind the graph, in buffers that do not overlap and end where the file ends, so that a truncated
file, or a shifted buffer, cannot pass.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NoReturn

import numpy as np

from gemma_edge.runtime.artifacts.flatbuffer import EXPORT_AGAIN, FlatBuffer, Table
from gemma_edge.runtime.artifacts.tflite_arity import wrong_arity
from gemma_edge.runtime.errors import BundleError

IDENTIFIER = b"TFL3"
VERSION = 3
# A weight begins at the next multiple of one of these after what comes before it.
ALIGNMENTS = (64, 4096)
GRAPH_PADDING = 16  # bytes at most that nothing in a graph refers to, at its end
MAX_ACTIVATION_BYTES = 1 << 31  # scores of 512 tokens over 32,768 positions take a quarter of it
# No activation is larger than so many times the largest input or output; what is small is not measured.
ACTIVATION_SHARE, SMALL_ACTIVATION_BYTES = 64, 16 << 20

# TensorType: name and bits of a value. Strings, resources and variants have no place in these models.
TYPES = {
    0: ("float32", 32),
    1: ("float16", 16),
    2: ("int32", 32),
    3: ("uint8", 8),
    4: ("int64", 64),
    6: ("bool", 8),
    7: ("int16", 16),
    9: ("int8", 8),
    15: ("uint32", 32),
    16: ("uint16", 16),
    17: ("int4", 4),
    18: ("bfloat16", 16),
}
BITS = dict(TYPES.values())
EMBEDDING_LOOKUP, FULLY_CONNECTED, COMPOSITE = 7, 9, 206
# Operators that run other code or hold state, or that have no kernel: none belongs in a text model.
REFUSED_OPERATORS = {
    **{10: "HASHTABLE_LOOKUP", 29: "CONCAT_EMBEDDINGS", 31: "CALL", 32: "CUSTOM", 51: "DELEGATE", 118: "IF"},
    **{119: "WHILE", 127: "PLACEHOLDER", 129: "CALL_ONCE", 136: "HASHTABLE", 137: "HASHTABLE_FIND"},
    **{138: "HASHTABLE_IMPORT", 139: "HASHTABLE_SIZE", 142: "VAR_HANDLE", 143: "READ_VARIABLE"},
    **{144: "ASSIGN_VARIABLE", 147: "BUCKETIZE", 199: "STABLEHLO_WHILE", 209: "STABLEHLO_CASE"},
}
LAST_OPERATOR = 209
# BuiltinOptions that hold more than numbers, with the slot and width of the vector in them.
VECTOR_OPTIONS = {8: (5, 1), 17: (0, 4), 30: (0, 4)}  # FullyConnected, Reshape, Squeeze
LAST_OPTIONS = 126
COMPOSITE_OPTIONS = 21  # of BuiltinOptions2
BLOCKWISE = 2  # of QuantizationDetails


@dataclass(frozen=True)
class Span:
    """Bytes [offset, offset + length) of the file; an empty span holds nothing."""

    offset: int
    length: int

    @property
    def end(self) -> int:
        return self.offset + self.length


@dataclass(frozen=True)
class Quantization:
    """How the values of a tensor are scaled: value * scale, per channel of one axis, or per block of it."""

    axis: int
    scales: Span | None  # float32, one a channel; None for a block-wise tensor
    scale_tensor: int = -1  # float16 tensor (rows, blocks) of a block-wise tensor
    block: int = 0


@dataclass(frozen=True)
class Tensor:
    """One tensor of a subgraph; `data` are the bytes of a constant."""

    name: str
    shape: tuple[int, ...]
    type: str
    data: Span | None
    is_variable: bool
    quantization: Quantization | None

    @property
    def constant(self) -> bool:
        return self.data is not None

    @property
    def bytes(self) -> int:
        """What its values take."""
        return (math.prod(self.shape) * BITS[self.type] + 7) // 8


@dataclass(frozen=True)
class Operator:
    """Builtin operator code, and the indices of its tensors (-1 for an input that is left out)."""

    code: int
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    decomposition: int = -1  # subgraph of a composite


@dataclass(frozen=True)
class Subgraph:
    name: str
    tensors: list[Tensor]
    operators: list[Operator]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class Signature:
    """An entry point: tensors by the names that a caller uses."""

    subgraph: int
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]


@dataclass(frozen=True)
class TfliteModel:
    """A checked model: what it can be called with, and where its weights lie in the file."""

    path: Path
    start: int
    stop: int
    subgraphs: list[Subgraph]
    signatures: dict[str, Signature] = field(default_factory=dict)

    def fail(self, name: str, expected: object, got: object, remedy: str = EXPORT_AGAIN) -> NoReturn:
        raise BundleError(self.path, name, expected, got, remedy)


def read_tflite(path: str | Path, start: int = 0, stop: int | None = None) -> TfliteModel:
    """Checks a model and returns its structure.

    Args:
        path: the file.
        start, stop: the bytes of the file that the model takes, for one inside a .litertlm.

    Raises:
        BundleError: the file cannot be read, or is not a model that an engine could load.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return _Reader(file, path, start, size if stop is None else stop).model()
    except OSError as error:
        raise BundleError(path, "file", "a readable .tflite", error.strerror) from None


class _Reader:
    """Walks one model. Every `fail` names the table by its path in the schema."""

    def __init__(self, file: BinaryIO, path: Path, start: int, stop: int) -> None:
        self.path, self.start, self.stop = path, start, stop
        self.flat = FlatBuffer(file, path, start, stop)
        self.fail = self.flat.fail
        self.buffers: list[Span] = []
        self.options: dict[int, int] = {}  # type of options by operator code
        self.behind: list[tuple[Span, int]] = []  # weights behind the graph, and their buffers

    def model(self) -> TfliteModel:
        root = self.flat.root(IDENTIFIER)
        if (version := root.number(0, "I")) != VERSION:
            self.fail("version", VERSION, version)
        if root.has(8) or root.has(9):
            self.fail("external_buffers", "none: weights in the file itself", "some")
        self.buffers = self._buffers(root.children(4, "buffers"))
        codes = [self._code(table) for table in root.children(1, "operator_codes")]
        tables = root.children(2, "subgraphs")
        if not tables:
            self.fail("subgraphs", "one or more", "none")
        subgraphs = [self._subgraph(table, f"subgraphs[{i}]", codes) for i, table in enumerate(tables)]
        self._check_composites(subgraphs)
        signatures = self._signatures(root.children(7, "signature_defs"), subgraphs)
        self._check_activations(subgraphs)
        for i, table in enumerate(root.children(6, "metadata")):
            table.string(0, f"metadata[{i}].name")
            self._index(table.number(1, "I"), len(self.buffers), f"metadata[{i}].buffer")
        root.string(3, "description")
        self._check_layout()
        return TfliteModel(self.path, self.start, self.stop, subgraphs, signatures)

    def _index(self, value: int, count: int, name: str) -> int:
        if not 0 <= value < count:
            self.fail(name, f"an index below {count}", value)
        return value

    def _buffers(self, tables: list[Table]) -> list[Span]:
        """Where each buffer's bytes lie: inside the graph, or behind it."""
        spans = []
        for i, table in enumerate(tables):
            name = f"buffers[{i}]"
            offset, length = table.number(1, "Q"), table.number(2, "Q")
            inside = Span(*table.span(0, 1, f"{name}.data"))
            if offset <= 1 and not length:  # 1 stands for "not set"
                spans.append(inside)
                continue
            if inside.length:
                self.fail(name, "data or an offset", "both")
            if offset % ALIGNMENTS[0] or not length:
                self.fail(name, f"bytes at a multiple of {ALIGNMENTS[0]}", f"{length} bytes at {offset}")
            if self.start + offset + length > self.stop:
                size = self.stop - self.start
                self.fail(name, f"within {size} bytes", f"bytes {offset} to {offset + length}")
            spans.append(Span(self.start + offset, length))
            self.behind.append((spans[-1], i))
        if not spans or spans[0].length:
            self.fail("buffers[0]", "the empty buffer", "none" if not spans else f"{spans[0].length} bytes")
        return spans

    def _check_layout(self) -> None:
        """Weights follow the graph, and each other, without overlap; the last one ends with the file."""
        end, padding = self.flat.used, GRAPH_PADDING
        for span, i in sorted(self.behind, key=lambda item: item[0].offset):
            offset = span.offset - self.start
            if offset not in {-(-e // a) * a for a in ALIGNMENTS for e in (end, end + padding)}:
                got = f"{offset}, {'inside' if offset < end else 'not next to'} what comes before"
                self.fail(f"buffers[{i}]", f"bytes of its own, from about {end} on", got)
            end, padding = offset + span.length, 0
        # A graph without weights behind it may be padded.
        if not end <= self.stop - self.start < end + (1 if self.behind else ALIGNMENTS[-1]):
            self.fail("file", f"{end} bytes, the end of the last weight", self.stop - self.start)

    def _code(self, table: Table) -> int:
        # The old field holds codes below 127 in files of old writers, and 127 in those of new ones.
        code = max(table.number(0, "b"), table.number(3, "i"))
        if not 0 <= code <= LAST_OPERATOR or code in REFUSED_OPERATORS or table.string(1, "custom_code"):
            self.fail(table.field, "a builtin operator on tensors", REFUSED_OPERATORS.get(code, code))
        return code

    # Subgraphs. -----------------------------------------------------------------------------------

    def _subgraph(self, table: Table, name: str, codes: list[int]) -> Subgraph:
        tensors = [self._tensor(t, t.field) for t in table.children(0, f"{name}.tensors")]
        for i, tensor in enumerate(tensors):
            self._check_blocks(tensor, tensors, f"{name}.tensors[{i}]")
        inputs = self._indices(table, 1, len(tensors), f"{name}.inputs")
        outputs = self._indices(table, 2, len(tensors), f"{name}.outputs")
        operators = [self._operator(t, codes, len(tensors)) for t in table.children(3, f"{name}.operators")]
        graph = Subgraph(table.string(4, f"{name}.name"), tensors, operators, inputs, outputs)
        self._check_flow(graph, name)
        return graph

    def _indices(
        self, table: Table, slot: int, count: int, name: str, optional: bool = False
    ) -> tuple[int, ...]:
        values = table.integers(slot, name)
        if values and not (-1 if optional else 0) <= min(values) <= max(values) < count:
            self.fail(name, f"indices below {count}", values[:8])
        return values

    def _tensor(self, table: Table, name: str) -> Tensor:
        shape = table.integers(0, f"{name}.shape")
        kind = table.number(1, "b")
        if kind not in TYPES:
            self.fail(f"{name}.type", "a type of numbers", kind)
        if (shape and min(shape) < 1) or table.has(6) or table.has(9) or table.has(10):
            self.fail(f"{name}.shape", "positive sizes of a dense tensor", shape)
        signature = table.integers(7, f"{name}.shape_signature")
        if signature and signature != shape:
            self.fail(f"{name}.shape_signature", f"{shape}: no dynamic sizes", signature)
        type_name, bits = TYPES[kind]
        length = (math.prod(shape) * bits + 7) // 8
        buffer = self._index(table.number(2, "I"), len(self.buffers), f"{name}.buffer")
        data = self.buffers[buffer] if self.buffers[buffer].length else None
        if data is None and length > MAX_ACTIVATION_BYTES:
            self.fail(f"{name}.shape", f"at most {MAX_ACTIVATION_BYTES} bytes", shape)
        if data is not None and data.length != length:
            self.fail(f"{name}.buffer", f"{length} bytes of {type_name} {list(shape)}", data.length)
        variable = bool(table.number(5, "B"))
        if variable and data is not None:
            self.fail(f"{name}.is_variable", "no constant", "a variable with data")
        quantized = table.child(4, f"{name}.quantization")
        scaling = self._quantization(quantized, shape, f"{name}.quantization") if quantized else None
        return Tensor(table.string(3, f"{name}.name"), shape, type_name, data, variable, scaling)

    def _quantization(self, table: Table, shape: tuple[int, ...], name: str) -> Quantization | None:
        axis = table.number(6, "i")
        details = table.number(4, "B")
        if details == BLOCKWISE:
            blocks = table.child(5, f"{name}.details")
            if blocks is None:
                self.fail(f"{name}.details", "block-wise quantization", "nothing")
            block = blocks.number(2, "i")
            if block < 16 or block & (block - 1) or len(shape) != 2 or shape[1] % block:
                self.fail(f"{name}.details.block_size", f"a power of two that divides {list(shape)}", block)
            if blocks.number(1, "i", -1) > 0:
                self.fail(f"{name}.details.zero_points", "none", blocks.number(1, "i"))
            return Quantization(axis, None, blocks.number(0, "i"), block)
        if details:
            self.fail(f"{name}.details_type", "none or block-wise", details)
        scales = table.array(2, "<f4", f"{name}.scale")
        zero_points = table.array(3, "<i8", f"{name}.zero_point")
        for slot in (0, 1):
            table.span(slot, 4, f"{name}.min_max")
        if not len(scales):
            return None
        channels = {1, shape[axis]} if 0 <= axis < len(shape) else {1}
        if len(scales) not in channels or len(zero_points) not in (0, len(scales)):
            got = f"{len(scales)} scales, {len(zero_points)} zero points"
            self.fail(f"{name}.scale", f"{max(channels)} scales, one a channel of axis {axis}", got)
        if not (np.isfinite(scales) & (scales > 0)).all() or zero_points.any():
            self.fail(f"{name}.scale", "positive scales around zero", "others")
        return Quantization(axis, Span(*table.span(2, 4, f"{name}.scale")))

    def _check_blocks(self, tensor: Tensor, tensors: list[Tensor], name: str) -> None:
        """The scales of a block-wise tensor are a constant of the right shape."""
        if not (scaling := tensor.quantization) or not scaling.block:
            return
        name = f"{name}.quantization.details.scales"
        scales = tensors[self._index(scaling.scale_tensor, len(tensors), name)]
        shape = (tensor.shape[0], tensor.shape[1] // scaling.block)
        if not scales.constant or scales.type != "float16" or math.prod(scales.shape) != math.prod(shape):
            got = f"{scales.type} {list(scales.shape)}"
            self.fail(name, f"constant float16 {list(shape)}", got)

    def _operator(self, table: Table, codes: list[int], tensors: int) -> Operator:
        name = table.field
        code = codes[self._index(table.number(0, "I"), len(codes), f"{name}.opcode_index")]
        inputs = self._indices(table, 1, tensors, f"{name}.inputs", optional=True)
        outputs = self._indices(table, 2, tensors, f"{name}.outputs")
        if any(table.has(slot) for slot in (5, 9, 10)):
            self.fail(name, "no custom options", "some")
        self._indices(table, 8, tensors, f"{name}.intermediates")
        table.span(7, 1, f"{name}.mutating_variable_inputs")
        kind = table.number(3, "B")
        if kind > LAST_OPTIONS:
            self.fail(f"{name}.builtin_options_type", f"at most {LAST_OPTIONS}", kind)
        # Engines read options as those of the operator: all of a kind must have the same ones.
        if self.options.setdefault(code, kind) != kind:
            self.fail(
                f"{name}.builtin_options_type", f"{self.options[code]}, as others of operator {code}", kind
            )
        options = table.child(4, f"{name}.builtin_options")
        if bool(kind) != (options is not None):
            self.fail(f"{name}.builtin_options", "options and their type", "one without the other")
        if options and kind in VECTOR_OPTIONS:
            slot, width = VECTOR_OPTIONS[kind]
            options.span(slot, width, f"{name}.builtin_options")
        decomposition = -1
        second = table.child(12, f"{name}.builtin_options_2")
        if second or table.number(11, "B"):
            if code != COMPOSITE or table.number(11, "B") != COMPOSITE_OPTIONS or not second:
                self.fail(f"{name}.builtin_options_2", "options of a composite", table.number(11, "B"))
            second.string(0, f"{name}.composite.name")
            second.span(2, 1, f"{name}.composite.attributes")
            decomposition = second.number(1, "i")
        elif code == COMPOSITE:
            self.fail(f"{name}.builtin_options_2", "options of a composite", "none")
        if expected := wrong_arity(code, inputs, outputs):
            self.fail(name, expected, f"inputs {list(inputs)}, outputs {list(outputs)}")
        return Operator(code, inputs, outputs, decomposition)

    def _check_flow(self, graph: Subgraph, name: str) -> None:
        """Every operator reads what is there by then, and nothing is written twice."""
        tensors = graph.tensors
        ready = bytearray(t.constant or t.is_variable for t in tensors)
        for i in graph.inputs:
            if tensors[i].constant:
                self.fail(f"{name}.inputs", "tensors without data", f"the constant {tensors[i].name!r}")
            ready[i] = 1
        ready.append(1)  # index -1, an input that is left out
        for index, operator in enumerate(graph.operators):
            for i in operator.inputs:
                if not ready[i]:
                    got = f"tensor {i} before it is computed"
                    self.fail(f"{name}.operators[{index}].inputs", "tensors that are there", got)
            for i in operator.outputs:
                if ready[i]:
                    self.fail(f"{name}.operators[{index}].outputs", "tensors of its own", f"tensor {i} again")
                ready[i] = 1
        for i in graph.outputs:
            if not ready[i]:
                self.fail(f"{name}.outputs", "tensors that are computed", f"tensor {i}")

    def _check_composites(self, subgraphs: list[Subgraph]) -> None:
        """A composite is decomposed into a subgraph of its arity without composites: no recursion."""
        for i, graph in enumerate(subgraphs):
            name = f"subgraphs[{i}] composite"
            for operator in (o for o in graph.operators if o.code == COMPOSITE):
                target = subgraphs[self._index(operator.decomposition, len(subgraphs), name)]
                if any(inner.code == COMPOSITE for inner in target.operators):
                    self.fail(name, "a decomposition without composites", target.name)
                arity = len(target.inputs), len(target.outputs)
                if arity != (len(operator.inputs), len(operator.outputs)):
                    self.fail(
                        name, "a decomposition with its tensors", f"{arity[0]} inputs, {arity[1]} outputs"
                    )

    def _check_activations(self, subgraphs: list[Subgraph]) -> None:
        """A damaged shape must not make the engine ask for memory that no model of this size needs."""
        ends = [graph.tensors[i].bytes for graph in subgraphs for i in (*graph.inputs, *graph.outputs)]
        most = max(SMALL_ACTIVATION_BYTES, ACTIVATION_SHARE * max(ends, default=0))
        for number, graph in enumerate(subgraphs):
            for i, tensor in enumerate(graph.tensors):
                if not tensor.constant and tensor.bytes > most:
                    expected = f"at most {most} bytes beside these inputs and outputs"
                    self.fail(f"subgraphs[{number}].tensors[{i}].shape", expected, list(tensor.shape))

    def _signatures(self, tables: list[Table], subgraphs: list[Subgraph]) -> dict[str, Signature]:
        signatures: dict[str, Signature] = {}
        for table in tables:
            key = table.string(2, f"{table.field}.signature_key")
            index = self._index(table.number(4, "I"), len(subgraphs), f"{table.field}.subgraph_index")
            graph = subgraphs[index]
            maps = []
            for slot, name, own in ((0, "inputs", graph.inputs), (1, "outputs", graph.outputs)):
                named: dict[str, Tensor] = {}
                indices = []
                for item in table.children(slot, f"{table.field}.{name}"):
                    i = self._index(item.number(1, "I"), len(graph.tensors), f"{item.field}.tensor_index")
                    indices.append(i)
                    named[item.string(0, f"{item.field}.name")] = graph.tensors[i]
                if sorted(indices) != sorted(own) or len(named) != len(indices):
                    got = f"{len(named)} names for {len(own)}"
                    self.fail(f"{table.field}.{name}", "one name for each tensor of the subgraph", got)
                maps.append(named)
            if not key or key in signatures:
                self.fail(f"{table.field}.signature_key", "a name of its own", repr(key))
            signatures[key] = Signature(index, *maps)
        return signatures
