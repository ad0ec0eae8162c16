"""`RowTable`: rows of a two-dimensional table, read from a file on demand.

A row is a token's embedding. A table of gigabytes costs no resident memory, because a lookup reads the
wanted rows with `pread`, each once, and never maps the file: a mapped table grows RssFile by fault-around.

Values are stored as floats, or quantized in blocks of `group` along the row: unsigned integers around a
zero point of half their range, times one scale a block. That is ONNX Runtime's MatMulNBits layout, so the
token embeddings of a tied model are read straight from the output head's data. The encodings "signed4" and
"signed8" are TFLite's: two's complement around zero. Group 0 means one scale for the whole row.

A table is described by its *layout*, a JSON object in the bundle's manifest:

    {"file": "ple.bin", "rows": 262144, "columns": 7680, "encoding": "int4", "group": 32,
     "data":   {"offset": 0,    "stride": 4320},
     "scales": {"offset": 3840, "stride": 4320, "dtype": "float16"},
     "scale": 16.0}

Row r of a region lies at offset + r * stride bytes. `group` and `scales` belong to the quantized
encodings only; `scale` multiplies every value. Everything is little-endian.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.errors import BundleError, UsageError

Floats = NDArray[np.float32]
Bytes = NDArray[np.uint8]

QUANTIZED_BITS = {"int4": 4, "int8": 8, "signed4": 4, "signed8": 8}
# From two's complement to an unsigned value around the middle of its range.
SIGN_BITS = {"signed4": 0x88, "signed8": 0x80}
FLOAT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
SCALE_DTYPES: dict[str, np.dtype[Any]] = {"float16": np.dtype("<f2"), "float32": np.dtype("<f4")}

# Values that one pass dequantizes: bounds a lookup's scratch to a few MB whatever its number of ids.
_SCRATCH_VALUES = 1 << 18


def unpack_nibbles(packed: Bytes) -> Bytes:
    """Bytes (..., n) to their 4-bit values (..., 2n), each 0..15; the low nibble comes first."""
    values = np.empty((*packed.shape[:-1], packed.shape[-1] * 2), np.uint8)
    np.bitwise_and(packed, 15, out=values[..., 0::2])
    np.right_shift(packed, 4, out=values[..., 1::2])
    return values


def dequantize_blocks(data: Bytes, scales: NDArray[Any], bits: int) -> Floats:
    """Blocks of quantized values to floats: (value - zero point) * scale of its block.

    Args:
        data: (rows, blocks, group * bits / 8), packed for 4 bits.
        scales: (rows, blocks), any float type.
        bits: 4 or 8; the zero point is 8 or 128.

    Returns:
        (rows, blocks * group).
    """
    values = (unpack_nibbles(data) if bits == 4 else data).astype(np.float32)
    values -= 1 << (bits - 1)
    values *= scales.astype(np.float32, copy=False)[..., None]
    return values.reshape(len(data), -1)


@dataclass(frozen=True)
class Region:
    """Where the rows of one kind lie: row r is the `length` bytes at offset + r * stride."""

    offset: int
    stride: int
    length: int

    def end(self, rows: int) -> int:
        return self.offset + (rows - 1) * self.stride + self.length

    def overlaps(self, other: Region, rows: int) -> bool:
        """Whether any byte belongs to both, for `rows` rows of each."""
        first, second = sorted((self, other), key=lambda region: region.offset)
        if first.end(rows) <= second.offset:
            return False
        distance = second.offset - first.offset
        interleaved = first.stride == second.stride >= distance + second.length and distance >= first.length
        return not interleaved


@dataclass(frozen=True)
class RowLayout:
    """A validated layout; `parse` is the way to make one."""

    rows: int
    columns: int
    encoding: str
    group: int  # as wide as the row where it has one scale; 0 for a float encoding
    data: Region
    scales: Region | None
    scale_dtype: np.dtype[Any]
    scale: float

    @property
    def blocks(self) -> int:
        """Quantization blocks in a row, the last one padded."""
        return -(-self.columns // self.group)

    @classmethod
    def parse(cls, layout: Mapping[str, Any], path: str | Path, file_size: int) -> RowLayout:
        """Checks a manifest's layout against itself and against the size of its file.

        Raises:
            BundleError: a key is missing, unknown, of the wrong type, or points outside the file.
        """
        return _LayoutParser(path, layout).layout(file_size)


class _LayoutParser:
    """Takes a layout apart, checking every field by its name."""

    def __init__(self, path: str | Path, layout: object) -> None:
        self.path = path
        self.top = self.record("layout", layout)

    def fail(self, field: str, expected: object, got: object) -> NoReturn:
        raise BundleError(self.path, field, expected, got, "Export the bundle again.")

    def record(self, field: str, value: object) -> Mapping[str, Any]:
        if not isinstance(value, Mapping):
            self.fail(field, "an object", repr(value))
        return value

    def keys(self, field: str, value: Mapping[str, Any], wanted: set[str]) -> None:
        if set(value) != wanted:
            self.fail(field, f"the keys {sorted(wanted)}", sorted(map(str, value)))

    def integer(self, field: str, value: object, minimum: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            self.fail(field, f"an integer of {minimum} or more", repr(value))
        return value

    def choice(self, field: str, value: object, choices: Iterable[str]) -> str:
        if not isinstance(value, str) or value not in choices:
            self.fail(field, f"one of {', '.join(choices)}", repr(value))
        return value

    def region(self, field: str, length: int, rows: int, file_size: int, extra: set[str]) -> Region:
        value = self.record(f"layout.{field}", self.top[field])
        self.keys(f"layout.{field}", value, {"offset", "stride"} | extra)
        offset = self.integer(f"layout.{field}.offset", value["offset"], 0)
        region = Region(offset, self.integer(f"layout.{field}.stride", value["stride"], length), length)
        if region.end(rows) > file_size:
            self.fail(f"layout.{field}", f"{rows} rows within {file_size} bytes", f"{region.end(rows)} bytes")
        return region

    def layout(self, file_size: int) -> RowLayout:
        top = self.top
        encoding = self.choice("layout.encoding", top.get("encoding"), [*QUANTIZED_BITS, *FLOAT_BYTES])
        quantized = {"group", "scales"} if encoding in QUANTIZED_BITS else set()
        self.keys("layout", top, {"file", "rows", "columns", "encoding", "data", "scale"} | quantized)
        rows = self.integer("layout.rows", top["rows"], 1)
        columns = self.integer("layout.columns", top["columns"], 1)
        scale = top["scale"]
        if not isinstance(scale, (int, float)) or isinstance(scale, bool) or not 0 < scale < math.inf:
            self.fail("layout.scale", "a positive number", repr(scale))
        if not quantized:
            data = self.region("data", columns * FLOAT_BYTES[encoding], rows, file_size, set())
            return RowLayout(rows, columns, encoding, 0, data, None, SCALE_DTYPES["float32"], float(scale))
        group = self.integer("layout.group", top["group"], 0 if encoding in SIGN_BITS else 16)
        if group and (group < 16 or group & (group - 1)):
            self.fail("layout.group", "a power of two of 16 or more", group)
        group = group or columns + columns % 2
        blocks = -(-columns // group)
        data = self.region("data", blocks * group * QUANTIZED_BITS[encoding] // 8, rows, file_size, set())
        name = self.record("layout.scales", top["scales"]).get("dtype")
        dtype = SCALE_DTYPES[self.choice("layout.scales.dtype", name, SCALE_DTYPES)]
        scales = self.region("scales", blocks * dtype.itemsize, rows, file_size, {"dtype"})
        if data.overlaps(scales, rows):
            self.fail("layout.scales", "bytes apart from layout.data", "overlapping regions")
        return RowLayout(rows, columns, encoding, group, data, scales, dtype, float(scale))


class RowTable:
    """Reads and dequantizes rows of one table. Lookups may run in several threads at once.

    Args:
        path: the data file. It may hold other things besides the table.
        layout: the manifest's description of the table, see the module's docstring.

    Raises:
        BundleError: the file cannot be opened, is too short, or the layout is wrong.
    """

    def __init__(self, path: str | Path, layout: Mapping[str, Any]) -> None:
        self.path = Path(path)
        try:
            self._file = self.path.open("rb", buffering=0)
        except OSError as error:
            raise BundleError(path, "file", "a readable data file", error.strerror) from None
        try:
            self.layout = RowLayout.parse(layout, path, os.fstat(self._file.fileno()).st_size)
        except BaseException:
            self._file.close()
            raise
        self._lock = threading.Lock()
        data, scales = self.layout.data, self.layout.scales
        # Scales that follow the values of the same row come with them in one read.
        adjacent = scales is not None and 0 < scales.offset - data.offset < data.stride == scales.stride
        if scales is not None and adjacent:
            self._scales_at = scales.offset - data.offset
            self._reads = [Region(data.offset, data.stride, self._scales_at + scales.length)]
        else:
            self._scales_at = data.length
            self._reads = [data] if scales is None else [data, scales]
        # Read-ahead around a row would fetch its neighbours, which nobody asked for.
        self._advise("POSIX_FADV_RANDOM", 0, 0)

    @property
    def rows(self) -> int:
        return self.layout.rows

    @property
    def columns(self) -> int:
        return self.layout.columns

    @property
    def row_bytes(self) -> int:
        """Bytes read from the file for one row."""
        return sum(region.length for region in self._reads)

    def lookup(self, ids: Sequence[int] | NDArray[Any]) -> Floats:
        """Rows of `ids` as floats, (len(ids), columns); each distinct row is read once.

        Raises:
            UsageError: an id is not a row of this table.
            BundleError: the file became shorter than its layout, or cannot be read.
        """
        wanted = np.asarray(ids)
        if wanted.size and not np.issubdtype(wanted.dtype, np.integer):
            raise TypeError(f"row ids must be integers, not {wanted.dtype}")
        wanted = wanted.astype(np.int64, copy=False).reshape(-1)
        unique, inverse = np.unique(wanted, return_inverse=True)
        if unique.size and not 0 <= unique[0] <= unique[-1] < self.rows:
            bad = unique[0] if unique[0] < 0 else unique[-1]
            raise UsageError(f"token id {bad} is not in the table of {self.rows} rows")
        if unique.size > 1:
            # The storage serves a prompt's rows in parallel instead of one by one.
            for row in unique.tolist():
                for region in self._reads:
                    self._advise("POSIX_FADV_WILLNEED", region.offset + row * region.stride, region.length)
        out = np.empty((len(wanted), self.columns), np.float32)
        step = max(1, _SCRATCH_VALUES // self.columns)
        for start in range(0, len(unique), step):
            values = self._decode(self._read(unique[start : start + step].tolist()))
            here = (inverse >= start) & (inverse < start + step)
            out[here] = values[inverse[here] - start]
        return out

    def close(self) -> None:
        """Closes the file; the table cannot be used any more. Not while a lookup is running."""
        self._file.close()

    def __enter__(self) -> RowTable:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _read(self, rows: list[int]) -> Bytes:
        """The stored bytes of `rows`, (rows, row_bytes)."""
        raw = np.empty((len(rows), self.row_bytes), np.uint8)
        start = 0
        for region in self._reads:
            for i, row in enumerate(rows):
                chunk = self._pread(region.length, region.offset + row * region.stride)
                if len(chunk) != region.length:
                    remedy = "The file was truncated: export the bundle again."
                    raise BundleError(self.path, f"row {row}", f"{region.length} bytes", len(chunk), remedy)
                raw[i, start : start + region.length] = np.frombuffer(chunk, np.uint8)
            start += region.length
        return raw

    def _pread(self, length: int, offset: int) -> bytes:
        try:
            if hasattr(os, "pread"):
                return os.pread(self._file.fileno(), length, offset)
            with self._lock:  # Windows has no pread
                self._file.seek(offset)
                return self._file.read(length) or b""
        except OSError as error:
            raise BundleError(self.path, f"bytes at {offset}", "a readable file", error.strerror) from None

    def _advise(self, advice: str, offset: int, length: int) -> None:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._file.fileno(), offset, length, getattr(os, advice))

    def _decode(self, raw: Bytes) -> Floats:
        layout = self.layout
        data = raw[:, : layout.data.length]
        if layout.encoding in QUANTIZED_BITS:
            stored = np.ascontiguousarray(raw[:, self._scales_at :]).view(layout.scale_dtype)
            # Folded into the scales, a block's worth of values times fewer multiplications.
            scales = stored.astype(np.float32) * np.float32(layout.scale)
            if layout.encoding in SIGN_BITS:
                data = np.bitwise_xor(data, np.uint8(SIGN_BITS[layout.encoding]))
            blocks = data.reshape(len(raw), layout.blocks, -1)
            return dequantize_blocks(blocks, scales, QUANTIZED_BITS[layout.encoding])[:, : layout.columns]
        data = np.ascontiguousarray(data)
        if layout.encoding == "bfloat16":
            # A bfloat16 is the upper half of a float32; NumPy has no type for it.
            values = (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
        else:
            values = data.view("<f2" if layout.encoding == "float16" else "<f4").astype(np.float32)
        values *= np.float32(layout.scale)
        return values
