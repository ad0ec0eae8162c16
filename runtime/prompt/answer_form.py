"""The form that the options of `Model.generate` ask of an answer, as a grammar."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gemma_edge.runtime.errors import UsageError, printable
from gemma_edge.runtime.files.json_schema_check import check_schema
from gemma_edge.runtime.prompt.grammar_constraint import Grammar
from gemma_edge.runtime.prompt.tool_calls import CONVENTIONS, Convention
from gemma_edge.runtime.prompt.tool_grammar import tool_grammar
from gemma_edge.runtime.prompt.tool_schemas import Tool, normal_tools

FORM_OPTIONS = ("response_format", "regex", "choices", "grammar")
TOOL_CHOICES = ("auto", "required", "none")
RESPONSE_FORMAT = '{"type": "json_object"} or {"type": "json_schema", "json_schema": {"schema": ...}}'


@dataclass(frozen=True)
class AnswerForm:
    """What an answer may be.

    Attributes:
        tools: those that the prompt describes.
        callable: those of them that the answer may call.
        convention: how calls are written; None for the template's default.
        grammar: holds the answer to a form; None if it is free.
    """

    tools: list[Tool]
    callable: list[Tool]
    convention: Convention | None
    grammar: Grammar | None


def answer_form(options: Mapping[str, Any], default_convention: Callable[[], Convention]) -> AnswerForm:
    """The form that options ask for.

    Args:
        options: of `GenerateOptions`.
        default_convention: asks the template.

    Raises:
        UsageError: an option is malformed, or several contradict each other.
    """
    tools, convention = normal_tools(options.get("tools")), options.get("tool_convention")
    if convention not in (None, *CONVENTIONS):
        raise UsageError(f"tool_convention must be {' or '.join(CONVENTIONS)}, not {printable(convention)!r}")
    if tools and options.get("raw"):
        raise UsageError("raw=True completes a text as it is: it has no place for tools")
    written = convention or (default_convention() if tools else CONVENTIONS[0])
    grammar = _grammar(options, tools, written)
    return AnswerForm(tools, offered(options.get("tool_choice"), tools), convention, grammar)


def _grammar(options: Mapping[str, Any], tools: Sequence[Tool], convention: Convention) -> Grammar | None:
    given = [name for name in FORM_OPTIONS if options.get(name) is not None]
    choice = options.get("tool_choice")
    if choice is not None and not tools:
        raise UsageError("tool_choice is given without tools")
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} are given, but an answer has one form: choose one")
    if given and tools and choice != "none":
        raise UsageError(f"{given[0]} and tools are given: ask for the form in a turn without tools")
    if not given:
        return _form_of_choice(choice, tools, convention)
    value = options[given[0]]
    if given[0] == "response_format":
        return response_grammar(value)
    if given[0] == "choices":
        return choices_grammar(value)
    if not isinstance(value, str) or not value:
        raise UsageError(f"{given[0]} must be a text, not {printable(value)!r}")
    return Grammar("regex" if given[0] == "regex" else "lark", value, given[0])


def offered(choice: object, tools: Sequence[Tool]) -> list[Tool]:
    """The tools that an answer may call.

    Raises:
        UsageError: the choice is neither one of `TOOL_CHOICES` nor the name of a tool.
    """
    name = named_tool(choice)
    if name is None or name in ("auto", "required"):
        return list(tools)
    if name == "none":
        return []
    if found := [tool for tool in tools if tool.name == name]:
        return found
    names = ", ".join(tool.name for tool in tools) or "none"
    raise UsageError(
        f"tool_choice must be {', '.join(TOOL_CHOICES)} or the name of a tool ({names}), "
        f"not {printable(name)!r}"
    )


def named_tool(choice: object) -> str | None:
    """A choice as a text: OpenAI writes that of a tool as {"type": "function", "function": {"name": ...}}."""
    if isinstance(choice, Mapping):
        function = choice.get("function")
        choice = function.get("name") if isinstance(function, Mapping) else None
        return choice if isinstance(choice, str) else ""
    return choice if choice is None or isinstance(choice, str) else printable(choice)


def response_grammar(value: object) -> Grammar | None:
    """What OpenAI's `response_format` asks for.

    Raises:
        UsageError: it is malformed, or its schema cannot be used.
    """
    kind = value.get("type") if isinstance(value, Mapping) else None
    if not isinstance(value, Mapping) or kind not in ("text", "json_object", "json_schema"):
        raise UsageError(f"response_format must be {RESPONSE_FORMAT}")
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar("json_schema", json.dumps({"type": "object"}), "response_format")
    wrapper, where = value.get("json_schema", value), "response_format['json_schema']"
    schema = wrapper.get("schema") if isinstance(wrapper, Mapping) else None
    if not isinstance(schema, Mapping):
        raise UsageError(f"{where}['schema'] must be a JSON schema")
    return schema_grammar(schema, f"{where}['schema']")


def schema_grammar(schema: Mapping[str, Any], name: str) -> Grammar:
    """Answers that fit a JSON schema. Raises as `check_schema`."""
    return Grammar("json_schema", json.dumps(check_schema(schema, name)), name)


def choices_grammar(value: object) -> Grammar:
    """Answers that are one of some texts.

    Raises:
        UsageError: they are no list of texts.
    """
    if (
        isinstance(value, str)
        or not isinstance(value, Sequence)
        or not value
        or not all(isinstance(choice, str) and choice for choice in value)
    ):
        raise UsageError("choices must be a list of one text or more, none of them empty")
    return Grammar("lark", "start: " + " | ".join(map(json.dumps, value)), "choices", own=True)


def _form_of_choice(choice: object, tools: Sequence[Tool], convention: Convention) -> Grammar | None:
    allowed = offered(choice, tools)
    if choice is None or not allowed:
        return None
    if choice in ("auto", "required"):
        return tool_grammar(allowed, convention, required=choice == "required")
    return tool_grammar(allowed, convention, required=True, most=1)
