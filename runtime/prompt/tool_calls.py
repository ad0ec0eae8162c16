"""Tool calls as text: written for a prompt, and found in an answer. Nothing is ever evaluated.

Two conventions, those of Google's guide to function calling with Gemma 3:

    json      {"name": "get_weather", "parameters": {"city": "Paris"}}     several: a list of these
    python    [get_weather(city="Paris"), now()]

The second is also read, and written if asked, as a block of code, as Gemma 3n answers in LiteRT-LM:

    ```tool_code
    get_weather(city="Paris")
    now()
    ```
"""

from __future__ import annotations

import ast
import json
import math
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, NoReturn

from gemma_edge.runtime.errors import GemmaEdgeError, UsageError, printable
from gemma_edge.runtime.files.json_schema_check import misfit_argument
from gemma_edge.runtime.prompt.tool_schemas import Tool

Convention = Literal["json", "python"]
CONVENTIONS: tuple[Convention, ...] = ("json", "python")
FENCE = "```tool_code\n"
MAX_CALLS = 32  # in one answer
MAX_STARTS = 64  # places in one answer where a call is looked for
MAX_DEPTH = 32  # of lists and objects in arguments
MAX_CHARACTERS = 1 << 16  # from a call's first character to its last

SPACE = re.compile(r"\s*")
STRING = re.compile(r'"(?:[^"\\\n]|\\.)*"|\'(?:[^\'\\\n]|\\.)*\'', re.DOTALL)
NUMBER = re.compile(r"[-+]?(?:\d{1,4000}(?:\.\d*)?|\.\d+)(?:[eE][-+]?\d+)?")
WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
CONSTANTS = {"true": True, "True": True, "false": False, "False": False, "null": None, "None": None}
FENCE_OPENS = re.compile(r"```(?:tool_code|tool_call|json|python)?[ \t]*\n?")
# Where a call may begin: a fence, a list of calls, a JSON object, a name on a line of its own.
MAY_OPEN = re.compile(r"`{1,2}\Z|```|\[\s*(?:[{A-Za-z_]|\Z)|\{\s*(?:[\"']|\Z)|^[ \t]*[A-Za-z_]", re.MULTILINE)
CLOSING = {"[": "]", "{": "}", "(": ")"}


@dataclass(frozen=True)
class ToolCall:
    """A call that a model asks for.

    Attributes:
        id: names the call among those of a conversation; a message of role "tool" answers it.
        name: the tool.
        arguments: by parameter.
        error: what is wrong with the call, for the model to read; None for one that fits its tool's schema.
    """

    id: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As a message has it among its "tool_calls"; the arguments are an object, not JSON in a text."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.id, "type": "function", "function": function}


class NotACall(GemmaEdgeError):
    """A text that begins like a call and is none."""


def write_calls(calls: Sequence[ToolCall], convention: Convention, *, fenced: bool = False) -> str:
    """The calls as a model writes them; `fenced`: Python calls as a block of code, a line each."""
    if convention == "json":
        objects = [json.dumps({"name": c.name, "parameters": c.arguments}, ensure_ascii=False) for c in calls]
        return objects[0] if len(objects) == 1 else f"[{', '.join(objects)}]"
    written = [
        f"{c.name}({', '.join(f'{name}={write_python(value)}' for name, value in c.arguments.items())})"
        for c in calls
    ]
    return FENCE + "\n".join(written) + "\n```" if fenced else f"[{', '.join(written)}]"


def write_python(value: Any) -> str:
    """A JSON value as a Python literal, with double quotes."""
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{write_python(k)}: {write_python(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(write_python, value))}]"
    return repr(value)


@dataclass(frozen=True)
class CallsInText:
    """An answer taken apart: its text without the calls, and the calls."""

    text: str
    calls: tuple[ToolCall, ...] = ()


