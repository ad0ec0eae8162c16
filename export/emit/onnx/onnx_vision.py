"""The ONNX interpreter of the image encoder: emits `vision.onnx`, for ONNX Runtime on CPU.

Its input is pixels, f32 (1, 3, image_size, image_size) in [0, 1], and its output soft_tokens, f32 (1, soft
tokens, text hidden): what stands in the prompt for an image.

Values are (1, height, width, channels). Channels come last, so that norms and 1x1 convolutions, which hold
nearly all weights, are linear layers, quantized by the same recipes. Only convolutions over more than a pixel
have to transpose, and stay fp32.

At 8 bits a linear layer is a product of integers. MatMulNBits would unpack all weights to fp32 for every
image, which at 256 x 256 takes longer than the products; with integer activations it has kernels for a few
rows, and an image has up to 36,864. Weights have a scale a row, activations one a pixel.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.emit.onnx.external_data import ExternalData
from gemma_edge.export.emit.onnx.onnx_graph import ACCURACY_FP32, FLOAT, MS, EmittedGraph, OnnxGraph
from gemma_edge.export.emit.onnx.onnx_package import numpy_helper
from gemma_edge.export.export_families import encoder_model
from gemma_edge.export.model.ops import Weight
from gemma_edge.export.weights.recipe import Precision, Recipe
from gemma_edge.runtime.engines.integer_activations import INTEGER_ACTIVATIONS
from gemma_edge.runtime.families.model_family import PixelsConfig

TO_CHANNELS_FIRST, TO_CHANNELS_LAST = [0, 3, 1, 2], [0, 2, 3, 1]
SMALLEST = 1e-20  # what a pixel of zeros is divided by, times 127


def emit_vision(
    config: PixelsConfig, recipe: Recipe, data_location: str = "vision.onnx.data"
) -> EmittedGraph:
    """Emits the encoder of `config`; reads no weight.

    Convolutions stay fp32, linear layers have the precision that `recipe` gives small projections.
    """
    encoder = encoder_model(config)
    specs = encoder.graph_specs(config)
    data = ExternalData(data_location, specs)
    ops = OnnxVisionOps(specs, recipe, data, encoder.eps, config.text_hidden_size)
    size = config.image_size
    pixels = ops.channels_last(ops.input("pixels", FLOAT, [1, 3, size, size]))
    encoder.soft_tokens(ops, config, pixels)
    ops.output("soft_tokens", FLOAT, [1, config.soft_tokens, config.text_hidden_size])
    return EmittedGraph(ops.model(encoder.name), data)


class OnnxVisionOps(OnnxGraph):
    """`VisionOps` that append to a graph."""

    accuracy_level = ACCURACY_FP32  # of weights of 4 bits, whose unpacking is spread over many rows

    def matmul(self, x: str, name: str, weights: list[Weight]) -> str:
        spec = self.specs[weights[0].name]
        if self.recipe.precision(spec).bits != 8 or spec.shape[-1] % 2:
            return super().matmul(x, name, weights)
        (weight,) = weights
        if name not in self.stored:
            self.data.add(name, [weight], spec.shape, spec.part, Precision(8))
            self.stored.add(name)
        return self.integer_product(x, name)

    def integer_product(self, x: str, name: str) -> str:
        """x times the transpose of i8 weights: x is quantized symmetrically, with a scale for each pixel."""
        axis, one = self.constant([-1], np.int64), self.constant(1)
        step, middle = (self.named(*each) for each in INTEGER_ACTIVATIONS.items())
        high, low = (self.node(op, [x, axis], keepdims=1) for op in ("ReduceMax", "ReduceMin"))
        largest = self.node("Max", [high, self.node("Neg", [low]), self.constant(SMALLEST)])
        scale = self.node("Mul", [largest, step])
        integers = self.node("QuantizeLinear", [self.node("Div", [x, scale]), one, middle])
        factors = [one, f"{name}_scales", middle]
        y = self.node("MatMulIntegerToFloat", [integers, name, *factors], domain=MS)
        return self.node("Mul", [y, scale])

    def named(self, name: str, value: NDArray[Any]) -> str:
        """A constant that the runtime may replace by its name."""
        self.constants.setdefault(name, numpy_helper.from_array(value, name))
        return name

    def conv2d(self, x: str, weight: Weight, stride: int = 1, bias: Weight | None = None) -> str:
        return self.convolve(x, weight, stride, 1, bias)

    def depthwise_conv2d(self, x: str, weight: Weight, stride: int = 1) -> str:
        return self.convolve(x, weight, stride, self.specs[weight.name].shape[0], None)

    def convolve(self, x: str, weight: Weight, stride: int, groups: int, bias: Weight | None) -> str:
        kernel = self.specs[weight.name].shape[-1]
        inputs = [self.channels_first(x), self.vector(weight)]
        if bias:
            inputs.append(self.vector(bias))
        y = self.node(
            "Conv",
            inputs,
            kernel_shape=[kernel, kernel],
            strides=[stride, stride],
            group=groups,
            auto_pad="SAME_UPPER",
        )
        return self.channels_last(y)

    def channels_first(self, x: str) -> str:
        return self.node("Transpose", [x], perm=TO_CHANNELS_FIRST)

    def channels_last(self, x: str) -> str:
        return self.node("Transpose", [x], perm=TO_CHANNELS_LAST)

    def multi_query_attention(self, q: str, k: str, v: str, heads: int, dim: int) -> str:
        # All heads read the same keys: the heads of a row of pixels are rows of one product.
        queries = self.node("Reshape", [q, self.constant([0, 0, -1, dim], np.int64)])
        keys, values = (self.node("Reshape", [x, self.constant([1, 1, -1, dim], np.int64)]) for x in (k, v))
        scores = self.node("FusedMatMul", [queries, keys], domain=MS, transB=1, alpha=dim**-0.5)
        y = self.node("MatMul", [self.node("Softmax", [scores], axis=-1), values])
        return self.node("Reshape", [y, self.constant([0, 0, -1, heads * dim], np.int64)])

    def upsample(self, x: str, factor: int) -> str:
        return self.node(
            "Resize",
            [x, "", self.constant([1, factor, factor, 1])],
            mode="nearest",
            coordinate_transformation_mode="asymmetric",
            nearest_mode="floor",
        )

    def average_pool(self, x: str, factor: int) -> str:
        y = self.node(
            "AveragePool",
            [self.channels_first(x)],
            kernel_shape=[factor, factor],
            strides=[factor, factor],
        )
        return self.channels_last(y)

    def concat(self, xs: list[str]) -> str:
        return self.node("Concat", xs, axis=-1)

    def flatten(self, x: str, channels: int) -> str:
        return self.node("Reshape", [x, self.constant([1, -1, channels], np.int64)])
