"""The TFLite interpreter of the image encoder: emits `vision.tflite`, for LiteRT and LiteRT-LM on CPU.

One signature, `vision`, of a fixed size:

    images      f32 (1, image_size, image_size, 3)    pixels in [0, 1], channels last
    -> features f32 (1, soft tokens, text hidden)     what stands in the prompt for an image

Channels come last everywhere, which is how the engine computes convolutions: nothing is transposed. Linear
layers have the precision that the recipe gives small projections. Convolutions over more than a pixel, a
hundredth of the published weights, stay fp32.
"""

from __future__ import annotations

from typing import Any

from gemma_edge.export.emit.tflite.tflite_file import TfliteFile
from gemma_edge.export.emit.tflite.tflite_ops import SAME, VALID, TfliteGraphOps
from gemma_edge.export.export_families import encoder_model
from gemma_edge.export.model.ops import Weight
from gemma_edge.export.weights.recipe import Recipe
from gemma_edge.runtime.artifacts.tflite_check import FEATURES, IMAGES, VISION
from gemma_edge.runtime.families.model_family import PixelsConfig

OUT_FIRST, CHANNELS_LAST = (0, 2, 3, 1), (1, 2, 3, 0)  # orders of a kernel's axes: full, depthwise


def emit_vision(config: PixelsConfig, recipe: Recipe) -> TfliteFile:
    """Emits the encoder of `config`; reads no weight."""
    encoder = encoder_model(config)
    specs = encoder.graph_specs(config)
    file = TfliteFile(specs)
    graph = file.graph(VISION)
    ops = TfliteVisionOps(graph, specs, recipe, encoder.eps)
    images = graph.input(IMAGES, (1, config.image_size, config.image_size, 3))
    rows = encoder.soft_tokens(ops, config, images)
    graph.outputs[FEATURES] = ops.reshape(rows, (1, config.soft_tokens, config.text_hidden_size))
    return file


class TfliteVisionOps(TfliteGraphOps):
    """`VisionOps` over edges: feature maps are (1, height, width, channels)."""

    def conv2d(self, x: int, weight: Weight, stride: int = 1, bias: Weight | None = None) -> int:
        return self.convolve(x, weight, OUT_FIRST, stride, bias)

    def depthwise_conv2d(self, x: int, weight: Weight, stride: int = 1) -> int:
        return self.convolve(x, weight, CHANNELS_LAST, stride, None)

    def convolve(
        self, x: int, weight: Weight, order: tuple[int, ...], stride: int, bias: Weight | None
    ) -> int:
        spec = self.specs[weight.name]
        kernel, edge = self.graph.kernel(weight, spec, order), self.vector(bias) if bias else None
        _, height, width, _ = self.shape(x)
        shape = (1, -(-height // stride), -(-width // stride), spec.shape[0])
        return self.convolution(x, kernel, edge, shape, (stride, stride), SAME)

    def multi_query_attention(self, q: int, k: int, v: int, heads: int, dim: int) -> int:
        # All heads read the same keys: the heads of a pixel are rows of one product.
        keys, values = (self.reshape(x, (1, self.shape(x)[1] * self.shape(x)[2], dim)) for x in (k, v))
        _, height, width, _ = shape = self.shape(q)
        queries = self.reshape(self.scale(q, dim**-0.5), (1, height * width * heads, dim))
        weights = self.softmax(self.matmul(queries, keys, transposed=True))
        return self.reshape(self.matmul(weights, values), shape)

    def upsample(self, x: int, factor: int) -> int:
        # Copies side by side, then rows of them below each other: XNNPACK has no such resizing.
        _, height, width, channels = self.shape(x)
        column = self.reshape(x, (height * width, 1, channels))
        wide = self.concat([column] * factor, axis=1)
        row = self.reshape(wide, (height, 1, width * factor * channels))
        tall = self.concat([row] * factor, axis=1)
        return self.reshape(tall, (1, height * factor, width * factor, channels))

    def average_pool(self, x: int, factor: int) -> int:
        _, height, width, channels = self.shape(x)
        shape = (1, height // factor, width // factor, channels)
        size: dict[str, Any] = {"strideH": factor, "strideW": factor}
        size |= {"filterHeight": factor, "filterWidth": factor, "padding": VALID}
        return self.graph.op("AVERAGE_POOL_2D", [x], shape, "Pool2DOptions", **size)

    def flatten(self, x: int, channels: int) -> int:
        _, height, width, _ = self.shape(x)
        return self.reshape(x, (height * width, channels))
