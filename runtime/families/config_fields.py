"""Fields taken out of a parsed config.json, each checked, with the file's own names in every error."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from gemma_edge.runtime.errors import ConfigError


class Fields:
    """One JSON object of a config file.

    Attributes:
        data: the object that fields are taken from.
        prefix: what stands before their names in errors, such as "text_config.".
    """

    def __init__(self, data: object, path: Path, prefix: str = "") -> None:
        self.path, self.prefix = path, prefix
        if not isinstance(data, dict):
            self.fail(prefix.rstrip(".") or "file", "a JSON object", type(data).__name__)
        self.data: dict[str, Any] = data

    def fail(self, field: str, expected: object, got: object, remedy: str = "") -> NoReturn:
        raise ConfigError(self.path, field, expected, got, remedy)

    def get(self, key: str, default: Any, ok: Callable[[Any], bool], expected: str) -> Any:
        value = self.data.get(key, default)
        if not ok(value):
            self.fail(self.prefix + key, expected, repr(value))
        return value

    def size(self, key: str, default: int, minimum: int = 1) -> int:
        return int(
            self.get(
                key,
                default,
                lambda v: is_int(v) and minimum <= v < 2**31,
                f"an integer of {minimum} or more",
            )
        )

    def number(self, key: str, default: float, positive: bool = True) -> float:
        return float(self.get(key, default, lambda v: is_number(v) and v > 0, "a positive number"))


def is_int(value: object) -> bool:
    """An integer, and not true or false."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """A finite number, and not true or false."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # JSON's integers have no bound
        return False
