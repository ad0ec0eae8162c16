"""The gate's second half: the engine computes what the stored weights say.

The artifact's own graph runs in its own engine, with further outputs and nothing else changed
(`ObservedDecoder`). The reference follows it step by step over the weights that the artifact stores,
dequantized: it computes what goes into every product with a weight from what the engine got out of the
products before, compares, and goes on from the engine's value. So nothing is amplified, whatever the weights,
and each comparison has a bound of its own.

**Between products** (norms, activations, sparsity, attention, rotation, streams, softcap) everything is fp32
on every CPU, and the last digits are all that may differ: `BETWEEN`, of a row's root mean square.

**A product** of x (K) with N rows of weights W may round x to 8 bits, in steps of s <= max|x| / 127. Such
rounding errors have the deviation s / sqrt(12), and what they make of a row of y has, over its N values, the
root mean square

    s / sqrt(12) * |W| / sqrt(N)

|W| being the root of the sum of all squares. Six of these are allowed, as y may have few directions of its
own; an engine that rounds block scales to bfloat16 adds less than `SCALES` of |x| |W| / sqrt(N), the size of
a row of y whose terms do not conspire. Accumulation in fp32 adds `SUMS` of the same. Which instructions round
x, and how, plays no part: AVX2, VNNI, AMX and Arm stay within the same bound.

**Caches.** The calls go on from a cache of given keys and values, so that a window's edge is reached without
a long prompt. The keys are small, so that every position is seen; the values are large around the edges of
the windows of the call's tokens, so that one position more or less shows. In an int8 cache the new keys and
values may be off by half a step more than between products.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.emit.reference.reference_text import ReferenceOps
from gemma_edge.export.export_families import family_with, tensor_specs
from gemma_edge.export.formats.observed_decoder import (
    Array,
    Call,
    KvSteps,
    Observation,
    ObservedDecoder,
    Product,
)
from gemma_edge.export.formats.registry import export_format
from gemma_edge.export.gate.engine_process import run_isolated
from gemma_edge.export.gate.stored_source import StoredSource
from gemma_edge.export.gate.weight_check import plain_job
from gemma_edge.export.model.ops import HeadProjection, Weight
from gemma_edge.export.model.weight_source import read_weight
from gemma_edge.export.progress_bar import ProgressBar
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import ParityError
from gemma_edge.runtime.families.model_family import TextConfig
from gemma_edge.runtime.files.abandoned import temporary_folder
from gemma_edge.runtime.model_parts import bundle_tables

BETWEEN = 5e-4
LOGITS = 2e-5
DEVIATIONS = 6.0
SCALES, SUMS = 0.006, 1e-5
SCORES = 2.0  # deviation of attention scores over the given keys, about
EDGE_VALUES = 8.0  # how much larger values are around the edges of windows
BLOCK = 1 << 20  # weights that are in memory at once


@dataclass(frozen=True)
class GraphFindings:
    """What the check of the graph found.

    Attributes:
        products: that were compared, all calls together.
        worst: the largest error, in parts of its bound.
    """

    products: int
    worst: float


# What the engine computed. ------------------------------------------------------------------------


def given_cache(config: TextConfig, call: Call, seed: int) -> dict[int, tuple[Array, Array]]:
    """Keys and values of the tokens before a call, by layer that owns KV: (position, KV heads, head_dim)."""
    shape = (call.position, config.num_key_value_heads, config.head_dim)
    # Of every token of the call: the last position that its window shows, and the first that it does not.
    edges = np.arange(call.position, call.position + call.tokens) - config.sliding_window
    near = np.isin(np.arange(call.position), np.concatenate([edges, edges + 1]))
    caches = {}
    for layer in config.kv_layers:
        random = np.random.default_rng([seed, layer])
        keys = random.standard_normal(shape, np.float32) * np.float32(SCORES / math.sqrt(config.head_dim))
        values = random.standard_normal(shape, np.float32)
        values[near] *= np.float32(EDGE_VALUES)
        caches[layer] = keys, values
    return caches


def given_ids(config: TextConfig, call: Call, seed: int) -> NDArray[np.int64]:
    """Any tokens: what is computed is compared, not what it means."""
    return np.random.default_rng([seed, 0]).integers(0, config.vocab_size_per_layer_input, call.tokens)


def observe_calls(path: Path, scratch: Path) -> None:
    """Runs the calls of a bundle's `ObservedDecoder`; a file a call in `scratch` says what it computed."""
    bundle = Bundle.open(path)
    embeddings, per_layer = bundle_tables(bundle)
    decoder = export_format(bundle.format).observed_decoder(bundle, scratch)
    for index, call in enumerate(decoder.to_observe):
        set_cache(decoder, call, given_cache(bundle.config, call, index))
        ids = given_ids(bundle.config, call, index)
        seen = decoder.observe(embeddings.lookup(ids), per_layer.lookup(ids), call.wanted)
        with open(scratch / f"call_{index}", "wb") as file:
            pickle.dump(SavedCall(call, seen, decoder.steps), file)


