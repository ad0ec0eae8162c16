"""Scales of the int8 KV caches, one for each channel of each KV head.

Keys and values are RMS-normalized, so their range is bounded by the norm's weight: |x| <= sqrt(head_dim) *
weight (for keys the larger weight of a rotated pair). Most stay far below it, so the scales come from what
the reference sees on the built-in prompts, with a margin, and never exceed that bound.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.emit.reference.reference_text import Array, ReferenceOps, final_hidden
from gemma_edge.export.model.weight_source import WeightSource
from gemma_edge.export.progress_bar import ProgressBar

MARGIN = 2.0  # headroom over the largest magnitude seen
MAX_INT8 = 127


@dataclass(frozen=True)
class KvScales:
    """f32 (1, kv_heads, 1, head_dim) each: a cached integer times its scale is the value."""

    key: NDArray[np.float32]
    value: NDArray[np.float32]


def kv_scales(source: WeightSource, sequences: Sequence[Sequence[int]]) -> dict[int, KvScales]:
    """Scales for every layer that owns KV, from one pass of the reference over `sequences`."""
    config = source.config
    lengths = [len(sequence) for sequence in sequences]
    ops = _CachingOps(source, lengths, [1] * len(lengths))
    with contextlib.suppress(_AllCached):
        final_hidden(ops, sequences)
    scales = {}
    for layer in config.kv_layers:
        weight = np.abs(source.read(f"layers.{layer}.self_attn.k_norm.weight"))
        half = config.head_dim // 2
        pair = np.tile(np.hypot(weight[:half], weight[half:]), 2)
        keys, values = ops.caches[layer]
        bound = math.sqrt(config.head_dim)
        scales[layer] = KvScales(_scale(keys, bound * pair), _scale(values, np.full(config.head_dim, bound)))
    return scales


def measured_kv_scales(
    source: WeightSource, precision: str, prompts: Sequence[Sequence[int]], progress: bool
) -> dict[int, KvScales]:
    """`kv_scales` for a KV cache of this precision, with a progress bar; none for fp32."""
    if precision != "int8":
        return {}
    with ProgressBar("calibrating the int8 cache", 0, progress):
        return kv_scales(source, prompts)


class _AllCached(Exception):
    """What comes next has no KV of its own."""


class _CachingOps(ReferenceOps):
    """The reference up to the last layer that owns KV."""

    def attention(self, heads: Array, layer: int) -> Array:
        attended = super().attention(heads, layer)
        if layer == max(self.config.kv_layers):
            raise _AllCached
        return attended


def _scale(seen: Array, bound: NDArray[np.floating]) -> NDArray[np.float32]:
    """(tokens, kv_heads, head_dim) and the bound of a channel -> the scale of each head's channel."""
    largest = np.minimum(np.abs(seen).max(axis=0) * MARGIN, bound)
    scale = np.maximum(largest, 1e-6) / MAX_INT8
    return scale.astype(np.float32)[None, :, None, :]
