"""The emitted decoder on ONNX Runtime, against transformers and the reference, in every kind of call."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from gemma_edge.export.emit.onnx.onnx_graph import EmittedGraph
from gemma_edge.export.emit.onnx.onnx_text import emit_decoder
from gemma_edge.export.emit.reference.reference_text import evaluate
from gemma_edge.export.model.gemma3n.gemma3n_text_tensors import tensor_specs
from gemma_edge.export.model.tensor_spec import PLE_NAME, Part
from gemma_edge.export.weights.recipe import KvCache, Recipe, load_recipe
from gemma_edge.export.weights.rounding import NearestRounding
from gemma_edge.runtime.artifacts.onnx_check import MAX_GRAPH_BYTES, check_windows
from gemma_edge.runtime.engines.cores import physical_cores
from gemma_edge.runtime.engines.onnx_decoder import OnnxDecoder
from gemma_edge.runtime.errors import BundleError, UsageError
from gemma_edge.runtime.families.config_fields import FULL
from support.random_gemma3n_text import (
    VARIANTS,
    DictSource,
    LiveCase,
    feed,
    random_ids,
    random_source,
    rows_of,
    write_decoder,
)

MAX_ERROR = 1e-3
CHUNKS = {
    "whole": [24],
    "one_by_one": [1] * 24,
    "uneven": [5, 7, 1, 1, 10],
    "prompt_then_decode": [20, 1, 1, 1, 1],
}


@pytest.fixture(scope="module")
def source() -> DictSource:
    return random_source()


@pytest.fixture(scope="module")
def decoder(source: DictSource, tmp_path_factory: pytest.TempPathFactory) -> OnnxDecoder:
    folder = tmp_path_factory.mktemp("decoder")
    return OnnxDecoder(write_decoder(source, folder, context=64, chunk=32), threads=1)


@pytest.fixture
def fresh(decoder: OnnxDecoder) -> OnnxDecoder:
    decoder.reset()
    return decoder


@pytest.mark.parametrize("window", [3, 5, 64])
def test_a_manifest_with_another_window_than_the_graph(
    source: DictSource, tmp_path: Path, window: int
) -> None:
    """ONNX Runtime would attend to the graph's window and answer otherwise than the manifest says."""
    bundle = write_decoder(source, tmp_path, context=64, chunk=32)
    config = replace(bundle.config, sliding_window=window)
    path = bundle.file("decoder.onnx")
    check_windows(path, bundle.config)
    with pytest.raises(BundleError, match=rf"attention window of layer 0: expected {window}, as in the"):
        check_windows(path, config)
    with pytest.raises(BundleError, match="attention window of layer 0"):
        OnnxDecoder(replace(bundle, config=config), threads=1)


def test_windows_of_what_is_no_model(source: DictSource, tmp_path: Path) -> None:
    path = tmp_path / "decoder.onnx"
    path.write_bytes(b"\x3a\x03\x0a\x01\x00")  # a graph with a node that is no message
    with pytest.raises(BundleError, match=r"decoder\.onnx: node: "):
        check_windows(path, source.config)
    path.write_bytes(b"")
    with pytest.raises(BundleError, match="attention operators"):
        check_windows(path, source.config)
    os.truncate(path, MAX_GRAPH_BYTES + 1)
    with pytest.raises(BundleError, match="size"):
        check_windows(path, source.config)


# Logits. ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_agrees_with_transformers(name: str, live_case: Callable[[str], LiveCase], tmp_path: Path) -> None:
    case = live_case(name)
    model = OnnxDecoder(write_decoder(case.source, tmp_path), threads=1)
    for chunks in CHUNKS.values():
        model.reset()
        logits = feed(model, case.source, case.ids, chunks)
        assert np.abs(logits - case.logits).max() <= MAX_ERROR, chunks


@pytest.mark.parametrize("wanted", [1, 3])
@pytest.mark.parametrize("name", ["as_it_is", "no_sharing", "all_full", "three_streams_active_1"])
def test_wanted_logits_are_the_last_rows(name: str, wanted: int, tmp_path: Path) -> None:
    """Layers that share KV run on these rows alone, and the others must not notice."""
    model = random_source(**VARIANTS[name])
    ids = random_ids(model.config, 24)
    reference = evaluate(model, [ids])[0]
    decoder = OnnxDecoder(write_decoder(model, tmp_path), threads=1)
    for chunks in CHUNKS.values():
        decoder.reset()
        ends = np.cumsum(chunks)
        expected = [reference[e - min(wanted, n) : e] for e, n in zip(ends, chunks, strict=True)]
        assert np.abs(feed(decoder, model, ids, chunks, wanted) - np.concatenate(expected)).max() <= MAX_ERROR


def test_every_number_of_logits(fresh: OnnxDecoder, source: DictSource) -> None:
    ids = random_ids(source.config, 9)
    expected = evaluate(source, [ids])[0]
    for wanted in range(1, 10):
        fresh.reset()
        logits = feed(fresh, source, ids, [9], wanted)
        assert logits.shape == (wanted, source.config.vocab_size)
        assert np.abs(logits - expected[-wanted:]).max() <= MAX_ERROR


