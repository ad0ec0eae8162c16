"""The ONNX interpreter: emits the decoder's graph node by node, for ONNX Runtime on CPU.

One graph serves prefill, decode and full logits. Its inputs:

| name | type | |
|---|---|---|
| inputs_embeds | f32 (1, T, hidden) | scaled token embeddings or soft tokens |
| ple_low | f32 (1, T, layers that own KV * ple width) | scaled per-layer rows |
| ple_high | f32 (1, n, layers that share KV * ple width) | of the n wanted rows; absent without sharing |
| num_logits | i64 (1) | n: the logits of the last n tokens |
| seqlens_k, total_sequence_length | i32 (1), i32 () | tokens in the cache after the call: less 1, all |
| cos_T, sin_T | f32 (context, head_dim / 2) | rotary tables of layer type T (full, sliding) |
| past_key.L, past_value.L | f32 or i8 (1, kv heads, capacity, head_dim) | caches; present_*.L in place |

Its outputs: logits f32 (1, n, vocab), present_key.L and present_value.L of layers that own KV, and, with an
int8 cache, shared_key.L and shared_value.L of global layers that read another's: bound to that one's buffers.

Sliding layers keep a window-sized cache (the operator evicts), except the one that the layers above read,
because the operator refuses to share a windowed cache. Those layers read a slice of it: their window.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from gemma_edge.export.emit.onnx.external_data import ExternalData
from gemma_edge.export.emit.onnx.onnx_graph import (
    FLOAT,
    INT8,
    INT32,
    INT64,
    MS,
    EmittedGraph,
    OnnxGraph,
    value_info,
)
from gemma_edge.export.emit.onnx.onnx_package import helper
from gemma_edge.export.export_families import family_with, tensor_specs
from gemma_edge.export.model.ops import HeadProjection
from gemma_edge.export.model.tensor_spec import Part
from gemma_edge.export.weights.kv_scales import KvScales
from gemma_edge.export.weights.recipe import FP32, Recipe
from gemma_edge.runtime.engines.kv_cache import cache_layouts
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.families.config_fields import FULL
from gemma_edge.runtime.families.model_family import TextConfig

HEAD_DIM_MULTIPLE = 16
LAST_INDEX = 2**62


def emit_decoder(
    config: TextConfig,
    recipe: Recipe,
    data_location: str,
    kv_scales: Mapping[int, KvScales] | None = None,
) -> EmittedGraph:
    """Emits the decoder of `config` with the precisions of `recipe`; reads no weight.

    Args:
        kv_scales: scales of an int8 cache, a layer; without them such a cache gets scales of 1, which is
            enough to plan with.

    Raises:
        UsageError: ONNX Runtime cannot run it; see `unsupported`.
    """
    if reason := unsupported(config, recipe):
        raise UsageError(reason)
    ops = OnnxOps(config, recipe, ExternalData(data_location, tensor_specs(config)), kv_scales or {})
    embeddings = ops.input("inputs_embeds", FLOAT, [1, "tokens", config.hidden_size])
    width = config.hidden_size_per_layer_input
    low = ops.input("ple_low", FLOAT, [1, "tokens", config.first_shared_layer * width])
    high = None
    if config.num_kv_shared_layers:
        high = ops.input("ple_high", FLOAT, [1, "wanted", config.num_kv_shared_layers * width])
    ops.declare_cache()
    family = family_with(config)
    family.text.decoder(ops, config, embeddings, low, high)
    ops.output("logits", FLOAT, [1, "wanted", config.vocab_size])
    return EmittedGraph(ops.model(f"{family.runtime.name}_decoder"), ops.data)


def unsupported(config: TextConfig, recipe: Recipe) -> str | None:
    """Why ONNX Runtime cannot run this model in this precision, or None."""
    if config.head_dim % HEAD_DIM_MULTIPLE:
        return (
            f"head_dim = {config.head_dim}: ONNX Runtime's GroupQueryAttention takes multiples of "
            f"{HEAD_DIM_MULTIPLE} only"
        )
    if part := recipe.channelwise:
        return (
            f"recipe {recipe.name}: {part} is channel-wise, which ONNX Runtime's MatMulNBits does not take: "
            "give it a group, or export with --format tflite"
        )
    return None


class OnnxOps(OnnxGraph):
    """`Ops` over edge names. Hidden states are (1, tokens, width), streams (1, tokens, streams, width)."""

    def __init__(
        self, config: TextConfig, recipe: Recipe, data: ExternalData, kv_scales: Mapping[int, KvScales]
    ) -> None:
        super().__init__(tensor_specs(config), recipe, data, config.rms_norm_eps, config.head_dim)
        self.config, self.kv_scales = config, kv_scales
        self.windows: dict[int, tuple[list[str], list[str]]] = {}
        self.positions = ""
        self.streams: dict[tuple[str, int], str] = {}

    # Ops. -----------------------------------------------------------------------------------------

    def project_heads(self, x: str, projections: list[HeadProjection]) -> str:
        """One matrix product for all heads; one norm, whose weights are a row a head."""
        first = projections[0].weight.name
        y = self.matmul(x, f"{first}.heads", [p.weight for p in projections])
        biases = [p.bias for p in projections if p.bias]
        if biases:
            shape = (sum(self.specs[b.name].shape[0] for b in biases),)
            self.data.add(f"{first}.biases", biases, shape, Part.VECTOR, FP32)
            y = self.node("Add", [y, f"{first}.biases"])
        heads, dim = sum(p.heads for p in projections), self.config.head_dim
        y = self.node("Reshape", [y, self.constant([0, 0, heads, dim], np.int64)])
        y = self.normalize(y, self.constant(np.ones(dim)))
        rows = [row for p in projections for row in [p.norm or 1.0] * p.heads]
        self.data.add(f"{first}.norms", rows, (heads, dim), Part.VECTOR, FP32)
        y = self.node("Mul", [y, f"{first}.norms"])
        return self.node("Reshape", [y, self.constant([0, 0, -1], np.int64)])

    def attention(self, heads: str, layer: int) -> str:
        c = self.config
        owner = c.kv_owner[layer]
        sliding = c.is_sliding(layer)
        kind = "sliding" if sliding else "full"
        lengths, rotary = ["seqlens_k", "total_sequence_length"], [f"cos_{kind}", f"sin_{kind}"]
        attributes: dict[str, Any] = {
            "num_heads": c.num_attention_heads,
            "kv_num_heads": c.num_key_value_heads,
            "scale": 1.0,
            "do_rotary": 1,
        }
        if sliding:
            attributes["local_window_size"] = c.sliding_window
        outputs = [f"attention.{layer}"]
        if layer == owner:
            inputs = [heads, "", "", f"past_key.{layer}", f"past_value.{layer}", *lengths, *rotary]
            outputs += [f"present_key.{layer}", f"present_value.{layer}"]
            if self.layouts[layer].windowed:
                attributes["sliding_window_cache"] = 1
        else:
            # No new keys: the queries are the last tokens of the owner's cache.
            empty = self.constant(np.zeros((1, 0, c.key_value_size)))
            past = [f"present_key.{owner}", f"present_value.{owner}"]
            if sliding:
                past, lengths = self.last_window(owner)
                heads = self.node(
                    "RotaryEmbedding",
                    [heads, self.wanted_positions(), *rotary],
                    domain=MS,
                    num_heads=c.num_attention_heads,
                )
                attributes["do_rotary"], rotary = 0, ["", ""]
            inputs = [heads, empty, empty, *past, *lengths, *rotary]
        if self.layouts[owner].precision == "int8":
            attributes |= {
                "k_quant_type": "PER_CHANNEL",
                "v_quant_type": "PER_CHANNEL",
                "kv_cache_bit_width": 8,
            }
            inputs += ["", "", "", *self.cache_scales(owner)]
            if layer != owner:
                # An int8 cache must have an output, even where nothing is appended.
                outputs += self.unchanged_cache(layer, sliding)
        while inputs[-1] == "":
            inputs.pop()
        self.nodes.append(
            helper.make_node(
                "GroupQueryAttention", inputs, outputs, f"attention.{layer}", domain=MS, **attributes
            )
        )
        return outputs[0]

    def last_window(self, owner: int) -> tuple[list[str], list[str]]:
        """The rows of a full cache that the wanted queries can see, and how many they are.

        Sliced once for all layers that read `owner`; without it each would go through the whole context.
        """
        if owner not in self.windows:
            visible = self.node(
                "Add", ["num_logits", self.constant([self.config.sliding_window - 1], np.int64)]
            )
            total = self.node(
                "Reshape",
                [self.node("Cast", ["total_sequence_length"], to=INT64), self.constant([1], np.int64)],
            )
            count = self.node("Min", [visible, total])
            start = self.node("Sub", [total, count])
            axis = self.constant([2], np.int64)
            past = [
                self.node("Slice", [f"present_{part}.{owner}", start, total, axis])
                for part in ("key", "value")
            ]
            length = self.node("Cast", [count], to=INT32)
            scalar = self.node("Squeeze", [length])
            self.windows[owner] = past, [self.node("Sub", [length, self.constant([1], np.int32)]), scalar]
        return self.windows[owner]

    def wanted_positions(self) -> str:
        """i64 (1, wanted): positions of the queries in layers that share KV."""
        if not self.positions:
            total = self.node("Cast", ["total_sequence_length"], to=INT64)
            first = self.node("Sub", [total, self.node("Squeeze", ["num_logits"])])
            positions = self.node("Range", [first, total, self.constant(1, np.int64)])
            self.positions = self.node("Unsqueeze", [positions, self.constant([0], np.int64)])
        return self.positions

    def unchanged_cache(self, layer: int, sliced: bool) -> list[str]:
        names = [f"shared_{part}.{layer}" for part in ("key", "value")]
        if not sliced:
            # Bound to the owner's own buffer, so that nothing is copied.
            shape: list[int | str] = [1, self.config.num_key_value_heads, "context", self.config.head_dim]
            self.outputs += [value_info(name, INT8, shape) for name in names]
        return names

    def cache_scales(self, layer: int) -> list[str]:
        shape = (1, self.config.num_key_value_heads, 1, self.config.head_dim)
        ones = np.ones(shape, np.float32)
        scales = self.kv_scales.get(layer, KvScales(ones, ones))
        return [self.constant(scales.key), self.constant(scales.value)]

    def declare_cache(self) -> None:
        c = self.config
        self.layouts = cache_layouts(c, self.recipe.kv_cache)
        self.input("num_logits", INT64, [1])
        self.input("seqlens_k", INT32, [1])
        self.input("total_sequence_length", INT32, [])
        for kind in sorted({"full" if t == FULL else "sliding" for t in c.layer_types}):
            for table in ("cos", "sin"):
                self.input(f"{table}_{kind}", FLOAT, ["context", c.head_dim // 2])
        for layer, layout in self.layouts.items():
            capacity = "window" if layout.windowed else "context"
            cache_type = INT8 if layout.precision == "int8" else FLOAT
            for part in ("key", "value"):
                shape: list[int | str] = [1, c.num_key_value_heads, capacity, c.head_dim]
                self.input(f"past_{part}.{layer}", cache_type, shape)
                self.outputs.append(value_info(f"present_{part}.{layer}", cache_type, shape))

    def wanted(self, x: str) -> str:
        start = self.node("Neg", ["num_logits"])
        return self.node(
            "Slice", [x, start, self.constant([LAST_INDEX], np.int64), self.constant([1], np.int64)]
        )

    def stack(self, xs: list[str]) -> str:
        axis = self.constant([2], np.int64)
        return self.node("Concat", [self.node("Unsqueeze", [x, axis]) for x in xs], axis=2)

    def stream(self, x: str, index: int) -> str:
        if (x, index) not in self.streams:
            self.streams[x, index] = self.node("Gather", [x, self.constant(index, np.int64)], axis=2)
        return self.streams[x, index]

    def mix(self, coefficients: str, streams: str) -> str:
        count = self.config.altup_num_inputs
        matrix = self.node("Reshape", [coefficients, self.constant([0, 0, count, count], np.int64)])
        # (c + I) x = c x + x, without another pass over the streams.
        with_identity = self.node("Add", [matrix, self.constant(np.eye(count))])
        return self.node("MatMul", [with_identity, streams])

    def spread(self, coefficients: str, x: str, streams: str) -> str:
        factors = self.node("Add", [coefficients, self.constant(1.0)])
        column = self.node("Unsqueeze", [factors, self.constant([3], np.int64)])
        row = self.node("Unsqueeze", [x, self.constant([2], np.int64)])
        return self.node("Add", [streams, self.node("Mul", [column, row])])

    def add_to_tail(self, streams: str, x: str) -> str:
        count = self.config.altup_num_inputs
        tail = np.array([0.0] + [1.0] * (count - 1)).reshape(1, 1, count, 1)
        row = self.node("Unsqueeze", [x, self.constant([2], np.int64)])
        y = self.node("Add", [streams, self.node("Mul", [self.constant(tail), row])])
        if (streams, 0) in self.streams:
            self.streams[y, 0] = self.streams[streams, 0]  # the first stream is unchanged
        return y
