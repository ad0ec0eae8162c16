"""Block-wise quantization: packing, error bounds, ONNX Runtime's reading of it, streaming."""

from __future__ import annotations

import threading

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from gemma_edge.export.weights import quantize as module
from gemma_edge.export.weights.quantize import (
    BlockQuantized,
    Clip,
    dequantize,
    pack_nibbles,
    quantize,
    quantize_stream,
    unpack_nibbles,
)

BITS = st.sampled_from([4, 8])
GROUPS = st.sampled_from([16, 32, 64])
SHAPES = hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=100)


def weights_of(limit: float) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, SHAPES, elements=st.floats(-limit, limit, width=32))


def normal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def errors(weights: np.ndarray, quantized: BlockQuantized) -> np.ndarray:
    return dequantize(quantized).astype(np.float64) - weights


def scale_of_each_weight(quantized: BlockQuantized) -> np.ndarray:
    return np.repeat(np.abs(quantized.scales), quantized.group, axis=1)[:, : quantized.columns].astype(
        np.float64
    )


@given(hnp.arrays(np.uint8, SHAPES.map(lambda shape: (shape[0], 2 * shape[1])), elements=st.integers(0, 15)))
def test_pack_unpack_round_trip(values: np.ndarray) -> None:
    assert np.array_equal(unpack_nibbles(pack_nibbles(values)), values)
    assert np.array_equal(pack_nibbles(values.T, axis=0), pack_nibbles(values).T)


def test_the_low_nibble_comes_first() -> None:
    assert pack_nibbles(np.array([[1, 2, 15, 0]], np.uint8)).tolist() == [[0x21, 0x0F]]
    with pytest.raises(ValueError, match="even number"):
        pack_nibbles(np.zeros((2, 3), np.uint8))


@pytest.mark.parametrize(("bits", "bytes_a_block", "zero"), [(4, 16, 0x88), (8, 32, 128)])
def test_layout_and_padding_with_the_zero_point(bits: int, bytes_a_block: int, zero: int) -> None:
    quantized = quantize(np.ones((3, 33), np.float32), bits, 32)
    assert quantized.data.shape == (3, 2, bytes_a_block) and quantized.data.dtype == np.uint8
    assert quantized.scales.shape == (3, 2) and quantized.scales.dtype == np.float32
    assert (quantized.data[:, 1, 1:] == zero).all()
    assert np.allclose(dequantize(quantized), 1, rtol=1e-6) and dequantize(quantized).shape == (3, 33)


@given(weights_of(2.0**126), BITS, GROUPS)
def test_unclipped_error_is_at_most_half_a_scale(weights: np.ndarray, bits: int, group: int) -> None:
    quantized = quantize(weights, bits, group, "none")
    assert (quantized.scales >= 0).all()
    # Blocks of weights below 2**-100 become zero; float32 itself rounds to 2**-24.
    bound = 0.5 * scale_of_each_weight(quantized) * (1 + 1e-4) + 2.0**-100
    assert (np.abs(errors(weights, quantized)) <= bound).all()


@given(weights_of(1e4), BITS, GROUPS, st.sampled_from(["none", "mse"]))
def test_float16_scales_are_exact_and_made_up_for(
    weights: np.ndarray, bits: int, group: int, clip: Clip
) -> None:
    quantized = quantize(weights, bits, group, clip, "float16")
    assert np.array_equal(quantized.scales.astype(np.float16).astype(np.float32), quantized.scales)
    if clip == "none":
        bound = 0.5 * scale_of_each_weight(quantized) * (1 + 1e-4) + 2.0**-100
        assert (np.abs(errors(weights, quantized)) <= bound).all()


@given(weights_of(10.0), BITS, GROUPS)
def test_mse_clip_is_never_worse_than_none(weights: np.ndarray, bits: int, group: int) -> None:
    def of_each_block(values: np.ndarray) -> np.ndarray:
        squares = values.astype(np.float64) ** 2
        return np.add.reduceat(squares, np.arange(0, weights.shape[1], group), axis=1)

    clipped = of_each_block(errors(weights, quantize(weights, bits, group, "mse")))
    plain = of_each_block(errors(weights, quantize(weights, bits, group, "none")))
    assert (clipped <= plain + 1e-6 * of_each_block(weights) + 2.0**-200).all()


@pytest.mark.parametrize("group", [32, 64, 128])
def test_mse_clip_comes_close_to_an_exhaustive_search(group: int) -> None:
    weights = normal(64, 512)
    blocks = weights.reshape(-1, group)
    extreme = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    best = np.full(len(blocks), np.inf)
    for factor in np.linspace(0.7, 1.6, 200):
        scale = extreme / -8 / factor
        best = np.minimum(best, ((np.clip(np.rint(blocks / scale), -8, 7) * scale - blocks) ** 2).sum(1))
    ours = (errors(weights, quantize(weights, 4, group, "mse")) ** 2).sum()
    plain = (errors(weights, quantize(weights, 4, group, "none")) ** 2).sum()
    assert ours <= 1.02 * best.sum()
    assert ours <= 0.75 * plain


@settings(max_examples=25)
@given(st.integers(0, 1000), st.integers(1, 200), GROUPS)
def test_eight_bits_are_better_than_four(seed: int, columns: int, group: int) -> None:
    weights = normal(4, columns, seed)
    four, eight = (np.square(errors(weights, quantize(weights, bits, group))).sum() for bits in (4, 8))
    assert eight <= four + 1e-12
    if columns > 16:
        assert eight < 0.05 * four