def set_cache(decoder: ObservedDecoder, call: Call, caches: dict[int, tuple[Array, Array]]) -> None:
    """Puts the given keys and values where the decoder would have put them."""
    decoder.reset()
    if not call.position:
        return
    decoder.position = call.position
    snapshot = decoder.snapshot()
    for name, array in snapshot.arrays.items():
        layer, part = _buffer(name)
        given = caches[layer][part][decoder.buffers.positions(name, call.position)]
        steps = decoder.steps.get(layer)
        decoder.buffers.by_place(name, array)[...] = given if steps is None else to_steps(given, steps, part)
    decoder.restore(snapshot)


def to_steps(values: Array, steps: KvSteps, part: int) -> NDArray[np.int8]:
    """Keys (part 0) or values (1) as an int8 cache holds them."""
    step = steps.value if part else steps.key
    return np.clip(np.rint(values / step), -128, 127).astype(np.int8)


def _buffer(name: str) -> tuple[int, int]:
    """The layer of a KV buffer, and whether it holds keys (0) or values (1): key.3, kv_cache_v_3."""
    kind, _, layer = name.replace("kv_cache_", "").replace("_", ".").partition(".")
    return int(layer), int(kind.startswith("v"))


@dataclass
class SavedCall:
    """What the process with the engine tells of a call."""

    call: Call
    seen: Observation
    all_steps: dict[int, KvSteps]

    def __post_init__(self) -> None:
        self.left = {name: list(products) for name, products in self.seen.products.items()}

    @property
    def rows(self) -> int:
        """Of how many of its tokens, the last ones, the products are known."""
        return max(len(product.x) for products in self.seen.products.values() for product in products)

    def take(self, name: str) -> Product | None:
        """The next product with a stored weight; None if there is no further one."""
        left = self.left.get(name)
        return left.pop(0) if left else None

    def own(self, layer: int) -> tuple[Array, Array]:
        """The call's own keys and values as they are in the cache, (tokens, KV heads, head_dim)."""
        keys, values = (a[layer].astype(np.float32) for a in (self.seen.keys, self.seen.values))
        if layer not in self.all_steps:
            return keys, values
        steps = self.all_steps[layer]
        return keys * steps.key, values * steps.value


# What the reference says of it. -------------------------------------------------------------------


class _NoLayersLeft(Exception):
    """A graph that computes no logits ends before this."""


