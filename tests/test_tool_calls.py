"""Tool calls in answers: both conventions, what stays text, and what no answer can do to us."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from gemma_edge.runtime.files.json_schema_check import check_schema, misfit_argument
from gemma_edge.runtime.prompt.tool_calls import CONVENTIONS, ToolCall, call_start, find_calls, write_calls
from gemma_edge.runtime.prompt.tool_schemas import normal_tools


def get_weather(city: str, days: int = 1) -> None:
    """Tells the weather."""


def now() -> None:
    """Tells the time."""


def put(value: Any) -> None:
    """Takes anything."""


TOOLS = normal_tools([get_weather, now, put])
PARIS = ("get_weather", {"city": "Paris"})


def found(answer: str) -> list[tuple[str, dict[str, Any]]]:
    return [(call.name, call.arguments) for call in find_calls(answer, TOOLS).calls]


@pytest.mark.parametrize(
    "answer",
    [
        '{"name": "get_weather", "parameters": {"city": "Paris"}}',
        '{"name": "get_weather", "arguments": {"city": "Paris"}}',
        '[{"name": "get_weather", "parameters": {"city": "Paris"}}]',
        "{'name': 'get_weather', 'parameters': {'city': 'Paris'}}",
        '```json\n{"name": "get_weather", "parameters": {"city": "Paris"}}\n```',
        '```tool_code\n{"name": "get_weather", "parameters": {"city": "Paris"}}\n```',
        'get_weather(city="Paris")',
        "[get_weather(city='Paris')]",
        '[ get_weather ( city = "Paris" , ) ]\n',
        '```tool_code\nget_weather(city="Paris")\n```',
        '```tool_code\n[get_weather(city="Paris")]\n```',
        '```python\nprint(get_weather(city="Paris"))\n```',
        '```tool_code\nprint(default_api.get_weather(city="Paris"))\n```',
        '```tool_code\nget_weather(city="Paris")',
    ],
)
def test_one_call_in_each_spelling(answer: str) -> None:
    assert found(answer) == [PARIS]
    assert find_calls(answer, TOOLS).text == ""


@pytest.mark.parametrize(
    "answer",
    [
        '[{"name": "get_weather", "parameters": {"city": "Paris"}}, {"name": "now", "parameters": {}}]',
        '{"name": "get_weather", "parameters": {"city": "Paris"}}\n{"name": "now"}',
        '[get_weather(city="Paris"), now()]',
        'get_weather(city="Paris")\nnow()',
        '```tool_code\nget_weather(city="Paris")\nnow()\n```',
    ],
)
def test_several_calls(answer: str) -> None:
    assert found(answer) == [PARIS, ("now", {})]


def test_calls_are_numbered() -> None:
    calls = find_calls("[now(), now()]", TOOLS, first_id=3).calls
    assert calls == (ToolCall("call_3", "now"), ToolCall("call_4", "now"))


def test_a_number_that_no_float_holds_is_the_largest() -> None:
    assert found("put(value=-9e999)") == [("put", {"value": -sys.float_info.max})]


VALUES = [
    "",
    "a \"b\" 'c' \\ \n\t",
    "(x=1)",
    "é 🙂",
    0,
    -3,
    2.5,
    1e-7,
    True,
    False,
    None,
    [],
    [1, [2, {}]],
    {"a": {"b": [None]}},
]


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("fenced", [False, True])
def test_every_value_is_read_as_it_was_written(convention: Any, fenced: bool) -> None:
    calls = [ToolCall(f"call_{i}", "put", {"value": value}) for i, value in enumerate(VALUES)]
    text = write_calls(calls, convention, fenced=fenced)
    assert find_calls(f"Well.\n{text}", TOOLS).calls == tuple(calls)
    assert find_calls(f"Well.\n{text}", TOOLS).text == "Well."


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("Let me look.\n\nnow()", "Let me look."),
        ('Sure: {"name": "now", "parameters": {}}', "Sure:"),
        ("now()\nThat is all.", "\nThat is all."),
    ],
)
def test_text_around_a_call_stays_text(answer: str, text: str) -> None:
    split = find_calls(answer, TOOLS)
    assert (split.text, [call.name for call in split.calls]) == (text, ["now"])


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "It is now (12:00).",
        'A person: {"name": "Ana", "age": 3}',
        "[1, 2]",
        "```python\nprint(3)\n```",
        "now(",
        "now(3)",
        "now(x=__import__('os'))",
        "now(x=1 + 1)",
        "get_weather(city=Paris)",
        '{"name": "now", "parameters": [',
        '{"name": {"now": 1}}',
        '{"name": "now", "parameters": ' + '{"a":' * 10_000,
        "put(value=" + "[" * 10_000,
        "[" * 100_000,
        '{"name":' * 10_000,
        "now(x=" + "9" * 60_000 + ")",
    ],
    ids=lambda answer: answer[:20],
)
def test_what_is_no_call_stays_text(answer: str) -> None:
    assert find_calls(answer, TOOLS) == find_calls(answer, [])
    assert find_calls(answer, TOOLS).text == answer


def test_a_text_that_only_looks_like_a_call_does_not_hide_one() -> None:
    assert found('{"name": oops} now then:\nget_weather(city="Paris")') == [PARIS]


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        ('get_weather(city="Paris")', None),
        ("get_weather()", "city: missing"),
        ("get_weather(city=3)", "city: expected a string, got 3"),
        ('get_weather(city="Paris", days="two")', 'days: expected an integer, got "two"'),
        ('{"name": "fly", "parameters": {}}', "there is no tool 'fly'; the tools are get_weather, now, put"),
    ],
)
def test_arguments_are_checked(answer: str, error: str | None) -> None:
    (call,) = find_calls(answer, TOOLS).calls
    assert call.error == error


@pytest.mark.parametrize(
    ("text", "start"),
    [
        ("Hello", None),
        ("Hello {", 6),
        ('Hello {"na', 6),
        ('Hello {"a', None),
        ("Hello [ ge", 8 - 2),
        ("It is no", None),
        ("It is\nno", 6),
        ("``", 0),
        ("A ```tool", 2),
        ("A ```sql", None),
    ],
)
def test_where_a_call_may_start(text: str, start: int | None) -> None:
    assert call_start(text, ["get_weather", "now"]) == start


SCHEMA = check_schema(
    {
        "type": "object",
        "properties": {
            "kind": {"enum": ["a", 1, None]},
            "tree": {"$ref": "#/$defs/tree"},
            "size": {"type": ["integer", "null"], "minimum": 1, "maximum": 3},
            "one": {"oneOf": [{"type": "integer"}, {"type": "number", "maximum": 2}]},
            "all": {"allOf": [{"minLength": 2}, {"maxLength": 3}]},
            "list": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
        },
        "additionalProperties": False,
        "$defs": {"tree": {"type": "object", "additionalProperties": {"$ref": "#/$defs/tree"}}},
    },
    "schema",
)


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"kind": 1},
        {"kind": None},
        {"kind": True},
        {"kind": "b"},
        {"tree": {"a": {"b": {}}}},
        {"tree": {"a": {"b": 3}}},
        {"size": 2},
        {"size": 2.0},
        {"size": None},
        {"size": 4},
        {"size": True},
        {"one": 1},
        {"one": 3},
        {"one": 1.5},
        {"all": "ab"},
        {"all": "abcd"},
        {"list": ["a", "b"]},
        {"list": ["a", 3]},
        {"list": ["a", "b", "c"]},
        {"other": 1},
    ],
    ids=str,
)
def test_arguments_fit_as_jsonschema_has_it(value: Any) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    fits = jsonschema.Draft202012Validator(SCHEMA).is_valid(value)
    assert (misfit_argument(value, SCHEMA) is None) == fits


def test_a_schema_that_explodes_ends() -> None:
    schema = check_schema(
        {"anyOf": [{"$ref": "#/$defs/x"}] * 2, "$defs": {"x": {"anyOf": [{"items": {}}, {"$ref": "#"}]}}}, "s"
    )
    assert misfit_argument({}, schema) is None
    doubled = {f"x{i}": {"allOf": [{"$ref": f"#/$defs/x{i + 1}"}] * 2} for i in range(40)}
    worse = check_schema({"$ref": "#/$defs/x0", "$defs": {**doubled, "x40": {}}}, "s")
    assert "10,000 parts" in str(misfit_argument({}, worse))
