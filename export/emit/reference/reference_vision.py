"""The NumPy interpreter of the image encoder: `VisionOps` over fp32 arrays, channels last.

Convolutions are matrix products over patches (im2col), a block of rows at a time, so that memory is bounded
by the largest feature map and not by its patches.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from gemma_edge.export.emit.reference.reference_text import ACTIVATIONS, BLOCK_BYTES, Array, ArrayOps
from gemma_edge.export.export_families import encoder_model
from gemma_edge.export.model.ops import Weight
from gemma_edge.export.model.tensor_spec import TensorSpec
from gemma_edge.export.model.weight_source import WeightSource
from gemma_edge.runtime.families.model_family import PixelsConfig


@dataclass
class ReferenceVisionOps(ArrayOps):
    """`VisionOps` over arrays without a batch axis.

    Args:
        source: where weights come from.
        specs: its tensors.
        eps: of RMS norms.
        progress: given the number of weights read since its last call.
    """

    source: WeightSource
    specs: Mapping[str, TensorSpec]
    eps: float
    progress: Callable[[int], None] | None = None

    def conv2d(self, x: Array, weight: Weight, stride: int = 1, bias: Weight | None = None) -> Array:
        kernels = self.load(weight)
        out, _, kernel, _ = kernels.shape
        padded = pad_same(x, kernel, stride)
        windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), axis=(0, 1))
        windows = windows[::stride, ::stride]  # (rows, columns, in, kernel, kernel)
        matrix = kernels.reshape(out, -1).T
        y = np.empty((*windows.shape[:2], out), dtype=np.float32)
        step = max(1, BLOCK_BYTES // (4 * windows[0].size))
        for row in range(0, len(y), step):
            patches = windows[row : row + step].reshape(-1, len(matrix))
            y[row : row + step] = (patches @ matrix).reshape(-1, *y.shape[1:])
        return y if bias is None else y + self.load(bias)

    def depthwise_conv2d(self, x: Array, weight: Weight, stride: int = 1) -> Array:
        kernels = self.load(weight)
        kernel = kernels.shape[-1]
        padded = pad_same(x, kernel, stride)
        rows, columns = (math.ceil(n / stride) for n in x.shape[:2])
        y = np.zeros((rows, columns, x.shape[2]), dtype=np.float32)
        for i in range(kernel):
            for j in range(kernel):
                shifted = padded[i : i + stride * rows : stride, j : j + stride * columns : stride]
                y += shifted * kernels[:, 0, i, j]
        return y

    def multi_query_attention(self, q: Array, k: Array, v: Array, heads: int, dim: int) -> Array:
        queries = q.reshape(-1, dim)  # a row for each pixel and head: all read the same keys
        keys, values = k.reshape(-1, dim), v.reshape(-1, dim)
        y = np.empty_like(queries)
        step = max(1, BLOCK_BYTES // (4 * len(keys)))
        for row in range(0, len(y), step):
            scores = queries[row : row + step] @ keys.T * np.float32(dim**-0.5)
            scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
            scores /= scores.sum(axis=-1, keepdims=True)
            y[row : row + step] = scores @ values
        return y.reshape(q.shape)

    def upsample(self, x: Array, factor: int) -> Array:
        return x.repeat(factor, axis=0).repeat(factor, axis=1)

    def average_pool(self, x: Array, factor: int) -> Array:
        rows, columns, channels = x.shape
        return x.reshape(rows // factor, factor, columns // factor, factor, channels).mean(axis=(1, 3))

    def concat(self, xs: list[Array]) -> Array:
        return np.concatenate(xs, axis=-1)

    def flatten(self, x: Array, channels: int) -> Array:
        return x.reshape(-1, channels)

    def activation(self, x: Array, name: str) -> Array:
        """In blocks: a feature map can be 75 MB, and its activation needs several temporaries."""
        flat = x.reshape(-1)
        y = np.empty_like(flat)
        for start in range(0, len(flat), BLOCK_BYTES // 16):
            block = slice(start, start + BLOCK_BYTES // 16)
            y[block] = ACTIVATIONS[name](flat[block])
        return y.reshape(x.shape)


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after `size` pixels, as TensorFlow's SAME."""
    total = max((math.ceil(size / stride) - 1) * stride + kernel - size, 0)
    return total // 2, total - total // 2


def pad_same(x: Array, kernel: int, stride: int) -> Array:
    rows, columns = (same_padding(size, kernel, stride) for size in x.shape[:2])
    return np.pad(x, (rows, columns, (0, 0)))


def evaluate_vision(
    source: WeightSource,
    config: PixelsConfig,
    pixels: Array,
    *,
    progress: Callable[[int], None] | None = None,
) -> Array:
    """Soft tokens of an image, fp32.

    Args:
        source: has the encoder's tensors.
        pixels: (3, image_size, image_size) in [0, 1].
        progress: given the number of weights read since its last call.

    Returns:
        (config.soft_tokens, config.text_hidden_size).
    """
    encoder = encoder_model(config)
    ops = ReferenceVisionOps(source, encoder.specs(config), encoder.eps, progress)
    last = np.ascontiguousarray(pixels.transpose(1, 2, 0), dtype=np.float32)
    return np.asarray(encoder.soft_tokens(ops, config, last))
