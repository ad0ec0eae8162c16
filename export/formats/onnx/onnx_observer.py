"""`ObservedDecoder` on ONNX Runtime: the graph as it is stored, with more outputs, built in memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from gemma_edge.export.emit.onnx.onnx_graph import FLOAT
from gemma_edge.export.emit.onnx.onnx_package import ModelProto, helper, numpy_helper
from gemma_edge.export.formats.observed_decoder import Array, Call, KvSteps, Observation, Product, rows_of
from gemma_edge.export.formats.onnx.onnx_stored import read_graph
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.onnx_files import DECODER
from gemma_edge.runtime.engines.kv_cache import cache_layouts
from gemma_edge.runtime.engines.onnx_decoder import OnnxDecoder
from gemma_edge.runtime.engines.onnx_session import open_session

PRODUCTS = ("MatMulNBits", "FusedMatMul")
MANY = 6  # tokens of a call


class OnnxObserver(OnnxDecoder):
    """See `ObservedDecoder`."""

    def __init__(self, bundle: Bundle) -> None:
        config = bundle.config
        layouts = cache_layouts(config, bundle.kv_cache)
        # Where the windows of all layers have moved on, and one of them moves while the call runs.
        beyond = max(layout.window_capacity for layout in layouts.values()) - 2
        self.products: list[tuple[str, str, str]] = []  # weight, and the edges that go in and come out
        self.steps: dict[int, KvSteps] = {}
        context = min(config.max_position_embeddings, max(bundle.context, beyond + MANY))
        super().__init__(bundle, context=context)
        few = max(1, min(MANY, self.chunk, config.sliding_window, context))
        beyond = max(0, min(max(beyond, config.sliding_window), context - few))
        self.to_observe: Sequence[Call] = [
            Call(0, few, -(-few // 2)),
            Call(beyond, few, min(2, few)),
            Call(min(beyond + 1, context - 1), 1, 1),
        ]
        self.names = sorted({edge for _, *edges in self.products for edge in edges} & self.extra)
        self._bind_names()

    def _bind_names(self) -> None:
        for name in self.names:
            self.binding.bind_output(name)

    def _load(self, bundle: Bundle, threads: int | None) -> ort.InferenceSession:
        path = bundle.file(DECODER)
        model = read_graph(path)
        self._find_products(model)
        graph = model.graph
        given = {value.name for value in (*graph.input, *graph.output)}
        self.extra = {edge for _, *edges in self.products for edge in edges} - given
        graph.output.extend(helper.make_tensor_value_info(name, FLOAT, None) for name in sorted(self.extra))
        self._find_steps(model)
        options = self._options(threads)
        options.add_session_config_entry(
            "session.model_external_initializers_file_folder_path", str(path.parent)
        )
        return open_session(model.SerializeToString(), options)

    def _find_products(self, model: ModelProto) -> None:
        stored = {tensor.name for tensor in model.graph.initializer}
        self.products = [
            (node.input[1], node.input[0], node.output[0])
            for node in model.graph.node
            if node.op_type in PRODUCTS and node.input[1] in stored
        ]

    def _find_steps(self, model: ModelProto) -> None:
        constants = {tensor.name: tensor for tensor in model.graph.initializer}
        for node in model.graph.node:
            scales = [constants[name] for name in node.input[12:14] if name in constants]
            if node.op_type == "GroupQueryAttention" and len(scales) == 2:
                owner = int(node.input[3].rpartition(".")[2]) if node.input[3].startswith("past_") else -1
                if owner >= 0:
                    key, value = (numpy_helper.to_array(s)[0, :, 0].astype(np.float32) for s in scales)
                    self.steps[owner] = KvSteps(key, value)

    def observe(self, embeddings: Array, per_layer: Array, wanted: int) -> Observation:
        self._bind_names()  # for buffers of this call's sizes
        logits = self.forward(embeddings, per_layer, wanted)
        # The binding keeps the order in which names were first bound: caches, these, logits.
        found = self.binding.get_outputs()[-1 - len(self.names) : -1]
        edges = {name: rows_of(value.numpy()) for name, value in zip(self.names, found, strict=True)}
        edges |= {name: rows_of(array) for name, array in self.arrays.items() if array.ndim == 3}
        edges["logits"] = logits
        products: dict[str, list[Product]] = {}
        for weight, x, y in self.products:
            products.setdefault(weight, []).append(Product(edges[x], edges[y]))
        after, tokens = self.snapshot(), len(embeddings)
        kept: dict[str, dict[int, NDArray[np.generic]]] = {"key": {}, "value": {}}
        for name, array in after.arrays.items():
            part, layer = name.split(".")
            new = self.buffers.positions(name, self.position) >= self.position - tokens
            kept[part][int(layer)] = self.buffers.by_place(name, array)[new]
        return Observation(products, kept["key"], kept["value"], logits)
