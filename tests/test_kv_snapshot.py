"""KV caches copied out, put back and taken back, in every layout of both engines: bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gemma_edge.export.exporter import export_bundle
from gemma_edge.export.weights.kv_scales import kv_scales
from gemma_edge.runtime.artifacts.artifact_formats import ARTIFACT_FORMATS
from gemma_edge.runtime.engines.decoder import Decoder, can_truncate
from gemma_edge.runtime.engines.deferred_decoder import DeferredDecoder
from gemma_edge.runtime.engines.kv_snapshot import EveryPosition, Evicting, Kept, KvBuffers, Ring
from gemma_edge.runtime.engines.onnx_decoder import OnnxDecoder
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.model import Model
from support.random_gemma3n_text import DictSource, feed, random_ids, random_source, write_decoder

WINDOW, CONTEXT = 24, 200
LITERT = ("tflite-fp32", "litertlm-fp32", "tflite-int8", "litertlm-int8")
Feed = Callable[[Decoder, list[int], list[int]], Any]  # logits of ids, cut into calls
Make = Callable[..., tuple[Decoder, Feed]]


# What buffers keep. -------------------------------------------------------------------------------


@given(
    kept=st.one_of(
        st.just(EveryPosition()),
        st.integers(1, 40).map(Ring),
        st.tuples(st.integers(1, 40), st.integers(1, 9)).map(lambda t: Evicting(t[0] + t[1], t[0])),
    ),
    position=st.integers(0, 300),
)
def test_what_is_kept_is_bounded_and_reaches_back(kept: Kept, position: int) -> None:
    assert 0 <= kept.used(position) <= position
    assert 0 <= kept.earliest_at(position) <= position
    for back in range(kept.earliest_at(position), position):
        assert kept.used(back) <= kept.used(position)


@pytest.mark.parametrize("window", [1, 3, 24])
def test_rows_lie_where_the_operator_puts_them(window: int, tmp_path: Path) -> None:
    """However the calls are cut. Layer 0's keys depend on a token and its position alone."""
    everything = random_source(sliding_window=400)
    ids = random_ids(everything.config, CONTEXT)
    whole = OnnxDecoder(write_decoder(everything, tmp_path / "whole", context=CONTEXT, chunk=200), threads=1)
    feed(whole, everything, ids, [CONTEXT])
    truth = whole.snapshot().arrays["key.0"]
    source = random_source(sliding_window=window)
    decoder = OnnxDecoder(write_decoder(source, tmp_path / "w", context=CONTEXT, chunk=200), threads=1)
    for seed in range(4):
        decoder.reset()
        for count in cuts(CONTEXT, seed):
            feed(decoder, source, ids[decoder.position : decoder.position + count], [count], 1)
            held = decoder.snapshot().arrays["key.0"]
            first = decoder.position - held.shape[2]
            assert held.shape[2] >= min(window, decoder.position)
            np.testing.assert_allclose(held, truth[:, :, first : decoder.position], atol=1e-5)


def cuts(total: int, seed: int) -> Iterator[int]:
    rng, left = random.Random(seed), total
    while left:
        yield (count := min(left, rng.choice((1, 1, 1, 2, 7, 23, 24, 25, 60))))
        left -= count


# Snapshots of real decoders. ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def source() -> DictSource:
    return random_source(sliding_window=WINDOW)


def onnx_decoders(source: DictSource, folder: Path, kv_cache: str) -> Make:
    scales = kv_scales(source, [random_ids(source.config, 64)]) if kv_cache == "int8" else None
    bundle = write_decoder(source, folder, context=CONTEXT, chunk=200, kv_scales=scales)
    return lambda **options: (
        OnnxDecoder(bundle, threads=1, **options),
        lambda decoder, ids, calls: feed(decoder, source, ids, calls, 1),
    )


def litert_decoders(checkpoint: Path, folder: Path, format: str, kv_cache: str) -> Make:
    pytest.importorskip("ai_edge_litert")
    out = folder / ("out" + ARTIFACT_FORMATS[format].suffix)
    path = export_bundle(
        checkpoint,
        out,
        recipe="fp32",
        kv_cache=kv_cache,
        context=CONTEXT,
        chunk=64,
        format=format,
        verify=False,
    ).path

    def make(**options: Any) -> tuple[Decoder, Feed]:
        model = Model.load(path, threads=1, **options)

        def fed(decoder: Decoder, ids: list[int], calls: list[int]) -> Any:
            parts = np.split(np.array(ids), np.cumsum(calls)[:-1])
            tables = model.embeddings, model.per_layer
            return np.concatenate([decoder.forward(*(t.lookup(part) for t in tables)) for part in parts])

        return model.decoder, fed

    return make


