"""The TFLite interpreter of the audio encoder: emits `audio.tflite`, for LiteRT and LiteRT-LM on CPU.

Shapes are fixed, so there is a signature `audio_F` for each of several lengths of F frames, over the same
weights; a clip takes the shortest that it fits. Names are those that LiteRT-LM looks for, which takes a file
of one signature:

    src_inputs  f32 (1, F, bins)                 log-mel frames, zeros behind the clip
    mask        bool (1, F)                      true where a frame belongs to the clip
    -> features f32 (1, soft tokens, text hidden)    what stands in the prompt for the clip
    -> mask     bool (1, soft tokens)                where that is no padding

Linear layers have the precision that the recipe gives small projections; convolutions stay fp32.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from gemma_edge.export.emit.tflite.tflite_file import Graph, TfliteFile
from gemma_edge.export.emit.tflite.tflite_ops import VALID, TfliteGraphOps
from gemma_edge.export.export_families import encoder_model
from gemma_edge.export.model.audio_ops import LocalWindow
from gemma_edge.export.model.ops import Weight
from gemma_edge.export.weights.recipe import Recipe
from gemma_edge.runtime.artifacts.tflite_check import FEATURES, LOG_MEL, MASK
from gemma_edge.runtime.families.model_family import LogMelConfig

# Orders of a kernel's axes: for all channels of a map, and for each column of a sequence.
OUT_FIRST, CHANNELS_LAST = (0, 2, 3, 1), (1, 2, 0)
MASKED = -1e9  # added to a logit, which is at most the cap
BOOL, FLOAT = 6, 0  # TensorType of the schema


def audio_lengths(config: LogMelConfig) -> tuple[int, ...]:
    """Frames of the signatures: the longest clip's (30 s as published), a half and a sixth of it."""
    unit = config.frames_per_token
    return tuple(sorted({-(-config.max_frames // part // unit) * unit for part in (1, 2, 6)}))


def emit_audio(config: LogMelConfig, recipe: Recipe, lengths: Sequence[int] | None = None) -> TfliteFile:
    """Emits the encoder of `config`; reads no weight. `file.write` takes `FoldedWeights`.

    Args:
        lengths: frames of each signature; None for `audio_lengths`.
    """
    encoder = encoder_model(config)
    file = TfliteFile(encoder.graph_specs(config))
    for frames in lengths or audio_lengths(config):
        graph = file.graph(f"audio_{frames}")
        ops = TfliteAudioOps(graph, config, recipe)
        log_mel = graph.input(LOG_MEL, (1, frames, config.input_feat_size))
        mask = graph.input(MASK, (1, frames), "bool")
        valid = graph.op("CAST", [mask], (1, frames), "CastOptions", inDataType=BOOL, outDataType=FLOAT)
        rows = encoder.soft_tokens(
            ops,
            config,
            ops.reshape(log_mel, (1, frames, config.input_feat_size, 1)),
            ops.reshape(valid, (frames, 1)),
        )
        graph.outputs[FEATURES] = ops.reshape(rows, (1, config.soft_tokens, config.text_hidden_size))
        kept = ops.reshape(ops.filled, (1, config.soft_tokens))
        graph.outputs[MASK] = ops.op("GREATER", [kept, graph.constant([0.5])], dtype="bool")
    return file


class TfliteAudioOps(TfliteGraphOps):
    """`AudioOps` over edges: sequences are (tokens, width), feature maps (1, time, frequency, channels)."""

    def __init__(self, graph: Graph, config: LogMelConfig, recipe: Recipe) -> None:
        encoder = encoder_model(config)
        super().__init__(graph, encoder.graph_specs(config), recipe, encoder.eps)
        self.masks: dict[tuple[int, LocalWindow], int] = {}
        self.filled = -1  # (soft tokens, 1): 1 where `fill` kept what it was given

    def convolve(self, x: int, weight: Weight, stride: tuple[int, int]) -> int:
        spec = self.specs[weight.name]
        channels, _, height, width = spec.shape
        padded = self.pad(x, (0, 0, 1, 0), (0, height - 1, 1, 0))
        _, rows, columns, _ = self.shape(padded)
        shape = (1, (rows - height) // stride[0] + 1, (columns - width) // stride[1] + 1, channels)
        return self.convolution(
            padded, self.graph.kernel(weight, spec, OUT_FIRST), None, shape, stride, VALID
        )

    def cumulative_norm(self, x: int, weight: Weight, eps: float) -> int:
        # All frames are of one size, so that means of means are means.
        time = self.shape(x)[1]
        centered = self.op("SUB", [x, self.cumulative(self.frame_mean(x), time)])
        variance = self.cumulative(self.frame_mean(self.op("SQUARE", [centered])), time)
        deviation = self.op("RSQRT", [self.op("ADD", [variance, self.graph.constant([eps])])])
        return self.op("MUL", [self.op("MUL", [centered, deviation]), self.vector(weight)])

    def frame_mean(self, x: int) -> int:
        """(1, time, frequency, channels) -> (1, time, 1, 1)."""
        return self.graph.op(
            "MEAN",
            [x, self.graph.constant([2, 3], "int32")],
            (1, self.shape(x)[1], 1, 1),
            "ReducerOptions",
            keepDims=True,
        )

    def cumulative(self, x: int, time: int) -> int:
        """(1, time, 1, 1) -> the same, means of what is not later."""
        shape = self.shape(x)
        total = self.graph.op("CUMSUM", [x, self.graph.constant(1, "int32")], shape, "CumsumOptions")
        return self.op("MUL", [total, self.graph.constant(1 / np.arange(1, time + 1).reshape(shape))])

    def flatten(self, x: int, width: int) -> int:
        return self.reshape(x, (self.shape(x)[1], width))

    def causal_convolve(self, x: int, weight: Weight) -> int:
        spec = self.specs[weight.name]
        tokens, width = self.shape(x)
        column = self.pad(self.reshape(x, (1, tokens, 1, width)), (0, spec.shape[2] - 1, 0, 0), (0, 0, 0, 0))
        kernel = self.graph.kernel(weight, spec, CHANNELS_LAST, (1, spec.shape[2], 1, width))
        y = self.convolution(column, kernel, None, (1, tokens, 1, width), (1, 1), VALID)
        return self.reshape(y, (tokens, width))

    def local_attention(
        self, q: int, k: int, v: int, positions: Weight, valid: int, window: LocalWindow, cap: float
    ) -> int:
        """In chunks: each is a small product of its queries with the keys that any of them sees."""
        heads, chunk, context, span = window.heads, window.chunk, window.context, window.span
        tokens, width = self.shape(q)
        count, dim = -(-tokens // chunk), width // heads
        rows = count * chunk
        q = self.pad(q, (0, 0), (rows - tokens, 0))
        queries = self.transpose(self.reshape(q, (rows, heads, dim)), (1, 0, 2))
        relative = self.reshape(self.vector(positions), (span, heads, dim))
        shifted = self.matmul(queries, self.transpose(relative, (1, 0, 2)), transposed=True)
        # Column c - i of row i goes to column c: rows that are one longer, laid end to end, do that.
        shifted = self.reshape(shifted, (heads * count, chunk, span))
        shifted = self.pad(shifted, (0, 0, 0), (0, 0, context + 1 - span))
        shifted = self.reshape(shifted, (heads * count, chunk * (context + 1)))
        shifted = self.reshape(self.columns(shifted, 0, chunk * context), (heads, count, chunk, context))
        keys, values = (
            self.transpose(self.reshape(self.around(x, window), (count, context, heads, dim)), (2, 0, 1, 3))
            for x in (k, v)
        )
        queries = self.reshape(queries, (heads, count, chunk, dim))
        logits = self.add(self.matmul(queries, keys, transposed=True), shifted)
        logits = self.scale(self.tanh(self.scale(logits, 1 / cap)), cap)
        attended = self.matmul(self.softmax(self.add(logits, self.mask(valid, window))), values)
        attended = self.transpose(self.reshape(attended, (heads, rows, dim)), (1, 0, 2))
        return self.slice_axis(self.reshape(attended, (rows, width)), 0, 0, tokens)

    def mask(self, valid: int, window: LocalWindow) -> int:
        """What is added to the logits, (1, chunks, chunk, context); the same for all layers."""
        if (valid, window) not in self.masks:
            distance = np.arange(window.context) - np.arange(window.chunk)[:, None]
            near = ((distance >= 0) & (distance < window.span)).astype(np.float32)
            around = self.around(valid, window)
            seen = self.reshape(around, (1, self.shape(around)[0], 1, window.context))
            visible = self.op("MUL", [seen, self.graph.constant(near)])
            hidden = self.op("SUB", [visible, self.graph.constant([1.0])])
            self.masks[valid, window] = self.scale(hidden, -MASKED)
        return self.masks[valid, window]

    def around(self, x: int, window: LocalWindow) -> int:
        """(tokens, width) -> (chunks, context, width), zeros beyond either end."""
        tokens, width = self.shape(x)
        count, parts = -(-tokens // window.chunk), -(-window.context // window.chunk)
        rows = count * window.chunk
        # A context is so many whole chunks, the last of them cut.
        after = rows + (parts - 1) * window.chunk - window.past - tokens
        padded = self.pad(x, (window.past, 0), (max(after, 0), 0))
        pieces = []
        for part in range(parts):
            start = part * window.chunk
            piece = self.slice_axis(padded, 0, start, start + rows)
            pieces.append(self.reshape(piece, (count, window.chunk, width)))
        return self.slice_axis(self.concat(pieces, axis=1), 1, 0, window.context)

    def clip(self, x: int, limit: float) -> int:
        below = self.op("MINIMUM", [x, self.graph.constant([limit])])
        return self.op("MAXIMUM", [below, self.graph.constant([-limit])])

    def sigmoid(self, x: int) -> int:
        return self.op("LOGISTIC", [x])

    def every(self, x: int, step: int) -> int:
        tokens, width = self.shape(x)
        count = -(-tokens // step)
        padded = self.pad(x, (0, 0), (count * step - tokens, 0))
        return self.columns(self.reshape(padded, (count, step * width)), 0, width)

    def fill(self, x: int, valid: int, weight: Weight, count: int) -> int:
        missing = count - self.shape(x)[0]
        rows, self.filled = (self.pad(y, (0, 0), (missing, 0)) for y in (x, valid))
        padding = self.op("SUB", [self.graph.constant([1.0]), self.filled])
        kept = self.op("MUL", [rows, self.filled])
        return self.add(kept, self.op("MUL", [padding, self.vector(weight)]))
