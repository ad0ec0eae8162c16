"""Schemas that answers are held to, for the campaign."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20, "pattern": "[a-z]+"},
        "kind": {"enum": ["a", "b", 3, None]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0}, "maxItems": 3},
        "next": {"anyOf": [{"$ref": "#/$defs/node"}, {"const": False}]},
    },
    "required": ["name", "sizes"],
    "additionalProperties": False,
    "$defs": {"node": {"type": "object", "properties": {"value": {"type": "number"}}}},
}


@cache
def grammars(tokenizer: Path) -> Any:
    from gemma_edge.runtime.prompt.grammar_constraint import Grammars
    from gemma_edge.runtime.prompt.tokenizer import Tokenizer

    return Grammars(Tokenizer(tokenizer, {"<image_soft_token>": 545}, 560), [1])


def schema_files() -> dict[str, bytes]:
    return {"schema.json": json.dumps(SCHEMA).encode()}


def read_schema(folder: Path, tokenizer: Path) -> None:
    """A schema compiled, and the first tokens of an answer drawn from it."""
    from gemma_edge.runtime.errors import FileError
    from gemma_edge.runtime.files.text_files import read_json
    from gemma_edge.runtime.prompt.answer_form import response_grammar

    schema = read_json(folder / "schema.json", FileError)
    grammar = response_grammar({"type": "json_schema", "json_schema": {"schema": schema}})
    constraint = grammars(tokenizer).constraint(grammar)
    for step in range(12):
        allowed = constraint.allowed().nonzero()[0]
        assert len(allowed), "no token is allowed"
        if (token := int(allowed[step % len(allowed)])) == 1:
            break
        constraint.accept(token)
