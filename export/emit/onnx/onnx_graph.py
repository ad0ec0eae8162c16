"""Builds ONNX graphs: nodes, constants, external weights, and the operations of all models.

`OnnxGraph` is `BaseOps` over edge names, for ONNX Runtime on CPU. Values have a batch axis of 1 before the
axes that the description thinks of.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from gemma_edge.export.emit.onnx.external_data import ExternalData
from gemma_edge.export.emit.onnx.onnx_package import (
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    numpy_helper,
)
from gemma_edge.export.model.ops import Weight
from gemma_edge.export.model.tensor_spec import TensorSpec
from gemma_edge.export.weights.recipe import FP32, Recipe

MS = "com.microsoft"
FLOAT, INT8, INT32, INT64 = TensorProto.FLOAT, TensorProto.INT8, TensorProto.INT32, TensorProto.INT64
# Activations inside MatMulNBits: int8, which for a few rows is several times faster than fp32.
ACCURACY_INT8, ACCURACY_FP32 = 4, 1


@dataclass(frozen=True)
class EmittedGraph:
    """A graph without weights, and the layout of the weights it names."""

    model: ModelProto
    data: ExternalData


class OnnxGraph:
    """A graph under construction, and `BaseOps` that append to it.

    Args:
        specs: the tensors that weights may name.
        recipe: the precision of each.
        data: where they will lie.
        eps: of RMS norms.
        bare_width: what a norm without a weight is over.
    """

    accuracy_level = ACCURACY_INT8

    def __init__(
        self,
        specs: Mapping[str, TensorSpec],
        recipe: Recipe,
        data: ExternalData,
        eps: float,
        bare_width: int,
    ) -> None:
        self.specs, self.recipe, self.data = specs, recipe, data
        self.eps, self.bare_width = eps, bare_width
        self.nodes: list[NodeProto] = []
        self.inputs: list[ValueInfoProto] = []
        self.outputs: list[ValueInfoProto] = []
        self.constants: dict[str, TensorProto] = {}
        self.stored: set[str] = set()
        self.count = 0

    def model(self, name: str) -> ModelProto:
        """The graph as a model; lays out what `data` kept for the end."""
        self.data.finish()
        initializers = [*self.constants.values(), *self.data.initializers]
        graph = helper.make_graph(self.nodes, name, self.inputs, self.outputs, initializers)
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid(MS, 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="gemma-edge")

    def input(self, name: str, data_type: int, shape: list[int | str]) -> str:
        self.inputs.append(value_info(name, data_type, shape))
        return name

    def node(self, op: str, inputs: list[str], domain: str = "", **attributes: Any) -> str:
        """Appends a node and returns its output."""
        self.count += 1
        name = f"{op}_{self.count}"
        self.nodes.append(helper.make_node(op, inputs, [name], name, domain=domain, **attributes))
        return name

    def constant(self, value: ArrayLike, dtype: type = np.float32) -> str:
        """A small constant inside the graph, one for each value."""
        array: NDArray[Any] = np.asarray(value, dtype=dtype)
        shape = "x".join(map(str, array.shape))
        name = f"const_{array.dtype}_{shape}_{zlib.crc32(array.tobytes()):08x}"
        self.constants.setdefault(name, numpy_helper.from_array(array, name))
        return name

    def vector(self, weight: Weight) -> str:
        """An fp32 initializer of the checkpoint, stored once."""
        if weight.name not in self.stored:
            spec = self.specs[weight.name]
            self.data.add(weight.name, [weight], spec.shape, spec.part, FP32)
            self.stored.add(weight.name)
        return weight.name

    def output(self, name: str, data_type: int, shape: list[int | str]) -> None:
        """Makes the last node's first output an output of the graph under that name."""
        self.nodes[-1].output[0] = name
        self.outputs.insert(0, value_info(name, data_type, shape))

    # BaseOps. -------------------------------------------------------------------------------------

    def linear(self, x: str, weight: Weight, bias: Weight | None = None) -> str:
        name = weight.name if weight.rows is None else f"{weight.name}.{weight.rows[0]}"
        y = self.matmul(x, name, [weight])
        return y if bias is None else self.node("Add", [y, self.vector(bias)])

    def matmul(self, x: str, name: str, weights: list[Weight]) -> str:
        """x times the transpose of weights stacked by rows, which are stored as one initializer."""
        spec = self.specs[weights[0].name]
        rows = sum(w.rows[1] - w.rows[0] if w.rows else self.specs[w.name].shape[0] for w in weights)
        shape = (rows, spec.shape[1])
        precision = self.recipe.precision(spec)
        if name not in self.stored:  # the AltUp router is used twice in a layer
            self.data.add(name, weights, shape, spec.part, precision)
            self.stored.add(name)
        if precision.bits == 32:
            # transB keeps the checkpoint's own (out, in) layout, so that nothing is transposed.
            return self.node("FusedMatMul", [x, name], domain=MS, transB=1)
        return self.node(
            "MatMulNBits",
            [x, name, f"{name}_scales"],
            domain=MS,
            N=shape[0],
            K=shape[1],
            bits=precision.bits,
            block_size=precision.group,
            accuracy_level=self.accuracy_level,
        )

    def normalize(self, x: str, scale: str) -> str:
        return self.node(
            "SimplifiedLayerNormalization",
            [x, scale],
            axis=-1,
            epsilon=self.eps,
            stash_type=1,
        )

    def rms_norm(self, x: str, weight: Weight | None, groups: int = 1) -> str:
        scale = self.vector(weight) if weight else self.constant(np.ones(self.bare_width))
        if groups == 1:
            return self.normalize(x, scale)
        x = self.node("Reshape", [x, self.constant([0, 0, groups, -1], np.int64)])
        return self.node("Reshape", [self.normalize(x, scale), self.constant([0, 0, -1], np.int64)])

    def add(self, a: str, b: str) -> str:
        return self.node("Add", [a, b])

    def subtract(self, a: str, b: str) -> str:
        return self.node("Sub", [a, b])

    def multiply(self, a: str, b: str) -> str:
        return self.node("Mul", [a, b])

    def divide(self, a: str, b: str) -> str:
        return self.node("Div", [a, b])

    def scale(self, x: str, factor: float) -> str:
        return self.node("Mul", [x, self.constant(factor)])

    def scale_by(self, x: str, weight: Weight) -> str:
        return self.node("Mul", [x, self.vector(weight)])

    def tanh(self, x: str) -> str:
        return self.node("Tanh", [x])

    def relu(self, x: str) -> str:
        return self.node("Relu", [x])

    def activation(self, x: str, name: str) -> str:
        if name == "gelu_pytorch_tanh":
            return self.node("FastGelu", [x], domain=MS)
        if name == "gelu":
            return self.node("Gelu", [x], domain=MS)
        if name == "silu":
            return self.node("QuickGelu", [x], domain=MS, alpha=1.0)
        return self.node("Relu", [x])

    def mean(self, x: str) -> str:
        return self.node("ReduceMean", [x, self.constant([-1], np.int64)], keepdims=1)

    def mean_square(self, x: str) -> str:
        return self.mean(self.node("Mul", [x, x]))

    def sqrt(self, x: str) -> str:
        return self.node("Sqrt", [x])

    def at_least(self, x: str, minimum: float) -> str:
        return self.node("Max", [x, self.constant(minimum)])

    def columns(self, x: str, start: int, stop: int) -> str:
        return self.node(
            "Slice",
            [x, *(self.constant([value], np.int64) for value in (start, stop, 2))],
        )


def value_info(name: str, data_type: int, shape: list[int | str]) -> ValueInfoProto:
    return helper.make_tensor_value_info(name, data_type, shape)


def serialize(model: ModelProto) -> bytes:
    """The bytes of a model. Weights are external, so they stay far below protobuf's limit of 2 GB."""
    return bytes(model.SerializeToString(deterministic=True))
