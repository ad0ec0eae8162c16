"""Fifty odd JSON schemas, each with answers of a bounded length."""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]


def of(**properties: Any) -> Schema:
    """An object of exactly these properties."""
    return {
        "type": "object",
        "properties": properties,
        "required": [*properties],
        "additionalProperties": False,
    }


SHORT = {"type": "string", "maxLength": 6}
TREE = {
    "$defs": {
        "leaf": {"type": "integer", "minimum": 0, "maximum": 9},
        "twig": {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 3},
    }
}
ODD_SCHEMAS: list[Schema] = [
    {"type": "boolean"},
    {"type": "null"},
    {"const": 'a "quoted" \\ word'},
    {"const": {"a": [1, None, {"b": False}]}},
    {"enum": ["é", "🙂", "\n", "\u2028", "", " "]},
    {"enum": [0, -1, 1.5, True, None, "x", [], {}]},
    {"type": "integer", "minimum": -3, "maximum": 3},
    {"type": "integer", "exclusiveMinimum": 99, "exclusiveMaximum": 101},
    {"type": "integer", "minimum": 1_000_000, "maximum": 1_000_010},
    {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 70},
    {"type": "number", "minimum": 0.25, "maximum": 0.75},
    {"type": "number", "minimum": -1, "maximum": 1},
    {"type": "string", "maxLength": 0},
    {"type": "string", "minLength": 3, "maxLength": 3},
    {"type": "string", "maxLength": 12},
    {"type": "string", "pattern": "^[0-9]{3}-[A-F]{2}$"},
    {"type": "string", "pattern": "^(yes|no)( please)?$"},
    {"type": "string", "pattern": "^é{2,4}$"},
    {"type": "string", "format": "date"},
    {"type": "string", "format": "ipv6"},
    {"type": "string", "format": "uuid"},
    {"type": "string", "format": "ipv4"},
    {"type": ["string", "null"], "maxLength": 4},
    {"type": ["integer", "boolean"], "minimum": 0, "maximum": 9},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"type": "array", "items": False},
    {"type": "array", "prefixItems": [{"const": 1}, SHORT], "items": False, "minItems": 2},
    {"type": "array", "items": {"type": "array", "items": {"type": "null"}, "maxItems": 2}, "maxItems": 3},
    {"type": "array", "minItems": 10, "maxItems": 10, "items": {"enum": [0, 1]}},
    of(),
    of(a={"type": "boolean"}),
    of(**{"a key": SHORT, 'with "quotes"': SHORT}),
    of(**{"": {"type": "null"}, "é": {"type": "boolean"}}),
    of(**{f"k{i}": {"enum": [i]} for i in range(20)}),
    of(a=of(b=of(c=of(d=of(e={"type": "boolean"}))))),
    {"type": "object", "properties": {"a": SHORT, "b": SHORT}, "additionalProperties": False},
    {"type": "object", "properties": {"a": SHORT}, "required": ["a"], "additionalProperties": False},
    {"type": "object", "additionalProperties": {"type": "boolean"}, "maxProperties": 0},
    {"anyOf": [of(kind={"const": "a"}, x=SHORT), of(kind={"const": "b"}, y={"type": "null"})]},
    {"anyOf": [{"type": "integer", "maximum": 5, "minimum": 0}, {"type": "boolean"}, SHORT]},
    {"allOf": [{"type": "string", "minLength": 2}, {"maxLength": 4}]},
    {"allOf": [of(a={"type": "boolean"}), {"properties": {"a": {"const": True}}}]},
    {"oneOf": [of(a={"type": "boolean"}), of(b={"type": "boolean"})]},
    {**TREE, "$ref": "#/$defs/twig"},
    {**TREE, **of(left={"$ref": "#/$defs/twig"}, right={"$ref": "#/$defs/leaf"})},
    of(size={"enum": ["S", "M", "L"]}, count={"type": "integer", "minimum": 1, "maximum": 12}),
    of(point={"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 9}, "maxItems": 2}),
    of(when={"type": "string", "format": "date"}, note={"anyOf": [SHORT, {"type": "null"}]}),
    {"title": "T", "description": "D", "examples": [3], "default": 1, "enum": [1, 2]},
    of(list={"type": "array", "items": of(x={"type": "boolean"}, y=SHORT), "maxItems": 3}),
]
assert len(ODD_SCHEMAS) == 50
