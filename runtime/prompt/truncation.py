"""Cuts a user's text until its prompt fits: `generate(..., truncate="middle")`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any, Literal, get_args

from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.prompt.prompt_builder import Prompt
from gemma_edge.runtime.prompt.tokenizer import Tokenizer

Side = Literal["start", "end", "middle"]
Messages = list[dict[str, Any]]  # as `normalize_messages` returns them

GAP = "\n[...]\n"  # where the middle was
ANSWER_TOKENS = 256  # left for an answer without `max_tokens`, if they are at most a quarter of the context


def check_side(side: object) -> None:
    """Raises UsageError unless `side` is a `Side` or None."""
    if side is not None and side not in get_args(Side):
        raise UsageError(f"truncate must be one of {', '.join(get_args(Side))}, not {side!r}")


def longest_prompt(context: int, max_tokens: int | None) -> int:
    """Tokens that a truncated prompt may have, so that there is room for an answer."""
    if max_tokens is None:
        return context - max(1, min(ANSWER_TOKENS, context // 4))
    return context - max(1, min(max_tokens, context // 2))


def truncated(
    text: str, make: Callable[[str], Prompt], most: int, side: Side, tokenizer: Tokenizer
) -> Prompt:
    """The prompt of `text` after a cut to at most `most` tokens; characters stay whole.

    Args:
        make: a prompt with a text; its other parts, such as the template's frame, stay whole.
        side: the part of the text that is left out.

    Raises:
        UsageError: the prompt is too long without the text, too.
    """
    whole = make(text)
    over = len(whole.ids) - most
    if over <= 0:
        return whole
    if (frame := len(make("").ids)) > most:
        raise UsageError(
            f"the prompt has {frame} tokens beside the text that can be cut, and may have {most}: "
            "leave out attachments or earlier turns, or load the bundle with a larger context (--context)"
        )
    ids = tokenizer.encode(text, bos=False)
    ends = list(accumulate(len(tokenizer.token_bytes(i, skip_special=False)) for i in ids))
    kept = len(ids)
    while over > 0 and kept > 0:
        kept = max(0, kept - over)
        made = make(_cut(text, [0, *ends], kept, side))
        over = len(made.ids) - most
    return replace(made, left_out=len(ids) - kept)


def _cut(text: str, ends: Sequence[int], kept: int, side: Side) -> str:
    """`text` with `kept` of its tokens, whose ends in UTF-8 these are."""
    raw = text.encode("utf-8")
    before = {"start": 0, "end": kept, "middle": (kept + 1) // 2}[side]
    after = kept - before
    head = raw[: ends[before]].decode("utf-8", "ignore")
    tail = raw[ends[len(ends) - 1 - after] :].decode("utf-8", "ignore") if after else ""
    return head + (GAP if side == "middle" and kept else "") + tail


def text_to_cut(messages: Messages) -> tuple[str, Callable[[str], Messages]]:
    """The longest text of the last user message, and what puts another text in its place.

    Raises:
        UsageError: there is no user message.
    """
    turns = [number for number, message in enumerate(messages) if message["role"] == "user"]
    if not turns:
        raise UsageError("truncate cuts the last user message, and there is none")
    at, message = turns[-1], messages[turns[-1]]
    content = message["content"]

    def with_content(new: Any) -> Messages:
        return [*messages[:at], {**message, "content": new}, *messages[at + 1 :]]

    if isinstance(content, str):
        return content, with_content
    texts = [number for number, part in enumerate(content) if part["type"] == "text"]
    if not texts:
        return "", lambda text: messages
    longest = max(texts, key=lambda number: len(content[number]["text"]))

    def with_part(text: str) -> Messages:
        part = {**content[longest], "text": text}
        return with_content([*content[:longest], part, *content[longest + 1 :]])

    return content[longest]["text"], with_part
