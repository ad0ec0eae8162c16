"""Batches as JSON lines: one prompt a line, read a line at a time.

    {"prompt": "Why is the sky blue?", "id": "sky", "max_tokens": 40}
    {"messages": [{"role": "user", "content": "Hello"}], "system": "Be brief.", "temperature": 0}

A line may also be a text alone. `id`, a text or an integer, is repeated in the answer. Other names are
options of `generate`. Files of attachments are named relative to the folder of the batch.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from gemma_edge.runtime.batches.batch import BatchRequest
from gemma_edge.runtime.errors import FileError, GemmaEdgeError, UsageError, printable
from gemma_edge.runtime.files.text_files import open_regular
from gemma_edge.runtime.generate_options import GenerateOptions
from gemma_edge.runtime.media.attachments import MODALITY

MAX_LINE_BYTES = 4 << 20
NOT_IN_FILES = frozenset(("guard", "client"))  # options that are no JSON, or the caller's own
OWN_NAMES = ("prompt", "messages", "id")
MEDIA = (*MODALITY, "video")

Json = dict[str, Any]


@dataclass(frozen=True)
class BatchLine:
    """A line of a batch: its request, or what is wrong with it.

    Attributes:
        number: of the line, from 1.
        raw: its bytes, without the newline.
    """

    number: int
    raw: bytes
    id: str | int | None = None
    request: BatchRequest | None = None
    error: GemmaEdgeError | None = None


def check_prompts(path: str | Path) -> None:
    """Raises FileError if the file cannot be read, or has no prompt."""
    with open_regular(Path(path), FileError) as file:
        if not any(raw.strip() for _, raw in _lines(file)):
            raise FileError(path, "lines", "a prompt", "none")


def read_prompts(path: str | Path) -> Iterator[BatchLine]:
    """The lines of a batch; blank ones are left out.

    Raises:
        FileError: the file cannot be read.
    """
    path = Path(path)
    with open_regular(path, FileError) as file:
        for number, raw in _lines(file):
            if not raw.strip():
                continue
            try:
                name, request = _parsed(raw, path.parent)
                yield BatchLine(number, raw, name, request)
            except UsageError as error:
                yield BatchLine(number, raw, _id_of(raw), error=error)


def _lines(file: IO[bytes]) -> Iterator[tuple[int, bytes]]:
    """Numbers and bytes of lines; of a line that is too long, one byte more than it may have."""
    number = 0
    while raw := file.readline(MAX_LINE_BYTES + 1):
        number += 1
        piece = raw
        while len(piece) > MAX_LINE_BYTES and not piece.endswith(b"\n"):
            piece = file.readline(MAX_LINE_BYTES + 1)
        yield number, raw.removesuffix(b"\n")


def _parsed(raw: bytes, folder: Path) -> tuple[str | int | None, BatchRequest]:
    if len(raw) > MAX_LINE_BYTES:
        raise UsageError(f"it is longer than {MAX_LINE_BYTES:,} bytes")
    data = _json(raw)
    if isinstance(data, str):
        return None, BatchRequest(data)
    if not isinstance(data, dict):
        raise UsageError("expected a JSON object with prompt or messages, or a text")
    known = {*OWN_NAMES, *GenerateOptions.__annotations__} - NOT_IN_FILES
    if unknown := sorted(data.keys() - known):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f": did you mean {near[0]!r}?" if near else ""
        raise UsageError(f"there is no option {printable(unknown[0], 80)!r}{hint}")
    if ("prompt" in data) == ("messages" in data):
        raise UsageError("expected either prompt or messages")
    prompt = data.get("prompt", data.get("messages"))
    if not isinstance(prompt, str if "prompt" in data else list):
        raise UsageError("prompt must be a text, and messages a list")
    if isinstance(data.get("id"), bool) or not isinstance(data.get("id"), str | int | None):
        raise UsageError("id must be a text or an integer")
    options = {name: value for name, value in data.items() if name not in OWN_NAMES}
    _check_types(options)
    if "attach" in options:
        options["attach"] = [str(folder / file) for file in options["attach"]]
    if isinstance(prompt, list):
        prompt = [_located(message, folder) for message in prompt]
    return data.get("id"), BatchRequest(prompt, options)


def _check_types(options: Json) -> None:
    """What `generate` takes for granted of options whose types Python code has right."""

    def texts(value: Any) -> bool:
        return isinstance(value, list) and all(isinstance(item, str) for item in value)

    whole = options.get("max_tokens")
    if whole is not None and (isinstance(whole, bool) or not isinstance(whole, int)):
        raise UsageError(f"max_tokens must be an integer, not {printable(whole, 80)}")
    if not isinstance(options.get("system"), str | None):
        raise UsageError("system must be a text")
    if "attach" in options and not texts(options["attach"]):
        raise UsageError("attach must be a list of files")
    for name in ("raw", "speculate"):
        if not isinstance(options.get(name, False), bool):
            raise UsageError(f"{name} must be true or false")
    stop = options.get("stop")
    if not (stop is None or isinstance(stop, str) or texts(stop)):
        raise UsageError("stop must be a text or a list of texts")


def _json(raw: bytes) -> Any:
    try:
        return json.loads(raw.decode("utf-8"))
    except RecursionError:
        raise UsageError("expected JSON, got brackets within brackets within brackets") from None
    except UnicodeDecodeError as error:
        raise UsageError(f"expected UTF-8, got {error.reason} at byte {error.start}") from None
    except ValueError as error:
        raise UsageError(f"expected JSON, got {printable(error, 120)}") from None


def _id_of(raw: bytes) -> str | int | None:
    """The id of a line that is wrong otherwise."""
    try:
        data = _json(raw[:MAX_LINE_BYTES])
    except UsageError:
        return None
    name = data.get("id") if isinstance(data, dict) else None
    return name if isinstance(name, str | int) and not isinstance(name, bool) else None


def _located(message: Any, folder: Path) -> Any:
    """The message with the paths of its files below `folder`."""
    content = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(content, list):
        return message
    parts = []
    for part in content:
        if isinstance(part, dict) and part.get("type") in MEDIA:
            for name in ("path", part["type"]):
                if isinstance(part.get(name), str):
                    part = {**part, name: str(folder / part[name])}
        parts.append(part)
    return {**message, "content": parts}
