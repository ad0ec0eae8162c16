"""Models in the form that LiteRT-LM runs, small enough to be known by heart, for tests of the formats.

The decoder is a bigram model: the logits are a projection of the last token's embedding, and the caches pass
through. Weights lie behind the graph, as in an export.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import flatbuffers
import numpy as np
from ai_edge_litert import schema_py_generated as schema
from numpy.typing import NDArray

from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig

S: Any = schema
FLOAT32, FLOAT16, INT32, INT8, INT4 = 0, 1, 2, 9, 17
ALIGNMENT = 64
BLOCK = 32


class TinyTflite:
    """Collects subgraphs and weights; `save` writes the file."""

    def __init__(self) -> None:
        self.model = S.ModelT()
        self.model.version = 3
        self.model.description = "a test"
        self.model.operatorCodes, self.model.subgraphs, self.model.signatureDefs = [], [], []
        self.model.buffers = [S.BufferT()]
        self.data: list[bytes] = [b""]

    def buffer(self, array: NDArray[Any]) -> int:
        self.model.buffers.append(S.BufferT())
        self.data.append(array.tobytes())
        return len(self.data) - 1

    def code(self, builtin: int, version: int = 1) -> int:
        code = S.OperatorCodeT()
        code.builtinCode, code.deprecatedBuiltinCode, code.version = builtin, min(builtin, 127), version
        self.model.operatorCodes.append(code)
        return len(self.model.operatorCodes) - 1

    def bytes(self) -> bytes:
        for buffer, data in zip(self.model.buffers, self.data, strict=True):
            buffer.offset, buffer.size = (1, 1) if data else (0, 0)
        at = -(-len(self._pack()) // ALIGNMENT) * ALIGNMENT
        places = []
        for buffer, data in zip(self.model.buffers, self.data, strict=True):
            if data:
                buffer.offset, buffer.size = at, len(data)
                places.append((at, data))
                at = -(-(at + len(data)) // ALIGNMENT) * ALIGNMENT
        out = bytearray(self._pack())
        for offset, data in places:
            out += bytes(offset - len(out)) + data
        return bytes(out)

    def _pack(self) -> bytes:
        builder = flatbuffers.Builder(1 << 16)
        builder.Finish(self.model.Pack(builder), b"TFL3")
        return bytes(builder.Output())


class TinyGraph:
    """One subgraph and its signature."""

    def __init__(self, file: TinyTflite, key: str) -> None:
        self.file, self.graph, self.signature = file, S.SubGraphT(), S.SignatureDefT()
        graph = self.graph
        graph.name, graph.tensors, graph.operators, graph.inputs, graph.outputs = key, [], [], [], []
        self.signature.signatureKey, self.signature.subgraphIndex = key, len(file.model.subgraphs)
        self.signature.inputs, self.signature.outputs = [], []
        file.model.subgraphs.append(graph)
        file.model.signatureDefs.append(self.signature)

    def tensor(self, name: str, shape: tuple[int, ...], kind: int = FLOAT32, buffer: int = 0) -> int:
        tensor = S.TensorT()
        tensor.name, tensor.shape, tensor.type, tensor.buffer = name, list(shape), kind, buffer
        self.graph.tensors.append(tensor)
        return len(self.graph.tensors) - 1

    def input(self, name: str, shape: tuple[int, ...], kind: int = FLOAT32) -> int:
        index = self.tensor(f"{self.graph.name}_{name}", shape, kind)
        self.graph.inputs.append(index)
        self.signature.inputs.append(_named(name, index))
        return index

    def output(self, name: str, index: int) -> None:
        self.graph.outputs.append(index)
        self.signature.outputs.append(_named(name, index))

    def operator(
        self, code: int, inputs: list[int], shape: tuple[int, ...], kind: int = 0, options: Any = None
    ) -> int:
        operator, out = S.OperatorT(), self.tensor(f"t{len(self.graph.tensors)}", shape)
        operator.opcodeIndex, operator.inputs, operator.outputs = code, inputs, [out]
        operator.builtinOptionsType, operator.builtinOptions = kind, options
        self.graph.operators.append(operator)
        return out


def _named(name: str, index: int) -> Any:
    item = S.TensorMapT()
    item.name, item.tensorIndex = name, index
    return item


def tiny_config(**changes: Any) -> Gemma3nConfig:
    """Three layers, two with caches; vocabulary 320, a row of per-layer embeddings for each id."""
    return Gemma3nConfig.from_dict(
        {
            "model_type": "gemma3n_text",
            "vocab_size": 320,
            "vocab_size_per_layer_input": 320,
            "hidden_size": 64,
            "hidden_size_per_layer_input": 16,
            "num_hidden_layers": 3,
            "num_kv_shared_layers": 1,
            "layer_types": ["sliding_attention", "full_attention", "full_attention"],
            "intermediate_size": 128,
            "activation_sparsity_pattern": 0.0,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "head_dim": 32,
            "sliding_window": 8,
        }
        | changes
    )


def bigram(config: Gemma3nConfig, seed: int = 0) -> tuple[NDArray[np.int8], NDArray[np.int8]]:
    """Random embedding (vocab, hidden) and head (vocab, hidden), int4 values."""
    rng = np.random.default_rng(seed)
    shape = (config.vocab_size, config.hidden_size)
    return rng.integers(-7, 8, shape, np.int8), rng.integers(-7, 8, shape, np.int8)


def decoder_bytes(
    config: Gemma3nConfig, head: NDArray[np.int8], *, context: int = 64, chunks: tuple[int, ...] = (8, 4)
) -> bytes:
    """A prefill_decode model; its head is int4 in blocks of 32 with scale 1 / 16."""
    file = TinyTflite()
    add, fully_connected = file.code(0), file.code(9, 5)
    low, high = head[:, 0::2].view(np.uint8) & 15, head[:, 1::2].view(np.uint8) << 4
    weights = file.buffer(low | high)
    scales = file.buffer(np.full((config.vocab_size, config.hidden_size // BLOCK), 1 / 16, np.float16))
    zero = file.buffer(np.zeros(1, np.float32))
    kv, size = config.num_key_value_heads, config.head_dim
    for tokens in (*chunks, 1):
        graph = TinyGraph(file, "decode" if tokens == 1 else f"prefill_{tokens}")
        none = graph.tensor("zero", (1,), buffer=zero)
        embeddings = graph.input("embeddings", (1, tokens, config.hidden_size))
        layers, width = config.num_hidden_layers, config.hidden_size_per_layer_input
        graph.input("per_layer_embeddings", (1, tokens, layers, width))
        graph.input("input_pos", (tokens,), INT32)
        graph.input("mask", (1, 1, tokens, context))
        for layer in config.kv_layers:
            for name, shape in (("k", (1, kv, context, size)), ("v", (1, kv, size, context))):
                key = f"kv_cache_{name}_{layer}"
                same = graph.operator(add, [graph.input(key, shape), none], shape, 11, S.AddOptionsT())
                graph.output(key, same)
        if tokens == 1:
            scale = graph.tensor("scales", (config.vocab_size, config.hidden_size // BLOCK), FLOAT16, scales)
            weight = graph.tensor("head", head.shape, INT4, weights)
            graph.graph.tensors[weight].quantization = _blockwise(scale)
            options = S.FullyConnectedOptionsT()
            options.keepNumDims = True
            shape = (1, 1, config.vocab_size)
            inputs = [embeddings, weight, -1]
            graph.output("logits", graph.operator(fully_connected, inputs, shape, 8, options))
    return file.bytes()


def _blockwise(scales: int) -> Any:
    quantization, details = S.QuantizationParametersT(), S.BlockwiseQuantizationT()
    details.scales, details.zeroPoints, details.blockSize = scales, -1, BLOCK
    quantization.detailsType, quantization.details = S.QuantizationDetails.BlockwiseQuantization, details
    return quantization


def embedder_bytes(table: NDArray[np.int8], width: tuple[int, ...], scale: float = 0.25) -> bytes:
    """A model that looks up one int8 row, times `scale`, and gives it as (1, 1, *width)."""
    file = TinyTflite()
    lookup, reshape = file.code(7), file.code(22)
    graph = TinyGraph(file, "serving_default")
    ids = graph.input("token_ids", (1, 1), INT32)
    rows = graph.tensor("table", table.shape, INT8, file.buffer(table))
    quantization = S.QuantizationParametersT()
    quantization.scale = np.full(len(table), scale, np.float32)
    quantization.zeroPoint = np.zeros(len(table), np.int64)
    graph.graph.tensors[rows].quantization = quantization
    flat = graph.operator(reshape, [ids, _shape(graph, (1,))], (1,), 17, S.ReshapeOptionsT())
    graph.graph.tensors[flat].type = INT32
    row = graph.operator(lookup, [flat, rows], (1, table.shape[1]))
    out = (1, 1, *width)
    shaped = graph.operator(reshape, [row, _shape(graph, out)], out, 17, S.ReshapeOptionsT())
    graph.output("embeddings", shaped)
    return file.bytes()


def _shape(graph: TinyGraph, shape: tuple[int, ...]) -> int:
    return graph.tensor("shape", (len(shape),), INT32, graph.file.buffer(np.asarray(shape, np.int32)))


def write_models(
    folder: Path, config: Gemma3nConfig, *, context: int = 64, head: NDArray[np.int8] | None = None
) -> dict[str, Path]:
    """The three models as files, by model type, in the order of a .litertlm."""
    embedding, default = bigram(config)
    head = default if head is None else head
    rows = np.zeros((config.vocab_size, config.ple_row_size), np.int8)
    per_layer = (config.num_hidden_layers, config.hidden_size_per_layer_input)
    models = {
        "embedder": embedder_bytes(embedding, (config.hidden_size,)),
        "per_layer_embedder": embedder_bytes(rows, per_layer),
        "prefill_decode": decoder_bytes(config, head, context=context),
    }
    for name, data in models.items():
        (folder / f"{name}.tflite").write_bytes(data)
    return {f"tf_lite_{name}": folder / f"{name}.tflite" for name in models}
