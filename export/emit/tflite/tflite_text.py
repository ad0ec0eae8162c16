"""The TFLite interpreter: emits the decoder as subgraphs of fixed shapes over shared weights, for XNNPACK.

Signatures `prefill_N`, of several N, append N tokens to the cache and return nothing else; they hold no layer
beyond the last one that owns KV. `decode` takes one token and returns its logits; `verify_N` takes N and
returns the logits of each. Inputs of all of them, with L layers, P the per-layer width, T the context, and i
counting the layers that own KV:

    embeddings            f32 (1, N, hidden)   scaled token embeddings or soft tokens
    per_layer_embeddings  f32 (1, N, L, P)     scaled rows of the per-layer table

There are two layouts of the cache. "litertlm" is the one that LiteRT-LM drives:

    input_pos             i32 (N)              positions; the cache is written from the first one on
    mask                  f32 (1, 1, N, T)     0 where a position is visible, very negative elsewhere
    kv_cache_k_i          f32 (1, kv heads, T, head_dim)     the whole cache in, the whole cache out
    kv_cache_v_i          f32 (1, kv heads, head_dim, T)     transposed,
                          f32 (1, kv heads, T, head_dim)     or not: a sliding layer picks its window's rows

"windowed" is ours. The graph only reads the cache and returns the keys and values of its own tokens, so that
nothing is copied; the caller puts them where it likes, and describes it in the masks. A sliding layer's cache
has room for its window only (C = window, else C = T):

    cos_K, sin_K          f32 (N, head_dim / 2)             rotary tables at the tokens' positions
    mask_K                f32 (1, 1, N, C + N)              over the cache, then the tokens themselves
    kv_cache_k_i, _v_i    f32 (1, kv heads, C, head_dim)    -> f32 (1, kv heads, N, head_dim), k rotated;
                          f32 (1, kv heads, head_dim, C)    v of full layers

K is a kind of layer, full or sliding; a kind that no layer has is left out.

Caches that are as long as the context may be int8. A channel of a KV head has a step, by which keys and
values are divided before they are rounded; queries and the sums of values are multiplied with it instead of
the cache. Attention reads an fp32 copy of the integers, of one layer at a time, or of its window.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from gemma_edge.export.emit.tflite.tflite_file import Graph, TfliteFile
from gemma_edge.export.emit.tflite.tflite_ops import TfliteGraphOps
from gemma_edge.export.export_families import family_with, tensor_specs
from gemma_edge.export.model.ops import HeadProjection, Weight
from gemma_edge.export.model.tensor_spec import EMBEDDING_NAME, PLE_NAME, Part
from gemma_edge.export.weights.kv_scales import KvScales
from gemma_edge.export.weights.recipe import FP32, Recipe
from gemma_edge.runtime.engines.kv_cache import int8_layers, values_transposed, window_capacity
from gemma_edge.runtime.engines.rope import rotary_tables
from gemma_edge.runtime.families.config_fields import FULL, SLIDING
from gemma_edge.runtime.families.model_family import TextConfig

CacheLayout = Literal["windowed", "litertlm"]

KINDS = {FULL: "full", SLIDING: "sliding"}
MASKED = -1e9  # finite: a padding row that sees nothing must not become NaN
# Rows of queries, of all heads that share a KV head: a call of 32 tokens of E2B. With 512 packing is cheaper.
MOST_ON_THE_RIGHT = 128
KV_STEP = "kv_step_"  # of the names of constants: kv_step_k_3 belongs to kv_cache_k_3
EMBEDDER, PER_LAYER_EMBEDDER = "embedder", "per_layer_embedder"


def emit_decoder(
    config: TextConfig,
    recipe: Recipe,
    *,
    context: int,
    prefill: Sequence[int] = (),
    verify: Sequence[int] = (),
    layout: CacheLayout = "windowed",
    kv_scales: Mapping[int, KvScales] | None = None,
) -> TfliteFile:
    """Emits the decoder of `config` with the precisions of `recipe`; reads no weight.

    Args:
        context: tokens of KV cache; fixed in the file.
        prefill, verify: numbers of tokens, each a signature beside `decode`.
        kv_scales: steps of an int8 cache, a layer; without them such a cache gets steps of 1, which is enough
            for a plan.
    """
    file = TfliteFile(tensor_specs(config))
    silent = {f"prefill_{tokens}": tokens for tokens in sorted(set(prefill))}
    speaking = {f"verify_{tokens}": tokens for tokens in sorted(set(verify))} | {"decode": 1}
    for name, tokens in (silent | speaking).items():
        graph = file.graph(name)
        ops = TfliteOps(graph, config, recipe, tokens, context, layout, kv_scales or {})
        logits = ops.emit()
        if name in speaking:
            graph.outputs["logits"] = ops.reshape(logits, (1, tokens, config.vocab_size))
    return file


def emit_embedder(config: TextConfig, recipe: Recipe) -> TfliteFile:
    """token_ids i32 (1, 1) -> embeddings f32 (1, 1, hidden), scaled."""
    return _emit_lookup(
        config, recipe, EMBEDDER, EMBEDDING_NAME, config.embed_scale, (1, 1, config.hidden_size)
    )


def emit_per_layer_embedder(config: TextConfig, recipe: Recipe) -> TfliteFile:
    """token_ids i32 (1, 1) -> embeddings f32 (1, 1, layers, per-layer width), scaled; row 0 for other ids."""
    shape = (1, 1, config.num_hidden_layers, config.hidden_size_per_layer_input)
    return _emit_lookup(config, recipe, PER_LAYER_EMBEDDER, PLE_NAME, config.ple_scale, shape)


def _emit_lookup(
    config: TextConfig, recipe: Recipe, signature: str, name: str, scale: float, shape: tuple[int, ...]
) -> TfliteFile:
    file = TfliteFile(tensor_specs(config))
    graph = file.graph(signature)
    spec = tensor_specs(config)[name]
    ids = graph.input("token_ids", (1, 1), "int32")
    ids = graph.op("RESHAPE", [ids, graph.constant([1], "int32")], (1,), dtype="int32")
    inside = graph.op("LESS", [ids, graph.constant([spec.shape[0]], "int32")], (1,), dtype="bool")
    ids = graph.op("SELECT_V2", [inside, ids, graph.constant([0], "int32")], (1,), dtype="int32")
    ids = graph.op("MAXIMUM", [ids, graph.constant([0], "int32")], (1,), dtype="int32")
    table = graph.weight(name, [Weight(name)], spec.shape, spec.part, recipe.precision(spec))
    rows = graph.op("EMBEDDING_LOOKUP", [ids, table], (1, spec.shape[1]))
    rows = graph.op("MUL", [rows, graph.constant([scale])], (1, spec.shape[1]), "MulOptions")
    out = graph.op("RESHAPE", [rows, graph.constant(shape, "int32")], shape)
    graph.outputs["embeddings"] = out
    return file


class TfliteOps(TfliteGraphOps):
    """`Ops` over edges of one graph. Hidden states are (tokens, width), streams (tokens, streams, width)."""

    def __init__(
        self,
        graph: Graph,
        config: TextConfig,
        recipe: Recipe,
        tokens: int,
        context: int,
        layout: CacheLayout,
        kv_scales: Mapping[int, KvScales],
    ) -> None:
        super().__init__(graph, tensor_specs(config), recipe, config.rms_norm_eps)
        self.config = config
        self.tokens, self.context, self.windowed = tokens, context, layout == "windowed"
        self.int8 = int8_layers(config, recipe.kv_cache, rings=self.windowed)
        self.kv_scales = kv_scales
        self.streams: dict[tuple[int, int], int] = {}
        # For each kind of layer: cos and sin, (tokens, 1, head_dim) each, and the mask over a layer's scores.
        self.rotary: dict[str, tuple[int, int]] = {}
        self.masks: dict[str, int] = {}
        # For each layer that owns KV: keys and values as attention reads them, in one or two parts, fp32.
        self.keys: dict[int, list[int]] = {}
        self.values: dict[int, list[int]] = {}
        # Positions that sliding layers read of whole caches, i32; None where they read all of them.
        self.window: int | None = None

    def emit(self) -> int:
        """Inputs, the description, and the caches' outputs; returns the logits, (tokens, vocab)."""
        c, n, graph = self.config, self.tokens, self.graph
        embeddings = graph.input("embeddings", (1, n, c.hidden_size))
        rows = graph.input("per_layer_embeddings", (1, n, c.num_hidden_layers, c.hidden_size_per_layer_input))
        self.declare_positions()
        for i in c.kv_layers:
            capacity = self.capacity(c.layer_types[i])
            key = (1, c.num_key_value_heads, capacity, c.head_dim)
            value = (*key[:2], key[3], key[2]) if self.transposed(i) else key
            dtype = "int8" if i in self.int8 else "float32"
            graph.input(f"kv_cache_k_{i}", key, dtype)
            graph.input(f"kv_cache_v_{i}", value, dtype)
        rows = self.reshape(rows, (n, c.ple_row_size))
        split = c.first_shared_layer * c.hidden_size_per_layer_input
        high = None
        if c.num_kv_shared_layers:
            high = self.columns(rows, split, c.ple_row_size)
        embeddings = self.reshape(embeddings, (n, c.hidden_size))
        text = family_with(c).text
        return text.decoder(self, c, embeddings, self.columns(rows, 0, split), high)

    def capacity(self, layer_type: str) -> int:
        """Positions in the cache of a layer."""
        if self.windowed and layer_type == SLIDING:
            return window_capacity(self.config, self.context)
        return self.context

    def transposed(self, layer: int) -> bool:
        """Whether the values of a layer's cache are (head_dim, positions)."""
        return values_transposed(self.config, layer, self.context, rings=self.windowed)

    def declare_positions(self) -> None:
        """Rotary tables and masks, as inputs or computed once from positions."""
        c, n, graph = self.config, self.tokens, self.graph
        kinds = sorted(set(c.layer_types))
        half = c.head_dim // 2
        if self.windowed:
            for kind in kinds:
                name = KINDS[kind]
                self.set_rotary(
                    kind, graph.input(f"cos_{name}", (n, half)), graph.input(f"sin_{name}", (n, half))
                )
                self.set_mask(kind, graph.input(f"mask_{name}", (1, 1, n, self.capacity(kind) + n)))
            return
        positions = graph.input("input_pos", (n,), "int32")
        first = self.slice(positions, (0,), (1,), dtype="int32")
        mask = graph.input("mask", (1, 1, n, self.context))
        mask = self.op("MAXIMUM", [mask, graph.constant([MASKED])])
        for kind in kinds:
            tables = rotary_tables(c, kind, self.context)
            cos, sin = (
                self.graph.op("EMBEDDING_LOOKUP", [positions, graph.constant(table)], (n, half))
                for table in tables
            )
            self.set_rotary(kind, cos, sin)
            self.set_mask(kind, mask if kind == FULL else self.sliding_mask(mask, positions, first))
        zero = graph.constant([0], "int32")
        self.key_place = self.concat([zero, zero, first, zero], dtype="int32")
        self.value_place = self.concat([zero, zero, zero, first], dtype="int32")

    def sliding_mask(self, mask: int, positions: int, first: int) -> int:
        """f32 (1, 1, tokens, positions read): `mask` there, and very negative beyond each token's window."""
        c, n, graph = self.config, self.tokens, self.graph
        whole = self.transposed(c.layer_types.index(SLIDING))
        visible = self.context if whole else min(c.sliding_window - 1 + n, self.context)
        read = graph.constant(np.arange(visible), "int32")
        if visible < self.context:
            start = self.integers("SUB", first, c.sliding_window - 1)
            start = self.integers("MAXIMUM", start, 0)
            start = self.integers("MINIMUM", start, self.context - visible)
            read = self.window = graph.op("ADD", [read, start], (visible,), "AddOptions", "int32")
            mask = self.gather(mask, 3)
        own, there = (
            self.reshape(
                graph.op("CAST", [x], self.shape(x), "CastOptions", inDataType=2, outDataType=0), shape
            )
            for x, shape in ((positions, (1, 1, n, 1)), (read, (1, 1, 1, self.shape(read)[0])))
        )
        inside = self.op("SUB", [there, own])  # minus the distance
        inside = self.op("ADD", [inside, graph.constant([c.sliding_window - 0.5])])
        outside = self.scale(self.op("MINIMUM", [inside, graph.constant([0.0])]), -MASKED)
        return self.op("ADD", [mask, outside])

    def integers(self, code: str, x: int, y: int) -> int:
        """i32 (1): `code` of x and a number."""
        options = "SubOptions" if code == "SUB" else ""
        return self.graph.op(code, [x, self.graph.constant([y], "int32")], (1,), options, "int32")

    def gather(self, x: int, axis: int) -> int:
        """The positions in `window`, along an axis."""
        assert self.window is not None
        shape = list(self.shape(x))
        shape[axis] = self.shape(self.window)[0]
        return self.graph.op(
            "GATHER", [x, self.window], shape, "GatherOptions", self.graph.dtype(x), axis=axis
        )

    def set_rotary(self, kind: str, cos: int, sin: int) -> None:
        shape = (self.tokens, 1, self.config.head_dim)
        both = self.concat([cos, cos]), self.concat([self.scale(sin, -1.0), sin])
        self.rotary[kind] = self.reshape(both[0], shape), self.reshape(both[1], shape)

    def set_mask(self, kind: str, mask: int) -> None:
        """The heads that share a KV head are rows of one product: the mask is repeated for them."""
        groups = self.config.num_attention_heads // self.config.num_key_value_heads
        self.masks[kind] = mask if self.tokens == 1 else self.concat([mask] * groups, axis=2)

    # Attention. -----------------------------------------------------------------------------------

    def project_heads(self, x: int, projections: list[HeadProjection]) -> int:
        """(tokens, heads, head_dim): one product and one norm for queries, keys and values."""
        first = projections[0].weight.name
        y = self.fully_connected(x, f"{first}.heads", [p.weight for p in projections])
        biases = [p.bias for p in projections if p.bias]
        if biases:
            size = (self.shape(y)[-1],)
            y = self.op("ADD", [y, self.graph.weight(f"{first}.biases", biases, size, Part.VECTOR, FP32)])
        heads, dim = sum(p.heads for p in projections), self.config.head_dim
        y = self.normalize(self.reshape(y, (self.shape(y)[0], heads, dim)))
        rows = [row for p in projections for row in [p.norm or 1.0] * p.heads]
        norms = self.graph.weight(f"{first}.norms", rows, (heads, dim), Part.VECTOR, FP32)
        return self.op("MUL", [y, norms])

    def attention(self, heads: int, layer: int) -> int:
        c = self.config
        kind = c.layer_types[layer]
        tokens, count, dim = self.shape(heads)
        queries = c.num_attention_heads
        if count > queries:
            rotated = self.rotate(self.slice_axis(heads, 1, 0, queries + c.num_key_value_heads), kind)
            key = self.slice_axis(rotated, 1, queries, queries + c.num_key_value_heads)
            self.append(layer, key, self.slice_axis(heads, 1, queries + c.num_key_value_heads, count))
            q = self.slice_axis(rotated, 1, 0, queries)
        else:
            q = self.rotate(heads, kind)
        q = self.reshape(
            self.transpose(q, (1, 0, 2)),
            (1, c.num_key_value_heads, queries // c.num_key_value_heads * tokens, dim),
        )
        owner = c.kv_owner[layer]
        steps = (c.num_key_value_heads, 1, dim)
        if owner in self.int8:
            q = self.op("MUL", [q, self.steps(owner, "k", steps)])
        keys, values = self.keys[owner], self.values[owner]
        # Of the first part; a second one holds the tokens' own rows.
        turned = [self.transposed(owner), False][: len(values)]
        scores = self.concat([self.score(q, k, t) for k, t in zip(keys, turned, strict=True)])
        weights = self.softmax(self.op("ADD", [scores, self.masks[kind]]))
        parts, start = [], 0
        for k, v, t in zip(keys, values, turned, strict=True):
            stop = start + self.shape(k)[2]
            parts.append(self.weigh(self.slice_axis(weights, 3, start, stop), v, t))
            start = stop
        y = parts[0] if len(parts) == 1 else self.op("ADD", parts)
        if owner in self.int8:
            y = self.op("MUL", [y, self.steps(owner, "v", steps)])
        y = self.transpose(self.reshape(y, (queries, tokens, dim)), (1, 0, 2))
        return self.reshape(y, (tokens, c.query_size))

    def score(self, queries: int, keys: int, turned: bool) -> int:
        """Scores (1, kv heads, queries, positions), of queries and keys (1, kv heads, _, head_dim).

        XNNPACK packs the right side of a product anew in every call. For few queries over a long cache, it is
        cheaper to have the cache on the left, although it then computes more columns than there are.
        """
        if turned and self.shape(queries)[2] <= MOST_ON_THE_RIGHT:
            return self.transpose(self.matmul(keys, queries, transposed=True), (0, 1, 3, 2))
        return self.matmul(queries, keys, transposed=True)

    def weigh(self, weights: int, values: int, turned: bool) -> int:
        """Sums of values, (1, kv heads, queries, head_dim); `turned` ones are (1, kv heads, head_dim, _)."""
        if turned and self.shape(weights)[2] <= MOST_ON_THE_RIGHT:
            return self.transpose(self.matmul(values, weights, transposed=True), (0, 1, 3, 2))
        return self.matmul(weights, values, transposed=turned)

    def append(self, layer: int, key: int, value: int) -> None:
        """Gives a layer the keys and values, (tokens, kv heads, head_dim) each, of the tokens themselves."""
        kv, dim = self.config.num_key_value_heads, self.config.head_dim
        row = (1, kv, self.tokens, dim)
        if layer in self.int8:
            key, value = (
                self.divide(x, self.steps(layer, part, (kv, dim))) for x, part in ((key, "k"), (value, "v"))
            )
        key = self.reshape(self.transpose(key, (1, 0, 2)), row)
        if self.windowed or not self.transposed(layer):
            value = self.reshape(self.transpose(value, (1, 0, 2)), row)
        else:
            value = self.reshape(self.transpose(value, (1, 2, 0)), (1, kv, dim, self.tokens))
        if layer in self.int8:
            key, value = self.to_int8(key), self.to_int8(value)
        names = f"kv_cache_k_{layer}", f"kv_cache_v_{layer}"
        cached = [self.graph.inputs[name] for name in names]
        if self.windowed:
            keys, values = [cached[0], key], [cached[1], value]
        else:
            place = self.value_place if self.transposed(layer) else self.key_place
            key, value = self.update(cached[0], key, self.key_place), self.update(cached[1], value, place)
            keys, values = [key], [value]
            if self.window is not None and self.config.is_sliding(layer):
                keys, values = [self.gather(key, 2)], [self.gather(value, 2)]
        self.keys[layer], self.values[layer] = ([self.to_fp32(x) for x in part] for part in (keys, values))
        self.graph.outputs |= zip(names, (key, value), strict=True)

    def update(self, cache: int, part: int, place: int) -> int:
        dtype = self.graph.dtype(cache)
        return self.graph.op("DYNAMIC_UPDATE_SLICE", [cache, part, place], self.shape(cache), dtype=dtype)

    def steps(self, layer: int, part: str, shape: tuple[int, ...]) -> int:
        """f32, (KV heads, head_dim) in `shape`: what the integers of a cache are multiplied with."""
        scales = self.kv_scales.get(layer)
        steps = np.ones(shape) if scales is None else scales.key if part == "k" else scales.value
        return self.graph.constant(steps.reshape(shape), name=f"{KV_STEP}{part}_{layer}")

    def rotate(self, x: int, kind: str) -> int:
        """RoPE over (tokens, heads, head_dim), half-split rotation."""
        cos, sin = self.rotary[kind]
        half = self.config.head_dim // 2
        swapped = self.concat([self.slice_axis(x, 2, half, 2 * half), self.slice_axis(x, 2, 0, half)])
        return self.op("ADD", [self.op("MUL", [x, cos]), self.op("MUL", [swapped, sin])])

    def wanted(self, x: int) -> int:
        """All rows: decode and verify_N return their logits; in prefill no output depends on what follows."""
        return x

    # Streams. -------------------------------------------------------------------------------------

    def stack(self, xs: list[int]) -> int:
        tokens, width = self.shape(xs[0])
        return self.concat([self.reshape(x, (tokens, 1, width)) for x in xs], axis=1)

    def stream(self, x: int, index: int) -> int:
        if (x, index) not in self.streams:
            tokens, _, width = self.shape(x)
            part = self.slice_axis(x, 1, index, index + 1)
            self.streams[x, index] = self.reshape(part, (tokens, width))
        return self.streams[x, index]

    def mix(self, coefficients: int, streams: int) -> int:
        tokens, count, _ = self.shape(streams)
        # (c + I) x = c x + x, without another pass over the streams.
        matrix = self.op("ADD", [coefficients, self.graph.constant(np.eye(count).reshape(1, -1))])
        return self.matmul(self.reshape(matrix, (tokens, count, count)), streams)

    def spread(self, coefficients: int, x: int, streams: int) -> int:
        tokens, count, width = self.shape(streams)
        factors = self.op("ADD", [coefficients, self.graph.constant([1.0])])
        column, row = self.reshape(factors, (tokens, count, 1)), self.reshape(x, (tokens, 1, width))
        return self.op("ADD", [streams, self.op("MUL", [column, row])])

    def add_to_tail(self, streams: int, x: int) -> int:
        tokens, count, width = self.shape(streams)
        tail = self.graph.constant(np.array([0.0] + [1.0] * (count - 1)).reshape(1, count, 1))
        y = self.op("ADD", [streams, self.op("MUL", [tail, self.reshape(x, (tokens, 1, width))])])
        if (streams, 0) in self.streams:
            self.streams[y, 0] = self.streams[streams, 0]  # the first stream is unchanged
        return y
