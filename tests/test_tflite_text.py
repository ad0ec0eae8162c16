"""The .tflite emitter: configs against the reference, what its signatures hold, how weights are stored."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.random_gemma3n_text import VARIANTS, DictSource, feed, random_ids, random_source

pytest.importorskip("ai_edge_litert")

from ai_edge_litert import schema_py_generated as schema

from gemma_edge.export.emit.reference.reference_text import evaluate
from gemma_edge.export.emit.tflite import tflite_text
from gemma_edge.export.emit.tflite.tflite_file import TfliteFile, stored_precision
from gemma_edge.export.emit.tflite.tflite_text import CacheLayout, emit_decoder, emit_per_layer_embedder
from gemma_edge.export.model.tensor_spec import EMBEDDING_NAME, PLE_NAME, Part, head_name
from gemma_edge.export.publish import HashingFile
from gemma_edge.export.weights.quantize import Clip, dequantize, quantize
from gemma_edge.export.weights.recipe import Precision, Recipe, load_recipe
from gemma_edge.export.weights.rounding import NearestRounding
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.folder_bundle import FolderBundle
from gemma_edge.runtime.artifacts.manifest import FileRecord
from gemma_edge.runtime.artifacts.row_table import RowTable
from gemma_edge.runtime.artifacts.tflite_reader import read_tflite
from gemma_edge.runtime.engines.litert_decoder import LitertDecoder

PROMPT, CONTEXT, PREFILL = 24, 32, (8, 4)
Decoders = Callable[[DictSource, CacheLayout], LitertDecoder]


def write(file: TfliteFile, source: DictSource, path: Path, clip: Clip = "mse") -> Any:
    """Writes a file; returns the record that the manifest gets."""
    out = HashingFile(path)
    file.write(out, source, NearestRounding(clip))
    return out.close()


@pytest.fixture
def decoders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Decoders:
    """The fp32 decoder of a source on LiteRT."""
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "packed"))

    def make(source: DictSource, layout: CacheLayout) -> LitertDecoder:
        file = emit_decoder(
            source.config, load_recipe("fp32"), context=CONTEXT, prefill=PREFILL, layout=layout
        )
        record = write(file, source, tmp_path / "decoder.tflite")
        files = {"decoder.tflite": FileRecord(record["bytes"], record["sha256"])}
        bundle = Bundle(FolderBundle(tmp_path, {}, files), source.config, CONTEXT, CONTEXT, "fp32", "tflite")
        return LitertDecoder(bundle, threads=1)

    return make


@pytest.mark.parametrize("name", VARIANTS)
def test_windowed_logits_are_the_references(name: str, decoders: Decoders) -> None:
    source = random_source(**VARIANTS[name])
    ids = random_ids(source.config, PROMPT)
    decoder = decoders(source, "windowed")
    wanted = evaluate(source, [ids])[0]
    # Calls that are padded, that are longer than the window, and that are a single token.
    got = feed(decoder, source, ids, [13, 1, 8, 2], wanted=1)
    assert np.abs(got - wanted[[12, 13, 21, 23]]).max() < 1e-3


@pytest.mark.parametrize(
    "name", ["as_it_is", "no_sharing", "one_kv_head", "all_full", "all_sliding", "rope_linear"]
)
def test_litertlm_logits_are_the_references(name: str, decoders: Decoders) -> None:
    source = random_source(**VARIANTS[name])
    ids = random_ids(source.config, CONTEXT)  # to the last place of the cache
    wanted = evaluate(source, [ids])[0]
    got = feed(decoders(source, "litertlm"), source, ids, [13, 1, 8, 10], wanted=1)
    assert np.abs(got - wanted[[12, 13, 21, 31]]).max() < 1e-3


@pytest.mark.parametrize("layout", ["windowed", "litertlm"])
@pytest.mark.parametrize("head_dim", [16, CONTEXT])  # with as many positions as values, no shape tells
@pytest.mark.parametrize("transposed", [None, False, True], ids=["now", "rows", "columns"])
def test_a_decoder_runs_files_whose_values_lie_either_way(
    layout: CacheLayout,
    head_dim: int,
    transposed: bool | None,
    decoders: Decoders,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Earlier versions had all values of a .litertlm in columns, and those of a bundle in rows."""
    if transposed is not None:
        if transposed != (layout == "litertlm"):
            pytest.skip("no version had it so")
        monkeypatch.setattr(tflite_text, "values_transposed", lambda *_, **__: transposed)
    source = random_source(head_dim=head_dim, sliding_window=5)
    ids = random_ids(source.config, CONTEXT)
    wanted = evaluate(source, [ids])[0]
    got = feed(decoders(source, layout), source, ids, [13, 1, 8, 10], wanted=1)
    assert np.abs(got - wanted[[12, 13, 21, 31]]).max() < 1e-3


