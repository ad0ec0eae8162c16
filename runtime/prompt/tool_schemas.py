"""Tools in one normal form: JSON schemas as OpenAI and transformers write them, and Python functions."""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from gemma_edge.runtime.errors import UsageError, printable
from gemma_edge.runtime.files.json_schema_check import check_schema

MAX_TOOLS = 128
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,63}")
JSON_TYPES = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null"}
TOOL_FORM = '{"name": ..., "description": ..., "parameters": a JSON schema}'

ToolSource = Mapping[str, Any] | Callable[..., Any]


@dataclass(frozen=True)
class Tool:
    """A function that a model may call.

    Attributes:
        name: letters, digits, "_", "-" and "."; at most 64.
        description: what it does, for the model.
        parameters: the JSON schema of its arguments, of type "object".
        function: what to call; None for a tool that is described only.
    """

    name: str
    description: str = ""
    parameters: dict[str, Any] = field(default_factory=lambda: {"type": "object", "properties": {}})
    function: Callable[..., Any] | None = field(default=None, compare=False)

    def to_dict(self) -> dict[str, Any]:
        """As OpenAI and transformers write it, which is what chat templates take."""
        described = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": described}


def normal_tools(tools: Sequence[ToolSource | Tool] | None) -> list[Tool]:
    """The tools in their normal form.

    Args:
        tools: each a function with type hints, {"type": "function", "function": {"name": ...,
            "description": ..., "parameters": ...}}, the inner object of that alone, or a `Tool`.

    Raises:
        UsageError: names the tool, and what in it cannot be used.
    """
    if tools is None:
        return []
    if isinstance(tools, str | bytes | Mapping) or not isinstance(tools, Sequence):
        raise UsageError(f"tools must be a list of functions or of {TOOL_FORM}")
    if len(tools) > MAX_TOOLS:
        raise UsageError(f"tools has {len(tools)} tools, the most are {MAX_TOOLS}. Offer fewer at a time.")
    made = [_normal_tool(tool, f"tools[{index}]") for index, tool in enumerate(tools)]
    names = [tool.name for tool in made]
    if doubled := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"tools has two tools of the name {doubled!r}: rename one")
    return made


def _normal_tool(tool: object, where: str) -> Tool:
    if isinstance(tool, Tool):
        return tool
    if callable(tool):
        return tool_from_function(tool)
    if not isinstance(tool, Mapping):
        raise UsageError(f"{where} must be a function or {TOOL_FORM}, not {type(tool).__name__}")
    described: Mapping[str, Any] = tool
    if tool.get("type") == "function" and isinstance(tool.get("function"), Mapping):
        described, where = tool["function"], f"{where}['function']"
    name, text = described.get("name"), described.get("description") or ""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UsageError(
            f"{where}['name'] must be a name of at most 64 letters, digits, '_', '-' and '.', "
            f"not {_shown(name)}"
        )
    if not isinstance(text, str):
        raise UsageError(f"{where}['description'] must be a text, not {_shown(text)}")
    schema = described.get("parameters") or {}
    if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
        raise UsageError(f"{where}['parameters'] must be a JSON schema of type \"object\"")
    parameters = check_schema({"type": "object", "properties": {}, **schema}, f"{where}['parameters']")
    return Tool(name, text.strip(), parameters)


def tool_from_function(function: Callable[..., Any]) -> Tool:
    """A function as a tool: its signature and type hints become the schema, its docstring the descriptions.

    The docstring's first paragraph describes the tool; a Google-style section "Args:" describes parameters.
    Hints may be str, int, float, bool, None, list, dict, Literal, Enum, Any, and unions of these.

    Raises:
        UsageError: names the function and the parameter without a hint that a schema can say.
    """
    name = getattr(function, "__name__", type(function).__name__)
    if not NAME.fullmatch(name):
        raise UsageError(
            f"a tool must have a name, which {printable(name)!r} is none: use `def`, not a lambda"
        )
    try:
        signature, hints = inspect.signature(function), typing.get_type_hints(function)
    except (TypeError, ValueError, NameError) as error:
        raise UsageError(f"tool {name}: its signature cannot be read: {error}") from None
    described, arguments = _docstring(inspect.getdoc(function) or "")
    properties: dict[str, Any] = {}
    for parameter in signature.parameters.values():
        where = f"tool {name}: parameter {parameter.name!r}"
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise UsageError(f"{where} must be one that is passed by name, without * or /")
        if parameter.name not in hints:
            raise UsageError(
                f"{where} has no type hint: write {parameter.name}: str, or the type that it has"
            )
        schema = _hint_schema(hints[parameter.name], where)
        if parameter.name in arguments:
            schema["description"] = arguments[parameter.name]
        properties[parameter.name] = schema
    required = [p.name for p in signature.parameters.values() if p.default is p.empty]
    parameters = {"type": "object", "properties": properties, "required": required}
    return Tool(name, described, parameters, function)


def _hint_schema(hint: Any, where: str) -> dict[str, Any]:
    """The JSON schema of a type hint."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return {}
    if hint in JSON_TYPES:
        return {"type": JSON_TYPES[hint]}
    if isinstance(hint, type) and issubclass(hint, Enum):
        return {"enum": [member.value for member in hint]}
    if origin is typing.Literal:
        kinds = {JSON_TYPES.get(type(value)) for value in inner}
        return {**({"type": kinds.pop()} if len(kinds) == 1 else {}), "enum": list(inner)}
    if origin in (typing.Union, types.UnionType):
        return {"anyOf": [_hint_schema(one, where) for one in inner]}
    if list in (hint, origin):
        return {"type": "array", **({"items": _hint_schema(inner[0], where)} if inner else {})}
    if dict in (hint, origin):
        values = {"additionalProperties": _hint_schema(inner[1], where)} if inner else {}
        return {"type": "object", **values}
    raise UsageError(
        f"{where} has the type {printable(hint)}, which no JSON schema says: "
        "use str, int, float, bool, list, dict, Literal or an Enum"
    )


def _docstring(text: str) -> tuple[str, dict[str, str]]:
    """The first paragraph on one line, and what "Args:" says of each parameter."""
    described = " ".join(text.split("\n\n", 1)[0].split())
    arguments: dict[str, str] = {}
    section = re.search(r"(?m)^Args:\n((?:[ \t]+.*\n?|\n)*)", text + "\n")
    lines = section[1].splitlines() if section else []
    indent = min((len(line) - len(line.lstrip()) for line in lines if line.strip()), default=0)
    name = ""
    for line in lines:
        found = re.match(r"(\w+)(?: *\([^)]*\))?: *(.*)", line[indent:])
        if found:
            name = found[1]
        if name and line.strip():
            arguments[name] = f"{arguments.get(name, '')} {found[2] if found else line.strip()}".strip()
    return ("" if described.startswith("Args:") else described), arguments


def _shown(value: object) -> str:
    return printable(json.dumps(value, default=str))