class Products:
    """The products of calls with the stored weights. A weight is dequantized once, for all calls together:
    its products depend on what the engine put in, not on what comes before them.
    """

    def __init__(self, source: StoredSource, calls: Sequence[SavedCall]) -> None:
        self.source, self.calls = source, calls
        self.worst: dict[str, float] = {}  # of the weights that were compared

    def compare(self, name: str, weights: Sequence[Weight]) -> float:
        """Compares every product with the stored tensor `name`: the largest error, in parts of its bound."""
        if name not in self.worst:
            columns = self.source.specs[weights[0].name].shape[-1]
            every = [product for call in self.calls for product in call.seen.products.get(name, ())]
            # An input of another width is refused where its own call is followed.
            found = [product for product in every if product.x.shape[1] == columns]
            ours, square = self._multiply(np.concatenate([product.x for product in found]), weights)
            norm, rounded = math.sqrt(square / ours.shape[1]), self.source.bits[name] != 32
            first, self.worst[name] = 0, 0.0
            for product in found:
                part = ours[first : first + len(product.x)]
                first += len(part)
                size = np.sqrt(np.square(product.x, dtype=np.float64).sum(axis=1))
                allowed = SUMS * size
                if rounded:
                    step = np.abs(product.x).max(axis=1) / 127
                    allowed += DEVIATIONS * step / math.sqrt(12) + SCALES * size
                worst = compare_rows(f"the product with {name}", product.y, part, norm * allowed)
                self.worst[name] = max(self.worst[name], worst)
        return self.worst[name]

    def _multiply(self, x: Array, weights: Sequence[Weight]) -> tuple[Array, float]:
        """x times the transpose of stacked weights, and the sum of the weights' squares."""
        parts, square = [], 0.0
        step = max(1, BLOCK // x.shape[1])
        for weight in weights:
            start, stop = weight.rows or (0, self.source.specs[weight.name].shape[0])
            for row in range(start, stop, step):
                block = read_weight(self.source, replace(weight, rows=(row, min(row + step, stop))))
                parts.append(x @ block.T)
                square += float(np.einsum("ij,ij->", block, block, dtype=np.float64))
        return np.concatenate(parts, axis=1), square


class FollowingOps(ReferenceOps):
    """`Ops` that compare each step with the engine's, and go on from there.

    Args:
        multiplied: the stored weights, and their products in `seen`.
        seen: what the engine computed.
        past: the cache that it went on from.
    """

    def __init__(self, multiplied: Products, seen: SavedCall, past: dict[int, tuple[Array, Array]]) -> None:
        super().__init__(multiplied.source, [seen.call.tokens], [min(seen.call.wanted, seen.rows)])
        self.multiplied, self.seen, self.past = multiplied, seen, past
        self.products, self.worst = 0, 0.0
        self.sizes = [1.0, 1.0]  # the largest values of the last products

    # Products. ------------------------------------------------------------------------------------

    def linear(self, x: Array, weight: Weight, bias: Weight | None = None) -> Array:
        name = weight.name if weight.rows is None else f"{weight.name}.{weight.rows[0]}"
        y = self.product(x, name, [weight])
        return y if bias is None else y + self.load(bias)

    def project_heads(self, x: Array, projections: list[HeadProjection]) -> Array:
        y = self.product(x, f"{projections[0].weight.name}.heads", [p.weight for p in projections])
        parts, start = [], 0
        for p in projections:
            part = y[:, start : start + p.heads * self.config.head_dim]
            start += part.shape[1]
            parts.append(self.rms_norm(part if p.bias is None else part + self.load(p.bias), p.norm, p.heads))
        return np.concatenate(parts, axis=-1)

    def product(self, x: Array, name: str, weights: list[Weight]) -> Array:
        found = self.seen.take(name)
        if found is None:
            if not self.seen.seen.complete:
                raise _NoLayersLeft
            raise _refusal(name, "the graph has no product with it")
        self.compare(f"the input of {name}", found.x, x[-len(found.x) :], BETWEEN)
        self.worst = max(self.worst, self.multiplied.compare(name, weights))
        self.products += 1
        self.sizes = [self.sizes[1], float(np.abs(found.y).max(initial=0))]
        return found.y

    # Attention. -----------------------------------------------------------------------------------

    def attention(self, heads: Array, layer: int) -> Array:
        c, call = self.config, self.seen.call
        owner, rows = c.kv_owner[layer], len(heads)
        heads = heads.reshape(rows, -1, c.head_dim)
        positions = np.arange(call.position + call.tokens - rows, call.position + call.tokens)
        if layer == owner:
            k, v = np.split(heads[:, c.num_attention_heads :], 2, axis=1)
            for part, ours in (("key", self.rotate(k, positions, layer)), ("value", v)):
                self.compare_cache(part, layer, ours)
        keys, values = (
            np.concatenate(pair) for pair in zip(self.past[owner], self.seen.own(owner), strict=True)
        )
        q = self.rotate(heads[:, : c.num_attention_heads], positions, layer)
        window = c.sliding_window if c.is_sliding(layer) else None
        return self.attend(q, keys, values, positions, window)

    def compare_cache(self, part: str, layer: int, ours: Array) -> None:
        theirs = self.seen.own(layer)[part == "value"][-len(ours) :]
        shape = (len(ours), -1)
        what = f"the {part}s that layer {layer} puts into the cache"
        steps = self.seen.all_steps.get(layer)
        if steps is None:
            self.compare(what, theirs.reshape(shape), ours.reshape(shape), BETWEEN)
            return
        step = steps.value if part == "value" else steps.key
        ours = np.clip(ours, -128 * step, 127 * step)
        off = np.abs(theirs - ours) - 0.51 * step
        self.compare(
            what, np.maximum(off, 0).reshape(shape) + ours.reshape(shape), ours.reshape(shape), BETWEEN
        )

    def wanted(self, x: Array) -> Array:
        return self.last_rows(x)

    def last_rows(self, x: Array) -> Array:
        return x[len(x) - self.wanted_lengths[0] :]

    # Comparisons. ---------------------------------------------------------------------------------

    def compare(self, what: str, theirs: Array, ours: Array, allowed: float) -> None:
        """Compares rows: the root mean square of the difference is at most a part of our row's."""
        if theirs.shape != ours.shape:
            raise _another_shape(what, theirs, ours)
        # What cancels out keeps the rounding of the numbers that it came from.
        rounding = 1e-7 * max(1.0, self.sizes[0]) * max(1.0, self.sizes[1])
        self.worst = max(self.worst, compare_rows(what, theirs, ours, allowed * _rms(ours) + rounding))


def compare_rows(what: str, theirs: Array, ours: Array, allowed: NDArray[np.float64]) -> float:
    """The largest error of a row, in parts of what is `allowed` of it.

    Raises:
        ParityError: the root mean square of the difference is larger than that.
    """
    if theirs.shape != ours.shape:
        raise _another_shape(what, theirs, ours)
    error, size = _rms(theirs.astype(np.float64) - ours), _rms(ours)
    part = error / np.maximum(allowed, 1e-30)
    worst = int(np.argmax(np.where(np.isnan(part), np.inf, part)))
    if not part[worst] <= 1:
        raise _refusal(
            what,
            f"is off by {error[worst] / max(float(size[worst]), 1e-30):.2%} in one row, where "
            f"{allowed[worst] / max(float(size[worst]), 1e-30):.2%} is the most that rounding explains",
        )
    return float(part[worst])


def _rms(rows: NDArray[np.floating]) -> NDArray[np.float64]:
    result: NDArray[np.float64] = np.sqrt(np.mean(np.square(rows, dtype=np.float64), axis=1))
    return result


def _another_shape(what: str, theirs: Array, ours: Array) -> ParityError:
    return _refusal(what, f"has the shape {list(theirs.shape)}, not {list(ours.shape)}")


def _refusal(what: str, problem: str) -> ParityError:
    return ParityError(f"the graph does not compute what its weights say: {what} {problem}")


def check_graph(bundle: Bundle, *, scratch: Path | None = None, progress: bool = False) -> GraphFindings:
    """Follows the bundle's engine through every part of its graph.

    Args:
        scratch: a folder for what the engine computed; by default the temporary one.

    Raises:
        ParityError: the engine computes something else; the message names the first place.
    """
    products, worst = 0, 0.0
    with temporary_folder(parent=scratch) as folder:
        with ProgressBar("observing the engine", 0, progress):
            run_isolated(bundle.path, observe_calls, folder)
        calls = []
        for path in sorted(folder.glob("call_*")):
            with open(path, "rb") as file:
                calls.append(pickle.load(file))
        multiplied = Products(stored_source(bundle), calls)
        for index, call in enumerate(calls):
            ops = follow(bundle, multiplied, call, index)
            products, worst = products + ops.products, max(worst, ops.worst)
    return GraphFindings(products, worst)


def stored_source(bundle: Bundle) -> StoredSource:
    """The decoder's weights as the bundle stores them."""
    format = export_format(bundle.format)
    layout = format.decoder_layout(plain_job(bundle))
    stored = format.stored(bundle, format.decoder)
    return StoredSource(bundle.config, layout.tensors, stored, tensor_specs(bundle.config))


def follow(bundle: Bundle, multiplied: Products, seen: SavedCall, index: int) -> FollowingOps:
    """Compares one call. Raises ParityError as `check_graph` does."""
    config, call = multiplied.source.config, seen.call
    past = {}
    for layer, given in given_cache(bundle.config, call, index).items():
        steps = seen.all_steps.get(layer)
        past[layer] = (
            given
            if steps is None
            else (to_steps(given[0], steps, 0) * steps.key, to_steps(given[1], steps, 1) * steps.value)
        )
    ids = given_ids(bundle.config, call, index)
    observed = ids[-seen.rows :]
    embeddings, per_layer = (table.lookup(observed) for table in bundle_tables(bundle))
    ops = FollowingOps(multiplied, seen, past)
    split = config.first_shared_layer * config.hidden_size_per_layer_input
    text = family_with(config).text
    high = ops.last_rows(per_layer[:, split:]) if config.num_kv_shared_layers else None
    try:
        logits = text.decoder(ops, config, embeddings, per_layer[:, :split], high)
        ops.compare("the logits", seen.seen.logits[-len(logits) :], logits, LOGITS)
    except _NoLayersLeft:
        pass
    for name, products in seen.left.items():
        if products:
            raise _refusal(name, "has a product that the model has not")
    return ops
