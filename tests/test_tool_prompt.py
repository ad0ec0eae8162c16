"""Tools in prompts: normal forms, the two conventions, the checkpoint's template and ours."""

from __future__ import annotations

import enum
from typing import Any, Literal

import pytest

from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.prompt.chat_template import ChatTemplate
from gemma_edge.runtime.prompt.tool_calls import Convention, ToolCall
from gemma_edge.runtime.prompt.tool_schemas import Tool, normal_tools
from support.repository import ROOT

POCKET = (ROOT / "pocket/checkpoint/chat_template.jinja").read_text()


class Unit(enum.Enum):
    CELSIUS = "C"
    FAHRENHEIT = "F"


def get_weather(city: str, days: int = 1, unit: Literal["C", "F"] | None = None) -> dict[str, Any]:
    """Tells the
    weather.

    More of it.

    Args:
        city: The city,
            in English.
        days (int): How many days.

    Returns:
        nothing: of interest
    """
    return {}


def now() -> str:
    """Tells the time."""
    return "12:00"


TOOLS = normal_tools([get_weather, now])
CALLS = [ToolCall("a", "get_weather", {"city": 'Pa"ris', "days": 2}), ToolCall("b", "now")]
MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "How is Paris?"},
    {"role": "assistant", "content": None, "tool_calls": [call.to_dict() for call in CALLS]},
    {"role": "tool", "tool_call_id": "a", "content": {"temperature": 21}},
    {"role": "tool", "tool_call_id": "b", "content": "12:00"},
    {"role": "assistant", "content": "21 degrees."},
]
RESULTS = '<start_of_turn>user\n```tool_outputs\n{"temperature": 21}\n12:00\n```<end_of_turn>\n'
DECLARED = (
    "def get_weather(city: str, days: int = None, unit: Any = None): Tells the weather.\n"
    "def now(): Tells the time.\n"
)
AS_JSON = '[{"name": "get_weather", "parameters": {"city": "Pa\\"ris", "days": 2}}, '
AS_JSON += '{"name": "now", "parameters": {}}]'


def test_a_function_becomes_a_schema() -> None:
    tool = TOOLS[0]
    assert (tool.name, tool.description, tool.function) == ("get_weather", "Tells the weather.", get_weather)
    assert tool.parameters == {
        "type": "object",
        "properties": {
            "city": {"type": "string", "description": "The city, in English."},
            "days": {"type": "integer", "description": "How many days."},
            "unit": {"anyOf": [{"type": "string", "enum": ["C", "F"]}, {"type": "null"}]},
        },
        "required": ["city"],
    }


def test_hints_that_a_schema_can_say() -> None:
    def plot(values: list[float], names: dict[str, int], unit: Unit, both: int | str, any_: Any) -> None:
        """Plots."""

    assert normal_tools([plot])[0].parameters["properties"] == {
        "values": {"type": "array", "items": {"type": "number"}},
        "names": {"type": "object", "additionalProperties": {"type": "integer"}},
        "unit": {"enum": ["C", "F"]},
        "both": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        "any_": {},
    }


def test_schemas_are_taken_in_both_forms() -> None:
    inner = {"name": "f", "description": "F.", "parameters": {"properties": {"x": {"type": "integer"}}}}
    expected = Tool("f", "F.", {"type": "object", "properties": {"x": {"type": "integer"}}})
    assert normal_tools([inner]) == normal_tools([{"type": "function", "function": inner}]) == [expected]
    assert normal_tools([{"name": "f"}]) == [Tool("f")]


def unhinted(x) -> None:  # type: ignore[no-untyped-def]
    pass


def starred(*x: int) -> None:
    pass


def odd(x: set[int]) -> None:
    pass