def find_calls(answer: str, tools: Sequence[Tool], *, first_id: int = 0, start: int = 0) -> CallsInText:
    """Takes an answer apart. A text that only looks like a call stays text.

    Args:
        tools: those that were offered; a call is checked against the schema of its tool.
        first_id: number of the first call's id, "call_0".
        start: take apart what begins here.
    """
    names = {tool.name for tool in tools}
    looked = start
    for _ in range(MAX_STARTS):
        begun = call_start(answer, names, looked)
        if begun is None:
            break
        looked = begun + 1
        try:
            found, end = _Reader(answer, begun, names).calls()
        except NotACall:
            continue
        by_name = {tool.name: tool for tool in tools}
        calls = tuple(
            ToolCall(f"call_{first_id + index}", name, arguments, _call_error(name, arguments, by_name))
            for index, (name, arguments) in enumerate(found)
        )
        return CallsInText(answer[start:begun].rstrip() + answer[end:].rstrip(), calls)
    return CallsInText(answer[start:])


def call_start(text: str, names: Collection[str], start: int = 0) -> int | None:
    """Where the first call, or what may become one when more text comes, begins; None if nowhere."""
    openers = _openers(frozenset(names))
    for found in MAY_OPEN.finditer(text, start):
        at = found.start()
        begun = re.sub(r"\s", "", text[at : at + 256])
        if any(begun.startswith(opener) or opener.startswith(begun) for opener in openers):
            return at
    return None


@lru_cache(maxsize=16)
def _openers(names: frozenset[str]) -> tuple[str, ...]:
    """The ways in which a call begins, without spaces."""
    fences = ("", "```", "```tool_code", "```tool_call", "```json", "```python")
    bodies = ('{"name":', "{'name':", *(f"{name}(" for name in names), "print(")
    return tuple(fence + bracket + body for fence in fences for bracket in ("", "[") for body in bodies)


def count_calls(messages: Sequence[Mapping[str, Any]] | str) -> int:
    """How many calls messages have made."""
    if isinstance(messages, str):
        return 0
    made = (message.get("tool_calls") for message in messages if isinstance(message, Mapping))
    return sum(len(calls) for calls in made if isinstance(calls, Sequence))