@pytest.mark.parametrize("clip", ["none", "mse"])
@pytest.mark.parametrize("bits", [4, 8])
def test_hard_blocks(bits: int, clip: Clip) -> None:
    weights = np.zeros((5, 32), np.float32)
    weights[1, 5] = -3.0  # a single weight is exact
    weights[2] = 1e-42  # denormals
    weights[3] = np.linspace(-8e37, 8e37, 32)  # huge
    weights[4, ::2] = 2.0  # two values are exact
    got = dequantize(quantize(weights, bits, 32, clip))
    assert (got[0] == 0).all() and (got[2] == 0).all()
    assert np.allclose(got[[1, 4]], weights[[1, 4]], rtol=1e-6, atol=0)
    assert np.abs(got[3] - weights[3]).max() <= 8e37 / (8 if bits == 4 else 128)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 2.0**127])
def test_weights_that_are_not_finite_are_refused(bad: float) -> None:
    weights = normal(3, 64)
    weights[1, 40] = bad
    with pytest.raises(ValueError, match="NaN, infinite"):
        quantize(weights, 4, 32)


def test_bad_arguments_are_refused() -> None:
    for bits, group in ((3, 32), (4, 8), (4, 48)):
        with pytest.raises(ValueError, match="must be"):
            quantize(normal(1, 32), bits, group)
    with pytest.raises(ValueError, match="too large for a scale in float16"):
        quantize(np.full((1, 32), 1e7, np.float32), 4, 32, scale_type="float16")


def test_result_does_not_depend_on_tiles_strides_or_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = normal(37, 96).astype(np.float16).astype(np.float32)
    whole = quantize(weights, 4, 32)
    monkeypatch.setattr(module, "TILE", 200)
    strided = np.asfortranarray(weights)
    for same in (weights, strided, weights.astype(np.float16)):
        tiled = quantize(same, 4, 32)
        assert np.array_equal(tiled.data, whole.data) and np.array_equal(tiled.scales, whole.scales)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(
    ("columns", "group"), [(128, 32), (128, 128), (100, 32), (16, 16), (70, 64), (500, 256)]
)
def test_onnxruntime_multiplies_with_the_same_weights(bits: int, columns: int, group: int) -> None:
    quantized, inputs = quantize(normal(24, columns), bits, group), normal(5, columns, seed=1)
    assert (quantized.scales < 0).any()
    node = helper.make_node(
        "MatMulNBits",
        ["x", "data", "scales"],
        ["y"],
        domain="com.microsoft",
        K=columns,
        N=24,
        bits=bits,
        block_size=group,
        accuracy_level=0,
    )
    graph = helper.make_graph(
        [node],
        "linear",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [5, 24])],
        [
            numpy_helper.from_array(quantized.data, "data"),
            numpy_helper.from_array(quantized.scales, "scales"),
        ],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"x": inputs})
    expected = inputs.astype(np.float64) @ dequantize(quantized).astype(np.float64).T
    assert np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_stream_keeps_order_and_bounds_what_is_in_flight(workers: int) -> None:
    taken = yielded = most = 0
    weights = normal(100, 64)

    def chunks():  # type: ignore[no-untyped-def]
        nonlocal taken, most
        for row in range(0, 100, 7):
            taken += 1
            most = max(most, taken - yielded)
            yield weights[row : row + 7]

    parts = []
    for part in quantize_stream(chunks(), 4, 32, workers=workers):
        yielded += 1
        parts.append(part)
    whole = quantize(weights, 4, 32)
    assert most <= workers + 1
    assert np.array_equal(np.concatenate([part.data for part in parts]), whole.data)
    assert np.array_equal(np.concatenate([part.scales for part in parts]), whole.scales)


def test_stream_passes_errors_on_and_leaves_no_thread() -> None:
    before = set(threading.enumerate())
    chunks = [normal(2, 32), np.full((2, 32), np.nan, np.float32), normal(2, 32)]
    with pytest.raises(ValueError, match="NaN"):
        list(quantize_stream(chunks, 4, 32))
    abandoned = quantize_stream(iter([normal(2, 32)] * 9), 4, 32)
    next(abandoned)
    abandoned.close()  # type: ignore[attr-defined]
    assert set(threading.enumerate()) <= before  # others' threads may end meanwhile


# What XNNPACK takes. ------------------------------------------------------------------------------


@given(weights_of(1000.0), BITS, st.sampled_from([0, 16, 32]))
def test_positive_scales_are_positive_and_exact_in_bfloat16(
    weights: np.ndarray, bits: int, group: int
) -> None:
    quantized = quantize(weights, bits, group, "mse", "bfloat16", positive=True)
    assert (quantized.scales > 0).all()
    assert not (quantized.scales.view(np.uint32) & 0xFFFF).any()
    assert np.array_equal(quantized.scales.astype(np.float16).astype(np.float32), quantized.scales)


@pytest.mark.parametrize("columns", [33, 64, 4096])
def test_group_0_is_one_block_a_row(columns: int) -> None:
    weights = normal(8, columns)
    quantized = quantize(weights, 8, 0, positive=True)
    assert quantized.scales.shape == (8, 1)
    # The largest weight of a row may be clipped by a step, where that leaves less squared error.
    assert np.abs(errors(weights, quantized)).max() <= 1.01 * quantized.scales.max()


def test_wide_blocks_are_clipped_further() -> None:
    weights = normal(16, 4096)
    clipped, whole = (quantize(weights, 4, 0, clip, positive=True) for clip in ("mse", "none"))
    assert np.square(errors(weights, clipped)).sum() < 0.6 * np.square(errors(weights, whole)).sum()
