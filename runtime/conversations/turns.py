"""`Turn`: what was said from one question to the next; what becomes of old turns when the context is full."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

from gemma_edge.runtime.errors import UsageError

Message = dict[str, Any]


@dataclass
class Turn:
    """A question and what came of it: an answer, or calls of tools, their results and an answer.

    Attributes:
        messages: as `Model.generate` takes them; the first is the user's.
        pinned: it is not forgotten when the context is full.
    """

    messages: list[Message] = field(default_factory=list)
    pinned: bool = False


@dataclass(frozen=True)
class Full:
    """A conversation whose next prompt leaves too little room for an answer.

    Attributes:
        turns: the oldest first; the last one is the question that is to be answered.
        tokens: the tokens of the prompt that turns make, system message and tools included.
        context: tokens of the KV cache.
        most: tokens that the prompt may have.
    """

    turns: Sequence[Turn]
    tokens: Callable[[Sequence[Turn]], int]
    context: int
    most: int


Strategy = Callable[[Full], Sequence[Turn]]
Overflow = Literal["error", "drop-oldest"] | Strategy


@dataclass(frozen=True)
class Forgotten:
    """Turns that a conversation no longer has, and the tokens that this made room for."""

    turns: Sequence[Turn]
    tokens: int
    context: int

    def __str__(self) -> str:
        number = len(self.turns)
        which = "its oldest turn was" if number == 1 else f"its {number} oldest turns were"
        return f"the conversation reached the context of {self.context} tokens: {which} forgotten"


def drop_oldest(full: Full) -> list[Turn]:
    """Drops the oldest turns that are not pinned, whole, until a quarter of the context is free.

    That is more than one answer needs, because what stays is computed anew. Where only fewer turns fit beside
    a long question, as many as fit stay.
    """
    droppable = [i for i, turn in enumerate(full.turns[:-1]) if not turn.pinned]

    def without(count: int) -> list[Turn]:
        dropped = set(droppable[:count])
        return [turn for i, turn in enumerate(full.turns) if i not in dropped]

    for most in (full.most - full.context // 4, full.most):
        # A search in halves: a prompt is made for each look, and a conversation may have thousands of turns.
        fits = partial(_fits, full, without, most)
        count = bisect_left(range(len(droppable) + 1), True, key=fits)
        if count <= len(droppable):
            return without(count)
    return without(len(droppable))


def _fits(full: Full, without: Callable[[int], list[Turn]], most: int, count: int) -> bool:
    return full.tokens(without(count)) <= most


def strategy_of(overflow: Overflow) -> Strategy | None:
    """What is done with the turns of a full conversation; None to leave it to `Model.generate` to refuse.

    Raises:
        UsageError: there is no such way.
    """
    if overflow == "error":
        return None
    if overflow == "drop-oldest":
        return drop_oldest
    if not callable(overflow):
        raise UsageError(f'overflow must be "error", "drop-oldest" or a function, not {overflow!r}')
    return overflow


def forgotten(full: Full, kept: Iterable[Turn]) -> Forgotten | None:
    """What `full` lost with the turns that are not among `kept`; None if nothing.

    Raises:
        UsageError: `kept` is no list of turns that ends with the question.
    """
    kept = list(kept)
    if not all(isinstance(turn, Turn) for turn in kept) or not kept or kept[-1] is not full.turns[-1]:
        raise UsageError("overflow must return turns, and the last of them must be the question")
    left = {id(turn) for turn in kept}
    lost = [turn for turn in full.turns if id(turn) not in left]
    return Forgotten(lost, full.tokens(full.turns) - full.tokens(kept), full.context) if lost else None
