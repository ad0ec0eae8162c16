"""JSONL files of results, read and written: every line is a record or a row."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import warnings
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from gemma_edge.benchmarks.records.record import CeilingRecord, CompareRecord, Head, QualityRecord, Record
from gemma_edge.benchmarks.records.rows import BenchRow, EncodeRow, PrefixRow, SessionRow, SpeculationRow
from gemma_edge.runtime.errors import FileError
from gemma_edge.runtime.files.text_files import read_text
from gemma_edge.runtime.files.typed_json import FieldError, from_json, to_json

MAX_RESULTS_BYTES = 256 << 20
# Kinds with a class of their own; any other kind is a `Record`.
KINDS: dict[str, type[Head]] = {
    "bench": BenchRow,
    "encode": EncodeRow,
    "prefix": PrefixRow,
    "speculation": SpeculationRow,
    "session": SessionRow,
    "compare": CompareRecord,
    "ceiling": CeilingRecord,
    "quality": QualityRecord,
}
# Keys of peers in old records, and their names.
_OLD_PEERS = {"llama_cpp": "llama.cpp", "litert_lm": "litert-lm", "against": "the other bundle"}


class RecordError(FileError):
    """A results file holds a line that is not a record."""


def append_record(path: Path, record: Head) -> None:
    """Appends one line to a JSONL file, making its folder; a torn last line, left by a kill, goes first.

    Raises ValueError for NaN and infinity.
    """
    line = json_line(record).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and not path.is_file():  # a pipe
        with path.open("ab", buffering=0) as pipe:
            pipe.write(line)
        return
    with path.open("a+b", buffering=0) as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        end = file.seek(0, os.SEEK_END)
        tail = _unfinished(file, end)
        if _is_json(tail):
            line = b"\n" + line  # somebody's editor leaves out the last newline
        elif tail:
            file.truncate(end - len(tail))
        file.write(line)  # one write: two processes' records do not mix
        os.fsync(file.fileno())


def _unfinished(file: FileIO, end: int) -> bytes:
    """What follows the last newline of a file of `end` bytes; leaves its position at the end."""
    begin, tail = end, b""
    while begin and b"\n" not in tail:
        size = min(1 << 16, begin)
        begin = file.seek(begin - size)
        tail = file.read(size) + tail
    file.seek(end)
    return tail.rpartition(b"\n")[2]


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def json_line(record: Head) -> str:
    """A record as a line of a results file. Raises ValueError for NaN and infinity."""
    return json.dumps(to_json(record), allow_nan=False, ensure_ascii=False) + "\n"


def read_records(path: Path) -> list[Head]:
    """All records of a JSONL file, each of the class of its kind.

    Raises:
        RecordError: a line is not a record, or of a newer schema; the error names file, line and field.

    A last line that a kill has torn is left out, with a warning.
    """
    lines = read_text(path, RecordError, what="a JSONL file", limit=MAX_RESULTS_BYTES).split("\n")
    if lines[-1].strip() and not _is_json(lines[-1].encode()):
        warnings.warn(f"{path}: its last line is not complete and is left out", stacklevel=2)
        lines.pop()
    return [_record(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def parse_record(data: object) -> Head:
    """One record. Raises FieldError, which names the field."""
    if not isinstance(data, dict):
        raise FieldError("", "a JSON object", data)
    kind = data.get("kind")
    return from_json(KINDS.get(kind, Record) if isinstance(kind, str) else Record, _upgraded(data))


def _record(path: Path, number: int, line: str) -> Head:
    try:
        return parse_record(json.loads(line))
    except FieldError as error:
        raise RecordError(path, f"line {number}: {error.field}", error.expected, error.got) from None
    except (ValueError, RecursionError) as error:
        raise RecordError(path, f"line {number}", "a JSON object", error) from None


def _upgraded(data: dict[str, Any]) -> dict[str, Any]:
    """A record with the peers of each round in one field; old records have a field a peer."""
    raw = data.get("raw")
    rounds = raw.get("rounds") if isinstance(raw, Mapping) else None
    if data.get("kind") != "compare" or not isinstance(rounds, list):
        return data
    newer = []
    for each in rounds:
        if isinstance(each, dict) and "peers" not in each:
            each = {**each, "peers": {name: each[key] for key, name in _OLD_PEERS.items() if each.get(key)}}
        newer.append(each)
    return {**data, "raw": {"rounds": newer}}
