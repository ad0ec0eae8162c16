"""`Prompt`: token ids and the places of attachments, built from messages.

Messages are those of `transformers`: the content of one is a text, or parts of type "text", "image", "audio"
and "video". The chat template writes a placeholder for each image and clip; here it becomes what
`Gemma3nProcessor` makes of it: an empty line, the token that begins it, its soft tokens, the token that ends
it, an empty line. Text and expansions are tokenized together, as there: newlines that meet become one token.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeGuard

from gemma_edge.runtime.artifacts.modalities import Modality
from gemma_edge.runtime.errors import BundleError, UsageError
from gemma_edge.runtime.media.attachments import MODALITY, PART_TYPES, Attachment, Part, Reader
from gemma_edge.runtime.prompt.chat_template import Message
from gemma_edge.runtime.prompt.tokenizer import Tokenizer

TURN = "<start_of_turn>"  # Gemma's; in a text without it, a prompt is one turn
MOST_NEWLINES = 32  # that Gemma's tokenizer has one token for


@dataclass(frozen=True)
class Placed:
    """An attachment whose soft tokens are ids[start:stop] of a prompt."""

    start: int
    stop: int
    attachment: Attachment


@dataclass(frozen=True)
class Prompt:
    """What a decoder is fed: token ids, and the attachments among them in order.

    Attributes:
        text: what the ids were made of, with one placeholder for each attachment.
        left_out: tokens that truncation took from the user's text.
        boundaries: how many of the first ids the next prompt may well share: those before the last question.
        messages: what the template was given, the attachments as bare parts; none for a raw prompt.
    """

    ids: list[int]
    placed: tuple[Placed, ...] = field(default=())
    text: str = ""
    left_out: int = 0
    boundaries: tuple[int, ...] = field(default=())
    messages: tuple[Message, ...] = field(default=(), compare=False, repr=False)

    @cached_property
    def keys(self) -> list[int]:
        """The ids, with negative numbers where soft tokens are: equal where the same picture is meant."""
        keys = list(self.ids)
        for item in self.placed:
            keys[item.start : item.stop] = [-1 - item.attachment.key] * (item.stop - item.start)
        return keys

    @property
    def soft_tokens(self) -> int:
        """How many of the ids stand for attachments."""
        return sum(item.stop - item.start for item in self.placed)

    def after(self, token: int) -> list[Attachment]:
        """The attachments that reach beyond the first `token` ids."""
        return [item.attachment for item in self.placed if item.stop > token]

    def takes(self) -> str:
        """For people: "photo.jpg takes 256 tokens, clip.mp4 1,212"; "" without attachments."""
        tokens: dict[str, int] = {}
        for item in self.placed:
            tokens[item.attachment.name] = tokens.get(item.attachment.name, 0) + item.stop - item.start
        return ", ".join(f"{name} takes {count} tokens" for name, count in tokens.items())


def open_messages(messages: Sequence[Message], reader: Reader) -> tuple[Sequence[Message], list[Attachment]]:
    """Messages with every image and clip as a bare part of its type, and these attachments in order.

    A video, and a recording of more than 30 s, become several parts.

    Raises:
        As `Reader.part`. Messages that are malformed otherwise are left to the template.
    """
    found: list[Attachment] = []
    opened: list[Message] = []
    if not is_list(messages):
        return messages, found  # the template's checks say what is wrong
    for number, message in enumerate(messages):
        content = message.get("content") if isinstance(message, Mapping) else None
        if not is_list(content):
            opened.append(message)
            continue
        parts: list[Any] = []
        for index, part in enumerate(content):
            if isinstance(part, Mapping) and part.get("type") in PART_TYPES:
                read = reader.part(part, f"messages[{number}]['content'][{index}]")
                found += [item for item in read if isinstance(item, Attachment)]
                parts += [bare(item) for item in read]
            else:
                parts.append(part)
        opened.append({**message, "content": parts})
    return opened, found


def attached(messages: Sequence[Message], parts: Sequence[Part]) -> Sequence[Message]:
    """The messages with `parts` before what the last of them says."""
    last = messages[-1] if is_list(messages) and messages else None
    if not parts or not isinstance(last, Mapping):
        return messages
    content = last.get("content")
    said = list(content) if is_list(content) else [bare(content)] if isinstance(content, str) else []
    return [*messages[:-1], {**last, "content": [*map(whole, parts), *said]}]


def is_list(value: object) -> TypeGuard[Sequence[Any]]:
    """Is it a sequence, but no text?"""
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def bare(part: Part) -> dict[str, Any]:
    """A part as a template takes it."""
    return {"type": "text", "text": part} if isinstance(part, str) else {"type": part.kind}


def whole(part: Part) -> dict[str, Any]:
    """A part as `open_messages` takes it: an attachment that was read is not read again."""
    return bare(part) if isinstance(part, str) else {"type": part.kind, part.kind: part}


def build(
    text: str,
    attachments: Sequence[Attachment],
    modalities: Mapping[str, Modality],
    tokenizer: Tokenizer,
    *,
    template: object = "chat template",
) -> Prompt:
    """The prompt of a text with a placeholder for every attachment, in the order of its kind; one bos.

    Args:
        template: what wrote the text, to name it in errors.

    Raises:
        UsageError: the text has more placeholders than there are attachments.
        BundleError: it has fewer: the template leaves attachments out.
    """
    if not attachments:
        ids = tokenizer.encode(text, bos=True)
        return Prompt(ids, text=text, boundaries=_boundaries(ids, tokenizer))
    kinds = {placeholder(modalities[MODALITY[kind]], tokenizer): kind for kind in _kinds(attachments)}
    queues = {kind: [item for item in attachments if item.kind == kind] for kind in kinds.values()}
    pieces: list[str] = []
    order: list[Attachment] = []
    for piece in re.split("(" + "|".join(map(re.escape, kinds)) + ")", text):
        if piece not in kinds:
            pieces.append(piece)
            continue
        if not queues[kinds[piece]]:
            raise UsageError(
                f"the text has {piece} in it, which is the place of an attachment: write it in another way"
            )
        item = queues[kinds[piece]].pop(0)
        order.append(item)
        pieces.append(expansion(modalities[MODALITY[item.kind]], tokenizer))
    if left := [item.name for queue in queues.values() for item in queue]:
        raise BundleError(
            str(template),
            "placeholders",
            f"one for every attachment ({', '.join(kinds)})",
            f"none for {left[0]}",
        )
    ids = tokenizer.encode("".join(pieces), bos=True)
    places = tuple(_places(ids, order, modalities))
    return Prompt(ids, places, text, boundaries=_boundaries(ids, tokenizer))


def placeholder(modality: Modality, tokenizer: Tokenizer) -> str:
    """The text of a modality's soft token.

    Raises:
        BundleError: the tokenizer does not know it.
    """
    return _special(tokenizer, modality.soft_id)


def expansion(modality: Modality, tokenizer: Tokenizer) -> str:
    """What stands in a prompt for one attachment, as text."""
    begin, end = _special(tokenizer, modality.begin_id), _special(tokenizer, modality.end_id)
    return f"\n\n{begin}{placeholder(modality, tokenizer) * modality.soft_tokens}{end}\n\n"


def _special(tokenizer: Tokenizer, token_id: int) -> str:
    text = tokenizer.token_text(token_id)
    if not text or tokenizer.encode(text, bos=False) != [token_id]:
        raise BundleError(
            tokenizer.path,
            "added_tokens",
            f"a text for token {token_id}",
            repr(text),
            "Export the checkpoint again, with its tokenizer_config.json.",
        )
    return text


def _boundaries(ids: Sequence[int], tokenizer: Tokenizer) -> tuple[int, ...]:
    """Where the last turn of the user begins, and where the last empty line before its question ends.

    Templates put an empty line after a system message and an attachment, people put one after a document.
    """
    turn = tokenizer.encode(TURN, bos=False)
    starts = [i for i, token in enumerate(ids) if [token] == turn]
    *turns, end = starts or [len(ids)]  # the last turn is the answer's
    newlines = {
        found[0]: count
        for count in range(1, MOST_NEWLINES)
        if len(found := tokenizer.encode("\n" * count, bos=False)) == 1
    }
    paragraph = run = 0
    for i, token in enumerate(ids[:end]):
        run = run + newlines[token] if token in newlines else 0
        if run >= 2:
            paragraph = i + 1
    return tuple(sorted({position for position in (*turns[-1:], paragraph) if position}))


def _kinds(attachments: Sequence[Attachment]) -> list[str]:
    return sorted({item.kind for item in attachments})


def _places(
    ids: Sequence[int], order: Sequence[Attachment], modalities: Mapping[str, Modality]
) -> Iterator[Placed]:
    start = 0
    for item in order:
        modality = modalities[MODALITY[item.kind]]
        start = ids.index(modality.soft_id, start)
        yield Placed(start, start + modality.soft_tokens, item)
        start += modality.soft_tokens
