"""`BatchTotals`: what a batch's answers took, all together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class BatchTotals:
    """Counts over answers; errors count as lines alone."""

    answers: int = 0
    errors: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def add(self, answer: Mapping[str, Any]) -> None:
        """Counts a line of an answers' file; usage that is no number is not counted."""
        if "error" in answer:
            self.errors += 1
            return
        self.answers += 1
        usage = answer.get("usage")
        for name in ("prompt_tokens", "cached_tokens", "completion_tokens"):
            value = usage.get(name) if isinstance(usage, Mapping) else None
            if isinstance(value, int):
                setattr(self, name, getattr(self, name) + value)

    @property
    def lines(self) -> int:
        """Answers and errors."""
        return self.answers + self.errors
