"""`VisionOps`: the operations of the image encoder, beyond `BaseOps`.

Images and feature maps are (height, width, channels). Channels come last, so that a 1x1 convolution is a
`linear`, and a norm over channels an `rms_norm`.
"""

from __future__ import annotations

from typing import Protocol, TypeVar

from gemma_edge.export.model.ops import BaseOps, Weight

T = TypeVar("T")


class VisionOps(BaseOps[T], Protocol[T]):
    """The operations of the image encoder."""

    def conv2d(self, x: T, weight: Weight, stride: int = 1, bias: Weight | None = None) -> T:
        """Convolution of (height, width, in) with a weight (out, in, kernel, kernel).

        Padded as TensorFlow's SAME: the result has ceil(height / stride) rows, and the larger half of an odd
        number of padding rows is at the end.
        """

    def depthwise_conv2d(self, x: T, weight: Weight, stride: int = 1) -> T:
        """The same with a kernel for each channel: weight (channels, 1, kernel, kernel)."""

    def multi_query_attention(self, q: T, k: T, v: T, heads: int, dim: int) -> T:
        """softmax(q k^T / sqrt(dim)) v, where all heads read the same keys and values.

        q (height, width, heads * dim), k and v (height', width', dim) -> (height, width, heads * dim). Every
        query sees every key.
        """

    def upsample(self, x: T, factor: int) -> T:
        """Every pixel `factor` times in both directions (nearest neighbour)."""

    def average_pool(self, x: T, factor: int) -> T:
        """Means over squares of `factor` x `factor` pixels, which divide height and width."""

    def concat(self, xs: list[T]) -> T:
        """Side by side along the last axis."""

    def flatten(self, x: T, channels: int) -> T:
        """(height, width, channels) -> (height * width, channels), row by row."""
