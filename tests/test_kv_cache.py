"""Which layers keep keys and values and how many, decoding far through windows, and the int8 cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from gemma_edge.export.emit.reference.reference_text import evaluate
from gemma_edge.export.synth.synth_gemma3n import text_config
from gemma_edge.export.weights.kv_scales import KvScales, kv_scales
from gemma_edge.runtime.engines.kv_cache import cache_layouts, int8_layers, litert_cache_bytes
from gemma_edge.runtime.engines.onnx_decoder import OnnxDecoder
from gemma_edge.runtime.families.config_fields import FULL, SLIDING
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from support.random_gemma3n_text import (
    SMALL,
    Array,
    DictSource,
    feed,
    random_ids,
    random_source,
    write_decoder,
)

MIB = 1 << 20
# What fp32 arithmetic in another order costs on these models.
EXACT = 1e-4


@pytest.fixture(scope="module")
def source() -> DictSource:
    return random_source()


def decoder(source: DictSource, folder: Path, scales: dict[int, KvScales] | None = None) -> OnnxDecoder:
    return OnnxDecoder(write_decoder(source, folder, context=96, kv_scales=scales), threads=1)


# Layouts. -----------------------------------------------------------------------------------------


def test_layouts_of_e2b() -> None:
    """20 caches, not 30; of them 4 global and the sliding one that others read are as long as the context."""
    layouts = cache_layouts(Gemma3nConfig.from_dict(text_config("e2b")))
    assert [i for i, layout in layouts.items() if not layout.windowed] == [4, 9, 14, 18, 19]
    assert len(layouts) == 20
    assert sum(layout.bytes(4096) for layout in layouts.values()) == (5 * 4096 + 15 * 544) * 4096
    assert 111 * MIB < sum(layout.bytes(4096) for layout in layouts.values()) < 112 * MIB


def test_int8_is_for_caches_that_grow_with_the_context() -> None:
    config = Gemma3nConfig.from_dict(text_config("e2b"))
    fp32, int8 = cache_layouts(config), cache_layouts(config, "int8")
    for layer, layout in int8.items():
        smaller = 1 if layout.windowed else 4
        assert layout.precision == ("fp32" if layout.windowed else "int8")
        assert smaller * layout.bytes(4096) == fp32[layer].bytes(4096)


def test_caches_of_a_tflite() -> None:
    """E2B: 4 global layers and 16 sliding ones; an int8 cache is read through an fp32 copy of one layer."""
    config, row = Gemma3nConfig.from_dict(text_config("e2b")), 2 * 512
    windows = 16 * 512 * row * 4
    for context in (4096, 32768):
        whole = context * row
        assert litert_cache_bytes(config, context, "fp32", rings=True) == 4 * whole * 4 + windows
        assert litert_cache_bytes(config, context, "int8", rings=True) == 4 * whole + windows + whole * 4
        assert litert_cache_bytes(config, context, "fp32", rings=False) == 20 * whole * 4
        assert litert_cache_bytes(config, context, "int8", rings=False) == 20 * whole + whole * 4
    assert not int8_layers(config, "fp32", rings=False)


@pytest.mark.parametrize("window", [1, 3, 4, 100])
def test_a_windowed_cache_has_room_for_its_window_and_a_token(window: int) -> None:
    layout = cache_layouts(Gemma3nConfig.from_dict(SMALL | {"sliding_window": window}))[0]
    assert layout.windowed and layout.capacity(10**6) > window
    assert layout.row_bytes == 2 * 2 * 16 * 4


def test_without_sharing_every_sliding_layer_is_windowed() -> None:
    layouts = cache_layouts(Gemma3nConfig.from_dict(SMALL | {"num_kv_shared_layers": 0}))
    assert [layout.windowed for layout in layouts.values()] == [t == SLIDING for t in SMALL["layer_types"]]


# Windows. -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chunks",
    [[1] * 90, [30, *[1] * 60], [4, 5, 6, *[1] * 40, 35], [3] * 30],
    ids=["decode", "prompt", "mixed", "3s"],
)
@pytest.mark.parametrize("sharing", [2, 0])
def test_windowed_cache_evicts_and_stays_exact(chunks: list[int], sharing: int, tmp_path: Path) -> None:
    """90 tokens through caches of 6 rows."""
    model = random_source(num_kv_shared_layers=sharing)
    layouts = cache_layouts(model.config)
    assert layouts[0].windowed and layouts[0].capacity(96) == 6
    ids = random_ids(model.config, 90)
    got = feed(decoder(model, tmp_path), model, ids, chunks)
    assert np.abs(got - evaluate(model, [ids])[0]).max() <= EXACT


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_shared_sliding_layers_read_only_the_window(
    source: DictSource, precision: str, tmp_path: Path
) -> None:
    """Rows of the shared sliding cache that are older than the window may hold anything."""
    ids = random_ids(source.config, 60)
    scales = kv_scales(source, [ids]) if precision == "int8" else None
    model = decoder(source, tmp_path, scales)
    expected = feed(model, source, ids, [50, *[1] * 10])
    model.reset()
    feed(model, source, ids[:50], [50])
    keys, values = model.caches[4:6]  # of layer 2
    oldest = 50 - source.config.sliding_window + 1  # the least position that the next query sees
    for cache in (keys, values):
        rows = cache.numpy().copy()
        assert rows.shape == (1, 2, 96, 16)
        rows[:, :, :oldest] = 100
        cache.update_inplace(rows)
    np.testing.assert_allclose(feed(model, source, ids[50:], [1] * 10), expected[50:], atol=EXACT)


def test_the_oldest_row_of_the_window_is_read(source: DictSource, tmp_path: Path) -> None:
    """The other side of the test above: one row more, and the result changes."""
    ids = random_ids(source.config, 51)
    model = decoder(source, tmp_path)
    expected = feed(model, source, ids, [50, 1])[-1:]
    model.reset()
    feed(model, source, ids[:50], [50])
    values = model.caches[5].numpy().copy()
    values[:, :, 50 - source.config.sliding_window + 1] = 100
    model.caches[5].update_inplace(values)
    assert np.abs(feed(model, source, ids[50:], [1]) - expected).max() > 0.01


# The int8 cache. ----------------------------------------------------------------------------------


def test_int8_cache_is_close_to_fp32(source: DictSource, tmp_path: Path) -> None:
    """Calibrated on one text, used on another."""
    ids = random_ids(source.config, 80, seed=1)
    expected = evaluate(source, [ids])[0]
    scales = kv_scales(source, [random_ids(source.config, 64, seed=2)])
    calibrated = feed(decoder(source, tmp_path / "calibrated", scales), source, ids, [40, *[1] * 40])
    error = np.abs(calibrated - expected)
    assert 1e-4 < error.mean() <= 0.02 * expected.std()
    assert error.max() <= 0.3 * expected.std()
    # Scales of 1 keep only the integers of a value: calibration is what makes the cache good.
    ones = {i: KvScales(np.ones_like(s.key), np.ones_like(s.value)) for i, s in scales.items()}
    rough = feed(decoder(source, tmp_path / "rough", ones), source, ids, [40, *[1] * 40])
    assert np.abs(rough - expected).mean() > 10 * error.mean()


def test_int8_cache_does_not_depend_on_chunks(source: DictSource, tmp_path: Path) -> None:
    ids = random_ids(source.config, 40, seed=1)
    model = decoder(source, tmp_path, kv_scales(source, [ids]))
    whole = feed(model, source, ids, [40])
    model.reset()
    # A token's own key and value are quantized too, whether or not its query is in the same call.
    assert np.abs(feed(model, source, ids, [7, 1, 1, 20, 11]) - whole).max() <= 0.3 * whole.std()


def test_scales_cover_what_was_seen_and_no_more_than_can_be(source: DictSource) -> None:
    ids = random_ids(source.config, 64)
    caches: dict[int, tuple[Array, Array]] = {}
    evaluate(source, [ids], caches=caches)
    scales = kv_scales(source, [ids])
    assert sorted(scales) == [0, 1, 2, 3]
    for layer, (keys, values) in caches.items():
        weight = np.abs(source.read(f"layers.{layer}.self_attn.k_norm.weight"))
        most_key = 4 * np.hypot(weight[:8], weight[8:])  # a pair of channels turns; sqrt(head_dim) is 4
        for seen, scale, bound in (
            (keys, scales[layer].key, np.tile(most_key, 2)),
            (values, scales[layer].value, 4.0),
        ):
            assert scale.shape == (1, 2, 1, 16) and scale.dtype == np.float32
            largest = 127 * scale[0, :, 0]
            assert (largest >= np.abs(seen).max(axis=0) * 0.999).all()
            assert (largest <= bound * 1.001).all()


def test_full_layers_have_no_window() -> None:
    layouts = cache_layouts(Gemma3nConfig.from_dict(SMALL | {"layer_types": [FULL] * 6}))
    assert [layout.capacity(77) for layout in layouts.values()] == [77] * 4