@pytest.fixture(
    scope="module",
    params=["fp32", "int8", *(pytest.param(name, marks=pytest.mark.slow) for name in LITERT)],
)
def make(
    request: pytest.FixtureRequest, source: DictSource, tmp_path_factory: pytest.TempPathFactory
) -> Make:
    """Makes a decoder, and what feeds it: on ONNX Runtime, or on LiteRT in a format."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param in ("fp32", "int8"):
        return onnx_decoders(source, folder, request.param)
    format, _, kv_cache = request.param.partition("-")
    return litert_decoders(request.getfixturevalue("tiny_checkpoint"), folder, format, kv_cache)


IDS = random_ids(random_source().config, CONTEXT, seed=3)
# Within every window, and far beyond: the tiny checkpoint's is 32.
CALLS = {1: [1], 20: [20], 31: [31], 60: [60], 77: [50, 27], 150: [50, 50, 50]}
POSITIONS = list(CALLS)


def state(decoder: Decoder) -> dict[str, bytes]:
    return {name: array.tobytes() for name, array in decoder.snapshot().arrays.items()}


def test_a_restored_cache_goes_on_bit_for_bit(make: Make) -> None:
    decoder, fed = make()
    fresh, again = make()
    for position in POSITIONS:
        decoder.reset()
        fed(decoder, IDS[:position], CALLS[position])
        snapshot = decoder.snapshot()
        assert snapshot.position == position and snapshot.bytes == decoder.snapshot_bytes(position)
        calls = [7, *[1] * 30]
        expected = fed(decoder, IDS[position : position + 37], calls)
        fed(fresh, IDS[100:140], [40])  # what was there before does not matter
        fresh.restore(snapshot)
        assert (fresh.position, fresh.earliest_at(position)) == (position, snapshot.earliest)
        np.testing.assert_array_equal(again(fresh, IDS[position : position + 37], calls), expected)
        assert state(fresh) == state(decoder)
        fresh.reset()


def test_a_snapshot_is_a_copy(make: Make) -> None:
    decoder, fed = make()
    fed(decoder, IDS[:30], [30])
    snapshot = decoder.snapshot()
    before = {name: array.copy() for name, array in snapshot.arrays.items()}
    fed(decoder, IDS[30:90], [60])
    for name, array in snapshot.arrays.items():
        np.testing.assert_array_equal(array, before[name])


def test_a_cache_taken_back_is_one_that_never_went_on(make: Make) -> None:
    """To every position that `can_truncate` allows; the others are refused and change nothing."""
    decoder, fed = make()
    plain, also = make()
    snapshots = [plain.snapshot()]
    for token in IDS[:150]:
        also(plain, [token], [1])
        snapshots.append(plain.snapshot())
    taken = 0
    for position in POSITIONS:
        for back in {0, 1, *range(max(0, position - 3), position), position // 2}:
            decoder.restore(snapshots[position])
            if not can_truncate(decoder, back):
                with pytest.raises(UsageError, match="cannot go back"):
                    decoder.truncate(back)
                assert decoder.position == position
                continue
            taken += 1
            decoder.truncate(back)
            plain.restore(snapshots[back])
            np.testing.assert_array_equal(fed(decoder, IDS[50:59], [9]), also(plain, IDS[50:59], [9]))
            assert state(decoder) == state(plain)
    assert taken >= 12


def test_within_the_window_every_step_back_is_possible(make: Make) -> None:
    decoder, fed = make()
    fed(decoder, IDS[:20], [20])
    assert decoder.earliest_at(20) == 0 and all(can_truncate(decoder, back) for back in range(21))
    assert not can_truncate(decoder, 21) and not can_truncate(decoder, -1)


def test_a_snapshot_fits_another_context(make: Make) -> None:
    decoder, fed = make()
    smaller, also = make(context=100)
    fed(decoder, IDS[:70], [60, 10])
    smaller.restore(decoder.snapshot())
    np.testing.assert_array_equal(also(smaller, IDS[70:80], [10]), fed(decoder, IDS[70:80], [10]))
    fed(decoder, IDS[80:140], [60])
    with pytest.raises(UsageError, match="140 tokens does not fit a context of 100"):
        smaller.restore(decoder.snapshot())
    assert smaller.position == 80


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: replace(s, layout="0" * 32), "another model or engine"),
        (lambda s: replace(s, arrays=dict(list(s.arrays.items())[1:])), "buffer"),
        (lambda s: replace(s, arrays={n: a[..., :-1] for n, a in s.arrays.items()}), "is float32|is int8"),
        (lambda s: replace(s, arrays={n: a.astype(np.float64) for n, a in s.arrays.items()}), "float64"),
        (lambda s: replace(s, position=s.position + 1), "not"),
        (lambda s: replace(s, position=-1), "does not fit"),
    ],
    ids=["layout", "missing", "shape", "dtype", "position", "negative"],
)
def test_a_foreign_snapshot_is_refused_and_changes_nothing(make: Make, change: Any, said: str) -> None:
    decoder, fed = make()
    fed(decoder, IDS[:20], [20])
    snapshot, before = decoder.snapshot(), state(decoder)
    with pytest.raises(UsageError, match=said):
        decoder.restore(change(snapshot))
    assert decoder.position == 20 and state(decoder) == before


def test_a_layout_names_the_engine_its_version_and_the_precision() -> None:
    def layout(engine: str = "an engine 1", dtype: Any = np.float32, kept: Kept | None = None) -> str:
        buffers = KvBuffers(engine)
        buffers.add("key.0", np.zeros((1, 2, 10, 4), dtype), kept or EveryPosition())
        return buffers.layout

    different = {layout(), layout("an engine 2"), layout(dtype=np.int8), layout(kept=Ring(10))}
    assert len(different) == 4


def test_a_deferred_decoder_is_loaded_to_be_restored(source: DictSource, tmp_path: Path) -> None:
    onnx = onnx_decoders(source, tmp_path, "fp32")
    decoder, fed = onnx()
    fed(decoder, IDS[:40], [40])
    deferred = DeferredDecoder(lambda: onnx()[0], context=CONTEXT, chunk=200)
    assert deferred.earliest_at(40) == 0 and not deferred.loaded
    deferred.truncate(0)
    assert not deferred.loaded
    deferred.restore(decoder.snapshot())
    assert (deferred.position, deferred.earliest_at(40)) == (40, decoder.earliest_at(40))
    np.testing.assert_array_equal(fed(deferred, IDS[40:50], [10]), fed(decoder, IDS[40:50], [10]))
    deferred.release()
    deferred.restore(decoder.snapshot())
    deferred.truncate(deferred.earliest_at(50))
    assert deferred.position == decoder.earliest_at(50) > 0
