"""Files of a JSON header and arrays, sealed with a SHA-256: read whole and as they were written, or refused.

    8 bytes   magic
    8 bytes   length of the header, little-endian, with its padding
    header    a JSON object; "arrays" lists name, dtype and shape of each; spaces up to a multiple of 64 bytes
    arrays    C order, each padded with zeros to a multiple of 64 bytes
    32 bytes  SHA-256 of everything before

Only the owner may read them: what they hold may be what somebody said.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.errors import FileError
from gemma_edge.runtime.files.text_files import ErrorClass, parse_json

Arrays = Mapping[str, NDArray[Any]]
Json = dict[str, Any]

MAGIC = b"GEMMA-KV"
ALIGNED = 64
HEADER_BYTES = 64 << 20  # most of them: keys of a long context, and a long conversation's text
DTYPES = ("float32", "int8", "int32", "uint8")
SEAL = hashlib.sha256().digest_size


def write_sealed(path: Path, header: Json, arrays: Arrays) -> None:
    """Writes a new file.

    Raises:
        FileExistsError: there is one already.
        OSError: it cannot be written.
    """
    listed = [
        {"name": name, "dtype": array.dtype.name, "shape": list(array.shape)}
        for name, array in arrays.items()
    ]
    text = json.dumps({**header, "arrays": listed}, ensure_ascii=False).encode("utf-8", "surrogatepass")
    text += b" " * (-len(text) % ALIGNED)
    seal = hashlib.sha256()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        for piece in (MAGIC, len(text).to_bytes(8, "little"), text, *_padded(arrays)):
            seal.update(piece)
            file.write(piece)
        file.write(seal.digest())


def _padded(arrays: Arrays) -> Iterator[memoryview | bytes]:
    for array in arrays.values():
        if array.size:
            yield np.ascontiguousarray(array).reshape(-1).view(np.uint8).data
        yield bytes(-array.nbytes % ALIGNED)


def read_header(path: Path, error: ErrorClass = FileError) -> Json:
    """The header of a file, whose seal is not checked.

    Raises:
        error: this is no such file, or it is cut short.
    """
    with open(_descriptor(path, error), "rb") as file:
        return _header(file, path, error)


def read_sealed(path: Path, error: ErrorClass = FileError) -> tuple[Json, Arrays]:
    """The header and the arrays, which are views of what was read.

    Raises:
        error: this is no such file, it is cut short, too long, or altered.
    """
    with open(_descriptor(path, error), "rb") as file:
        header = _header(file, path, error)
        first, size = file.tell(), os.fstat(file.fileno()).st_size
        places, expected = _places(header, first, path, error)
        if size != expected + SEAL:
            raise error(path, "size", f"{expected + SEAL:,} bytes", f"{size:,}", "Copy the file again.")
        data = bytearray(size)
        file.seek(0)
        if file.readinto(data) != size:
            raise error(path, "size", f"{size:,} bytes", "fewer: it became shorter", "Copy the file again.")
    view = memoryview(data)
    if hashlib.sha256(view[:-SEAL]).digest() != data[-SEAL:]:
        raise error(path, "sha256", "the one at its end", "another: the file was altered")
    arrays = {
        name: np.frombuffer(view[begin:end], dtype).reshape(shape)
        for name, (begin, end, dtype, shape) in places.items()
    }
    return header, arrays


def _descriptor(path: Path, error: ErrorClass) -> int:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not hang it
    except OSError as problem:
        raise error(path, "file", "a readable file", (problem.strerror or "nothing").lower()) from None
    except ValueError:
        raise error(path, "file", "a readable file", "a name that no file can have") from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(path, "file", "a regular file", "a folder, a device or a pipe")
    return descriptor


def _header(file: BinaryIO, path: Path, error: ErrorClass) -> Json:
    size = os.fstat(file.fileno()).st_size
    start = file.read(16)
    if start[:8] != MAGIC or len(start) < 16:
        raise error(path, "magic", repr(MAGIC)[1:], repr(start[:8])[1:])
    length = int.from_bytes(start[8:], "little")
    if length > min(HEADER_BYTES, size - 16 - SEAL) or length % ALIGNED:
        raise error(path, "length of the header", "one that fits the file", length)
    return parse_json(file.read(length), path, error, field="header")


def _places(
    header: Json, first: int, path: Path, error: ErrorClass
) -> tuple[dict[str, tuple[int, int, str, tuple[int, ...]]], int]:
    """Begin, end, dtype and shape of each array by its name, and where the last one ends."""
    places: dict[str, tuple[int, int, str, tuple[int, ...]]] = {}
    listed = header.get("arrays")
    if not isinstance(listed, list):
        raise error(path, "arrays", "a list", type(listed).__name__)
    for index, entry in enumerate(listed):
        field = f"arrays[{index}]"
        name, dtype, shape = (
            (entry.get(key) for key in ("name", "dtype", "shape")) if isinstance(entry, dict) else (None,) * 3
        )
        if not isinstance(name, str) or name in places or dtype not in DTYPES:
            raise error(path, field, "a name of its own and a known dtype", f"{name!r}, {dtype!r}")
        if not isinstance(shape, list) or len(shape) > 8 or not all(map(_is_size, shape)):
            raise error(path, f"{field}.shape", "at most 8 sizes", repr(shape)[:80])
        size = math.prod(shape) * np.dtype(dtype).itemsize
        places[name] = first, first + size, dtype, tuple(shape)
        first += size + -size % ALIGNED
    return places, first


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 32