def test_sliding_layers_of_a_litertlm_read_their_window(tmp_path: Path) -> None:
    source = random_source(sliding_window=5)
    file = emit_decoder(source.config, load_recipe("fp32"), context=CONTEXT, prefill=[8], layout="litertlm")
    write(file, source, tmp_path / "decoder.tflite")
    model = read_tflite(tmp_path / "decoder.tflite")
    for name, tokens in (("decode", 1), ("prefill_8", 8)):
        graph = model.subgraphs[model.signatures[name].subgraph]
        products = [o for o in graph.operators if o.code == schema.BuiltinOperator.BATCH_MATMUL]
        read = {n for o in products for i in o.inputs for n in graph.tensors[i].shape}
        assert 5 - 1 + tokens in read
        sliding = {i for i in source.config.kv_layers if source.config.is_sliding(i)}
        picked = [o for o in graph.operators if o.code == schema.BuiltinOperator.GATHER]
        assert len(picked) == 1 + 2 * len(sliding)  # the mask's columns, and keys and values


def test_prefill_stops_at_the_last_cache(tmp_path: Path) -> None:
    source = random_source()
    file = emit_decoder(source.config, load_recipe("fp32"), context=CONTEXT, prefill=PREFILL)
    model = parse(file, source, tmp_path)
    graphs = {graph.name.decode(): graph for graph in model.subgraphs}
    names = {key: {t.name.decode() for t in graph.tensors} for key, graph in graphs.items()}
    shared = source.config.first_shared_layer
    for key in ("prefill_4", "prefill_8"):
        assert not any(name.startswith(f"layers.{shared}.") for name in names[key])
        # Of the last owner only keys and values are wanted: its feed-forward block is not there.
        assert f"layers.{shared - 1}.mlp.gate_proj.weight" not in names[key]
        assert not names[key] & {head_name(source.config), "norm.weight"}
    assert {f"layers.{shared}.mlp.gate_proj.weight", head_name(source.config)} <= names["decode"]
    outputs = {s.signatureKey.decode(): {o.name.decode() for o in s.outputs} for s in model.signatureDefs}
    assert outputs["decode"] - outputs["prefill_4"] == {"logits"}


def test_signatures_share_weights(tmp_path: Path) -> None:
    source = random_source()
    one, three = (
        emit_decoder(source.config, load_recipe("fp32"), context=CONTEXT, prefill=prefill)
        for prefill in ((4,), (4, 8, 16))
    )
    assert one.size == three.size
    buffers = [
        {t.name: t.buffer for t in graph.tensors if t.name.startswith(b"layers.")}
        for graph in parse(three, source, tmp_path).subgraphs
    ]
    assert len(buffers) == 4
    for graph in buffers[1:]:
        common = graph.keys() & buffers[0].keys()
        assert common
        assert all(graph[name] == buffers[0][name] for name in common)


def test_weights_lie_behind_the_flatbuffer_apart_from_each_other(tmp_path: Path) -> None:
    source = random_source()
    file = emit_decoder(source.config, mixed(), context=CONTEXT, prefill=PREFILL)
    model = parse(file, source, tmp_path)
    size = (tmp_path / "model.tflite").stat().st_size
    assert size == file.file_bytes
    spans = sorted((b.offset, b.offset + b.size) for b in model.buffers if b.size)
    assert len(file.head) <= spans[0][0]
    assert all(stop <= start for (_, stop), (start, _) in itertools.pairwise(spans))
    assert spans[-1][1] == size


