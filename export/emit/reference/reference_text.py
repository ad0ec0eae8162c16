"""The NumPy interpreter of the text model: the truth that every artifact is compared with.

It evaluates the description in fp32 with one weight tensor in memory at a time (the head and the tables in
row blocks), without torch. Several sequences are evaluated in one pass, so that every weight is read once
however many prompts there are: their tokens are concatenated and attention keeps them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.export_families import family_with, tensor_specs
from gemma_edge.export.model.ops import HeadProjection, Weight
from gemma_edge.export.model.tensor_spec import EMBEDDING_NAME, PLE_NAME, TensorSpec
from gemma_edge.export.model.weight_source import WeightSource, read_weight
from gemma_edge.runtime.engines.rope import rotary_tables

Array = NDArray[np.float32]
# fp32 bytes of a weight that are in memory at once: malloc maps and clears larger blocks anew each time.
BLOCK_BYTES = (
    16 << 20
)  # fp32 bytes of a weight that are in memory at once: more, and malloc maps them anew each time
LOGIT_ROWS = 128


def evaluate(
    source: WeightSource,
    sequences: Sequence[Sequence[int]],
    *,
    last: int | None = None,
    caches: dict[int, tuple[Array, Array]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Array]:
    """Logits of token sequences, each evaluated from an empty cache.

    Args:
        last: logits of only the last so many tokens of each sequence; None for all.
        caches: filled with the keys (rotated) and values of each layer that owns KV, (tokens, kv_heads,
            head_dim) of all sequences in a row.
        progress: given the number of weights read since its last call.

    Returns:
        For each sequence an array (tokens or last, vocab) of fp32 logits after the softcap.
    """
    blocks = list(evaluate_blocks(source, sequences, last=last, caches=caches, progress=progress))
    wanted = [len(s) if last is None else min(last, len(s)) for s in sequences]
    return np.split(np.concatenate(blocks), np.cumsum(wanted)[:-1])


def evaluate_blocks(
    source: WeightSource,
    sequences: Sequence[Sequence[int]],
    *,
    last: int | None = None,
    caches: dict[int, tuple[Array, Array]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> Iterator[Array]:
    """`evaluate`, with the logits of all sequences in a row yielded in blocks of LOGIT_ROWS rows.

    With a vocabulary of 262,400 a row is a megabyte: whoever compares many rows takes them block by block.
    """
    lengths = [len(s) for s in sequences]
    wanted = [n if last is None else min(last, n) for n in lengths]
    ops = ReferenceOps(source, lengths, wanted, progress, {} if caches is None else caches)
    hidden = final_hidden(ops, sequences)
    for row in range(0, len(hidden), LOGIT_ROWS):
        yield family_with(ops.config).text.logits(ops, ops.config, hidden[row : row + LOGIT_ROWS])


def final_hidden(ops: ReferenceOps, sequences: Sequence[Sequence[int]]) -> Array:
    """Hidden states (wanted rows of all sequences, hidden) after the last norm, as the head takes them."""
    source, config = ops.source, ops.config
    ids = np.concatenate([np.asarray(s, dtype=np.int64) for s in sequences])
    embeddings = gather(source, EMBEDDING_NAME, ids) * np.float32(config.embed_scale)
    # Ids beyond the per-layer table, those of soft tokens, use row 0.
    in_table = np.where(ids < config.vocab_size_per_layer_input, ids, 0)
    ple = gather(source, PLE_NAME, in_table) * np.float32(config.ple_scale)
    split = config.first_shared_layer * config.hidden_size_per_layer_input
    high = ops.last_rows(ple[:, split:]) if config.num_kv_shared_layers else None
    hidden = family_with(config).text.hidden_states(ops, config, embeddings, ple[:, :split], high)
    return np.asarray(hidden, np.float32)


def gather(source: WeightSource, name: str, ids: NDArray[np.int64]) -> Array:
    """Rows of a table, each read once: (ids, columns) fp32."""
    unique, inverse = np.unique(ids, return_inverse=True)
    rows = np.concatenate([source.rows(name, int(i), int(i) + 1) for i in unique])
    return rows[inverse]


class ArrayOps:
    """`BaseOps` over fp32 arrays. Needs a `source` of weights, their `specs` and the norms' `eps`."""

    source: WeightSource
    specs: Mapping[str, TensorSpec]
    eps: float
    progress: Callable[[int], None] | None = None

    def load(self, weight: Weight) -> Array:
        array = read_weight(self.source, weight)
        if self.progress:
            self.progress(array.size)
        return array

    def linear(self, x: Array, weight: Weight, bias: Weight | None = None) -> Array:
        start, stop = weight.rows or (0, self.specs[weight.name].shape[0])
        step = max(1, BLOCK_BYTES // (4 * x.shape[-1]))
        flat = x.reshape(-1, x.shape[-1])
        y = np.empty((len(flat), stop - start), dtype=np.float32)
        for row in range(start, stop, step):
            end = min(row + step, stop)
            block = self.load(replace(weight, rows=(row, end)))
            np.matmul(flat, block.T, out=y[:, row - start : end - start])
        if bias is not None:
            y += self.load(bias)
        return y.reshape(*x.shape[:-1], -1)

    def rms_norm(self, x: Array, weight: Weight | None, groups: int = 1) -> Array:
        parts = x.reshape(*x.shape[:-1], groups, -1)
        scale = np.sqrt(np.mean(np.square(parts), axis=-1, keepdims=True) + np.float32(self.eps))
        normed = parts / scale
        if weight is not None:
            normed = normed * self.load(weight)
        return normed.reshape(x.shape)

    def add(self, a: Array, b: Array) -> Array:
        return a + b

    def subtract(self, a: Array, b: Array) -> Array:
        return a - b

    def multiply(self, a: Array, b: Array) -> Array:
        return a * b

    def divide(self, a: Array, b: Array) -> Array:
        return a / b

    def scale(self, x: Array, factor: float) -> Array:
        return x * np.float32(factor)

    def scale_by(self, x: Array, weight: Weight) -> Array:
        return x * self.load(weight)

    def tanh(self, x: Array) -> Array:
        return np.tanh(x)

    def relu(self, x: Array) -> Array:
        return np.maximum(x, np.float32(0))

    def activation(self, x: Array, name: str) -> Array:
        return ACTIVATIONS[name](x)

    def mean(self, x: Array) -> Array:
        return x.mean(axis=-1, keepdims=True)

    def mean_square(self, x: Array) -> Array:
        return np.mean(np.square(x), axis=-1, keepdims=True)

    def sqrt(self, x: Array) -> Array:
        return np.sqrt(x)

    def at_least(self, x: Array, minimum: float) -> Array:
        return np.maximum(x, np.float32(minimum))

    def columns(self, x: Array, start: int, stop: int) -> Array:
        return x[..., start:stop]


@dataclass
class ReferenceOps(ArrayOps):
    """`Ops` over fp32 arrays. Attention needs the lengths of the sequences that are concatenated."""

    source: WeightSource
    lengths: list[int]
    wanted_lengths: list[int]
    progress: Callable[[int], None] | None = None
    caches: dict[int, tuple[Array, Array]] = field(default_factory=dict)
    only_wanted: bool = False

    def __post_init__(self) -> None:
        self.config = self.source.config
        self.specs = tensor_specs(self.config)
        self.eps = self.config.rms_norm_eps

    def project_heads(self, x: Array, projections: list[HeadProjection]) -> Array:
        parts = [self.rms_norm(self.linear(x, p.weight, p.bias), p.norm, p.heads) for p in projections]
        return np.concatenate(parts, axis=-1)

    def attention(self, heads: Array, layer: int) -> Array:
        c = self.config
        heads = heads.reshape(len(heads), -1, c.head_dim)
        q = heads[:, : c.num_attention_heads]
        if layer in c.kv_layers:
            k, v = np.split(heads[:, c.num_attention_heads :], 2, axis=1)
            self.caches[layer] = (self.rotate(k, self.positions(self.lengths), layer), v)
        keys, values = self.caches[c.kv_owner[layer]]
        counts = self.wanted_lengths if self.only_wanted else self.lengths
        positions = self.positions(counts)
        q = self.rotate(q, positions, layer)
        window = c.sliding_window if c.is_sliding(layer) else None
        out = np.empty((len(q), c.query_size), dtype=np.float32)
        first_q = first_k = 0
        for length, count in zip(self.lengths, counts, strict=True):
            rows, cols = slice(first_q, first_q + count), slice(first_k, first_k + length)
            out[rows] = self.attend(q[rows], keys[cols], values[cols], positions[rows], window)
            first_q, first_k = first_q + count, first_k + length
        return out

    def positions(self, counts: list[int]) -> NDArray[np.int64]:
        """Positions of the last `counts` tokens of each sequence."""
        return np.concatenate([np.arange(n - m, n) for n, m in zip(self.lengths, counts, strict=True)])

    def attend(self, q: Array, k: Array, v: Array, positions: NDArray[np.int64], window: int | None) -> Array:
        """(queries, heads, dim) over (tokens, kv_heads, dim) of one sequence -> (queries, heads * dim)."""
        repeats = q.shape[1] // k.shape[1]
        k, v = np.repeat(k, repeats, axis=1), np.repeat(v, repeats, axis=1)
        scores = np.einsum("qhd,khd->hqk", q, k, optimize=True)
        distance = positions[:, None] - np.arange(len(k))[None, :]
        visible = distance >= 0
        if window is not None:
            visible &= distance < window
        scores = np.where(visible, scores, np.float32(-np.inf))
        scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
        scores /= scores.sum(axis=-1, keepdims=True)
        return np.einsum("hqk,khd->qhd", scores, v, optimize=True).reshape(len(q), -1)

    def rotate(self, x: Array, positions: NDArray[np.int64], layer: int) -> Array:
        """RoPE over (tokens, heads, dim), half-split rotation."""
        cos, sin = rotary_tables(self.config, self.config.layer_types[layer], positions)
        cos, sin = cos[:, None, :], sin[:, None, :]
        low, high = np.split(x, 2, axis=-1)
        return np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1)

    def wanted(self, x: Array) -> Array:
        self.only_wanted = True
        return self.last_rows(x)

    def last_rows(self, x: Array) -> Array:
        """The wanted rows of each sequence."""
        ends = np.cumsum(self.lengths)
        return np.concatenate([x[e - m : e] for e, m in zip(ends, self.wanted_lengths, strict=True)])

    def stack(self, xs: list[Array]) -> Array:
        return np.stack(xs, axis=1)

    def stream(self, x: Array, index: int) -> Array:
        return x[:, index]

    def mix(self, coefficients: Array, streams: Array) -> Array:
        count = streams.shape[1]
        return streams + np.matmul(coefficients.reshape(-1, count, count), streams)

    def spread(self, coefficients: Array, x: Array, streams: Array) -> Array:
        return streams + (coefficients + np.float32(1))[:, :, None] * x[:, None, :]

    def add_to_tail(self, streams: Array, x: Array) -> Array:
        streams = streams.copy()
        streams[:, 1:] += x[:, None, :]
        return streams


def _gelu_tanh(x: Array) -> Array:
    inner = np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x * x * x)
    return np.asarray(np.float32(0.5) * x * (np.float32(1) + np.tanh(inner)), np.float32)


def _gelu(x: Array) -> Array:
    erf = np.frompyfunc(math.erf, 1, 1)
    factor: Array = (0.5 + 0.5 * erf(x / math.sqrt(2)).astype(np.float64)).astype(np.float32)
    return x * factor


def _silu(x: Array) -> Array:
    return np.asarray(x / (np.float32(1) + np.exp(np.minimum(-x, np.float32(80)))), np.float32)


ACTIVATIONS: dict[str, Callable[[Any], Any]] = {
    "gelu_pytorch_tanh": _gelu_tanh,
    "gelu": _gelu,
    "silu": _silu,
    "relu": lambda x: np.maximum(x, np.float32(0)),
}
