"""Attachments that are no files: bytes, data URLs, and the parts of messages that other APIs have."""

from __future__ import annotations

import base64
import binascii
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from gemma_edge.runtime.errors import FileError, UsageError
from gemma_edge.runtime.files.abandoned import temporary_folder

DOWNLOAD = "only files are read: download it first."
# Types of parts as OpenAI's API has them: what they are called here.
FOREIGN_TYPES = {"image_url": "image", "input_audio": "audio"}
SHOWN = 80  # characters of a URL in errors


def is_url(source: object) -> bool:
    """Whether a text is a URL; a path is none."""
    return isinstance(source, str) and ("://" in source or source.startswith("data:"))


def own_part(part: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A part of OpenAI's types as one of ours; any other as it is.

    Raises:
        UsageError: it lacks its URL or its data.
    """
    kind = part.get("type")
    if not isinstance(kind, str) or kind not in FOREIGN_TYPES:
        return part
    value = part.get(kind)
    if kind == "image_url":
        url = value.get("url") if isinstance(value, Mapping) else value
        if not isinstance(url, str):
            raise UsageError(f'{where}: expected {{"type": "image_url", "image_url": {{"url": ...}}}}')
        return {"type": "image", "url": url}
    data = value.get("data") if isinstance(value, Mapping) else None
    if not isinstance(data, str):
        raise UsageError(f'{where}: expected {{"type": "input_audio", "input_audio": {{"data": base64}}}}')
    return {"type": "audio", "audio": _decoded(data, where)}


def read_url(url: str, where: str) -> Path | bytes:
    """The path of a file: URL, or the bytes of a data: URL.

    Raises:
        UsageError: any other URL, or data that are not base64.
    """
    if url.startswith("data:"):
        head, comma, payload = url.partition(",")
        if not comma:
            raise UsageError(f"{where}: {url[:SHOWN]}: a data URL without data")
        return _decoded(payload, where) if head.endswith(";base64") else unquote_to_bytes(payload)
    parts = urlsplit(url)
    if parts.scheme != "file" or parts.netloc not in ("", "localhost"):
        raise UsageError(f"{where}: {url[:SHOWN]}: {DOWNLOAD}")
    return Path(unquote(parts.path))


@contextmanager
def as_file(data: bytes | bytearray | memoryview, name: str) -> Iterator[Path]:
    """A temporary file with these bytes; errors that name the file name `name` instead."""
    with temporary_folder() as folder:
        path = folder / "attachment"
        path.write_bytes(data)
        try:
            yield path
        except FileError as error:
            if error.path != path:
                raise
            raise type(error)(name, error.field, error.expected, error.got, error.remedy) from None
        except UsageError as error:
            raise type(error)(str(error).replace(str(path), name)) from None


def _decoded(text: str, where: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise UsageError(f"{where}: its data are not base64") from None
