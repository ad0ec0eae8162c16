"""A .tflite file is read exactly, or refused: truncated, with offsets that lie, or of another model."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_edge.runtime.artifacts.row_table import RowTable
from gemma_edge.runtime.artifacts.tflite_check import check_decoder, check_embedder, embedding_table
from gemma_edge.runtime.artifacts.tflite_reader import TfliteModel, read_tflite
from gemma_edge.runtime.errors import BundleError

pytest.importorskip("ai_edge_litert", reason="the LiteRT schema is not installed")

from support.bigram_tflite import S, TinyGraph, TinyTflite, bigram, decoder_bytes, embedder_bytes, tiny_config

CONFIG = tiny_config()
EMBEDDING, HEAD = bigram(CONFIG)
DECODER = decoder_bytes(CONFIG, HEAD)
EMBEDDER = embedder_bytes(EMBEDDING, (CONFIG.hidden_size,), 0.25)


@pytest.fixture
def read(tmp_path):
    """Reads bytes as a file."""

    def reader(data: bytes, **place: int) -> TfliteModel:
        path = tmp_path / "model.tflite"
        path.write_bytes(data)
        return read_tflite(path, **place)

    return reader


def weight_spans(data: bytes, folder: Path) -> list[tuple[int, int]]:
    (folder / "whole.tflite").write_bytes(data)
    model = read_tflite(folder / "whole.tflite")
    spans = {t.data for graph in model.subgraphs for t in graph.tensors if t.data}
    return sorted((span.offset, span.length) for span in spans)


# What a good file says. ---------------------------------------------------------------------------


def test_decoder(read):
    model = read(DECODER)
    assert sorted(model.signatures) == ["decode", "prefill_4", "prefill_8"]
    decoder = check_decoder(model, CONFIG)
    assert (decoder.prefill, decoder.context, decoder.layout) == ((4, 8), 64, "litertlm")
    logits = model.signatures["decode"].outputs["logits"]
    assert (logits.shape, logits.type) == ((1, 1, CONFIG.vocab_size), "float32")


def test_weights_are_where_the_file_has_them(read):
    graph = read(DECODER).subgraphs[-1]
    head = next(t for t in graph.tensors if t.name == "head")
    packed = np.frombuffer(DECODER, np.uint8, head.data.length, head.data.offset).reshape(len(HEAD), -1)
    low = (packed & 15).astype(np.int8)
    assert np.array_equal(np.where(low > 7, low - 16, low), HEAD[:, 0::2])
    assert head.quantization.block == 32
    scales = graph.tensors[head.quantization.scale_tensor].data
    assert set(np.frombuffer(DECODER, np.float16, scales.length // 2, scales.offset)) == {np.float16(1 / 16)}


def test_embedding_rows_are_where_the_layout_has_them(read):
    model = read(EMBEDDER)
    check_embedder(model, (CONFIG.hidden_size,))
    layout = embedding_table(model, CONFIG.hidden_size, 1.0)
    data, scales = layout["data"], layout["scales"]
    row = np.frombuffer(EMBEDDER, np.int8, CONFIG.hidden_size, data["offset"] + 5 * data["stride"])
    (scale,) = struct.unpack_from("<f", EMBEDDER, scales["offset"] + 5 * scales["stride"])
    assert np.array_equal(row * scale, EMBEDDING[5] * np.float32(0.25))


def test_embedding_rows_through_a_row_table(read, tmp_path):
    model = read(EMBEDDER)
    layout = embedding_table(model, CONFIG.hidden_size, 3.0)
    with RowTable(tmp_path / "model.tflite", layout) as table:
        assert np.allclose(table.lookup([7, 319]), EMBEDDING[[7, 319]] * 0.75)


def test_a_model_inside_another_file(read, tmp_path):
    before, after = bytes(16384), b"what follows"
    model = read(before + EMBEDDER + after, start=len(before), stop=len(before) + len(EMBEDDER))
    alone = read(EMBEDDER)
    shifted = embedding_table(model, CONFIG.hidden_size, 1.0)["data"]["offset"]
    assert shifted == len(before) + embedding_table(alone, CONFIG.hidden_size, 1.0)["data"]["offset"]


# Damage. ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", [DECODER, EMBEDDER], ids=["decoder", "embedder"])
def test_truncation_anywhere_is_refused(read, data):
    for size in {*range(0, len(data), 331), 1, 3, 4, 7, 8, 12, len(data) - 1}:
        with pytest.raises(BundleError):
            read(data[:size])


def test_bytes_after_the_last_weight_are_refused(read):
    with pytest.raises(BundleError, match="end of the last weight"):
        read(DECODER + b"\0")


def test_an_empty_file(read):
    with pytest.raises(BundleError, match="header"):
        read(b"")


def test_no_such_file(tmp_path):
    with pytest.raises(BundleError, match="readable"):
        read_tflite(tmp_path / "nothing.tflite")


def test_another_identifier(read):
    with pytest.raises(BundleError, match="TFL3"):
        read(DECODER[:4] + b"TFL2" + DECODER[8:])


@pytest.mark.parametrize("delta", [-64, 16, 64, 1 << 20, 1 << 33, 1 << 62])
@pytest.mark.parametrize("which", ["offset", "length"])
def test_a_weight_that_is_not_where_it_should_be(read, tmp_path, delta, which):
    graph_end = weight_spans(DECODER, tmp_path)[0][0]
    for span in weight_spans(DECODER, tmp_path):
        value = span[which == "length"]
        if value < 64:
            continue  # too small a number to be found in the graph
        at = DECODER.index(struct.pack("<Q", value), 0, graph_end)
        changed = struct.pack("<Q", (value + delta) % 2**64)
        with pytest.raises(BundleError):
            read(DECODER[:at] + changed + DECODER[at + 8 :])


def test_overlapping_weights(read, tmp_path):
    first, second = weight_spans(DECODER, tmp_path)[:2]
    at = DECODER.index(struct.pack("<Q", second[0]), 0, first[0])
    with pytest.raises(BundleError, match="bytes of its own"):
        read(DECODER[:at] + struct.pack("<Q", first[0]) + DECODER[at + 8 :])


@settings(max_examples=400, deadline=None)
@given(bit=st.integers(0, 8 * 2**20), decoder=st.booleans())
def test_a_flipped_bit_is_refused_or_harmless(tmp_path_factory, bit, decoder):
    whole = bytearray(DECODER if decoder else EMBEDDER)
    folder = tmp_path_factory.getbasetemp()
    original = weight_spans(bytes(whole), folder)
    at = (bit // 8) % original[0][0]  # in the graph: any value of a weight is a good one
    whole[at] ^= 1 << bit % 8
    try:
        model = weight_spans(bytes(whole), folder)
    except BundleError:
        return
    # What passes has its weights in the same places, all of them or fewer.
    assert set(model) <= set(original)


@settings(max_examples=200, deadline=None)
@given(at=st.integers(0, len(EMBEDDER)), junk=st.binary(min_size=1, max_size=64))
def test_bytes_replaced_by_junk_never_crash(tmp_path_factory, at, junk):
    path = tmp_path_factory.getbasetemp() / "junk.tflite"
    path.write_bytes(EMBEDDER[:at] + junk + EMBEDDER[at + len(junk) :])
    with contextlib.suppress(BundleError):
        model = read_tflite(path)
        check_embedder(model, (CONFIG.hidden_size,))
        # Replaced by itself, or in a name or a weight.
        assert embedding_table(model, CONFIG.hidden_size, 1.0)["rows"] == CONFIG.vocab_size


def test_a_vector_that_repeats_one_table_ends_soon(read):
    # A million offsets to the same subgraph, each with its thousands of tensors, in four megabytes.
    file = TinyTflite()
    graph = TinyGraph(file, "main")
    for i in range(3000):
        graph.tensor(f"t{i}", (1,))
    subgraph = file.bytes()
    root = struct.unpack_from("<I", subgraph, 0)[0]
    vtable = root - struct.unpack_from("<i", subgraph, root)[0]
    slot = struct.unpack_from("<H", subgraph, vtable + 4 + 2 * 2)[0]  # subgraphs
    vector = root + slot + struct.unpack_from("<I", subgraph, root + slot)[0]
    table = vector + 4 + struct.unpack_from("<I", subgraph, vector + 4)[0]
    count, at = 1_000_000, -(-len(subgraph) // 4) * 4
    # Offsets go forward only, so the repeated table comes after the vector: a copy of the file's tail.
    tail = at + 4 + 4 * count
    moved = subgraph[vtable:] if vtable < table else subgraph
    data = bytearray(subgraph + bytes(at - len(subgraph)) + struct.pack("<I", count))
    target = tail + (table - (vtable if vtable < table else 0))
    positions = np.arange(at + 4, tail, 4)
    data += (target - positions).astype("<u4").tobytes() + moved
    struct.pack_into("<I", data, root + slot, at - (root + slot))
    with pytest.raises(BundleError, match="tables"):
        read(bytes(data))


# Graphs that do not hold together. ----------------------------------------------------------------


def graph_with(change) -> bytes:
    """c = a + b, with a change."""
    file = TinyTflite()
    graph = TinyGraph(file, "main")
    a = graph.input("a", (2, 32))
    b = graph.tensor("b", (2, 32), buffer=file.buffer(np.ones((2, 32), np.float32)))
    c = graph.operator(file.code(0), [a, b], (2, 32), 11, S.AddOptionsT())
    graph.output("c", c)
    change(file, graph.graph)
    return file.bytes()


def test_a_graph_that_holds_together(read):
    model = read(graph_with(lambda file, graph: None))
    assert list(model.signatures["main"].inputs) == ["a"]


def quantized(scales, axis=0, **values):
    def change(file, graph):
        quantization = S.QuantizationParametersT()
        quantization.scale, quantization.quantizedDimension = np.asarray(scales, np.float32), axis
        for name, value in values.items():
            setattr(quantization, name, value)
        graph.tensors[1].quantization = quantization

    return change


def blockwise(block):
    def change(file, graph):
        quantization, details = S.QuantizationParametersT(), S.BlockwiseQuantizationT()
        details.scales, details.zeroPoints, details.blockSize = 1, -1, block
        quantization.detailsType, quantization.details = S.QuantizationDetails.BlockwiseQuantization, details
        graph.tensors[1].quantization = quantization

    return change


def change_of(path: str, value):
    """A change of one attribute, named as in the schema: `graph.operators.0.inputs`."""

    def change(file, graph):
        *parents, name = path.split(".")[1:]
        target = {"graph": graph, "model": file.model}[path.split(".")[0]]
        for parent in parents:
            target = target[int(parent)] if parent.isdigit() else getattr(target, parent)
        setattr(target, name, value)

    return change


def huge_activation(file, graph):
    tensor = S.TensorT()
    tensor.name, tensor.shape, tensor.type, tensor.buffer = "huge", np.array([1, 2**24, 16], np.int32), 0, 0
    graph.tensors.append(tensor)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (huge_activation, r"tensors\[3\].shape: expected at most 16777216 bytes"),
        (change_of("model.version", 2), "version"),
        (change_of("model.operatorCodes.0.builtinCode", 32), "CUSTOM"),
        (change_of("model.operatorCodes.0.builtinCode", 500), "builtin operator"),
        (change_of("model.operatorCodes.0.customCode", "evil"), "builtin operator"),
        (change_of("model.operatorCodes.0.builtinCode", 206), "composite"),
        (change_of("graph.operators.0.opcodeIndex", 7), "opcode_index"),
        (change_of("graph.operators.0.inputs", [0, 9]), "indices below 3"),
        (change_of("graph.operators.0.inputs", [0, -2]), "indices below 3"),
        (change_of("graph.operators.0.inputs", [0]), "2 inputs"),
        (change_of("graph.operators.0.inputs", [0, -1]), "2 inputs"),
        (change_of("graph.operators.0.inputs", [0, 1, 1]), "2 inputs"),
        (change_of("graph.operators.0.outputs", []), "an output"),
        (change_of("graph.operators.0.inputs", [0, 2]), "before it is computed"),
        (change_of("graph.operators.0.outputs", [1]), "again"),
        (change_of("graph.operators.0.customOptions", [1, 2]), "custom options"),
        (change_of("graph.operators", []), "computed"),
        (change_of("graph.inputs", [1]), "without data"),
        (change_of("graph.inputs", [3]), "indices below 3"),
        (change_of("graph.outputs", [0]), "one name for each"),
        (change_of("graph.tensors.1.buffer", 9), "buffer"),
        (change_of("graph.tensors.1.shape", [2, 33]), "bytes of float32"),
        (change_of("graph.tensors.1.type", 1), "bytes of float16"),
        (change_of("graph.tensors.1.type", 5), "type of numbers"),
        (change_of("graph.tensors.1.isVariable", True), "constant"),
        (change_of("graph.tensors.0.shape", [2, -1]), "positive"),
        (change_of("graph.tensors.0.shape", [2**30, 2**30]), "at most"),
        (change_of("graph.tensors.0.shapeSignature", [-1, 32]), "dynamic"),
        (change_of("model.signatureDefs.0.subgraphIndex", 1), "subgraph_index"),
        (change_of("model.signatureDefs.0.signatureKey", ""), "name of its own"),
        (change_of("model.signatureDefs.0.inputs.0.tensorIndex", 2), "one name for each"),
        (quantized([1.0, 2.0, 3.0]), "scales"),
        (quantized([1.0, 0.0]), "positive"),
        (quantized([1.0, float("nan")]), "positive"),
        (quantized([1.0, 1.0], zeroPoint=np.array([0, 3])), "around zero"),
        (quantized([1.0, 1.0], zeroPoint=np.array([0])), "zero points"),
        (quantized([1.0, 1.0], axis=5), "scales"),
        (blockwise(24), "power of two"),
        (blockwise(64), "power of two"),
        (blockwise(32), "float16"),
    ],
)
def test_a_graph_that_does_not(read, change, message):
    with pytest.raises(BundleError, match=message):
        read(graph_with(change))


# Another model. -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 321},
        {"hidden_size": 32},
        {"hidden_size_per_layer_input": 8},
        {"head_dim": 16},
        {"num_key_value_heads": 2},
        {"num_hidden_layers": 4, "layer_types": ["sliding_attention", *["full_attention"] * 3]},
        {"num_kv_shared_layers": 0},
    ],
    ids=lambda change: next(iter(change)),
)
def test_another_models_decoder(read, change):
    with pytest.raises(BundleError, match="signature"):
        check_decoder(read(DECODER), tiny_config(**change))


def test_an_embedder_is_no_decoder(read):
    with pytest.raises(BundleError, match="prefill_N"):
        check_decoder(read(EMBEDDER), CONFIG)


def test_a_decoder_is_no_embedder(read):
    with pytest.raises(BundleError, match="signatures"):
        check_embedder(read(DECODER), (CONFIG.hidden_size,))


def test_an_embedder_of_another_width(read):
    with pytest.raises(BundleError, match="int32"):
        check_embedder(read(EMBEDDER), (3, 16))
    with pytest.raises(BundleError, match="rows of 48"):
        embedding_table(read(EMBEDDER), 48, 1.0)
