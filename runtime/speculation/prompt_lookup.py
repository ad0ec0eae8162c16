"""`PromptLookup`: guesses the next tokens from where the latest ones stood before, in prompt or answer."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

LONGEST_MATCH = 16  # tokens; a longer match says no more
CANDIDATES = 8  # the latest places that are compared


@dataclass(frozen=True)
class Match:
    """A place where the latest tokens stood before.

    Attributes:
        length: how many of them, 2 to `LONGEST_MATCH`.
        behind: the index of the token that came next there.
    """

    length: int
    behind: int


class PromptLookup:
    """The tokens so far, and where each pair of them stood.

    Args:
        keys: of the prompt's tokens; negative ones, those of soft tokens, are never guessed.
    """

    def __init__(self, keys: Iterable[int] = ()) -> None:
        self._tokens: list[int] = []
        self._latest: dict[tuple[int, int], int] = {}  # by pair: the index behind its latest place
        self._earlier: list[int] = []  # by that index: the one of the place before; 0 for none
        self.extend(keys)

    def extend(self, tokens: Iterable[int]) -> None:
        """Appends tokens. Nothing comes behind the last pair yet: the next token makes it known."""
        for token in tokens:
            index = len(self._tokens)
            self._tokens.append(token)
            pair = (self._tokens[index - 2], self._tokens[index - 1]) if index > 1 else None
            self._earlier.append(self._latest.get(pair, 0) if pair else 0)
            if pair:
                self._latest[pair] = index

    def match(self) -> Match | None:
        """The longest match of the latest tokens, and of equal ones the latest; None where there is none."""
        tokens = self._tokens
        if len(tokens) < 2:
            return None
        behind, best = self._latest.get((tokens[-2], tokens[-1]), 0), None
        for _ in range(CANDIDATES):
            if not behind:
                break
            length = self._length(behind)
            if best is None or length > best.length:
                best = Match(length, behind)
            if length == LONGEST_MATCH:
                break
            behind = self._earlier[behind]
        return best

    def _length(self, behind: int) -> int:
        tokens, length = self._tokens, 2
        most = min(LONGEST_MATCH, behind)
        while length < most and tokens[behind - 1 - length] == tokens[-1 - length]:
            length += 1
        return length

    def draft(self, match: Match, most: int, end_ids: Collection[int] = ()) -> list[int]:
        """At most `most` tokens that came next at a match; what repeats itself goes on to do so.

        It ends before an end token, whose logits nobody needs, and before a soft token.
        """
        drafted: list[int] = []
        known = len(self._tokens)
        for index in range(match.behind, match.behind + most):
            token = self._tokens[index] if index < known else drafted[index - known]
            if token < 0 or token in end_ids:
                break
            drafted.append(token)
        return drafted
