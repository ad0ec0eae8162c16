"""The NumPy interpreter of the audio encoder: `AudioOps` over fp32 arrays without a batch axis."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.emit.reference.encoder_weights import FoldedWeights
from gemma_edge.export.emit.reference.reference_text import Array, ArrayOps
from gemma_edge.export.export_families import encoder_model
from gemma_edge.export.model.audio_ops import LocalWindow
from gemma_edge.export.model.ops import Weight
from gemma_edge.export.model.weight_source import WeightSource
from gemma_edge.runtime.families.model_family import LogMelConfig

MASKED = np.finfo(np.float32).min


def evaluate_audio(
    source: WeightSource,
    config: LogMelConfig,
    log_mel: Array,
    mask: NDArray[np.bool_] | None = None,
    *,
    progress: Callable[[int], None] | None = None,
) -> Array:
    """Soft tokens of a clip, fp32.

    Args:
        source: has the encoder's tensors.
        log_mel: (frames, bins), at most `config.max_frames` frames.
        mask: (frames,), True where a frame belongs to the clip; all of them if None.
        progress: given the number of weights read since its last call.

    Returns:
        (config.soft_tokens, config.text_hidden_size).
    """
    valid = np.ones(len(log_mel), bool) if mask is None else mask
    ops = ReferenceAudioOps(FoldedWeights(source, config), config, progress)
    rows = encoder_model(config).soft_tokens(
        ops, config, log_mel[:, :, None], valid.astype(np.float32)[:, None]
    )
    return np.asarray(rows)


@dataclass
class ReferenceAudioOps(ArrayOps):
    """`AudioOps` over arrays; `source` has the tensors of the encoder's graph."""

    source: WeightSource
    config: LogMelConfig
    progress: Callable[[int], None] | None = None

    def __post_init__(self) -> None:
        encoder = encoder_model(self.config)
        self.specs, self.eps = encoder.graph_specs(self.config), encoder.eps

    def convolve(self, x: Array, weight: Weight, stride: tuple[int, int]) -> Array:
        kernels = self.load(weight)
        height, width = kernels.shape[2:]
        padded = np.pad(x, ((0, height - 1), (1, 1), (0, 0)))
        rows = (padded.shape[0] - height) // stride[0] + 1
        columns = (padded.shape[1] - width) // stride[1] + 1
        y = np.zeros((rows, columns, len(kernels)), np.float32)
        for i in range(height):
            for j in range(width):
                seen = padded[i :: stride[0], j :: stride[1]][:rows, :columns]
                y += seen @ kernels[:, :, i, j].T
        return y

    def cumulative_norm(self, x: Array, weight: Weight, eps: float) -> Array:
        counts = x[0].size * np.arange(1, len(x) + 1)
        means = np.cumsum(x.sum(axis=(1, 2), dtype=np.float64)) / counts
        centered = x - means.astype(np.float32)[:, None, None]
        variances = np.cumsum(np.square(centered).sum(axis=(1, 2), dtype=np.float64)) / counts
        scale = (1 / np.sqrt(variances + eps)).astype(np.float32)
        centered *= scale[:, None, None]
        return centered * self.load(weight)

    def flatten(self, x: Array, width: int) -> Array:
        return x.reshape(-1, width)

    def causal_convolve(self, x: Array, weight: Weight) -> Array:
        kernels = self.load(weight)[:, 0]  # (width, kernel)
        before = kernels.shape[1] - 1
        padded = np.pad(x, ((before, 0), (0, 0)))
        y = np.zeros_like(x)
        for i in range(before + 1):
            y += padded[i : i + len(x)] * kernels[:, i]
        return y

    def local_attention(
        self,
        q: Array,
        k: Array,
        v: Array,
        positions: Weight,
        valid: Array,
        window: LocalWindow,
        cap: float,
    ) -> Array:
        tokens, width = q.shape
        heads = (window.heads, width // window.heads)
        around = ((window.past, window.future), (0, 0))
        keys, values, seen = (np.pad(y, around) for y in (k, v, valid))
        relative = self.load(positions).reshape(window.span, *heads)
        y = np.empty((tokens, *heads), np.float32)
        for start in range(0, tokens, window.chunk):
            count = min(window.chunk, tokens - start)
            context = slice(start, start + count + window.span - 1)
            queries = q[start : start + count].reshape(count, *heads)
            logits = np.einsum("qnd,cnd->nqc", queries, keys[context].reshape(-1, *heads), optimize=True)
            # Query i sees keys i ... i + span - 1 of the context, which have the distances of `positions`.
            distance = np.arange(logits.shape[2]) - np.arange(count)[:, None]
            near = (distance >= 0) & (distance < window.span)
            by_distance = np.einsum("qnd,fnd->nqf", queries, relative, optimize=True)
            index = np.broadcast_to(np.clip(distance, 0, window.span - 1), logits.shape)
            logits += np.take_along_axis(by_distance, index, axis=2)
            logits = np.tanh(logits / np.float32(cap)) * np.float32(cap)
            logits = np.where(near & (seen[context, 0] > 0), logits, MASKED)
            weights = np.exp(logits - logits.max(axis=2, keepdims=True))
            weights /= weights.sum(axis=2, keepdims=True)
            context_values = values[context].reshape(-1, *heads)
            y[start : start + count] = np.einsum("nqc,cnd->qnd", weights, context_values, optimize=True)
        return y.reshape(tokens, width)

    def clip(self, x: Array, limit: float) -> Array:
        return np.clip(x, np.float32(-limit), np.float32(limit))

    def sigmoid(self, x: Array) -> Array:
        return np.asarray(1 / (1 + np.exp(np.minimum(-x, np.float32(80)))), np.float32)

    def every(self, x: Array, step: int) -> Array:
        return x[::step]

    def fill(self, x: Array, valid: Array, weight: Weight, count: int) -> Array:
        y = np.tile(self.load(weight), (count, 1))
        y[: len(x)] = np.where(valid > 0, x, y[: len(x)])
        return y
