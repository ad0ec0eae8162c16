"""The ONNX interpreter of the audio encoder: emits `audio.onnx`, for ONNX Runtime on CPU.

| input | type | |
|---|---|---|
| log_mel | f32 (1, frames, bins) | at most `AudioConfig.max_frames` frames |
| valid | f32 (1, frames, 1) | 1 where a frame belongs to the clip, 0 where it is padding |

Its output is soft_tokens, f32 (1, soft tokens, text hidden). Convolutions stay fp32; linear layers have the
precision that the recipe gives small projections.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gemma_edge.export.emit.onnx.external_data import ExternalData
from gemma_edge.export.emit.onnx.onnx_graph import ACCURACY_FP32, FLOAT, EmittedGraph, OnnxGraph
from gemma_edge.export.emit.onnx.onnx_package import TensorProto, helper, numpy_helper
from gemma_edge.export.export_families import encoder_model
from gemma_edge.export.model.audio_ops import LocalWindow
from gemma_edge.export.model.ops import Weight
from gemma_edge.export.weights.recipe import Recipe
from gemma_edge.runtime.families.model_family import LogMelConfig
from gemma_edge.runtime.media.audio_encoder import MAX_FRAMES

BOOL = TensorProto.BOOL
END = 2**62
MASKED = -1e30  # added to a logit, which is at most the cap


def emit_audio(config: LogMelConfig, recipe: Recipe, data_location: str = "audio.onnx.data") -> EmittedGraph:
    """Emits the encoder of `config` with the precisions of `recipe`; reads no weight.

    `data.write` takes `FoldedWeights`.
    """
    encoder = encoder_model(config)
    data = ExternalData(data_location, encoder.graph_specs(config))
    ops = OnnxAudioOps(config, recipe, data)
    log_mel = ops.input("log_mel", FLOAT, [1, "frames", config.input_feat_size])
    valid = ops.input("valid", FLOAT, [1, "frames", 1])
    # One channel: the only feature map whose channels can be first without moving a number.
    image = ops.node("Unsqueeze", [log_mel, ops.constant([1], np.int64)])
    encoder.soft_tokens(ops, config, image, valid)
    ops.output("soft_tokens", FLOAT, [1, config.soft_tokens, config.text_hidden_size])
    model = ops.model(encoder.name)
    helper.set_model_props(model, {MAX_FRAMES: str(config.max_frames)})
    return EmittedGraph(model, data)


@dataclass(frozen=True)
class _Chunking:
    """Edges: the number of tokens i64 (1,), rows of the chunks' queries (chunks, chunk) and of their keys
    (chunks, context), and what is added to the logits (chunks, 1, chunk, context).
    """

    tokens: str
    queries: str
    keys: str
    mask: str


class OnnxAudioOps(OnnxGraph):
    """`AudioOps` over edge names: sequences are (1, tokens, width), feature maps (1, channels, time,
    frequency), as the engine's convolutions take them.
    """

    # As in the image encoder: weights stay pages of the file, where packed for int8 activations they would be
    # 665 MiB of heap. 30 s of audio, 750 rows, took as long in either way, measured on a busy machine.
    accuracy_level = ACCURACY_FP32

    def __init__(self, config: LogMelConfig, recipe: Recipe, data: ExternalData) -> None:
        encoder = encoder_model(config)
        specs = encoder.graph_specs(config)
        super().__init__(specs, recipe, data, encoder.eps, config.text_hidden_size)
        self.chunkings: dict[tuple[str, LocalWindow], _Chunking] = {}

    def convolve(self, x: str, weight: Weight, stride: tuple[int, int]) -> str:
        kernel = self.specs[weight.name].shape[2:]
        return self.node(
            "Conv",
            [x, self.vector(weight)],
            kernel_shape=list(kernel),
            strides=list(stride),
            pads=[0, 1, kernel[0] - 1, 1],
        )

    def cumulative_norm(self, x: str, weight: Weight, eps: float) -> str:
        # All frames are of one size, so that means of means are means.
        axes, time = self.constant([1, 3], np.int64), self.constant(2, np.int64)
        one = numpy_helper.from_array(np.ones(1, np.float32))
        frame = self.node("ReduceMean", [x, axes], keepdims=1)
        ones = self.node("ConstantOfShape", [self.node("Shape", [frame])], value=one)
        count = self.node("CumSum", [ones, time])
        mean = self.node("Div", [self.node("CumSum", [frame, time]), count])
        centered = self.node("Sub", [x, mean])
        # Not a product and its mean: the product would be as large as the feature map, 50 MB.
        squares = self.node("ReduceSumSquare", [centered, axes], keepdims=1)
        sizes = self.node("Shape", [centered])
        channels, bins = (self.node("Gather", [sizes, self.constant(axis, np.int64)]) for axis in (1, 3))
        size = self.node("Mul", [channels, bins])
        square = self.node("Div", [squares, self.node("Cast", [size], to=FLOAT)])
        variance = self.node("Div", [self.node("CumSum", [square, time]), count])
        deviation = self.node("Sqrt", [self.node("Add", [variance, self.constant(eps)])])
        scale = self.node("Reshape", [self.vector(weight), self.constant([-1, 1, 1], np.int64)])
        return self.node("Mul", [centered, self.node("Div", [scale, deviation])])

    def flatten(self, x: str, width: int) -> str:
        by_time = self.node("Transpose", [x], perm=[0, 2, 3, 1])
        return self.node("Reshape", [by_time, self.constant([0, 0, width], np.int64)])

    def causal_convolve(self, x: str, weight: Weight) -> str:
        width, _, kernel = self.specs[weight.name].shape
        inputs = [self.node("Transpose", [x], perm=[0, 2, 1]), self.vector(weight)]
        y = self.node("Conv", inputs, kernel_shape=[kernel], group=width, pads=[kernel - 1, 0])
        return self.node("Transpose", [y], perm=[0, 2, 1])

    def local_attention(
        self, q: str, k: str, v: str, positions: Weight, valid: str, window: LocalWindow, cap: float
    ) -> str:
        """In chunks: each is a small product of its queries with the keys that any of them sees."""
        chunking = self.chunking(valid, window)
        heads, (_, width) = window.heads, self.specs[positions.name].shape
        dim, chunk, context, span = width // heads, window.chunk, window.context, window.span

        def split(x: str, tokens: int, perm: list[int]) -> str:
            """(1, chunks, tokens, width) -> (chunks, tokens, heads, dim), transposed."""
            parts = self.node("Reshape", [x, self.constant([-1, tokens, heads, dim], np.int64)])
            return self.node("Transpose", [parts], perm=perm)

        own = self.node("Pad", [q, self.constant([0, 0, 0, 0, chunk - 1, 0], np.int64)])
        queries = split(self.node("Gather", [own, chunking.queries], axis=1), chunk, [0, 2, 1, 3])
        keys = split(self.around(k, chunking.keys, window), context, [0, 2, 3, 1])
        values = split(self.around(v, chunking.keys, window), context, [0, 2, 1, 3])
        relative = self.node("Reshape", [self.vector(positions), self.constant([span, heads, dim], np.int64)])
        by_distance = self.node("MatMul", [queries, self.node("Transpose", [relative], perm=[1, 2, 0])])
        # Column c - i of row i goes to column c: rows that are one longer, laid end to end, do that.
        pads = self.constant([0] * 7 + [context + 1 - span], np.int64)
        flat = self.node("Pad", [by_distance, pads])
        flat = self.node("Reshape", [flat, self.constant([0, 0, chunk * (context + 1)], np.int64)])
        flat = self.slice(flat, 0, chunk * context, 2)
        shifted = self.node("Reshape", [flat, self.constant([0, 0, chunk, context], np.int64)])
        logits = self.node("Add", [self.node("MatMul", [queries, keys]), shifted])
        logits = self.scale(self.tanh(self.scale(logits, 1 / cap)), cap)
        weights = self.node("Softmax", [self.node("Add", [logits, chunking.mask])], axis=-1)
        attended = self.node("Transpose", [self.node("MatMul", [weights, values])], perm=[0, 2, 1, 3])
        rows = self.node("Reshape", [attended, self.constant([1, -1, width], np.int64)])
        zero, axis = self.constant([0], np.int64), self.constant([1], np.int64)
        return self.node("Slice", [rows, zero, chunking.tokens, axis])

    def chunking(self, valid: str, window: LocalWindow) -> _Chunking:
        """Where the tokens of each chunk are, computed once for all layers."""
        if (valid, window) in self.chunkings:
            return self.chunkings[valid, window]
        chunk, context = window.chunk, window.context
        tokens = self.node("Shape", [valid], start=1, end=2)
        zero, step = self.constant(0, np.int64), self.constant(chunk, np.int64)
        starts = self.node("Range", [zero, self.node("Squeeze", [tokens]), step])
        column = self.node("Unsqueeze", [starts, self.constant([1], np.int64)])
        queries = self.node("Add", [column, self.constant(np.arange(chunk), np.int64)])
        keys = self.node("Add", [column, self.constant(np.arange(context), np.int64)])
        distance = np.arange(context) - np.arange(chunk)[:, None]
        near = ((distance >= 0) & (distance < window.span)).astype(np.float32)
        seen = self.around(valid, keys, window)
        seen = self.node("Reshape", [seen, self.constant([-1, 1, 1, context], np.int64)])
        visible = self.node("Mul", [seen, self.constant(near)])
        hidden = self.node("Sub", [self.constant(1.0), visible])
        made = _Chunking(tokens, queries, keys, self.scale(hidden, MASKED))
        self.chunkings[valid, window] = made
        return made

    def around(self, x: str, index: str, window: LocalWindow) -> str:
        """(1, tokens, width) -> (1, chunks, context, width), zeros beyond either end."""
        pads = self.constant([0, window.past, 0, 0, window.future + window.chunk - 1, 0], np.int64)
        return self.node("Gather", [self.node("Pad", [x, pads]), index], axis=1)

    def clip(self, x: str, limit: float) -> str:
        return self.node("Clip", [x, self.constant(-limit), self.constant(limit)])

    def sigmoid(self, x: str) -> str:
        return self.node("Sigmoid", [x])

    def every(self, x: str, step: int) -> str:
        return self.slice(x, 0, END, 1, step)

    def fill(self, x: str, valid: str, weight: Weight, count: int) -> str:
        pads = self.constant([0, 0, 0, 0, count, 0], np.int64)
        rows, kept = (self.slice(self.node("Pad", [y, pads]), 0, count, 1) for y in (x, valid))
        return self.node("Where", [self.node("Cast", [kept], to=BOOL), rows, self.vector(weight)])

    def slice(self, x: str, start: int, stop: int, axis: int, step: int = 1) -> str:
        return self.node(
            "Slice", [x, *(self.constant([value], np.int64) for value in (start, stop, axis, step))]
        )
