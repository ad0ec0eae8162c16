"""Reads FlatBuffers with every offset checked: .tflite graphs and .litertlm headers.

Engines follow the offsets of a FlatBuffer without looking, so a truncated or altered file makes them crash.
This reader refuses such a file with a `BundleError` that names the field. Only the bytes that are asked for
are read, which leaves the gigabytes of weights behind a graph alone.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.errors import BundleError

EXPORT_AGAIN = "The file is damaged: copy it, or export it, again."
MAX_BYTES = 256 << 20  # a graph is some MB, with channel-wise scales some tens of them
# Tables visited, ten times those of the largest model: offsets that repeat cannot keep a reader for long.
MAX_TABLES = 400_000
_FIRST_READ = 1 << 20

_FORMATS = {"B": 1, "b": 1, "?": 1, "H": 2, "i": 4, "I": 4, "f": 4, "q": 8, "Q": 8, "d": 8}
_READERS: dict[str, Callable[[bytes, int], tuple[int | float, ...]]] = {
    code: struct.Struct(f"<{code}").unpack_from for code in _FORMATS
}
_U32, _I32, _U16 = _READERS["I"], _READERS["i"], _READERS["H"]


class FlatBuffer:
    """One FlatBuffer: bytes [start, stop) of an open file.

    Args:
        file: open for reading; this object seeks in it.
        path: names the file in errors.
        start, stop: where the FlatBuffer begins, and the end of what may belong to it.
    """

    def __init__(self, file: BinaryIO, path: Path, start: int, stop: int) -> None:
        self.path, self.start, self.size = path, start, stop - start
        self._file = file
        self.data = b""
        self._vtables: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._tables_left = MAX_TABLES
        self.used = 0  # end of the furthest thing asked for
        self._ready = 0  # what is both asked for and read

    def root(self, identifier: bytes = b"") -> Table:
        """The root table, after checking the four-character identifier that follows its offset."""
        self.need(0, 4 + len(identifier), "header")
        if (found := self.data[4 : 4 + len(identifier)]) != identifier:
            self.fail("identifier", repr(identifier), repr(found))
        return self.table(self.offset(0, "root"), "root")

    def fail(self, field: str, expected: object, got: object) -> NoReturn:
        raise BundleError(self.path, field, expected, got, EXPORT_AGAIN)

    def need(self, position: int, length: int, field: str) -> None:
        """Makes `length` bytes at `position` available in `data`."""
        end = position + length
        if end <= self._ready:
            return
        self.claim(position, length, field)
        if end > len(self.data):
            if end > MAX_BYTES:
                self.fail(field, f"a graph of at most {MAX_BYTES} bytes, weights behind it", f"byte {end}")
            self._load(min(self.size, max(end, 2 * len(self.data), _FIRST_READ)), field)
        self._ready = min(self.used, len(self.data))

    def claim(self, position: int, length: int, field: str) -> None:
        """Checks that bytes exist, without reading them."""
        end = position + length
        if end > self.size:
            self.fail(field, f"within {self.size} bytes", f"bytes {position} to {end}")
        self.used = max(self.used, end)

    def _load(self, end: int, field: str) -> None:
        have = len(self.data)
        try:
            self._file.seek(self.start + have)
            self.data += self._file.read(end - have)
        except OSError as error:
            self.fail(field, "a readable file", error.strerror)
        if len(self.data) < end:
            self.fail(field, f"{end} bytes", f"{len(self.data)}, the file became shorter")

    def offset(self, position: int, field: str) -> int:
        """Where the offset stored at `position` points to."""
        self.need(position, 4, field)
        target = position + int(_U32(self.data, position)[0])
        if target == position:
            self.fail(field, "an offset", 0)
        return target

    def table(self, position: int, field: str) -> Table:
        """The table at `position`; its vtable is checked once."""
        self._tables_left -= 1
        if self._tables_left < 0:
            self.fail(field, f"at most {MAX_TABLES} tables", "more")
        if position % 4:
            self.fail(field, "a table aligned to 4 bytes", f"position {position}")
        self.need(position, 4, field)
        at = position - int(_I32(self.data, position)[0])
        known = self._vtables.get(at)
        if known is None:
            known = self._vtables[at] = self._vtable(at, field)
        self.need(position, known[0], field)
        return Table(self, position, known[1], field)

    def _vtable(self, at: int, field: str) -> tuple[int, tuple[int, ...]]:
        """Bytes of a table and the offsets of its fields in it, 0 for an absent one."""
        if at < 0 or at % 2:
            self.fail(field, "a vtable inside the file", f"position {at}")
        self.need(at, 4, field)
        length, table_bytes = int(_U16(self.data, at)[0]), int(_U16(self.data, at + 2)[0])
        if length < 4 or length % 2 or table_bytes < 4:
            self.fail(field, "a vtable", f"{length} bytes for a table of {table_bytes}")
        self.need(at, length, field)
        fields = struct.unpack_from(f"<{(length - 4) // 2}H", self.data, at + 4)
        for value in fields:
            if value and not 4 <= value < table_bytes:
                self.fail(field, f"fields inside a table of {table_bytes} bytes", f"offset {value}")
        return table_bytes, fields


class Table:
    """One table. Fields are named by their slot, the order in which the schema declares them."""

    __slots__ = ("buffer", "field", "fields", "position")

    def __init__(self, buffer: FlatBuffer, position: int, fields: tuple[int, ...], field: str) -> None:
        self.buffer, self.position, self.fields, self.field = buffer, position, fields, field

    def _at(self, slot: int) -> int:
        """Position of a field's value, 0 if it is absent."""
        if slot >= len(self.fields) or not self.fields[slot]:
            return 0
        return self.position + self.fields[slot]

    def has(self, slot: int) -> bool:
        return bool(self._at(slot))

    def number(self, slot: int, code: str, default: int = 0) -> int:
        """An integer or bool of `struct` format `code`."""
        if not (at := self._at(slot)):
            return default
        width = _FORMATS[code]
        if at % width:
            self.buffer.fail(f"{self.field}[{slot}]", f"aligned to {width} bytes", f"position {at}")
        self.buffer.need(at, width, self.field)
        return int(_READERS[code](self.buffer.data, at)[0])

    def child(self, slot: int, name: str) -> Table | None:
        at = self._at(slot)
        return self.buffer.table(self.buffer.offset(at, name), name) if at else None

    def children(self, slot: int, name: str) -> list[Table]:
        """A vector of tables; [] if it is absent."""
        buffer = self.buffer
        at, count = self._vector(slot, 4, name)
        if not count:
            return []
        offsets = np.frombuffer(buffer.data, "<u4", count, at).astype(np.int64)
        positions = (offsets + np.arange(at, at + 4 * count, 4)).tolist()
        return [buffer.table(position, f"{name}[{i}]") for i, position in enumerate(positions)]

    def string(self, slot: int, name: str, limit: int = 1 << 20) -> str:
        """UTF-8 text, "" if it is absent."""
        at, count = self._vector(slot, 1, name)
        if not at:
            return ""
        buffer = self.buffer
        buffer.need(at, count + 1, name)
        raw = buffer.data[at : at + count]
        if count > limit or buffer.data[at + count]:
            buffer.fail(name, f"a text of at most {limit} bytes, ended by a zero", f"{count} bytes")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            buffer.fail(name, "UTF-8 text", error.reason)

    def integers(self, slot: int, name: str) -> tuple[int, ...]:
        """A short vector of int32."""
        at, count = self._vector(slot, 4, name)
        return struct.unpack_from(f"<{count}i", self.buffer.data, at) if count else ()

    def array(self, slot: int, dtype: str, name: str) -> NDArray[Any]:
        """A vector of numbers, copied."""
        at, count = self._vector(slot, np.dtype(dtype).itemsize, name)
        return np.frombuffer(self.buffer.data, dtype, count, at).copy() if count else np.empty(0, dtype)

    def span(self, slot: int, width: int, name: str) -> tuple[int, int]:
        """Bytes [offset, offset + length) of the file that a vector of `width`-byte elements takes."""
        at, count = self._vector(slot, width, name, load=False)
        return (self.buffer.start + at, count * width) if at else (0, 0)

    def _vector(self, slot: int, width: int, name: str, load: bool = True) -> tuple[int, int]:
        """Position of the first element and number of elements; (0, 0) if it is absent."""
        if not (at := self._at(slot)):
            return 0, 0
        buffer = self.buffer
        at = buffer.offset(at, name)
        if at % 4 or (at + 4) % width:
            buffer.fail(name, f"a vector aligned to {max(4, width)} bytes", f"position {at}")
        buffer.need(at, 4, name)
        count = int(_U32(buffer.data, at)[0])
        (buffer.need if load else buffer.claim)(at + 4, count * width, name)
        return at + 4, count
