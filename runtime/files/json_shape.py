"""The shape that parsed JSON must have, written as data, and where a value departs from it.

A shape is "text", "number" (finite), "size" (a number of 0 or more) or "flag"; a list of one shape; or a dict
of fields, where "*" stands for any. A shape or a field's name that ends in "?" may be null or absent.
"""

from __future__ import annotations

import math
from typing import Any

LARGEST = 1e300
Shape = Any  # of the three kinds above; they nest
NAMES = {"text": "a text", "number": "a number", "size": "a number of 0 or more", "flag": "true or false"}


def misfit(value: Any, shape: Shape, where: str = "") -> tuple[str, str] | None:
    """Where a value departs from its shape, and what belongs there; None where it does not."""
    if isinstance(shape, str):
        kind = shape.removesuffix("?")
        fits = (value is None and shape != kind) or _is(value, kind)
        return None if fits else (where, NAMES[kind])
    if isinstance(shape, list):
        if not isinstance(value, list):
            return where, "a list"
        items = (misfit(item, shape[0], f"{where}[{index}]") for index, item in enumerate(value))
        return next(filter(None, items), None)
    if not isinstance(value, dict):
        return where, "an object"
    for name, part in shape.items():
        key = name.removesuffix("?")
        for own in value if key == "*" else [key]:
            here = value.get(own)
            if here is None and name != key:
                continue
            if found := misfit(here, part, f"{where}.{own}".lstrip(".")):
                return found
    if (
        where.endswith("timeline")
        and len({len(column) for column in value.values() if isinstance(column, list)}) > 1
    ):
        return where, "columns of one length"
    return None


def _is(value: Any, kind: str) -> bool:
    if kind == "text":
        return isinstance(value, str)
    if kind == "flag":
        return isinstance(value, bool)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST
    return number and (kind == "number" or value >= 0) and not math.isnan(value)
