"""Reads fields of a config.json, each checked; errors use the file's own names."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from gemma_edge.runtime.errors import ConfigError

# Types of layers, as `layer_types` has them.
FULL, SLIDING = "full_attention", "sliding_attention"
# Far above any Gemma, and low enough for lists and sums over them to cost nothing.
MAX_SIZE = (1 << 24) - 1
MAX_LAYERS = 1024
MAX_STREAMS = 64  # of AltUp; each has tensors of its own
MAX_SOFT_TOKENS = 1 << 15  # of one attachment; a context has room for no more


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

    def size(self, key: str, default: int, minimum: int = 1, maximum: int = MAX_SIZE) -> int:
        def ok(value: Any) -> bool:
            return is_int(value) and minimum <= value <= maximum

        return int(self.get(key, default, ok, f"an integer of {minimum} or more, at most {maximum}"))

    def number(self, key: str, default: float, maximum: float = math.inf) -> float:
        expected = "a positive number" + (f", at most {maximum:g}" if maximum < math.inf else "")
        return float(self.get(key, default, lambda v: is_number(v) and 0 < v <= maximum, expected))


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
