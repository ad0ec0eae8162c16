"""Text and JSON from somebody else's files: regular ones of a bounded size, one error for all that is wrong.

A FIFO does not hang, /dev/zero and a manifest of gigabytes are not read; a number of any length, any depth
of brackets and any bytes end in the caller's class of error.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import IO, Any

from gemma_edge.runtime.errors import FileError

MAX_TEXT_BYTES = 16 << 20  # a manifest is some kB, Gemma's tokenizer_config.json 1.2 MB

ErrorClass = type[FileError]


def read_bytes(
    path: Path,
    error: ErrorClass,
    *,
    what: str = "a readable file",
    limit: int = MAX_TEXT_BYTES,
    remedy: str = "",
) -> bytes:
    """A file's bytes, at most `limit` of them.

    Raises:
        error: the file is missing, unreadable, no regular file, or larger.
    """
    with open_regular(path, error, what=what, remedy=remedy) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise error(path, "size", f"at most {limit:,} bytes", f"{size:,}", remedy)
        try:
            return file.read(limit + 1)
        except OSError as problem:
            raise error(path, "file", what, problem.strerror, remedy) from None


def open_regular(
    path: Path, error: ErrorClass, *, what: str = "a readable file", remedy: str = ""
) -> IO[bytes]:
    """A regular file, open for reading.

    Raises:
        error: the file is missing, unreadable, or no regular file.
    """
    try:
        descriptor = os.open(
            path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
        )  # a FIFO must not hang the open
    except OSError as problem:
        raise error(path, "file", what, (problem.strerror or "nothing").lower(), remedy) from None
    except ValueError:
        raise error(path, "file", what, "a name that no file can have", remedy) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        got = "a folder" if stat.S_ISDIR(status.st_mode) else "a device or a pipe"
        raise error(path, "file", "a regular file", got, remedy)
    return open(descriptor, "rb")


def is_name(name: str) -> bool:
    """Whether a file may be called so: UTF-8, without NUL, of at most 255 bytes between slashes."""
    try:
        parts = name.encode("utf-8").split(b"/")
    except UnicodeEncodeError:
        return False
    return b"\0" not in name.encode() and all(0 < len(part) <= 255 for part in parts)


def read_text(path: Path, error: ErrorClass, **options: Any) -> str:
    """A file's UTF-8 text; options and errors as of `read_bytes`."""
    try:
        return read_bytes(path, error, **options).decode("utf-8")
    except UnicodeDecodeError as problem:
        raise error(path, "file", "UTF-8 text", problem, options.get("remedy", "")) from None


def read_json(path: Path, error: ErrorClass, **options: Any) -> dict[str, Any]:
    """A file's JSON object; options and errors as of `read_bytes`."""
    return parse_json(read_bytes(path, error, **options), path, error, remedy=options.get("remedy", ""))


def parse_json(
    text: str | bytes, path: Path, error: ErrorClass, *, field: str = "file", remedy: str = ""
) -> dict[str, Any]:
    """The JSON object that `text` is.

    Raises:
        error: it is no JSON, too deep, has a number of thousands of digits, or is no object.
    """
    try:
        data = json.loads(text if isinstance(text, str) else text.decode("utf-8"))
    except (ValueError, RecursionError) as problem:
        raise error(path, field, "JSON", _reason(problem), remedy) from None
    if not isinstance(data, dict):
        raise error(path, field, "a JSON object", type(data).__name__, remedy)
    return data


def _reason(problem: Exception) -> object:
    if isinstance(problem, RecursionError):
        return "brackets within brackets within brackets"
    known = isinstance(problem, (json.JSONDecodeError, UnicodeDecodeError))
    return problem if known else "a number of thousands of digits"
