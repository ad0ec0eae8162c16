"""Row tables: what is written is what is read, and a layout that lies is refused before any read."""

from __future__ import annotations

import copy
import io
import os
import threading
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gemma_edge.export.weights.quantize import dequantize, quantize
from gemma_edge.export.weights.recipe import Precision
from gemma_edge.export.weights.row_table_writer import write_row_table
from gemma_edge.runtime.artifacts import row_table as module
from gemma_edge.runtime.artifacts.ple_table import PleTable
from gemma_edge.runtime.artifacts.row_table import RowTable
from gemma_edge.runtime.errors import BundleError, UsageError
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig

Layout = dict[str, Any]
Factory = pytest.TempPathFactory
DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}


def normal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def write(path: Path, values: np.ndarray, precision: Precision, **options: Any) -> Layout:
    chunks = (values[i : i + 7] for i in range(0, len(values), 7))
    with path.open("wb") as out:
        return write_row_table(out, chunks, values.shape[1], precision, file=path.name, **options)


@pytest.fixture
def table(tmp_path: Path) -> tuple[Path, Layout]:
    """A small int4 table, its file exactly as long as its rows."""
    path = tmp_path / "ple.bin"
    return path, write(path, normal(10, 70), Precision(4, 32), scale=16.0)


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 130),
    dtype=st.sampled_from(sorted(DTYPES)),
    scale=st.sampled_from([1.0, 16.0, 45.25]),
    data=st.data(),
)
def test_float_rows_come_back_exactly(
    tmp_path_factory: Factory,
    rows: int,
    columns: int,
    dtype: str,
    scale: float,
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.mktemp("rows") / "table.bin"
    values = normal(rows, columns).astype(DTYPES[dtype])
    layout = write(path, values, Precision(32), scale=scale)
    assert layout["encoding"] == dtype and layout["rows"] == rows
    ids = data.draw(st.lists(st.integers(0, rows - 1), max_size=20))
    with RowTable(path, layout) as opened:
        got = opened.lookup(ids)
        assert opened.row_bytes == columns * values.dtype.itemsize
    assert got.dtype == np.float32 and got.shape == (len(ids), columns)
    assert np.array_equal(got, values[ids].astype(np.float32) * np.float32(scale))


@settings(max_examples=30, deadline=None)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 130),
    bits=st.sampled_from([4, 8]),
    group=st.sampled_from([16, 32, 64]),
    data=st.data(),
)
def test_quantized_rows_come_back_as_their_dequantized_values(
    tmp_path_factory: Factory,
    rows: int,
    columns: int,
    bits: int,
    group: int,
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.mktemp("rows") / "table.bin"
    values = normal(rows, columns)
    layout = write(path, values, Precision(bits, group), scale=16.0)
    ids = data.draw(st.lists(st.integers(0, rows - 1), max_size=20))
    with RowTable(path, layout) as opened:
        got = opened.lookup(np.array(ids, np.int32))
        assert opened.row_bytes * rows == path.stat().st_size
    expected = dequantize(quantize(values, bits, group, "mse", "float16"))
    assert np.array_equal(got, expected[ids] * 16)


@pytest.mark.parametrize("bits", [4, 8])
def test_embeddings_are_read_from_the_heads_two_regions(tmp_path: Path, bits: int) -> None:
    head = quantize(normal(20, 100), bits, 32)
    before, between = b"x" * 64, b"y" * 13
    path = tmp_path / "decoder.onnx.data"
    path.write_bytes(before + head.data.tobytes() + between + head.scales.tobytes() + b"tail")
    stride = head.data[0].nbytes
    layout = {
        "file": path.name,
        "rows": 20,
        "columns": 100,
        "encoding": f"int{bits}",
        "group": 32,
        "data": {"offset": 64, "stride": stride},
        "scales": {"offset": 64 + 20 * stride + 13, "stride": 16, "dtype": "float32"},
        "scale": 1.0,
    }
    with RowTable(path, layout) as opened:
        assert np.array_equal(opened.lookup(range(20)), dequantize(head))
        assert opened.row_bytes == stride + 16


def test_a_quantized_row_is_one_read(table: tuple[Path, Layout], monkeypatch: pytest.MonkeyPatch) -> None:
    reads = []
    pread = os.pread
    monkeypatch.setattr(os, "pread", lambda fd, n, at: (reads.append((n, at)), pread(fd, n, at))[1])
    with RowTable(*table) as opened:
        opened.lookup([3, 3, 1, 3])
    assert reads == [(54, 54), (54, 3 * 54)]  # 3 blocks of 16 bytes, 3 scales of 2; distinct rows only


def test_no_pread(table: tuple[Path, Layout], monkeypatch: pytest.MonkeyPatch) -> None:
    with RowTable(*table) as opened:
        expected = opened.lookup(range(10))
        monkeypatch.delattr(os, "pread")
        monkeypatch.delattr(os, "posix_fadvise")
        assert np.array_equal(opened.lookup(range(10)), expected)


def test_lookups_of_any_length_use_bounded_scratch(
    table: tuple[Path, Layout], monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = np.random.default_rng(1).integers(0, 10, 50)
    with RowTable(*table) as opened:
        expected = opened.lookup(ids)
        monkeypatch.setattr(module, "_SCRATCH_VALUES", 3 * 70)
        most = []
        decode = opened._decode
        monkeypatch.setattr(opened, "_decode", lambda raw: (most.append(len(raw)), decode(raw))[1])
        assert np.array_equal(opened.lookup(ids), expected)
    assert max(most) == 3


def test_threads_do_not_disturb_each_other(table: tuple[Path, Layout]) -> None:
    wrong = []
    with RowTable(*table) as opened:
        expected = opened.lookup(range(10))

        def work(seed: int) -> None:
            for ids in np.random.default_rng(seed).integers(0, 10, (50, 6)):
                if not np.array_equal(opened.lookup(ids), expected[ids]):
                    wrong.append(ids)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


def test_ids_outside_the_table_and_ids_that_are_no_integers(table: tuple[Path, Layout]) -> None:
    with RowTable(*table) as opened:
        for bad in (-1, 10):
            with pytest.raises(UsageError, match=f"token id {bad} is not in the table of 10 rows"):
                opened.lookup([0, bad])
        with pytest.raises(TypeError):
            opened.lookup([0.5])
        assert opened.lookup([]).shape == (0, 70)


def change(layout: Layout, field: str, value: object) -> Layout:
    """A copy with a dotted field set, or removed if `value` is Ellipsis."""
    layout = copy.deepcopy(layout)
    *parents, last = field.split(".")
    target = layout
    for parent in parents:
        target = target[parent]
    if value is ...:
        del target[last]
    else:
        target[last] = value
    return layout


LIES: list[tuple[str, object]] = [
    ("rows", 11),
    ("rows", 2**62),
    ("rows", 0),
    ("rows", -1),
    ("rows", "10"),
    ("rows", True),
    ("rows", 10.0),
    ("columns", 0),
    ("columns", 97),
    ("columns", 2**70),
    ("encoding", "int5"),
    ("encoding", ["int4"]),
    ("encoding", "float32"),
    ("encoding", "int8"),
    ("encoding", ...),
    ("group", 48),
    ("group", 8),
    ("group", 0),
    ("group", ...),
    ("group", 16),
    ("data", None),
    ("data.offset", -1),
    ("data.offset", 1),
    ("data.offset", 2**63),
    ("data.stride", 47),
    ("data.stride", 0),
    ("data.stride", 55),
    ("data.length", 1),
    ("scales", []),
    ("scales.offset", 47),
    ("scales.offset", 0),
    ("scales.offset", 49),
    ("scales.stride", 5),
    ("scales.stride", 53),
    ("scales.dtype", "bfloat16"),
    ("scales.dtype", ...),
    ("scale", 0),
    ("scale", float("nan")),
    ("scale", float("inf")),
    ("scale", "16"),
    ("scale", ...),
    ("file", ...),
    ("mmap", True),
]


@pytest.mark.parametrize(("field", "value"), LIES)
def test_a_layout_that_lies_is_refused(table: tuple[Path, Layout], field: str, value: object) -> None:
    path, layout = table
    with pytest.raises(BundleError) as caught:
        RowTable(path, change(layout, field, value))
    assert caught.value.field.startswith("layout") and "ple.bin" in str(caught.value)


def test_a_layout_that_is_no_object_is_refused(table: tuple[Path, Layout]) -> None:
    with pytest.raises(BundleError, match="an object"):
        RowTable(table[0], [table[1]])  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None)
@given(
    rows=st.integers(1, 4),
    data=st.tuples(st.integers(0, 40), st.integers(4, 12)),
    scales=st.tuples(st.integers(0, 40), st.integers(2, 12)),
)
def test_overlap_is_found_byte_by_byte(rows: int, data: tuple[int, int], scales: tuple[int, int]) -> None:
    one, other = module.Region(*data, length=4), module.Region(*scales, length=2)
    used = [
        {r.offset + i * r.stride + byte for i in range(rows) for byte in range(r.length)}
        for r in (one, other)
    ]
    shared = bool(used[0] & used[1])
    in_one_row = one.stride == other.stride > abs(one.offset - other.offset)
    apart = max(used[0]) < min(used[1]) or max(used[1]) < min(used[0])
    if shared or in_one_row or apart:  # other arrangements are refused without need
        assert one.overlaps(other, rows) == other.overlaps(one, rows) == shared


def test_a_truncated_or_missing_file_is_refused(table: tuple[Path, Layout]) -> None:
    path, layout = table
    with RowTable(path, layout) as opened:
        os.truncate(path, path.stat().st_size - 1)
        opened.lookup([8])
        with pytest.raises(BundleError, match="row 9: expected 54 bytes, got 53"):
            opened.lookup([8, 9])
    with pytest.raises(BundleError, match="10 rows within 539 bytes"):
        RowTable(path, layout)
    path.unlink()
    with pytest.raises(BundleError, match="a readable data file"):
        RowTable(path, layout)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors in /proc")
def test_descriptors_are_closed(table: tuple[Path, Layout]) -> None:
    path, layout = table

    def descriptors() -> int:
        return sum(link.resolve() == path for link in Path("/proc/self/fd").iterdir() if link.is_symlink())

    opened = RowTable(path, layout)
    assert descriptors() == 1
    opened.close()
    with pytest.raises(BundleError):
        RowTable(path, change(layout, "rows", 11))
    assert descriptors() == 0
    with pytest.raises(ValueError, match="closed"):
        opened.lookup([0])


def ple_config(**changes: int) -> Gemma3nConfig:
    sizes = {"num_hidden_layers": 4, "hidden_size_per_layer_input": 16, "vocab_size_per_layer_input": 10}
    return Gemma3nConfig.from_dict(
        {"model_type": "gemma3n_text", "num_kv_shared_layers": 0, "vocab_size": 12, **sizes, **changes}
    )


def test_ple_rows_are_scaled_and_ids_outside_use_row_0(tmp_path: Path) -> None:
    values, config = normal(10, 64), ple_config()
    layout = write(tmp_path / "ple.bin", values, Precision(32), scale=config.ple_scale)
    ple = PleTable(tmp_path / "ple.bin", layout, config)
    got = ple.lookup([3, 10, 262_145, -1, 9])
    ple.close()
    assert np.array_equal(got, values[[3, 0, 0, 0, 9]] * 4)
    assert ple.row_bytes == 64 * 4


@pytest.mark.parametrize(
    ("field", "changes"),
    [
        ("rows", {"vocab_size_per_layer_input": 9}),
        ("columns", {"num_hidden_layers": 3}),
        ("scale", {"hidden_size_per_layer_input": 32, "num_hidden_layers": 2}),
    ],
)
def test_a_table_of_another_model_is_refused(tmp_path: Path, field: str, changes: dict[str, int]) -> None:
    layout = write(tmp_path / "ple.bin", normal(10, 64), Precision(32), scale=4.0)
    with pytest.raises(BundleError, match="another model") as caught:
        PleTable(tmp_path / "ple.bin", layout, ple_config(**changes))
    assert caught.value.field == f"layout.{field}"


def test_the_writer_streams_and_reports_progress() -> None:
    written: list[int] = []

    class Out(io.BytesIO):
        def seek(self, *_: int) -> int:
            raise io.UnsupportedOperation

    out = Out()
    chunks = (normal(n, 64) for n in (5, 0, 3))
    layout = write_row_table(out, chunks, 64, Precision(8, 32), "none", written.append, scale=2.0)
    assert written == [5 * 64, 3 * 64] and layout["rows"] == 8
    assert len(out.getvalue()) == 8 * (64 + 2 * 2)


@pytest.mark.parametrize(
    ("chunks", "message"),
    [
        ([], "no rows"),
        ([np.zeros((0, 64), np.float32)], "no rows"),
        ([np.zeros((2, 63), np.float32)], "shape"),
        ([np.zeros((2, 64), np.float32), np.zeros((2, 64), np.float16)], "float16"),
        ([np.zeros((2, 64), np.float64)], "float64"),
    ],
)
def test_the_writer_refuses_rows_that_do_not_fit(chunks: list[np.ndarray], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        write_row_table(io.BytesIO(), chunks, 64, Precision(32))
