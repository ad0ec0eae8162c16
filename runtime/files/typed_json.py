"""Dataclasses as JSON objects and back: every field is checked against its annotation.

Results come from files, from child processes and from devices. `from_json` accepts what `to_json` wrote, and
tells by name which field is something else. Unknown fields are ignored, so that newer results stay readable.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import types
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
# Of a class: properties that `to_json` writes beside the fields, for readers of the JSON.
DERIVED = "DERIVED"


class Dataclass(Protocol):
    """Any dataclass."""

    __dataclass_fields__: ClassVar[dict[str, Any]]


class FieldError(ValueError):
    """A field is missing, or is not what its annotation says."""

    def __init__(self, field: str, expected: str, got: object) -> None:
        super().__init__(f"{field or 'value'}: expected {expected}, got {_shown(got)}")
        self.field, self.expected, self.got = field or "value", expected, _shown(got)


def to_json(value: Any) -> Any:
    """A dataclass, or containers of them, as JSON values; tuples become lists."""
    if dataclasses.is_dataclass(value):
        names = [*(field.name for field in dataclasses.fields(value)), *getattr(value, DERIVED, ())]
        return {name: to_json(getattr(value, name)) for name in names}
    if isinstance(value, Mapping):
        return {str(key): to_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(each) for each in value]
    return value


def from_json(kind: type[T], data: object, field: str = "") -> T:
    """The dataclass that `to_json` wrote.

    Args:
        field: the name of `data` in errors.

    Raises:
        FieldError: a field is missing or of another type; numbers must be finite.
    """
    read: T = _read(kind, data, field)
    return read


@functools.cache
def _hints(kind: type[Dataclass]) -> dict[str, tuple[Any, bool]]:
    """The annotation of each field, and whether the field must be there."""
    hints = get_type_hints(kind)
    return {
        field.name: (hints[field.name], field.default is field.default_factory is dataclasses.MISSING)
        for field in dataclasses.fields(kind)
    }


def _read(kind: Any, data: object, field: str) -> Any:
    if kind is Any:
        return data
    if kind in _SCALARS:
        return _scalar(kind, data, field)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        return _object(kind, data, field)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _union(arguments, data, field)
    if origin is Literal:
        if data not in arguments:
            raise FieldError(field, " or ".join(map(repr, arguments)), data)
        return data
    if origin in (list, tuple):
        if not isinstance(data, list):
            raise FieldError(field, "a list", data)
        return origin(_read(arguments[0], each, f"{field}[{i}]") for i, each in enumerate(data))
    if origin is dict:
        if not isinstance(data, dict):
            raise FieldError(field, "an object", data)
        return {key: _read(arguments[1], each, _below(field, key)) for key, each in data.items()}
    raise TypeError(f"{field}: {kind} has no form in JSON")


def _object(kind: type[Dataclass], data: object, field: str) -> Any:
    if not isinstance(data, dict):
        raise FieldError(field, "an object", data)
    values = {}
    for name, (hint, required) in _hints(kind).items():
        if name in data and (required or data[name] is not None):  # null is no value
            values[name] = _read(hint, data[name], _below(field, name))
        elif required:
            raise FieldError(_below(field, name), "a value", None)
    try:
        return kind(**values)
    except FieldError as error:
        raise FieldError(_below(field, error.field), error.expected, error.got) from None


def _union(kinds: tuple[Any, ...], data: object, field: str) -> Any:
    if data is None and types.NoneType in kinds:
        return None
    rest = [kind for kind in kinds if kind is not types.NoneType]
    for kind in rest[:-1]:
        try:
            return _read(kind, data, field)
        except FieldError:
            continue
    return _read(rest[-1], data, field)


_SCALARS = {float: "a number", int: "an integer", str: "a string", bool: "true or false"}


def _scalar(kind: Any, data: object, field: str) -> Any:
    right = isinstance(data, kind) and (kind is bool or not isinstance(data, bool))
    if kind is float and isinstance(data, int | float) and not isinstance(data, bool):
        right = (isinstance(data, int) and abs(data) < 2**63) or (
            isinstance(data, float) and math.isfinite(data)
        )
    if not right:
        raise FieldError(field, _SCALARS[kind], data)
    return data


def _below(field: str, name: str) -> str:
    return f"{field}.{name}" if field else name


def _shown(got: object) -> str:
    text = got if isinstance(got, str) else repr(got)
    return text if len(text) <= 80 else f"{text[:77]}..."
