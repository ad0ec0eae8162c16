"""KV snapshots in sealed files: what a header says of one, written and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemma_edge.runtime.engines.kv_snapshot import KvSnapshot
from gemma_edge.runtime.files.sealed_arrays import Arrays, Json
from gemma_edge.runtime.files.text_files import ErrorClass

Keys = list[int]


def kv_header(keys: Keys, snapshot: KvSnapshot) -> Json:
    """What `kv_of` reads; the arrays go beside it, under their names."""
    return {
        "layout": snapshot.layout,
        "earliest": snapshot.earliest,
        "buffers": list(snapshot.arrays),
        "keys": keys,
    }


def kv_keys(header: Any, path: Path, error: ErrorClass) -> tuple[Keys, int]:
    """The keys of a snapshot's tokens, and the least position that it can be taken back to.

    Raises:
        error: `header` is none that `kv_header` made.
    """
    keys, earliest = (
        (header.get("keys"), header.get("earliest")) if isinstance(header, dict) else (None, None)
    )
    if not isinstance(keys, list) or not all(type(key) is int for key in keys):
        raise error(path, "kv.keys", "a list of integers", repr(keys)[:80])
    if type(earliest) is not int or not 0 <= earliest <= len(keys):
        raise error(path, "kv.earliest", f"0 to {len(keys)}", repr(earliest)[:80])
    return keys, earliest


def kv_of(header: Any, arrays: Arrays, path: Path, error: ErrorClass) -> tuple[Keys, KvSnapshot]:
    """The keys and the snapshot of a file; whether a decoder takes it is for `Decoder.restore` to say.

    Raises:
        error: `header` is none that `kv_header` made of these arrays.
    """
    keys, earliest = kv_keys(header, path, error)
    layout, names = header.get("layout"), header.get("buffers")
    if not isinstance(layout, str):
        raise error(path, "kv.layout", "a text", repr(layout)[:80])
    if not isinstance(names, list) or not all(isinstance(name, str) and name in arrays for name in names):
        raise error(path, "kv.buffers", "names of arrays in the file", repr(names)[:80])
    return keys, KvSnapshot(layout, len(keys), earliest, {name: arrays[name] for name in names})
