"""The examples that tasks consist of, and the rule that holds some of them out."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import Any

HELD_OUT_ONE_IN = 10


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation.

    Attributes:
        role: "user" or "model".
        text: as typed.
        media: None, or what comes before the text: a `pictures.Scene` or a `speech.Clip`.
    """

    role: str
    text: str
    media: Any = None


@dataclass(frozen=True)
class Example:
    """A conversation that ends with the user, and the only right answer."""

    task: str
    turns: tuple[Turn, ...]
    answer: str


def held_out(*combination: object) -> bool:
    """Is this combination kept from training? One in ten is; the same ones everywhere and always."""
    return zlib.crc32(repr(combination).encode()) % HELD_OUT_ONE_IN == 0


def ask(task: str, question: str, answer: str, media: Any = None) -> Example:
    """An example of one turn."""
    return Example(task, (Turn("user", question, media),), answer)