def checked_calls(value: object, where: str, first_id: int = 0) -> list[ToolCall]:
    """The "tool_calls" of a message, as OpenAI and transformers write them.

    Raises:
        UsageError: names the call, and what in it is wrong.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise UsageError(f"{where} must be a list of one call or more")
    return [_checked_call(call, f"{where}[{i}]", f"call_{first_id + i}") for i, call in enumerate(value)]


def _checked_call(call: object, where: str, default_id: str) -> ToolCall:
    if isinstance(call, ToolCall):
        return call
    function = call.get("function", call) if isinstance(call, Mapping) else None
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(call, Mapping) or not isinstance(function, Mapping) or not isinstance(name, str):
        raise UsageError(f'{where} must be {{"function": {{"name": ..., "arguments": ...}}}}')
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError):
            raise UsageError(f"{where}['function']['arguments'] is no JSON, or nested too deep") from None
    if not isinstance(arguments, Mapping) or not all(isinstance(key, str) for key in arguments):
        raise UsageError(f"{where}['function']['arguments'] must be an object, or the JSON of one")
    try:  # a copy of plain values, so that a template can reach nothing else
        plain = json.loads(json.dumps(arguments, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        reason = "nested too deep" if isinstance(error, RecursionError) else printable(error)
        raise UsageError(f"{where}['function']['arguments'] is no JSON: {reason}") from None
    given = call.get("id")
    return ToolCall(str(given) if given else default_id, str(name), plain)


def _call_error(name: str, arguments: dict[str, Any], tools: Mapping[str, Tool]) -> str | None:
    if name not in tools:
        return f"there is no tool {printable(name)!r}; the tools are {', '.join(tools)}"
    return misfit_argument(arguments, tools[name].parameters)


class _Reader:
    """Reads calls from a place in a text, in either convention."""

    def __init__(self, text: str, start: int, names: Collection[str]) -> None:
        self.text, self.at, self.names = text[: start + MAX_CHARACTERS], start, names

    def calls(self) -> tuple[list[tuple[str, dict[str, Any]]], int]:
        """The calls, and where they end.

        Raises:
            NotACall: there are none.
        """
        fence = FENCE_OPENS.match(self.text, self.at)
        if fence:
            self.at = fence.end()
        found = self.several() if self.peek() == "[" else [self.call()]
        while len(found) < MAX_CALLS and self.more(fenced=bool(fence)):
            found += self.several() if self.peek() == "[" else [self.call()]
        if fence:  # a block that the end token cut short is read as a whole one
            self.skip()
            self.at += 3 * self.text.startswith("```", self.at)
        return found, self.at

    def more(self, *, fenced: bool) -> bool:
        """Whether another call follows on a line of its own."""
        ahead = SPACE.match(self.text, self.at)
        at = ahead.end() if ahead else self.at
        if "\n" not in self.text[self.at : at] and not (fenced and self.text[at - 1] == ";"):
            return False
        word = WORD.match(self.text, at)
        is_call = bool(word and word[0].removeprefix("default_api.") in {*self.names, "print"})
        return is_call or self.text[at : at + 1] == "{" or (fenced and self.text[at : at + 1] == "[")

    def several(self) -> list[tuple[str, dict[str, Any]]]:
        self.take("[")
        found = []
        while True:
            found.append(self.call())
            if len(found) > MAX_CALLS:
                self.fail()
            if not self.accept(","):
                self.take("]")
                return found

    def call(self) -> tuple[str, dict[str, Any]]:
        if self.peek() == "{":
            return self.json_call()
        name = self.word().removeprefix("default_api.")
        if name == "print" and name not in self.names:
            self.take("(")
            inner = self.call()
            self.take(")")
            return inner
        if name not in self.names:
            self.fail()
        return name, self.python_arguments()

    def json_call(self) -> tuple[str, dict[str, Any]]:
        value = self.value(0)
        name = value.get("name")
        arguments = value.get("parameters", value.get("arguments"))
        if not isinstance(name, str):
            self.fail()
        if arguments is None and name in self.names:
            arguments = {}
        if not isinstance(arguments, dict):
            self.fail()
        return name, arguments

    def python_arguments(self) -> dict[str, Any]:
        arguments: dict[str, Any] = {}
        self.take("(")
        while not self.accept(")"):
            name = self.word()
            self.take("=")
            arguments[name] = self.value(0)
            if not self.accept(","):
                self.take(")")
                break
        return arguments

    def value(self, depth: int) -> Any:
        """A literal, of JSON or of Python."""
        character = self.peek()
        if depth > MAX_DEPTH:
            self.fail()
        if character == "{":
            return self.mapping(depth)
        if character in "[(" and character:
            return self.items(CLOSING[character], depth)
        if string := STRING.match(self.text, self.at):
            self.at = string.end()
            return self.string(string[0])
        if number := NUMBER.match(self.text, self.at):
            self.at = number.end()
            text = number[0]
            if text.lstrip("+-").isdigit():
                return int(text)
            value = float(text)  # JSON knows no infinity: what is too large becomes the largest
            return value if math.isfinite(value) else math.copysign(sys.float_info.max, value)
        word = self.word()
        if word not in CONSTANTS:
            self.fail()
        return CONSTANTS[word]

    def string(self, quoted: str) -> str:
        try:
            if quoted[0] == '"':
                return str(json.loads(quoted, strict=False))
            return str(ast.literal_eval(quoted))
        except (ValueError, SyntaxError):  # an escape that only one of them knows
            return quoted[1:-1]

    def items(self, closing: str, depth: int) -> list[Any]:
        self.at += 1
        items: list[Any] = []
        while not self.accept(closing):
            items.append(self.value(depth + 1))
            if not self.accept(","):
                self.take(closing)
                break
        return items

    def mapping(self, depth: int) -> dict[str, Any]:
        self.at += 1
        values: dict[str, Any] = {}
        while not self.accept("}"):
            key = self.value(depth + 1)
            self.take(":")
            values[str(key)] = self.value(depth + 1)
            if not self.accept(","):
                self.take("}")
                break
        return values

    def skip(self) -> None:
        if space := SPACE.match(self.text, self.at):
            self.at = space.end()

    def peek(self) -> str:
        self.skip()
        return self.text[self.at : self.at + 1]

    def accept(self, character: str) -> bool:
        found = self.peek() == character
        self.at += found
        return found

    def take(self, character: str) -> None:
        if not self.accept(character):
            self.fail()

    def word(self) -> str:
        self.skip()
        found = WORD.match(self.text, self.at)
        if not found:
            self.fail()
        self.at = found.end()
        return found[0]

    def fail(self) -> NoReturn:
        raise NotACall(f"character {self.at} belongs to no call")