def test_reset_forgets(fresh: OnnxDecoder, source: DictSource) -> None:
    ids, others = random_ids(source.config, 12), random_ids(source.config, 30, seed=1)
    first = feed(fresh, source, ids, [12])
    feed(fresh, source, others, [30])
    assert fresh.position == 42
    fresh.reset()
    assert fresh.position == 0
    np.testing.assert_array_equal(feed(fresh, source, ids, [12]), first)


def test_logits_are_the_callers_to_keep(fresh: OnnxDecoder, source: DictSource) -> None:
    embeddings, per_layer = rows_of(source, [1, 2])
    first = fresh.forward(embeddings[:1], per_layer[:1])
    kept = first.copy()
    fresh.forward(embeddings[1:], per_layer[1:])
    np.testing.assert_array_equal(first, kept)


# Limits. ------------------------------------------------------------------------------------------


def test_a_full_context_is_a_clear_error(fresh: OnnxDecoder, source: DictSource) -> None:
    ids = random_ids(source.config, 64)
    feed(fresh, source, ids, [32, 32], 1)
    with pytest.raises(UsageError, match=r"64 \+ 1 tokens do not fit a context of 64"):
        feed(fresh, source, ids[:1], [1])
    assert fresh.position == 64


@pytest.mark.parametrize(("tokens", "wanted"), [(0, 1), (0, 0), (33, 1), (2, 3), (2, -1)])
def test_a_call_outside_its_contract(
    fresh: OnnxDecoder, source: DictSource, tokens: int, wanted: int
) -> None:
    rows = rows_of(source, [1] * max(tokens, 1))
    with pytest.raises(ValueError, match="does not hold"):
        fresh.forward(rows[0][:tokens], rows[1][:tokens], wanted)


@pytest.mark.parametrize("context", [0, 513])
def test_a_context_the_model_does_not_have(source: DictSource, tmp_path: Path, context: int) -> None:
    with pytest.raises(UsageError, match=r"1 to 512 \(max_position_embeddings\)"):
        OnnxDecoder(write_decoder(source, tmp_path), context=context)


def test_a_smaller_context_than_planned(source: DictSource, tmp_path: Path) -> None:
    small = OnnxDecoder(write_decoder(source, tmp_path, context=64), threads=1, context=10)
    ids = random_ids(source.config, 10)
    assert np.abs(feed(small, source, ids, [10]) - evaluate(source, [ids])[0]).max() <= MAX_ERROR
    with pytest.raises(UsageError, match="context of 10"):
        feed(small, source, ids, [1])


def test_a_graph_that_the_engine_refuses(source: DictSource, tmp_path: Path) -> None:
    bundle = write_decoder(source, tmp_path)
    (tmp_path / "decoder.onnx").write_bytes(b"not a graph")
    with pytest.raises(BundleError, match=r"decoder\.onnx: graph"):
        OnnxDecoder(bundle)


def test_a_head_that_the_engine_does_not_take() -> None:
    config = random_source(head_dim=24).config
    with pytest.raises(UsageError, match="head_dim = 24"):
        emit_decoder(config, load_recipe("fp32"), "data")


def test_threads_are_cores() -> None:
    assert 1 <= physical_cores() <= 1024


# The emission itself. -----------------------------------------------------------------------------


def recipe_of(name: str, kv_cache: KvCache = "fp32") -> Recipe:
    return replace(load_recipe(name), kv_cache=kv_cache)


@pytest.fixture(scope="module", params=["fp32", "int8", "int4"])
def recipe(request: pytest.FixtureRequest) -> Recipe:
    return recipe_of(request.param)


@pytest.fixture(scope="module")
def emitted(source: DictSource, recipe: Recipe) -> EmittedGraph:
    return emit_decoder(source.config, recipe, "decoder.onnx.data")


def test_weights_are_outside_the_graph(emitted: EmittedGraph) -> None:
    for tensor in emitted.model.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            assert tensor.ByteSize() < 4096 and tensor.name.startswith("const_")


def test_regions_are_in_order_aligned_and_apart(emitted: EmittedGraph) -> None:
    end = 0
    for tensor in emitted.data.tensors:
        for region in filter(None, (tensor.data, tensor.scales)):
            assert region.offset >= end
            assert region.offset % (4096 if region.length >= 4096 else 64) == 0
            end = region.offset + region.length
    assert end == emitted.data.size


@pytest.mark.parametrize("name", ["as_it_is", "untied_head", "attention_bias", "three_streams_active_1"])
def test_every_tensor_is_stored_once(name: str) -> None:
    """Each row of each tensor, but for the tables, which are files of their own."""
    config = random_source(**VARIANTS[name]).config
    stored: dict[str, int] = {}
    emitted = emit_decoder(config, load_recipe("fp32"), "data")
    names = [tensor.name for tensor in emitted.model.graph.initializer]
    assert len(names) == len(set(names))
    for tensor in emitted.data.tensors:
        for weight in tensor.weights:
            if isinstance(weight, float):
                continue
            shape = tensor_specs(config)[weight.name].shape
            start, stop = weight.rows or (0, shape[0])
            stored[weight.name] = stored.get(weight.name, 0) + stop - start
    expected = {
        n: s.shape[0] for n, s in tensor_specs(config).items() if s.part not in (Part.PLE, Part.EMBEDDING)
    }
    # One row of a norm's weight serves each head that it normalizes.
    for name in [n for n in expected if n.endswith(("q_norm.weight", "k_norm.weight"))]:
        heads = config.num_attention_heads if "q_norm" in name else config.num_key_value_heads
        expected[name] *= heads
    assert stored == expected and PLE_NAME not in stored


