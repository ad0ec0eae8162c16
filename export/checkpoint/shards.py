"""Safetensors files: headers and the index checked before any byte is used, and positioned reads.

The checks are those of the safetensors library, made without mapping the file: a bounded header, UTF-8 JSON
with each name once, known dtypes, contiguous ranges of the right size, and a last byte that is the end of
the file.
"""

from __future__ import annotations

import json
import os
import stat
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NoReturn

import ml_dtypes
import numpy as np

from gemma_edge.runtime.errors import CheckpointError
from gemma_edge.runtime.files.text_files import is_name, read_json

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
MAX_HEADER_BYTES = 100_000_000  # the bound of the safetensors library
MAX_DIMENSIONS = 8
AGAIN = "Download the checkpoint again."
FLOAT_DTYPES: dict[str, np.dtype[Any]] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
}
# Bits of every safetensors dtype: other towers may use them, the text model may not.
DTYPE_BITS = {
    dtype: bits
    for bits, dtypes in {
        4: "F4",
        6: "F6_E2M3 F6_E3M2",
        8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
        16: "I16 U16 F16 BF16",
        32: "I32 U32 F32",
        64: "F64 I64 U64 C64",
    }.items()
    for dtype in dtypes.split()
}


@dataclass(frozen=True)
class ShardTensor:
    """Where one tensor lies: its name in the file, dtype in safetensors' spelling, and byte range."""

    key: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Shard:
    """One open safetensors file whose header has been checked."""

    path: Path
    fd: int
    size: int
    header: bytes
    tensors: tuple[ShardTensor, ...]


def open_shard(path: Path) -> Shard:
    """Opens one file and checks its header. Raises CheckpointError; the file is closed then."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not hang the open
    except OSError as error:
        raise CheckpointError(path, "file", "a readable safetensors file", error.strerror, AGAIN) from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(path, "file", "a regular file", "something else")
        header, tensors = _parse_header(path, fd, status.st_size)
        return Shard(path, fd, status.st_size, header, tensors)
    except BaseException:
        os.close(fd)
        raise


def _parse_header(path: Path, fd: int, size: int) -> tuple[bytes, tuple[ShardTensor, ...]]:
    """The checks of the safetensors library: 8 bytes of length, JSON, then contiguous tensors up to the
    last byte.
    """

    def fail(field: str, expected: object, got: object) -> NoReturn:
        raise CheckpointError(path, field, expected, got, AGAIN)

    if size < 8:
        fail("file", "a safetensors file of 8 bytes or more", f"{size} bytes")
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if length > MAX_HEADER_BYTES:
        fail("header length", f"at most {MAX_HEADER_BYTES}", length)
    if 8 + length > size:
        fail("header length", f"at most {size - 8}, what the file has left", length)
    raw = os.pread(fd, length, 8)

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        data = dict(pairs)
        if len(data) != len(pairs):
            names = [key for key, _ in pairs]
            fail("header", "each name once", f"{next(n for n in names if names.count(n) > 1)!r} twice")
        return data

    try:
        header = json.loads(raw.decode("utf-8"), object_pairs_hook=no_duplicates)
    except (ValueError, RecursionError) as error:
        fail("header", "UTF-8 JSON", error)
    if not isinstance(header, dict):
        fail("header", "a JSON object", type(header).__name__)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        fail("__metadata__", "an object of strings", metadata)
    tensors = []
    for key, entry in header.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            fail(key, "dtype, shape and data_offsets", entry)
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            fail(f"{key}.dtype", "a safetensors dtype", dtype)
        if not _sizes(shape) or len(shape) > MAX_DIMENSIONS:
            fail(f"{key}.shape", "a list of at most 8 sizes", shape)
        if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            fail(f"{key}.data_offsets", "[begin, end]", offsets)
        bits = DTYPE_BITS[dtype]
        for n in shape:
            bits *= n
        if bits != 8 * (offsets[1] - offsets[0]):
            fail(
                f"{key}.data_offsets",
                f"{bits // 8} bytes for {dtype} {shape}",
                f"{offsets[1] - offsets[0]} bytes",
            )
        base = 8 + length
        tensors.append(ShardTensor(key, dtype, tuple(shape), base + offsets[0], base + offsets[1]))
    tensors.sort(key=lambda t: (t.start, t.stop))
    end = 8 + length
    for tensor in tensors:
        if tensor.start != end:
            fail(f"{tensor.key}.data_offsets", f"to begin at {end - 8 - length}", tensor.start - 8 - length)
        end = tensor.stop
    if end != size:
        fail("file", f"{end} bytes, as the header says", f"{size} bytes")
    return raw, tuple(tensors)


def _sizes(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 63 for n in value
    )


def open_indexed(index: Path, shards: list[Shard]) -> None:
    """Opens every shard that the index names, into `shards`, and checks that both agree."""
    if not index.exists():
        raise CheckpointError(
            index.parent,
            "weights",
            f"{SINGLE_NAME} or {INDEX_NAME}",
            "neither",
            "Only safetensors weights are read.",
        )
    weight_map = read_json(index, CheckpointError, remedy=AGAIN).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(index, "weight_map", "an object of tensor: file", weight_map, AGAIN)
    for key, name in weight_map.items():
        if not isinstance(name, str) or PurePath(name).name != name or name == ".." or not is_name(name):
            raise CheckpointError(
                index, f"weight_map.{key}", "the name of a file in this folder", repr(name), AGAIN
            )
    for name in sorted(set(weight_map.values())):
        shards.append(open_shard(index.parent / name))
    for shard in shards:
        found = {tensor.key for tensor in shard.tensors}
        listed = {key for key, name in weight_map.items() if name == shard.path.name}
        if missing := sorted(listed - found):
            raise CheckpointError(shard.path, missing[0], f"here, says {INDEX_NAME}", "no such tensor", AGAIN)
        if extra := sorted(found - listed):
            got = weight_map.get(extra[0], "nothing")
            raise CheckpointError(
                index, f"weight_map.{extra[0]}", f"{shard.path.name}, which holds it", got, AGAIN
            )


def read_into(shard: Shard, view: memoryview, offset: int, field: str) -> None:
    """Fills `view` with the bytes at `offset`. Raises CheckpointError, naming `field`, when the file ends
    before.
    """
    done = 0
    while done < len(view):  # one call reads at most 2 GiB
        count = os.preadv(shard.fd, [view[done:]], offset + done)
        if count == 0:
            raise CheckpointError(shard.path, field, f"{len(view)} bytes at {offset}", f"{done} bytes", AGAIN)
        done += count


def close_shards(shards: list[Shard]) -> None:
    """Closes the files."""
    for shard in shards:
        os.close(shard.fd)
