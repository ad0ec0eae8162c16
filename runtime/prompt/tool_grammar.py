"""The grammar of answers that call tools: a Lark grammar for llguidance, in either convention.

A call begins in one of few ways: {"name": "NAME" in JSON, a block ```tool_code or [NAME( in Python. The text
before it is free, but can contain none of these; from there on, only a whole call of a tool that exists is
possible, with arguments of its schema.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from typing import Any

from gemma_edge.runtime.prompt.grammar_constraint import DEFINITIONS, JSON_FORM, Grammar
from gemma_edge.runtime.prompt.tool_calls import FENCE, Convention, write_python
from gemma_edge.runtime.prompt.tool_schemas import Tool

MOST_CALLS = 8  # in an answer that is held to a grammar
CLOSED = {"type", "properties", "required", "additionalProperties"}
PYTHON_KEYWORDS = {"title", "description", "default", "examples"}  # they say nothing of the value


def tool_grammar(
    tools: Sequence[Tool], convention: Convention, *, required: bool, most: int = MOST_CALLS
) -> Grammar:
    """Answers that call `tools`, one to `most` times, or are text; `required`: nothing but calls."""
    write = _json_rules if convention == "json" else _python_rules
    rules = [*write(tools, required), f"rest: {_more(', ', most)}", "lines: " + _more("\n", most)]
    return Grammar("lark", "\n".join(rules) + "\n", "the grammar of the tools", own=True)


def _json_rules(tools: Sequence[Tool], required: bool) -> list[str]:
    opens = [f'{{"name": {json.dumps(tool.name)}, "parameters": ' for tool in tools]
    rules = [f"args_{i}: {_json(tool.parameters)}" for i, tool in enumerate(tools)]
    rules += [f'call_{i}: {_quoted(text)} args_{i} "}}"' for i, text in enumerate(opens)]
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    if required:
        return ['start: call | "[" call rest "]"', *rules]
    marks = [f'{{"name": {json.dumps(tool.name)}' for tool in tools]
    # A list's bracket belongs to the free text: the last call may close it.
    begun = [
        f'head_{i} {_quoted(text.removeprefix(mark))} args_{i} "}}"'
        for i, (text, mark) in enumerate(zip(opens, marks, strict=True))
    ]
    rules += [f"head_{i}[suffix={_quoted(mark)}]: /(.|\\n)*/" for i, mark in enumerate(marks)]
    return [f'start: FREE | ({" | ".join(begun)}) rest "]"?', *rules, _free(marks)]


def _python_rules(tools: Sequence[Tool], required: bool) -> list[str]:
    rules: list[str] = []
    for index, tool in enumerate(tools):
        pairs = _PythonGrammar(rules, f"v{index}", tool.parameters).pairs(
            tool.parameters, lambda name: f"{name}="
        )
        rules.append(f'tail_{index}: {pairs} ")"')
        rules.append(f"call_{index}: {_quoted(tool.name + '(')} tail_{index}")
    rules.append("call: " + " | ".join(f"call_{i}" for i in range(len(tools))))
    rules.append('block: call lines "\\n```"')
    if required:
        return [f'start: "[" call rest "]" | {_quoted(FENCE)} block', *rules]
    marks = [FENCE, *(f"[{tool.name}(" for tool in tools)]
    begun = [f'head_{i + 1} tail_{i} rest "]"' for i in range(len(tools))]
    rules += [f"head_{i}[suffix={_quoted(mark)}]: /(.|\\n)*/" for i, mark in enumerate(marks)]
    return [f"start: FREE | head_0 block | {' | '.join(begun)}", *rules, _free(marks)]


def _more(separator: str, most: int) -> str:
    """The calls after the first."""
    return f"({_quoted(separator)} call){{0,{most - 1}}}" if most > 1 else '""'


def _free(marks: Sequence[str]) -> str:
    """Text with none of the marks in it."""
    either = "|".join(re.escape(mark).replace("/", "\\/").replace("\n", "\\n") for mark in marks)
    return f"FREE: /(.|\\n)*/ & ~/(.|\\n)*({either})(.|\\n)*/"


def _quoted(text: str) -> str:
    return json.dumps(text)


def _json(schema: dict[str, Any]) -> str:
    """A schema inside a Lark grammar; an object has no properties but its own, unless the schema says so."""
    closed = {"additionalProperties": False} if schema.get("type") == "object" else {}
    return "%json " + json.dumps({"x-guidance": JSON_FORM, **closed, **schema})


class _PythonGrammar:
    """Rules for the literals of schemas; what Python spells as JSON does, and the rest, is left to %json."""

    def __init__(self, rules: list[str], prefix: str, root: dict[str, Any]) -> None:
        self.rules, self.prefix, self.count = rules, prefix, 0
        self.shared = {name: root[name] for name in DEFINITIONS if name in root}

    def pairs(self, schema: dict[str, Any], key: Callable[[str], str]) -> str:
        """Properties in their order, those that are not required or not."""
        required = set(schema.get("required", ()))
        after = '""'  # what may follow a pair
        first = '""'  # what may come where no pair is yet
        for name, inner in reversed(schema.get("properties", {}).items()):
            pair = f"{_quoted(key(name))} {self.value(inner)}"
            with_pair, alone = f'", " {pair} {after}', f"{pair} {after}"
            if name in required:
                after, first = self.rule(with_pair), self.rule(alone)
            else:
                after, first = self.rule(f"{with_pair} | {after}"), self.rule(f"{alone} | {first}")
        return first

    def value(self, schema: Any) -> str:
        said = (
            {k: v for k, v in schema.items() if k not in PYTHON_KEYWORDS} if isinstance(schema, dict) else {}
        )
        kind = said.get("type")
        if "enum" in said and set(said) <= {"enum", "type"}:
            return self.rule(" | ".join(_quoted(write_python(value)) for value in said["enum"]))
        if set(said) == {"anyOf"}:
            return self.rule(" | ".join(self.value(inner) for inner in said["anyOf"]))
        if said == {"type": "boolean"}:
            return '("True" | "False")'
        if said == {"type": "null"}:
            return '"None"'
        if kind == "array" and set(said) <= {"type", "items"} and "items" in said:
            item = self.value(said["items"])
            return self.rule(f'"[" ({item} (", " {item})*)? "]"')
        if (
            kind == "object"
            and not said.get("additionalProperties")
            and set(said) <= CLOSED
            and "properties" in said
        ):
            return self.rule(f'"{{" {self.pairs(said, lambda name: f"{_quoted(name)}: ")} "}}"')
        return _json({**self.shared, **said})

    def rule(self, body: str) -> str:
        self.count += 1
        name = f"{self.prefix}_{self.count}"
        self.rules.append(f"{name}: {body}")
        return name
