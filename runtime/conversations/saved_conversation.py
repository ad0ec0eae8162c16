"""Conversations in files: the turns with their attachments, and the KV cache to go on with.

A file belongs to the bundle that it was made with, and is refused by every other. The KV cache in it belongs
to a version of an engine, too; another one computes it again, and nothing is lost.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from gemma_edge.runtime.conversations.turns import Message, Turn
from gemma_edge.runtime.engines.kv_snapshot import KvSnapshot
from gemma_edge.runtime.errors import GemmaEdgeError, SessionError, UsageError
from gemma_edge.runtime.files.json_shape import misfit
from gemma_edge.runtime.files.sealed_arrays import Arrays, Json, read_sealed, write_sealed
from gemma_edge.runtime.files.whole_file import replacing
from gemma_edge.runtime.media.attachments import Attachment, Reader
from gemma_edge.runtime.prompt.chat_template import normalize_messages
from gemma_edge.runtime.reuse.kv_file import Keys, kv_header, kv_of

KIND, SCHEMA = "conversation", 1
SHAPE = {
    "schema": "size",
    "bundle": "text",
    "system?": "text",
    "turns": [{"messages": [{"role": "text"}], "pinned": "flag"}],
    "tokens": {"prompt": "size", "cached": "size", "completion": "size"},
    "attachments": [{"kind": "text", "name": "text"}],
}
T = TypeVar("T")


@dataclass(frozen=True)
class SavedConversation:
    """What a file holds. `tokens` counts those of all prompts and answers; `kv` may be missing."""

    system: str | None
    turns: Sequence[Turn]
    tokens: dict[str, int]
    kv: tuple[Keys, KvSnapshot] | None


def write_conversation(path: str | Path, saved: SavedConversation, bundle: str) -> None:
    """Writes a conversation, whole or not at all.

    Args:
        bundle: `Bundle.identity`.

    Raises:
        UsageError: a message holds what JSON does not have.
        OSError: the file cannot be written.
    """
    attachments: list[Attachment] = []

    def without_data(part: Json) -> Json:
        data = part.get(part["type"])
        if not isinstance(data, Attachment):
            return part
        attachments.append(data)
        return {"type": part["type"], "attachment": len(attachments) - 1}

    turns = [
        {"messages": [_with_parts(message, without_data) for message in turn.messages], "pinned": turn.pinned}
        for turn in saved.turns
    ]
    header = {"kind": KIND, "schema": SCHEMA, "bundle": bundle, "system": saved.system, "turns": turns}
    header |= {"tokens": saved.tokens, "kv": None}
    header["attachments"] = [{"kind": item.kind, "name": item.name} for item in attachments]
    arrays = {_array(i): item.data for i, item in enumerate(attachments)}
    if saved.kv:
        header["kv"] = kv_header(*saved.kv)
        arrays |= saved.kv[1].arrays
    with replacing(Path(path)) as sibling:
        try:
            write_sealed(sibling, header, arrays)
        except (TypeError, ValueError) as error:
            raise UsageError(f"a message cannot be written into a file: {error}") from None


def read_conversation(path: str | Path, bundle: str, reader: Reader) -> SavedConversation:
    """The conversation in a file.

    Raises:
        SessionError: this is no such file, it is cut short, altered, or of another bundle.
    """
    path = Path(path)
    header, arrays = read_sealed(path, SessionError)
    if header.get("kind") != KIND:
        raise SessionError(path, "kind", KIND, header.get("kind"))
    if wrong := misfit(header, SHAPE):
        raise SessionError(path, *wrong, "something else")
    if header["schema"] != SCHEMA:
        raise SessionError(path, "schema", SCHEMA, header["schema"], "Upgrade gemma-edge.")
    if header["bundle"] != bundle:
        remedy = "Load the bundle that the conversation was saved with."
        raise SessionError(path, "bundle", bundle[:16], header["bundle"][:16], remedy)
    attachments = _checked(path, "attachments", lambda: _attachments(header["attachments"], arrays, reader))
    turns = _checked(path, "turns", lambda: _turns(header["turns"], attachments))
    tokens = {name: header["tokens"][name] for name in ("prompt", "cached", "completion")}
    kv = None if header.get("kv") is None else kv_of(header["kv"], arrays, path, SessionError)
    return SavedConversation(header.get("system"), turns, tokens, kv)


def _attachments(listed: list[Json], arrays: Arrays, reader: Reader) -> list[Attachment]:
    return [reader.again(entry["kind"], entry["name"], arrays[_array(i)]) for i, entry in enumerate(listed)]


def _array(number: int) -> str:
    return f"attachment {number}"


def _turns(listed: list[Json], attachments: Sequence[Attachment]) -> list[Turn]:
    def with_data(part: Json) -> Json:
        if "attachment" not in part:
            return part
        item = attachments[part["attachment"]]
        return {"type": item.kind, item.kind: item}

    turns = [
        Turn([_with_parts(message, with_data) for message in turn["messages"]], turn["pinned"])
        for turn in listed
    ]
    if turns:
        normalize_messages([message for turn in turns for message in turn.messages])
    return turns


def _with_parts(message: Message, change: Callable[[Json], Json]) -> Message:
    """The message, with each part of its content changed if it has parts."""
    content = message.get("content")
    return (
        {**message, "content": [change(part) for part in content]} if isinstance(content, list) else message
    )


def _checked(path: Path, field: str, make: Callable[[], T]) -> T:
    """What `make` returns; SessionError for what it raises."""
    try:
        return make()
    except GemmaEdgeError as error:
        raise SessionError(path, field, "one that can be read", error) from None
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise SessionError(path, field, "one that can be read", f"{type(error).__name__}: {error}") from None
