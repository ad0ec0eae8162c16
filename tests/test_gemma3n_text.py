"""Each block of the description against transformers (golden/make_text_golden.py), by both interpreters.

A block is a function of `Ops`, so one table serves the NumPy reference and the ONNX emission; the latter's
graph holds that block alone and runs on ONNX Runtime.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper

from gemma_edge.export.emit.onnx.external_data import ExternalData
from gemma_edge.export.emit.onnx.onnx_text import OnnxOps
from gemma_edge.export.emit.reference.reference_text import ReferenceOps, evaluate
from gemma_edge.export.model.gemma3n import gemma3n_text as text
from gemma_edge.export.model.gemma3n.gemma3n_text_tensors import tensor_specs
from gemma_edge.export.model.ops import Weight, Weights
from gemma_edge.export.weights.recipe import load_recipe
from gemma_edge.export.weights.rounding import NearestRounding
from gemma_edge.runtime.engines.kv_cache import cache_layouts
from gemma_edge.runtime.engines.rope import rotary_tables
from gemma_edge.runtime.families.config_fields import FULL, SLIDING
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from support.random_gemma3n_text import SMALL, Array, DictSource

GOLDEN = Path(__file__).parent / "golden" / "text.npz"
LAYERS = [Weights().layer(i) for i in range(6)]
SLIDING_OWNER, GLOBAL, SHARED_FROM, SHARED_SLIDING, SHARED_GLOBAL = 0, 1, 2, 4, 5
# Largest error allowed, relative to the largest value of the block.
TOLERANCE = 1e-5

Block = Callable[..., Any]  # (ops, config, *inputs) -> a value, or a list of them


def attention(layer: int) -> Block:
    return lambda o, c, x: text.attention(o, c, LAYERS[layer], layer, x)


def shared_attention(layer: int) -> Block:
    """The owner fills its cache from its own input; the layer that shares it has another."""

    def block(o: Any, c: Gemma3nConfig, owners: Any, x: Any) -> Any:
        text.attention(o, c, LAYERS[c.kv_owner[layer]], c.kv_owner[layer], owners)
        return text.attention(o, c, LAYERS[layer], layer, x)

    return block


def whole_model(o: Any, c: Gemma3nConfig, embeddings: Any, rows: Any) -> Any:
    split = c.first_shared_layer * c.hidden_size_per_layer_input
    return text.decoder(o, c, embeddings, o.columns(rows, 0, split), o.columns(rows, split, c.ple_row_size))


BLOCKS: dict[str, Block] = {
    "rms_norm": lambda o, c, x: o.rms_norm(x, LAYERS[0]["input_layernorm"]),
    "rms_norm_without_weight": lambda o, c, x: o.rms_norm(x, None),
    "laurel": lambda o, c, x: text.laurel(o, LAYERS[0], x),
    "altup_predict": lambda o, c, streams: text.altup_predict(o, c, LAYERS[1], streams),
    "altup_correct": lambda o, c, streams, x: text.altup_correct(o, c, LAYERS[1], streams, x),
    "feed_forward_sparse": lambda o, c, x: text.feed_forward(o, c, LAYERS[0], 0, x),
    "feed_forward_dense": lambda o, c, x: text.feed_forward(o, c, LAYERS[1], 1, x),
    "attention_sliding": attention(SLIDING_OWNER),
    "attention_global": attention(GLOBAL),
    "attention_shared_sliding": shared_attention(SHARED_SLIDING),
    "attention_shared_global": shared_attention(SHARED_GLOBAL),
    "per_layer_inputs": lambda o, c, x, rows: text.per_layer_inputs(o, c, x, rows, 0, c.num_hidden_layers),
    "decoder_layer_0": lambda o, c, streams, ple: text.decoder_layer(o, c, LAYERS[0], 0, streams, ple),
    "decoder_layer_1": lambda o, c, streams, ple: text.decoder_layer(o, c, LAYERS[1], 1, streams, ple),
    "expand_streams": text.expand_streams,
    "merge_streams": text.merge_streams,
    "logits": text.logits,
    "model": whole_model,
}


def run_reference(source: DictSource, block: Block, inputs: list[Array]) -> Array:
    tokens = [len(inputs[0])]
    return np.asarray(block(ReferenceOps(source, tokens, tokens), source.config, *inputs))


def run_onnx(source: DictSource, block: Block, inputs: list[Array], folder: Path) -> Array:
    """Emits the block's graph alone, and runs it from empty caches over all tokens at once."""
    config, tokens = source.config, len(inputs[0])
    ops = OnnxOps(config, load_recipe("fp32"), ExternalData("block.data", tensor_specs(config)), {})
    ops.declare_cache()
    edges = [ops.input(f"x{i}", TensorProto.FLOAT, [1, *x.shape]) for i, x in enumerate(inputs)]
    out = block(ops, config, *edges)
    names: list[str] = out if isinstance(out, list) else [out]
    ops.data.finish()
    used = {name for node in ops.nodes for name in node.input} | set(edges)
    made = {name for node in ops.nodes for name in node.output}
    graph_inputs = [value for value in ops.inputs if value.name in used]
    presents = [value for value in ops.outputs if value.name in made]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names] + presents
    initializers = [*ops.constants.values(), *ops.data.initializers]
    graph = helper.make_graph(ops.nodes, "block", graph_inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    with open(folder / "block.data", "wb") as file:
        ops.data.write(file, source, NearestRounding("none"))
    (folder / "block.onnx").write_bytes(model.SerializeToString())
    session = ort.InferenceSession(folder / "block.onnx", providers=["CPUExecutionProvider"])

    arrays: dict[str, np.ndarray] = {f"x{i}": x[None] for i, x in enumerate(inputs)}
    arrays |= {"num_logits": np.array([tokens]), "seqlens_k": np.array([tokens - 1], np.int32)}
    arrays["total_sequence_length"] = np.array(tokens, np.int32)
    for kind, layer_type in (("full", FULL), ("sliding", SLIDING)):
        arrays[f"cos_{kind}"], arrays[f"sin_{kind}"] = rotary_tables(config, layer_type, tokens)
    binding = session.io_binding()
    for name in names:
        binding.bind_output(name)
    for layer, layout in cache_layouts(config).items():
        for part in ("key", "value"):
            shape = (1, config.num_key_value_heads, layout.capacity(tokens), config.head_dim)
            arrays[f"past_{part}.{layer}"] = cache = np.zeros(shape, np.float32)
            if f"present_{part}.{layer}" in made:
                value = ort.OrtValue.ortvalue_from_numpy(cache)
                binding.bind_ortvalue_output(f"present_{part}.{layer}", value)
    for value_info in graph_inputs:
        array = np.ascontiguousarray(arrays[value_info.name]).reshape(arrays[value_info.name].shape)
        arrays[value_info.name] = array  # kept: a bound value borrows its memory
        binding.bind_ortvalue_input(value_info.name, ort.OrtValue.ortvalue_from_numpy(array))
    session.run_with_iobinding(binding)
    results = [value.numpy()[0] for value in binding.get_outputs()[: len(names)]]
    return np.stack(results) if isinstance(out, list) else results[0]


@pytest.fixture(scope="module")
def golden() -> dict[str, Any]:
    with np.load(GOLDEN) as file:
        return dict(file)


@pytest.fixture(scope="module")
def source(golden: dict[str, Any]) -> DictSource:
    weights = {n.removeprefix("weight."): a for n, a in golden.items() if n.startswith("weight.")}
    return DictSource(Gemma3nConfig.from_dict(json.loads(str(golden["config"]))), weights)


@pytest.fixture(params=["reference", "onnx"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[[DictSource, Block, list[Array]], Array]:
    """An interpreter."""
    if request.param == "reference":
        return run_reference
    return lambda source, block, inputs: run_onnx(source, block, inputs, tmp_path)


Run = Callable[[DictSource, Block, list[Array]], Array]


def small(**changes: Any) -> DictSource:
    """A model whose weights do not matter, for operations that have none."""
    return DictSource(Gemma3nConfig.from_dict(SMALL | changes), {})


def normal(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# Against transformers. ----------------------------------------------------------------------------


def test_the_golden_file_has_every_block_in_fp32(golden: dict[str, Any]) -> None:
    assert {name.rpartition(".out")[0] for name in golden if name.endswith(".out")} == set(BLOCKS)
    others = ("ids", "config", "made_with")
    assert {array.dtype for name, array in golden.items() if name not in others} == {np.dtype(np.float32)}


@pytest.mark.parametrize("name", BLOCKS)
def test_block(name: str, run: Run, source: DictSource, golden: dict[str, Any]) -> None:
    expected = golden[f"{name}.out"]
    inputs = [golden[f"{name}.in.{i}"] for i in range(2) if f"{name}.in.{i}" in golden]
    got = run(source, BLOCKS[name], inputs)
    assert got.shape == expected.shape
    assert np.abs(got - expected).max() <= TOLERANCE * np.abs(expected).max()


def test_evaluate_from_token_ids(source: DictSource, golden: dict[str, Any]) -> None:
    """Also embeds the tokens; the last of them has no per-layer row of its own."""
    assert golden["ids"][-1] >= source.config.vocab_size_per_layer_input
    (logits,) = evaluate(source, [golden["ids"]])
    assert np.abs(logits - golden["model.out"]).max() <= TOLERANCE * np.abs(golden["model.out"]).max()


# Facts that are easy to get wrong, each against arithmetic of its own. ----------------------------


def test_activation_sparsity_uses_biased_std(run: Run) -> None:
    x = normal(5, 16)
    got = run(small(), lambda o, c, x: text.gaussian_top_k(o, x, c.sparsity_multiplier(0)), [x])

    def expected(ddof: int) -> Any:
        cutoff = x.mean(axis=1, keepdims=True) + 1.6448536 * x.std(axis=1, ddof=ddof, keepdims=True)
        return np.maximum(x - cutoff, 0)

    np.testing.assert_allclose(got, expected(ddof=0), atol=1e-6)
    assert np.abs(got - expected(ddof=1)).max() > 0.01
    assert 0 < np.count_nonzero(got) <= 0.15 * got.size


def test_final_logit_softcap(run: Run, source: DictSource) -> None:
    hidden = 40 * normal(5, source.config.hidden_size)
    raw = hidden @ source.read("embed_tokens.weight").T
    got = run(source, text.logits, [hidden])
    np.testing.assert_allclose(got, 30 * np.tanh(raw / 30), rtol=1e-5, atol=1e-5)
    assert np.abs(raw).max() > 60 and np.abs(got).max() <= 30
    uncapped = DictSource(Gemma3nConfig.from_dict(SMALL | {"final_logit_softcapping": None}), source.weights)
    np.testing.assert_allclose(run(uncapped, text.logits, [hidden]), raw, rtol=1e-5, atol=1e-4)


def heads_of(config: Gemma3nConfig, q: Array, k: Array, v: Array) -> Array:
    """(tokens, heads, dim) each, side by side as `Ops.attention` takes them."""
    return np.concatenate([q, k, v], axis=1).reshape(len(q), -1)


def naive_attention(
    config: Gemma3nConfig, layer: int, q: Array, k: Array, v: Array, scale: float = 1.0
) -> Any:
    """One query at a time, in fp64, with rotation as multiplication of complex numbers."""

    def rotated(x: Array, position: int) -> Any:
        low, high = np.split(x.astype(np.float64), 2)
        angle = position * np.array(config.inverse_frequencies(config.layer_types[layer]))
        return (low + 1j * high) * np.exp(1j * angle)

    out = np.zeros((len(q), config.num_attention_heads, config.head_dim))
    for t in range(len(q)):
        first = max(0, t - config.sliding_window + 1) if config.is_sliding(layer) else 0
        for head in range(config.num_attention_heads):
            kv = head * config.num_key_value_heads // config.num_attention_heads
            turned = rotated(q[t, head], t)
            products = [(turned * rotated(k[s, kv], s).conj()).real.sum() for s in range(first, t + 1)]
            scores = [scale * float(product) for product in products]
            weights = np.exp(np.array(scores) - max(scores))
            out[t, head] = weights @ v[first : t + 1, kv] / weights.sum()
    return out.reshape(len(q), -1)


@pytest.mark.parametrize("layer", [SLIDING_OWNER, GLOBAL])
def test_attention_scale_is_one(run: Run, layer: int) -> None:
    source, tokens = small(), 11
    c = source.config
    q, k, v = (normal(tokens, n, c.head_dim, seed=i) for i, n in enumerate((4, 2, 2)))
    got = run(source, lambda o, c, x: o.attention(x, layer), [heads_of(c, q, k, v)])
    np.testing.assert_allclose(got, naive_attention(c, layer, q, k, v), atol=1e-5)
    assert np.abs(got - naive_attention(c, layer, q, k, v, scale=c.head_dim**-0.5)).max() > 0.1


@pytest.mark.parametrize("window", [1, 4, 9])
@pytest.mark.parametrize("layer", [SLIDING_OWNER, SHARED_FROM, SHARED_SLIDING])
def test_window_edge(run: Run, layer: int, window: int) -> None:
    """A token at a distance of window - 1 is seen, one at a distance of window is not.

    With queries of zero every visible token weighs the same, and the values say which were visible.
    """
    source, tokens = small(sliding_window=window), 16
    c = source.config
    zeros = np.zeros((tokens, 4, 16), np.float32)
    values = np.repeat(np.eye(tokens, 16, dtype=np.float32)[:, None], 2, axis=1)
    heads = heads_of(c, zeros, zeros[:, :2], values)
    if layer == SHARED_SLIDING:

        def block(o: Any, c: Gemma3nConfig, owners: Any, queries: Any) -> Any:
            o.attention(owners, c.kv_owner[layer])
            return o.attention(queries, layer)

        got = run(source, block, [heads, zeros.reshape(tokens, -1)])
    else:
        got = run(source, lambda o, c, x: o.attention(x, layer), [heads])
    distance = np.arange(tokens)[:, None] - np.arange(tokens)[None, :]
    visible = (distance >= 0) & (distance < window)
    expected = visible / visible.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(got.reshape(tokens, 4, 16), np.repeat(expected[:, None], 4, axis=1), atol=1e-6)


def test_expanded_streams_of_nothing_stay_finite(run: Run, source: DictSource) -> None:
    """A projection that vanishes is divided by the root of the least mean square, not by zero."""
    x = np.zeros((3, source.config.hidden_size), np.float32)
    np.testing.assert_array_equal(run(source, text.expand_streams, [x]), np.zeros((3, 4, 32), np.float32))


def test_a_factor_belongs_to_the_weight(run: Run) -> None:
    source = small()
    source.weights["norm.weight"] = weight = normal(32)
    x = normal(3, 32, seed=1)
    got = run(source, lambda o, c, x: o.rms_norm(x, Weight("norm.weight")), [x])
    expected = x / np.sqrt((x**2).mean(axis=1, keepdims=True) + 1e-6) * weight
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        (
            "gelu_pytorch_tanh",
            lambda x: 0.5 * x * (1 + math.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3))),
        ),
        ("gelu", lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2)))),
        ("silu", lambda x: x / (1 + math.exp(-x))),
        ("relu", lambda x: max(x, 0.0)),
    ],
)
def test_activation(run: Run, name: str, function: Callable[[float], float]) -> None:
    x = np.linspace(-12, 12, 97, dtype=np.float32)[None]
    expected = [[function(float(value)) for value in x[0]]]
    np.testing.assert_allclose(run(small(), lambda o, c, x: o.activation(x, name), [x]), expected, atol=2e-6)
