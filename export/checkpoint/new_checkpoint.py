"""A checkpoint folder in the making: shards laid out before a weight is known, and published whole or not."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from gemma_edge.export.checkpoint.shards import DTYPE_BITS, INDEX_NAME, SINGLE_NAME
from gemma_edge.runtime.errors import GemmaEdgeError, UsageError
from gemma_edge.runtime.files.abandoned import remove_abandoned

SHARD_BYTES = 4_000_000_000  # a larger tensor (E4B's PLE table) is a shard of its own, as published


@dataclass(frozen=True)
class NewShard:
    """One file: its name, what it begins with, and where each tensor begins, in the order of the file."""

    name: str
    header: bytes
    offsets: Mapping[str, int]


def lay_out_shards(tensors: Iterable[tuple[str, str, tuple[int, ...]]]) -> tuple[list[NewShard], int]:
    """Shards of at most `SHARD_BYTES` for tensors given by key, dtype and shape, and the bytes of weights."""
    groups: list[dict[str, tuple[str, tuple[int, ...], int]]] = [{}]
    filled = total = 0
    for key, dtype, shape in tensors:
        size = math.prod(shape) * DTYPE_BITS[dtype] // 8
        if groups[-1] and filled + size > SHARD_BYTES:
            groups.append({})
            filled = 0
        groups[-1][key] = dtype, shape, size
        filled, total = filled + size, total + size
    names = [f"model-{i:05d}-of-{len(groups):05d}.safetensors" for i in range(1, len(groups) + 1)]
    names = names if len(groups) > 1 else [SINGLE_NAME]
    return [_shard(name, group) for name, group in zip(names, groups, strict=True)], total


def _shard(name: str, tensors: Mapping[str, tuple[str, tuple[int, ...], int]]) -> NewShard:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offsets, end = {}, 0
    for key, (dtype, shape, size) in tensors.items():
        entries[key] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        offsets[key], end = end, end + size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    return NewShard(
        name, len(text).to_bytes(8, "little") + text, {key: start + at for key, at in offsets.items()}
    )


def write_index(folder: Path, shards: list[NewShard], total: int) -> None:
    """The index that several shards need; one has none."""
    if len(shards) > 1:
        weight_map = {key: shard.name for shard in shards for key in shard.offsets}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        text = json.dumps(index, indent=2, sort_keys=True) + "\n"
        (folder / INDEX_NAME).write_text(text, encoding="utf-8")


def check_new(path: Path) -> Path:
    """An absolute path for a new folder. Raises UsageError if something other than an empty one is there."""
    path = path.expanduser().resolve()
    if path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise UsageError(f"{path}: exists and is not an empty folder; choose another path")
    return path


@contextlib.contextmanager
def new_checkpoint(path: Path, size: int) -> Iterator[Path]:
    """A hidden folder beside `path`, which takes its name when the block ends, and goes if that fails.

    Args:
        path: of `check_new`.
        size: bytes of weights that the disk must have room for.

    Raises:
        GemmaEdgeError: the disk is full or refuses. Nothing is left behind, nor after an interrupt.
    """
    before = f".{path.name}.partial-"
    remove_abandoned(path.parent, before)
    temporary = path.with_name(f"{before}{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        free = shutil.disk_usage(temporary).free
        if size > free:
            raise OSError(errno.ENOSPC, f"{size / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free")
        yield temporary
        os.rename(temporary, path)
    except OSError as error:
        raise GemmaEdgeError(
            f"{path}: cannot be written: {error.strerror}. Nothing was left there."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