CIRCLE: dict[str, Any] = {"type": "object"}
CIRCLE["properties"] = {"x": CIRCLE}
DEEP: dict[str, Any] = {}
for _ in range(10_000):
    DEEP = {"type": "object", "properties": {"x": DEEP}}


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ({"name": "f"}, "tools must be a list"),
        ([3], r"tools\[0\] must be a function or"),
        ([{"name": "a b"}], r"tools\[0\]\['name'\] must be a name"),
        ([{"type": "function", "function": {"name": 3}}], r"\['function'\]\['name'\]"),
        ([{"name": "f", "description": 3}], r"\['description'\] must be a text"),
        ([{"name": "f", "parameters": {"type": "string"}}], 'of type "object"'),
        ([{"name": "f"}, {"name": "f"}], "two tools of the name 'f'"),
        ([{"name": f"f{i}"} for i in range(200)], "200 tools, the most are 128"),
        ([unhinted], "tool unhinted: parameter 'x' has no type hint: write x: str"),
        ([starred], "passed by name"),
        ([odd], "which no JSON schema says"),
        ([lambda: 3], "use `def`"),
        ([{"name": "f", "parameters": CIRCLE}], "holds itself"),
        ([{"name": "f", "parameters": DEEP}], "nested more than 64 deep"),
        ([{"name": "f", "parameters": {"description": "x" * (1 << 19)}}], "the most are 262,144"),
        ([{"name": "f", "parameters": {"x": {1, 2}}}], "is no JSON"),
    ],
)
def test_unusable_tools_are_named(tools: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        normal_tools(tools)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"x": {"type": "text"}}, r"properties\.x\.type must be one of object"),
        ({"x": {"enum": []}}, r"properties\.x\.enum must be a list"),
        ({"x": {"type": "integer", "enum": ["a"]}}, "none of its enum"),
        ({"x": {"minimum": 3, "maximum": 2}}, "contradicts itself: minimum is 3, maximum is 2"),
        ({"x": {"minLength": "a"}}, "minLength must be a number"),
        ({"x": {"anyOf": []}}, "anyOf must be a list"),
        ({"x": {"items": 3}}, r"x\.items must be a JSON schema"),
        ({"x": {"$ref": "http://a/b"}}, "must point into the schema itself"),
        ({"x": {"$ref": "#/$defs/y"}}, "where there is no schema"),
        ({"x": {"$ref": "#/properties/x"}}, "leads back to itself"),
        ({"x": {"required": ["y"], "additionalProperties": False}}, "requires 'y', but has no such property"),
        ({"x": {"required": "y"}}, "required must be a list"),
        ({"x": {"properties": []}}, "properties must be an object"),
    ],
)
def test_unusable_schemas_are_named(schema: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        normal_tools([{"name": "f", "parameters": {"properties": schema}}])


@pytest.mark.parametrize(
    ("convention", "line", "calls"),
    [
        ("python", "", '```tool_code\nget_weather(city="Pa\\"ris", days=2)\nnow()\n```'),
        (
            "json",
            'Call as {"name": ..., "parameters": {...}}\n',
            AS_JSON,
        ),
    ],
)
def test_pocket_template_writes_both_conventions(convention: Convention, line: str, calls: str) -> None:
    made = ChatTemplate(POCKET).render(
        MESSAGES, tools=TOOLS, convention=convention, add_generation_prompt=False
    )
    assert made == (
        f"<bos><start_of_turn>user\nBe brief.\n\n{line}{DECLARED}\nHow is Paris?<end_of_turn>\n"
        f"<start_of_turn>model\n{calls}<end_of_turn>\n{RESULTS}"
        "<start_of_turn>model\n21 degrees.<end_of_turn>\n"
    )


def test_pocket_template_renders_as_in_transformers() -> None:
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    messages = [dict(m) for m in MESSAGES]
    messages[3]["content"] = '{"temperature": 21}'
    expected = utils._compile_jinja_template(POCKET).render(
        messages=messages, tools=[t.to_dict() for t in TOOLS], bos_token="<bos>", add_generation_prompt=True
    )
    assert ChatTemplate(POCKET).render(messages, tools=TOOLS) == expected


def test_pocket_template_takes_the_declarations_of_litert_lm() -> None:
    """These texts are what LiteRT-LM 0.18.1 passes for a `gemma3n`, with values written in Python."""
    weather = "def get_weather(\n    city: str,\n    days: int | None = None,\n"
    weather += "    unit: Any | None = None,\n) -> dict:\n"
    weather += '  """Tells the weather.\n\n  Args:\n    city: The city.\n    days    unit  """\n'
    time = 'def now(\n\n) -> dict:\n  """Tells the time.\n\n  Args:\n  """\n'
    messages = [dict(m) for m in MESSAGES]
    calls = [{"function": {"name": "get_weather", "arguments": {"city": '"Pa\\"ris"', "days": "2"}}}]
    messages[2] = {"role": "assistant", "tool_calls": [*calls, {"function": {"name": "now"}}]}
    messages[3]["content"] = [{"type": "text", "text": '{"temperature": 21}'}]
    jinja2 = pytest.importorskip("jinja2")
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(POCKET)
    made = template.render(messages=messages, tools=[weather, time], bos_token="<bos>")
    assert made == ChatTemplate(POCKET).render(MESSAGES, tools=TOOLS, add_generation_prompt=False)


@pytest.mark.parametrize(
    ("convention", "form", "calls"),
    [
        ("python", "[func_name1(", '[get_weather(city="Pa\\"ris", days=2), now()]'),
        (
            "json",
            '{"name": function name, "parameters": dictionary',
            AS_JSON,
        ),
    ],
)
def test_a_template_without_tools_gets_the_section_of_googles_guide(
    convention: Convention, form: str, calls: str
) -> None:
    made = ChatTemplate().render(MESSAGES, tools=TOOLS, convention=convention)
    section, rest = made.split("Be brief.\n\nHow is Paris?<end_of_turn>\n")
    assert section.startswith(
        "<bos><start_of_turn>user\nYou have access to functions. If you decide to invoke any"
    )
    assert f"put it in the format of\n{form}" in section
    assert 'any other text in the response if you call a function\n[{"name": "get_weather",' in section
    assert section.endswith("]\n\n")
    assert rest == (
        f"<start_of_turn>model\n{calls}<end_of_turn>\n{RESULTS}"
        "<start_of_turn>model\n21 degrees.<end_of_turn>\n<start_of_turn>model\n"
    )


def test_the_section_comes_before_the_parts_of_a_first_user_turn() -> None:
    parts = [{"type": "image"}, {"type": "text", "text": "What is this?"}]
    made = ChatTemplate().render([{"role": "user", "content": parts}], tools=TOOLS)
    assert made.endswith("}]<image_soft_token>What is this?<end_of_turn>\n<start_of_turn>model\n")


def test_how_a_template_takes_tools() -> None:
    plain, taking = ChatTemplate(), ChatTemplate("{{ messages[0].content }}{{ tools | tojson }}")
    assert (plain.renders_tools(), plain.default_convention) == (False, "json")
    assert (taking.renders_tools(), taking.renders_tools("python"), taking.default_convention) == (
        True,
        False,
        "json",
    )
    user = [{"role": "user", "content": "x"}]
    assert taking.render(user, tools=TOOLS[1:]).startswith(
        'x[{"type": "function", "function": {"name": "now"'
    )
    assert taking.render(user) == "xnull"
    assert taking.render(user, tools=TOOLS, convention="python").startswith("You have access to functions.")


USER = {"role": "user", "content": "x"}
ASKED = {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "now", "arguments": {}}}]}


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (
            [USER, {"role": "tool", "content": "x"}],
            r"messages\[1\] is the result of a call, but no call is open",
        ),
        ([USER, ASKED, USER], r"messages\[2\] comes before the result of call 'a'"),
        ([USER, ASKED, {"role": "tool", "tool_call_id": "b", "content": "x"}], "'b', the open calls are a"),
        (
            [USER, ASKED, {"role": "tool", "tool_call_id": "b" * 9000, "content": "x"}],
            "b{100,200}[.]{3}, the open",
        ),
        ([{**ASKED, "role": "user"}], "only one of role 'assistant' may"),
        ([USER, {**ASKED, "tool_calls": "now"}], r"\['tool_calls'\] must be a list"),
        ([USER, {**ASKED, "tool_calls": [3]}], r"\['tool_calls'\]\[0\] must be"),
        (
            [USER, {**ASKED, "tool_calls": [{"function": {"name": "f", "arguments": "[" * 10_000}}]}],
            "is no JSON, or nested too deep",
        ),
        (
            [USER, {**ASKED, "tool_calls": [{"function": {"name": "f", "arguments": DEEP}}]}],
            "nested too deep",
        ),
        (
            [USER, {**ASKED, "tool_calls": [{"function": {"name": "f", "arguments": "3"}}]}],
            "must be an object",
        ),
        ([USER, ASKED, {"role": "tool", "content": {1, 2}}], "must be a text, or a value that JSON can say"),
    ],
)
def test_impossible_messages_are_named(messages: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        ChatTemplate().render(messages, tools=TOOLS)