def test_the_recorded_hash_is_the_files(tmp_path: Path) -> None:
    # Channel-wise scales are patched in after the rest was written.
    source = random_source()
    file = emit_decoder(source.config, mixed(), context=CONTEXT, prefill=PREFILL)
    record = write(file, source, tmp_path / "model.tflite")
    assert record["sha256"] == hashlib.sha256((tmp_path / "model.tflite").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("precision", "columns", "expected"),
    [
        (Precision(32), 64, Precision(32)),
        (Precision(8, 64), 64, Precision(8)),
        (Precision(4, 64), 128, Precision(4, 64)),
        (Precision(4, 16), 128, Precision(4, 32)),
        (Precision(4, 128), 96, Precision(4, 32)),
        (Precision(4, 32), 48, Precision(4)),
        (Precision(4), 128, Precision(4)),
        (Precision(4), 33, Precision(8)),
    ],
)
def test_stored_precision(precision: Precision, columns: int, expected: Precision) -> None:
    assert stored_precision(precision, columns) == expected


@pytest.mark.parametrize("precision", [Precision(32), Precision(8), Precision(4), Precision(4, 32)])
def test_rows_are_read_past_the_engine(precision: Precision, tmp_path: Path) -> None:
    """Bit for bit what was quantized: the layouts, signs, nibbles and scales agree."""
    source = random_source(hidden_size_per_layer_input=32)
    recipe = changed(ple=precision)
    file = emit_per_layer_embedder(source.config, recipe)
    write(file, source, tmp_path / "ple.tflite")
    layout = file.row_layout(PLE_NAME, "ple.tflite", 1.0)
    expected = source.weights[PLE_NAME]
    if precision.bits != 32:
        kind = "bfloat16" if precision.group else "float32"
        expected = dequantize(quantize(expected, precision.bits, precision.group, "mse", kind, positive=True))
    with RowTable(tmp_path / "ple.tflite", layout) as table:
        assert np.array_equal(table.lookup(np.arange(len(expected))), expected)


def test_the_tied_heads_rows_are_the_embeddings(tmp_path: Path) -> None:
    source = random_source()
    file = emit_decoder(source.config, changed(head=Precision(8)), context=CONTEXT, prefill=PREFILL)
    write(file, source, tmp_path / "d.tflite")
    with RowTable(tmp_path / "d.tflite", file.row_layout(EMBEDDING_NAME, "d.tflite", 2.0)) as table:
        rows = table.lookup([0, 95])
    weights = source.weights[EMBEDDING_NAME][[0, 95]]
    assert np.abs(rows - 2 * weights).max() < 2 * np.abs(weights).max() / 127


def test_per_layer_embedder_runs(tmp_path: Path) -> None:
    """On the engine itself, as LiteRT-LM calls it; ids beyond the table, of soft tokens, give row 0."""
    from ai_edge_litert.interpreter import Interpreter

    source = random_source(hidden_size_per_layer_input=32)
    config = source.config
    file = emit_per_layer_embedder(config, changed(ple=Precision(4, 32)))
    write(file, source, tmp_path / "ple.tflite")
    run = Interpreter(str(tmp_path / "ple.tflite")).get_signature_runner("per_layer_embedder")
    layout = file.row_layout(PLE_NAME, "ple.tflite", config.ple_scale)
    with RowTable(tmp_path / "ple.tflite", layout) as table:
        for token, row in ((3, 3), (config.vocab_size_per_layer_input, 0), (-1, 0)):
            got = run(token_ids=np.array([[token]], np.int32))["embeddings"]
            assert got.shape == (1, 1, config.num_hidden_layers, 32)
            assert np.allclose(got.reshape(-1), table.lookup([row])[0], atol=1e-5)


def changed(**parts: Precision) -> Recipe:
    """fp32, but for some parts."""
    recipe = load_recipe("fp32")
    return replace(recipe, parts={**recipe.parts, **{Part(name): p for name, p in parts.items()}})


def mixed() -> Recipe:
    return changed(decoder=Precision(4, 32), head=Precision(4), small=Precision(8))


def parse(file: TfliteFile, source: DictSource, folder: Path) -> Any:
    """The schema's objects of what is written."""
    write(file, source, folder / "model.tflite")
    raw = (folder / "model.tflite").read_bytes()
    assert raw[4:8] == b"TFL3"
    return schema.ModelT.InitFromPackedBuf(raw)
