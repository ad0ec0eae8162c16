"""`Constraint`: what a sampler asks before it picks a token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Constraint(Protocol):
    """Holds an answer to a form, token by token. It belongs to one answer."""

    def allowed(self) -> NDArray[np.bool_]:
        """Which ids may come next, bool (V,); at least one, if only an end token."""

    def accept(self, token: int) -> None:
        """Goes on behind a token that was allowed."""

    def fitting(self, tokens: Sequence[int]) -> int:
        """How many of `tokens`, guessed ahead, may follow from here; asking accepts none."""

    def rollback(self, count: int) -> None:
        """Takes the last `count` accepted tokens back."""
