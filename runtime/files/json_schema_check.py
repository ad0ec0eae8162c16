"""JSON schemas of tools: whether a schema can be used, and where a value departs from it.

The keywords are those that tools use: type, enum, const, properties, required, additionalProperties, items,
anyOf, oneOf, allOf, $ref into the schema itself, and the bounds of numbers, texts, lists and objects. Others,
`pattern` and `format` among them, are not looked at here; a constraint (`structured`) holds decoding to them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

from gemma_edge.runtime.errors import UsageError, printable

MAX_SCHEMA_BYTES = 1 << 18
MAX_DEPTH = 64
MAX_NUMBER = 1 << 53  # llguidance 1.9 ends the process at the least number of 64 bits
MAX_STEPS = 10_000  # comparisons of one value
TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}
# Bounds: keyword of the least, of the most, and what of a value they bound.
BOUNDS = (
    ("minimum", "maximum", (int, float)),
    ("minLength", "maxLength", (str,)),
    ("minItems", "maxItems", (list,)),
    ("minProperties", "maxProperties", (dict,)),
)
BRANCHES = ("anyOf", "oneOf", "allOf")
OBJECTS = ("properties", "$defs", "definitions")
PATH_CHARACTERS = 300  # of a path that an error repeats


def check_schema(schema: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A copy of a schema, of plain JSON values.

    Raises:
        UsageError: the schema is no JSON, too large or too deep, refers to what is not there, or forbids
            every value; the message starts with `where` and the path in the schema.
    """
    try:
        text = json.dumps(_bounded(schema, where), allow_nan=False, ensure_ascii=False)
        size = len(text.encode())  # half of a surrogate pair is no text
    except (TypeError, ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else error
        raise UsageError(f"{where} is no JSON: {printable(reason)}") from None
    if size > MAX_SCHEMA_BYTES:
        raise UsageError(f"{where} has {size:,} bytes, the most are {MAX_SCHEMA_BYTES:,}: make it smaller")
    copy: dict[str, Any] = json.loads(text)
    _check_part(copy, copy, where)
    if not _ends(copy, copy, (), set()):
        raise UsageError(f"{where} needs a value of itself within every value, so that no value ends")
    return copy


def misfit_argument(value: Any, schema: Mapping[str, Any]) -> str | None:
    """Where a value departs from a checked schema, as "days: expected an integer, got 3.5"; or None."""
    return _Comparison(schema).misfit(value, schema)


def _bounded(value: Any, where: str, depth: int = 0) -> Any:
    """The value, unless it is too deep, as one that holds itself is, or has numbers that are too large."""
    if depth > MAX_DEPTH:
        raise UsageError(f"{where} is nested more than {MAX_DEPTH} deep, or holds itself: flatten it")
    if isinstance(value, Mapping):
        return {key: _bounded(inner, where, depth + 1) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_bounded(inner, where, depth + 1) for inner in value]
    if isinstance(value, int | float) and abs(value) > MAX_NUMBER:
        raise UsageError(f"{where} has a number beyond 2^53, which JSON does not keep exact: use a text")
    return value


def _check_part(schema: Any, root: dict[str, Any], where: str) -> None:
    if isinstance(schema, bool):
        return
    if len(where) > PATH_CHARACTERS:
        where = f"{where[: PATH_CHARACTERS // 3]}...{where[-PATH_CHARACTERS // 2 :]}"
    if not isinstance(schema, dict):
        raise UsageError(f"{where} must be a JSON schema, not {printable(json.dumps(schema))}")
    _resolved(schema, root, where)
    kinds = schema.get("type", [])
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if not isinstance(kind, str) or kind not in TYPES:
            raise UsageError(
                f"{where}.type must be one of {', '.join(TYPES)}, not {printable(json.dumps(kind))}"
            )
    for low, high, _ in BOUNDS:
        for name in (low, high):
            if name in schema and not _is_number(schema[name]):
                raise UsageError(f"{where}.{name} must be a number")
        if schema.get(low, -math.inf) > schema.get(high, math.inf):
            raise UsageError(f"{where} contradicts itself: {low} is {schema[low]}, {high} is {schema[high]}")
    if "enum" in schema and not (isinstance(schema["enum"], list) and schema["enum"]):
        raise UsageError(f"{where}.enum must be a list of one value or more")
    for name in OBJECTS:
        if not isinstance(schema.get(name, {}), dict):
            raise UsageError(f"{where}.{name} must be an object of schemas")
    properties, required = schema.get("properties", {}), schema.get("required", [])
    if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
        raise UsageError(f"{where}.required must be a list of names")
    undeclared = [name for name in required if name not in properties]
    if undeclared and schema.get("additionalProperties") is False:
        raise UsageError(
            f"{where} contradicts itself: it requires {printable(undeclared[0])!r}, but has no such property"
        )
    for name in OBJECTS:
        for key, inner in schema.get(name, {}).items():
            _check_part(inner, root, f"{where}.{name}.{printable(key, 60)}")
    for name in ("items", "additionalProperties"):
        if name in schema:
            _check_part(schema[name], root, f"{where}.{name}")
    for name in (name for name in BRANCHES if name in schema):
        branches = schema[name]
        if not isinstance(branches, list) or not branches:
            raise UsageError(f"{where}.{name} must be a list of one schema or more")
        for index, inner in enumerate(branches):
            _check_part(inner, root, f"{where}.{name}[{index}]")
    if "enum" in schema and all(_Comparison(root).misfit(v, {**schema, "enum": [v]}) for v in schema["enum"]):
        raise UsageError(f"{where} contradicts itself: none of its enum is of its type and bounds")


def _resolved(schema: dict[str, Any], root: Mapping[str, Any], where: str) -> Any:
    """The schema that a chain of `$ref` ends at."""
    found: Any = schema
    for _ in range(MAX_DEPTH):
        if not isinstance(found, dict) or "$ref" not in found:
            return found
        path = found["$ref"]
        if not isinstance(path, str) or not (path == "#" or path.startswith("#/")):
            raise UsageError(f"{where}.$ref must point into the schema itself, as '#/$defs/...' does")
        found = root
        for key in path.split("/")[1:]:
            key = key.replace("~1", "/").replace("~0", "~")
            found = found.get(key) if isinstance(found, dict) else None
        if not isinstance(found, dict | bool):
            raise UsageError(f"{where}.$ref points to {printable(path)!r}, where there is no schema")
    raise UsageError(f"{where}.$ref leads back to itself: say what the value is")


def _ends(schema: Any, root: Mapping[str, Any], within: tuple[int, ...], known: set[int]) -> bool:
    """Whether a value of the schema can be finite.

    Args:
        within: the schemas that it is a part of, by their identity.
        known: the schemas of which that is known already; it is filled.
    """
    if id(schema) in within:
        return False
    if not isinstance(schema, dict) or id(schema) in known or len(within) > 4 * MAX_DEPTH:
        return True
    within = (*within, id(schema))
    needed = [schema["properties"].get(name) for name in schema.get("required", ()) if "properties" in schema]
    if schema.get("minItems", 0) > 0:
        needed.append(schema.get("items"))
    needed += schema.get("allOf", ())
    if "$ref" in schema:
        needed.append(_resolved(schema, root, ""))
    ends = all(_ends(part, root, within, known) for part in needed) and all(
        any(_ends(part, root, within, known) for part in schema[name])
        for name in ("anyOf", "oneOf")
        if name in schema
    )
    if ends:
        known.add(id(schema))
    return ends


class _Comparison:
    """Compares values with one schema, in a bounded number of steps."""

    def __init__(self, root: Mapping[str, Any]) -> None:
        self.root, self.steps = root, MAX_STEPS

    def misfit(self, value: Any, schema: Any, where: str = "", depth: int = 0) -> str | None:
        def wrong(expected: str) -> str:
            return f"{where or 'the arguments'}: expected {expected}, got {printable(json.dumps(value), 60)}"

        self.steps -= 1
        if depth > MAX_DEPTH or self.steps < 0:
            return wrong(f"a value of at most {MAX_DEPTH} levels and {MAX_STEPS:,} parts")
        if isinstance(schema, dict) and "$ref" in schema:
            schema = _resolved(schema, self.root, where)
        if isinstance(schema, bool):
            return None if schema else wrong("nothing here")
        kinds = schema.get("type")
        kinds = [kinds] if isinstance(kinds, str) else kinds
        if kinds and not any(_is_type(value, kind) for kind in kinds):
            return wrong(" or ".join(f"{'an' if kind[0] in 'aio' else 'a'} {kind}" for kind in kinds))
        if "const" in schema and not _same(value, schema["const"]):
            return wrong(json.dumps(schema["const"]))
        if "enum" in schema and not any(_same(value, one) for one in schema["enum"]):
            return wrong("one of " + ", ".join(map(json.dumps, schema["enum"])))
        for low, high, types in BOUNDS:
            if isinstance(value, types) and not isinstance(value, bool):
                size = value if isinstance(value, int | float) else len(value)
                if not schema.get(low, -math.inf) <= size <= schema.get(high, math.inf):
                    return wrong(
                        ", ".join(f"{name} {schema[name]}" for name in (low, high) if name in schema)
                    )
        inside = next(filter(None, self.misfits_inside(value, schema, where, depth)), None)
        return inside or self.misfit_of_branches(value, schema, where, depth)

    def misfits_inside(
        self, value: Any, schema: Mapping[str, Any], where: str, depth: int
    ) -> Iterator[str | None]:
        """Misfits of an object's properties, or of a list's items."""
        if isinstance(value, list) and "items" in schema:
            for index, item in enumerate(value):
                yield self.misfit(item, schema["items"], f"{where}[{index}]", depth + 1)
        if not isinstance(value, dict):
            return
        properties, other = schema.get("properties", {}), schema.get("additionalProperties", True)
        for name in schema.get("required", []):
            if name not in value:
                yield f"{f'{where}.{name}'.lstrip('.')}: missing"
        for name, inner in value.items():
            here = f"{where}.{printable(name, 60)}".lstrip(".")
            if name not in properties and other is False:
                yield f"{here}: there is no such parameter"
            yield self.misfit(inner, properties.get(name, other), here, depth + 1)

    def misfit_of_branches(self, value: Any, schema: Mapping[str, Any], where: str, depth: int) -> str | None:
        for name in BRANCHES:
            if name not in schema:
                continue
            found = [self.misfit(value, inner, where, depth + 1) for inner in schema[name]]
            fits = found.count(None)
            if not (fits == len(found) if name == "allOf" else fits == 1 if name == "oneOf" else fits):
                return next(filter(None, found), f"{where}: it fits more than one schema of oneOf")
        return None


def _is_type(value: Any, kind: str) -> bool:
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, TYPES[kind]) and (kind == "boolean" or not isinstance(value, bool))


def _same(value: Any, other: Any) -> bool:
    return bool(value == other) and isinstance(value, bool) == isinstance(other, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