@pytest.mark.parametrize("kv_cache", ["fp32", "int8"])
def test_kv_sharing_in_the_graph(source: DictSource, kv_cache: KvCache) -> None:
    """Four caches for six layers; shared layers project queries alone and read their owners'."""
    graph = emit_decoder(source.config, recipe_of("int4", kv_cache), "data").model.graph
    caches = {f"{part}.{layer}" for part in ("key", "value") for layer in range(4)}
    assert {i.name for i in graph.input if i.name.startswith("past_")} == {f"past_{c}" for c in caches}
    # An int8 cache must have an output wherever it is read: one more name for the owner's buffer.
    shared = {"shared_key.5", "shared_value.5"} if kv_cache == "int8" else set()
    assert {o.name for o in graph.output} == {"logits"} | {f"present_{c}" for c in caches} | shared
    nodes = {n.name: n for n in graph.node if n.op_type == "GroupQueryAttention"}
    assert len(nodes) == 6
    assert list(nodes["attention.5"].input[3:5]) == ["present_key.3", "present_value.3"]
    made = {name: node for node in graph.node for name in node.output}
    for edge, owner in zip(
        nodes["attention.4"].input[3:5], ("present_key.2", "present_value.2"), strict=True
    ):
        assert made[edge].op_type == "Slice" and made[edge].input[0] == owner
    attributes = {name: {a.name: a.i for a in node.attribute} for name, node in nodes.items()}
    assert [n for n, a in attributes.items() if a.get("sliding_window_cache")] == ["attention.0"]


def test_shared_sliding_layers_share_one_slice() -> None:
    config = random_source(num_kv_shared_layers=4).config
    graph = emit_decoder(config, load_recipe("fp32"), "data").model.graph
    readers = [n for n in graph.node if n.name in ("attention.2", "attention.4")]
    assert len(readers) == 2 and list(readers[0].input[3:7]) == list(readers[1].input[3:7])


def test_inputs_depend_on_what_the_model_has() -> None:
    def inputs(name: str) -> set[str]:
        model = emit_decoder(random_source(**VARIANTS[name]).config, load_recipe("fp32"), "data").model
        return {i.name for i in model.graph.input if not i.name.startswith("past_")}

    common = {"inputs_embeds", "ple_low", "num_logits", "seqlens_k", "total_sequence_length"}
    sliding, full = {"cos_sliding", "sin_sliding"}, {"cos_full", "sin_full"}
    assert inputs("as_it_is") == common | sliding | full | {"ple_high"}
    assert inputs("no_sharing") == common | sliding | full
    assert inputs("all_full") == common | full | {"ple_high"}


def test_emission_is_the_same_every_time(emitted: EmittedGraph, source: DictSource, recipe: Recipe) -> None:
    again = emit_decoder(source.config, recipe, "decoder.onnx.data")
    assert again.model.SerializeToString(deterministic=True) == emitted.model.SerializeToString(
        deterministic=True
    )


@pytest.mark.parametrize(("name", "least"), [("int8", 0.999), ("int4", 0.9)])
def test_quantized_decoder_is_near_the_reference(
    name: str, least: float, source: DictSource, tmp_path: Path
) -> None:
    """Through MatMulNBits: wrong packing or a wrong zero point would give noise."""
    loaded = recipe_of(name)
    emitted = emit_decoder(source.config, loaded, "decoder.onnx.data")
    bundle = write_decoder(source, tmp_path)
    with open(tmp_path / "decoder.onnx.data", "wb") as file:
        emitted.data.write(file, source, NearestRounding(loaded.clip))
    (tmp_path / "decoder.onnx").write_bytes(emitted.model.SerializeToString())
    ids = random_ids(source.config, 24)
    expected = evaluate(source, [ids])[0]
    got = feed(OnnxDecoder(bundle, threads=1), source, ids, CHUNKS["uneven"])
    assert np.corrcoef(got.ravel(), expected.ravel())[0, 1] > least
    assert np.abs(got - expected).max() > 1e-3  # quantized indeed


def test_a_model_of_global_layers_alone(tmp_path: Path) -> None:
    model = random_source(layer_types=[FULL] * 6, num_kv_shared_layers=3)
    ids = random_ids(model.config, 24)
    decoder = OnnxDecoder(write_decoder(model, tmp_path), threads=1)
    assert np.abs(feed(decoder, model, ids, [10, 14]) - evaluate(model, [ids])[0]).max() <= MAX_ERROR
