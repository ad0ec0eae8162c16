"""TFLite operators, and the `BaseOps` that append them to a graph of any model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_edge.export.emit.tflite.tflite_file import Graph
from gemma_edge.export.model.ops import Weight
from gemma_edge.export.model.tensor_spec import TensorSpec
from gemma_edge.export.weights.recipe import FP32, Recipe

SAME, VALID = 0, 1  # Padding of the schema


class TfliteGraphOps:
    """`BaseOps` over edges of one graph; operations work on the last axis, whatever comes before it.

    Args:
        graph: what operators are appended to.
        specs: the tensors that weights may name.
        recipe: the precision of each.
        eps: of RMS norms.
    """

    def __init__(self, graph: Graph, specs: Mapping[str, TensorSpec], recipe: Recipe, eps: float) -> None:
        self.graph, self.specs, self.recipe, self.eps = graph, specs, recipe, eps

    # Operators. -----------------------------------------------------------------------------------

    def op(self, code: str, inputs: list[int], options: str = "", **values: Any) -> int:
        """An elementwise operator, which broadcasts."""
        shape = np.broadcast_shapes(*(self.graph.shapes[i] for i in inputs))
        options = options or {"ADD": "AddOptions", "SUB": "SubOptions", "MUL": "MulOptions"}.get(code, "")
        return self.graph.op(code, inputs, shape, options, **values)

    def shape(self, x: int) -> tuple[int, ...]:
        return self.graph.shapes[x]

    def reshape(self, x: int, shape: tuple[int, ...]) -> int:
        if self.shape(x) == shape:
            return x
        return self.graph.op("RESHAPE", [x, self.graph.constant(shape, "int32")], shape)

    def slice(self, x: int, begin: tuple[int, ...], size: tuple[int, ...], dtype: str = "float32") -> int:
        places = [self.graph.constant(p, "int32") for p in (begin, size)]
        return self.graph.op("SLICE", [x, *places], size, "SliceOptions", dtype)

    def slice_axis(self, x: int, axis: int, start: int, stop: int) -> int:
        shape = self.shape(x)
        if (start, stop) == (0, shape[axis]):
            return x
        begin = tuple(start if i == axis else 0 for i in range(len(shape)))
        return self.slice(x, begin, tuple(stop - start if i == axis else n for i, n in enumerate(shape)))

    def concat(self, xs: list[int], axis: int = -1, dtype: str = "float32") -> int:
        if len(xs) == 1:
            return xs[0]
        shape = list(self.shape(xs[0]))
        axis %= len(shape)
        shape[axis] = sum(self.shape(x)[axis] for x in xs)
        return self.graph.op("CONCATENATION", xs, shape, "ConcatenationOptions", dtype, axis=axis)

    def transpose(self, x: int, order: tuple[int, ...]) -> int:
        shape = tuple(self.shape(x)[i] for i in order)
        moved = [i for i in order if self.shape(x)[i] != 1]
        if moved == sorted(moved):
            return self.reshape(x, shape)
        return self.graph.op("TRANSPOSE", [x, self.graph.constant(order, "int32")], shape, "TransposeOptions")

    def matmul(self, a: int, b: int, transposed: bool = False) -> int:
        """Batched a @ b, or a @ b.T."""
        columns = self.shape(b)[-2 if transposed else -1]
        shape = (*self.shape(a)[:-1], columns)
        return self.graph.op("BATCH_MATMUL", [a, b], shape, "BatchMatMulOptions", adjY=transposed)

    def pad(self, x: int, before: tuple[int, ...], after: tuple[int, ...]) -> int:
        """Zeros before and after, along each axis."""
        if not any(before + after):
            return x
        shape = tuple(b + n + a for b, n, a in zip(before, self.shape(x), after, strict=True))
        places = self.graph.constant(np.transpose([before, after]), "int32")
        return self.graph.op("PAD", [x, places], shape, "PadOptions")

    def convolution(
        self,
        x: int,
        kernel: int,
        bias: int | None,
        shape: tuple[int, ...],
        strides: tuple[int, int],
        padding: int,
    ) -> int:
        """Of a map (1, rows, columns, channels), to `shape`.

        A kernel (out, rows, columns, in) is over all channels, (1, rows, columns, channels) over each alone.
        """
        if bias is None:
            bias = self.graph.constant(np.zeros(shape[3]))  # the engine insists on one
        options: dict[str, Any] = {
            **{"padding": padding, "strideH": strides[0], "strideW": strides[1]},
            **{"dilationHFactor": 1, "dilationWFactor": 1},
        }
        if self.shape(kernel)[0] == 1 != shape[3]:
            options["depthMultiplier"] = 1
            code, kind = "DEPTHWISE_CONV_2D", "DepthwiseConv2DOptions"
        else:
            code, kind = "CONV_2D", "Conv2DOptions"
        return self.graph.op(code, [x, kernel, bias], shape, kind, **options)

    def to_int8(self, x: int) -> int:
        """The nearest integers, from -128 to 127."""
        return self.graph.op("QUANTIZE", [x], self.shape(x), "QuantizeOptions", "int8")

    def to_fp32(self, x: int) -> int:
        if self.graph.dtype(x) == "float32":
            return x
        return self.graph.op("DEQUANTIZE", [x], self.shape(x), "DequantizeOptions")

    def softmax(self, x: int) -> int:
        return self.graph.op("SOFTMAX", [x], self.shape(x), "SoftmaxOptions", beta=1.0)

    def vector(self, weight: Weight) -> int:
        spec = self.specs[weight.name]
        return self.graph.weight(weight.name, [weight], spec.shape, spec.part, FP32)

    def fully_connected(self, x: int, name: str, weights: list[Weight]) -> int:
        """x times the transpose of weights stacked by rows, which are stored as one."""
        spec = self.specs[weights[0].name]
        rows = sum(w.rows[1] - w.rows[0] if w.rows else self.specs[w.name].shape[0] for w in weights)
        edge = self.graph.weight(name, weights, (rows, spec.shape[1]), spec.part, self.recipe.precision(spec))
        return self.graph.op(
            "FULLY_CONNECTED",
            [x, edge, -1],
            (*self.shape(x)[:-1], rows),
            "FullyConnectedOptions",
            keepNumDims=True,
        )

    def linear(self, x: int, weight: Weight, bias: Weight | None = None) -> int:
        name = weight.name if weight.rows is None else f"{weight.name}.{weight.rows[0]}"
        y = self.fully_connected(x, name, [weight])
        return y if bias is None else self.op("ADD", [y, self.vector(bias)])

    # Norms and elementwise. ---------------------------------------------------------------------

    def normalize(self, x: int) -> int:
        epsilon = self.graph.constant([self.eps])
        mean = self.op("ADD", [self.mean_square(x), epsilon])
        return self.op("MUL", [x, self.op("RSQRT", [mean])])

    def rms_norm(self, x: int, weight: Weight | None, groups: int = 1) -> int:
        shape = self.shape(x)
        y = self.normalize(self.reshape(x, (*shape[:-1], groups, shape[-1] // groups)) if groups > 1 else x)
        y = y if weight is None else self.op("MUL", [y, self.vector(weight)])
        return self.reshape(y, shape)

    def add(self, a: int, b: int) -> int:
        return self.op("ADD", [a, b])

    def subtract(self, a: int, b: int) -> int:
        return self.op("SUB", [a, b])

    def multiply(self, a: int, b: int) -> int:
        return self.op("MUL", [a, b])

    def divide(self, a: int, b: int) -> int:
        return self.op("DIV", [a, b], "DivOptions")

    def scale(self, x: int, factor: float) -> int:
        return self.op("MUL", [x, self.graph.constant([factor])])

    def scale_by(self, x: int, weight: Weight) -> int:
        return self.op("MUL", [x, self.vector(weight)])

    def tanh(self, x: int) -> int:
        return self.op("TANH", [x])

    def relu(self, x: int) -> int:
        return self.op("RELU", [x])

    def activation(self, x: int, name: str) -> int:
        if name in ("gelu_pytorch_tanh", "gelu"):
            return self.op("GELU", [x], "GeluOptions", approximate=name != "gelu")
        if name == "silu":
            return self.op("MUL", [x, self.op("LOGISTIC", [x])])
        return self.relu(x)

    def mean(self, x: int) -> int:
        axis = self.graph.constant([len(self.shape(x)) - 1], "int32")
        return self.graph.op("MEAN", [x, axis], (*self.shape(x)[:-1], 1), "ReducerOptions", keepDims=True)

    def mean_square(self, x: int) -> int:
        return self.mean(self.op("SQUARE", [x]))

    def sqrt(self, x: int) -> int:
        return self.op("SQRT", [x])

    def at_least(self, x: int, minimum: float) -> int:
        return self.op("MAXIMUM", [x, self.graph.constant([minimum])])

    def columns(self, x: int, start: int, stop: int) -> int:
        return self.slice_axis(x, len(self.shape(x)) - 1, start, stop)
