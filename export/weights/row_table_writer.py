"""Streams the row tables that `RowTable` reads, in one pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.publish import Output
from gemma_edge.export.weights.quantize import Clip, ScaleType, quantize_stream
from gemma_edge.export.weights.recipe import Precision
from gemma_edge.runtime.artifacts.row_table import FLOAT_BYTES, SCALE_DTYPES

SCALE_TYPE: ScaleType = "float16"


def write_row_table(
    out: Output,
    chunks: Iterable[NDArray[Any]],
    columns: int,
    precision: Precision,
    clip: Clip = "mse",
    progress: Callable[[int], object] = lambda values: None,
    *,
    file: str = "ple.bin",
    scale: float = 1.0,
    workers: int = 2,
) -> dict[str, Any]:
    """Writes a table to `out`, which is at the start of its file, and returns the layout for the manifest.

    Quantized rows are each stored in one piece, values then float16 scales, so that a lookup is one read.
    At 32 bits rows keep the dtype they come in, which makes the table exact.

    Args:
        out: written front to back, never sought.
        chunks: rows (n, columns) in order, float32, float16 or bfloat16, all alike. At most workers + 1
            are held at a time.
        columns: values in a row.
        precision: bits and group of the stored values.
        clip: as in `quantize`.
        progress: called with the number of values written since the last call.
        file: name of the file inside the bundle, recorded in the layout.
        scale: what a reader multiplies the values with, recorded in the layout.
        workers: quantizing threads.

    Raises:
        ValueError: no rows, a chunk of another width or dtype, a NaN, or a weight that float16 scales
            cannot hold.
    """
    source = iter(chunks)
    first = next(source, None)
    if first is None:
        raise ValueError("the table has no rows")
    rows = _checked(itertools.chain([first], source), columns, first.dtype)
    layout: dict[str, Any] = {"file": file, "rows": 0, "columns": columns}
    if precision.bits == 32:
        encoding = first.dtype.name
        if encoding not in FLOAT_BYTES:
            raise ValueError(f"rows are {encoding}, not one of {', '.join(FLOAT_BYTES)}")
        stride = columns * first.dtype.itemsize
        layout |= {"encoding": encoding, "data": {"offset": 0, "stride": stride}}
        stored: Iterator[NDArray[np.uint8]] = (np.ascontiguousarray(chunk).view(np.uint8) for chunk in rows)
    else:
        blocks = -(-columns // precision.group)
        data_bytes = blocks * precision.group * precision.bits // 8
        stride = data_bytes + blocks * SCALE_DTYPES[SCALE_TYPE].itemsize
        layout |= {
            "encoding": f"int{precision.bits}",
            "group": precision.group,
            "data": {"offset": 0, "stride": stride},
            "scales": {"offset": data_bytes, "stride": stride, "dtype": SCALE_TYPE},
        }
        stored = _interleaved(rows, precision, clip, workers)
    for raw in stored:
        out.write(raw.data)
        layout["rows"] += len(raw)
        progress(len(raw) * columns)
    if not layout["rows"]:
        raise ValueError("the table has no rows")
    return {**layout, "scale": scale}


def _checked(chunks: Iterable[NDArray[Any]], columns: int, dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    for chunk in chunks:
        if chunk.ndim != 2 or chunk.shape[1] != columns or chunk.dtype != dtype:
            raise ValueError(f"rows must be {dtype} of shape (n, {columns}), not {chunk.dtype} {chunk.shape}")
        if len(chunk):
            yield chunk


def _interleaved(
    rows: Iterator[NDArray[Any]], precision: Precision, clip: Clip, workers: int
) -> Iterator[NDArray[np.uint8]]:
    """Stored bytes (n, stride) of each chunk: packed values, then scales."""
    for part in quantize_stream(rows, precision.bits, precision.group, clip, workers, SCALE_TYPE):
        scales = part.scales.astype(SCALE_DTYPES[SCALE_TYPE]).view(np.uint8)
        yield np.concatenate([part.data.reshape(len(part.data), -1), scales], axis=1)
