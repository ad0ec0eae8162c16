"""`ObservedDecoder` on LiteRT: a copy of the .tflite whose signatures have more outputs.

The FlatBuffer is packed anew; the weights behind it are copied as they are. Of a prefill's tokens the last
few are observed: a product treats every token alike, and attention reads the keys and values of all.
"""

from __future__ import annotations

import mmap
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.compiled_model import CompiledModel
from numpy.typing import NDArray

from gemma_edge.export.emit.tflite.tflite_file import IDENTIFIER
from gemma_edge.export.emit.tflite.tflite_text import KV_STEP
from gemma_edge.export.formats.observed_decoder import Array, Call, KvSteps, Observation, Product, rows_of
from gemma_edge.export.weights.stored_tensor import PAGE
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.engines.litert_decoder import LitertDecoder
from gemma_edge.runtime.engines.litert_model import compile_model, engine_log
from gemma_edge.runtime.errors import UsageError

ROWS = 4
PREFIX = "observed_"  # of the names of the outputs that are added
BLOCK = 64 << 20
ROOM = 2.3  # times the file: the copy, and its packed weights
# By signature: the weight of each product, and the outputs that hold what goes in and comes out.
Products = dict[str, list[tuple[str, str, str]]]


class TfliteObserver(LitertDecoder):
    """See `ObservedDecoder`. Its copy of the model lies in the folder `scratch`."""

    def __init__(self, bundle: Bundle, scratch: Path) -> None:
        self.scratch, self.products = scratch, Products()
        self.steps: dict[int, KvSteps] = {}
        super().__init__(bundle)
        window, context = self.config.sliding_window, self.context
        beyond = window + max(1, window // 16)
        sizes = sorted(size for size in self.calls if 1 < size <= context)
        prefills = [Call(min(beyond, context - size), size, 0) for size in sizes]
        prefills += [Call(0, size, 0) for size in sizes[:1]]
        verified = [size for size in self.verify_rows if size <= context]
        verifies = [Call(min(beyond, context - size), size, size) for size in verified]
        self.to_observe: Sequence[Call] = [*prefills, *verifies, Call(min(beyond, context - 1), 1, 1)]

    def _load(self, path: Path, recorded: str, threads: int) -> CompiledModel:
        needed, free = int(ROOM * path.stat().st_size), shutil.disk_usage(self.scratch).free
        if free < needed:
            raise UsageError(
                f"{self.scratch}: the check of the graph needs {needed:,} bytes there for a while, and "
                f"{free:,} are free. Make room, or export with --no-verify"
            )
        copy = self.scratch / "observed.tflite"
        self.products, self.steps = write_observed(path, copy)
        with engine_log():
            return compile_model(copy, self.scratch / "observed.packed", threads)

    def observe(self, embeddings: Array, per_layer: Array, wanted: int) -> Observation:
        first, tokens = self.position, len(embeddings)
        logits = self.forward(embeddings, per_layer, wanted)
        call, config = (self.verifying if wanted else self.calls)[tokens], self.config
        name = "decode" if tokens == 1 else f"{'verify' if wanted else 'prefill'}_{tokens}"
        products: dict[str, list[Product]] = {}
        for weight, x, y in self.products[name]:
            edges = (rows_of(call.outputs[edge].array) for edge in (x, y))
            products.setdefault(weight, []).append(Product(*edges))
        keys: dict[int, NDArray[np.generic]] = {}
        values: dict[int, NDArray[np.generic]] = {}
        for found, part in ((keys, "k"), (values, "v")):
            for layer in config.kv_layers:
                name = f"kv_cache_{part}_{layer}"
                if self.windowed:
                    new = np.moveaxis(call.outputs[name].array[0], 1, 0)
                else:
                    new = self.buffers.by_place(name, self.caches[name].array)[first : first + tokens]
                found[layer] = new.copy()
        return Observation(products, keys, values, logits, complete=wanted > 0)


def write_observed(path: Path, copy: Path) -> tuple[Products, dict[int, KvSteps]]:
    """Writes a copy of a model whose signatures also return what goes into every product, and comes out.

    Returns these outputs, and the steps of layers whose cache is int8.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as whole:
        root = schema.Model.GetRootAs(whole)
        offsets = [root.Buffers(i).Offset() for i in range(root.BuffersLength())]
        begin = min((offset for offset in offsets if offset > 1), default=len(whole))
        model = schema.ModelT.InitFromPackedBuf(whole[:begin], 0)
    steps = _steps(model)
    products = {
        signature.signatureKey.decode(): _observe(model, model.subgraphs[signature.subgraphIndex], signature)
        for signature in model.signatureDefs
    }
    length = -(-len(_pack(model)) // PAGE) * PAGE
    for buffer in model.buffers:
        if buffer.offset > 1:
            buffer.offset += length - begin
    with copy.open("wb") as out, path.open("rb") as file:
        out.write(_pack(model).ljust(length, b"\0"))
        file.seek(begin)
        shutil.copyfileobj(file, out, BLOCK)
    return products, steps


def _steps(model: Any) -> dict[int, KvSteps]:
    """The constants that every graph divides new keys and values by."""
    found: dict[str, Array] = {}
    for tensor in (tensor for graph in model.subgraphs for tensor in graph.tensors):
        name = tensor.name.decode().rpartition("/")[2]
        if name.startswith(KV_STEP) and len(tensor.shape) == 2:
            steps = np.asarray(model.buffers[tensor.buffer].data, np.uint8).view("<f4")
            found[name.removeprefix(KV_STEP)] = steps.reshape(tensor.shape)
    layers = sorted(int(name.partition("_")[2]) for name in found if name.startswith("k_"))
    return {layer: KvSteps(found[f"k_{layer}"], found[f"v_{layer}"]) for layer in layers}


def _observe(model: Any, graph: Any, signature: Any) -> list[tuple[str, str, str]]:
    """Adds the outputs of one signature."""
    seen: dict[int, str] = {}

    def output(edge: int) -> str:
        if edge not in seen:
            seen[edge] = f"{PREFIX}{len(seen)}"
            entry = schema.TensorMapT()
            entry.name, entry.tensorIndex = seen[edge], _last_rows(model, graph, edge)
            signature.outputs.append(entry)
            graph.outputs = np.append(graph.outputs, np.int32(entry.tensorIndex))
        return seen[edge]

    products = []
    for operator in list(graph.operators):
        code = model.operatorCodes[operator.opcodeIndex].builtinCode
        if code == schema.BuiltinOperator.FULLY_CONNECTED:
            x, weight = (int(i) for i in operator.inputs[:2])
            name = graph.tensors[weight].name.decode()
            products.append((name, output(x), output(int(operator.outputs[0]))))
    return products


def _last_rows(model: Any, graph: Any, edge: int) -> int:
    """The tensor with the last few rows of an edge (rows, width)."""
    rows, width = (int(n) for n in graph.tensors[edge].shape)
    if rows <= ROWS:
        return edge
    tensor = schema.TensorT()
    tensor.shape, tensor.name = np.array([ROWS, width], np.int32), f"{PREFIX}{edge}"
    graph.tensors.append(tensor)
    index = len(graph.tensors) - 1
    places = [_constant(model, graph, place) for place in ([rows - ROWS, 0], [ROWS, width])]
    operator = schema.OperatorT()
    operator.opcodeIndex = _opcode(model, schema.BuiltinOperator.SLICE)
    operator.inputs, operator.outputs = [edge, *places], [index]
    operator.builtinOptionsType = schema.BuiltinOptions.SliceOptions
    operator.builtinOptions = schema.SliceOptionsT()
    graph.operators.append(operator)
    return index


def _constant(model: Any, graph: Any, value: list[int]) -> int:
    buffer, tensor = schema.BufferT(), schema.TensorT()
    buffer.data = np.array(value, "<i4").view(np.uint8)
    model.buffers.append(buffer)
    tensor.shape, tensor.type = np.array([len(value)], np.int32), schema.TensorType.INT32
    tensor.buffer, tensor.name = len(model.buffers) - 1, f"{PREFIX}place_{len(model.buffers)}"
    graph.tensors.append(tensor)
    return len(graph.tensors) - 1


def _opcode(model: Any, code: int) -> int:
    for index, found in enumerate(model.operatorCodes):
        if found.builtinCode == code:
            return index
    made = schema.OperatorCodeT()
    made.builtinCode, made.deprecatedBuiltinCode, made.version = code, min(code, 127), 1
    model.operatorCodes.append(made)
    return len(model.operatorCodes) - 1


def _pack(model: Any) -> bytes:
    builder = flatbuffers.Builder(1 << 20)
    builder.Finish(model.Pack(builder), IDENTIFIER)
    return bytes(builder.Output())
