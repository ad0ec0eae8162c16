"""Answers held to a form: valid whatever the sampling, and refused where a form cannot be held."""

from __future__ import annotations

import contextlib
import json
import re
from typing import Any

import numpy as np
import pytest

from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.prompt.answer_form import answer_form, schema_grammar
from gemma_edge.runtime.prompt.grammar_constraint import Grammar, Grammars
from gemma_edge.runtime.prompt.tokenizer import Tokenizer
from gemma_edge.runtime.prompt.tool_calls import CONVENTIONS, Convention, find_calls
from gemma_edge.runtime.prompt.tool_schemas import normal_tools
from gemma_edge.runtime.sampling import Sampler, Sampling
from support.odd_schemas import ODD_SCHEMAS, of
from support.rule_decoder import answers, tiny_model
from support.tiny_tokenizer import END_OF_TURN, EOS

pytest.importorskip("llguidance")
jsonschema = pytest.importorskip("jsonschema")
SIZE = 315


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer) -> Grammars:
    return Grammars(tokenizer, (EOS, END_OF_TURN))


def sampled(grammars: Grammars, grammar: Grammar, seed: int, most: int = 400) -> str:
    """The text of an answer of random logits, at temperature 2, which a grammar holds."""
    constraint = grammars.constraint(grammar)
    sampler = Sampler(Sampling(temperature=2.0, top_k=0, top_p=1.0, seed=seed), constraint=constraint)
    rng = np.random.default_rng(seed)
    ids: list[int] = []
    for _ in range(most):
        token = sampler.pick(rng.standard_normal(SIZE).astype(np.float32) * 4)
        if token in (EOS, END_OF_TURN):
            return grammars.tokenizer.decode(ids)
        ids.append(token)
    raise AssertionError(f"no end: {grammars.tokenizer.decode(ids)[:200]!r}")


@pytest.mark.parametrize("schema", ODD_SCHEMAS, ids=lambda schema: json.dumps(schema)[:40])
def test_random_logits_make_valid_json(grammars: Grammars, schema: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    for seed in range(2):
        validator.validate(json.loads(sampled(grammars, schema_grammar(schema, "schema"), seed)))


def test_regex_and_choices(grammars: Grammars) -> None:
    made = {sampled(grammars, Grammar("regex", "[a-f]{2,3}é?", "regex"), seed) for seed in range(20)}
    assert len(made) > 10 and all(re.fullmatch("[a-f]{2,3}é?", text) for text in made)
    choices = ["yes", 'n"o\n', "🙂", "\\"]
    form = answer_form({"choices": choices}, lambda: "json").grammar
    assert form is not None
    assert {sampled(grammars, form, seed) for seed in range(60)} == set(choices)


def get_weather(city: str, days: int = 1, dry: bool = False) -> None:
    """Tells the weather."""


def now() -> None:
    """Tells the time."""


# Random letters do not end a text within a reasonable time.
SHORT_CITY: dict[str, Any] = {
    "name": "set",
    "parameters": {
        "properties": {
            "city": {"type": "string", "maxLength": 5},
            "days": {"type": "integer", "minimum": 0, "maximum": 9},
            "dry": {"type": "boolean"},
            "unit": {"anyOf": [{"enum": ["C", "F"]}, {"type": "null"}]},
            "at": {"type": "array", "items": {"type": "boolean"}},
            "of": of(**{"a b": {"type": "null"}}),
        },
        "required": ["city", "unit"],
    },
}


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_required_call_is_always_one(grammars: Grammars, convention: Convention) -> None:
    tools = normal_tools([SHORT_CITY, now])
    form = answer_form({"tools": tools, "tool_choice": "required"}, lambda: convention).grammar
    assert form is not None
    seen = set()
    for seed in range(60):
        text = sampled(grammars, form, seed, most=2000)
        found = find_calls(text, tools)
        assert found.calls and found.text == "" and [call.error for call in found.calls if call.error] == []
        seen |= {call.name for call in found.calls} | {key for call in found.calls for key in call.arguments}
    assert seen == {"set", "now", "city", "days", "dry", "unit", "at", "of"}


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize(
    ("answer", "fits"),
    [
        ("Hello {1} [x] ```sql\n``` now()", True),
        ('A person: {"name": "Ana", "age": 3}', True),
        ('{"name": "fly", "parameters": {}}', True),
        ("[fly()]", True),
    ],
)
def test_text_is_free_until_a_call_begins(
    grammars: Grammars, convention: Convention, answer: str, fits: bool
) -> None:
    assert held(grammars, convention, answer) == answer


@pytest.mark.parametrize(
    ("convention", "answer", "until"),
    [
        ("json", 'So: {"name": "now", "parameters": {"x": 1}}', 'So: {"name": "now", "parameters": {'),
        ("json", '{"name": "get_weather", "parameters": {}}', '{"name": "get_weather", "parameters": {'),
        ("python", "So:\n[now(x=1)]", "So:\n[now("),
        ("python", "```tool_code\nfly()", "```tool_code\n"),
        ("python", '```tool_code\nget_weather(days="x")', "```tool_code\nget_weather("),
    ],
)
def test_a_call_that_has_begun_is_held(
    grammars: Grammars, convention: Convention, answer: str, until: str
) -> None:
    assert held(grammars, convention, answer) == until


@pytest.mark.parametrize(
    ("convention", "answer"),
    [
        ("json", 'So: {"name": "now", "parameters": {}}'),
        ("json", '[{"name": "now", "parameters": {}}, {"name": "now", "parameters": {}}]'),
        ("json", '{"name": "get_weather", "parameters": {"city": "Pa\\"ris", "dry": true}}'),
        ("python", "So:\n[now(), now()]"),
        ("python", '```tool_code\nget_weather(city="Paris", days=-2, dry=True)\nnow()\n```'),
    ],
)
def test_a_whole_call_fits(grammars: Grammars, convention: Convention, answer: str) -> None:
    assert held(grammars, convention, answer) == answer


def held(grammars: Grammars, convention: Convention, answer: str) -> str:
    """How much of an answer the grammar of tool_choice "auto" lets through; bytes are tokens."""
    tools = normal_tools([get_weather, now])
    form = answer_form({"tools": tools, "tool_choice": "auto"}, lambda: convention).grammar
    assert form is not None
    ids = [8 + byte for byte in answer.encode()]
    texts = [grammars.tokenizer.encode(character, bos=False) for character in answer]
    ids = [token for text in texts for token in text]
    constraint = grammars.constraint(form)
    return grammars.tokenizer.decode(ids[: constraint.fitting(ids)])


def test_tokens_are_taken_back(grammars: Grammars) -> None:
    constraint = grammars.constraint(Grammar("regex", "the (and|end)", "regex"))
    ids = grammars.tokenizer.encode("the end", bos=False)
    wrong = grammars.tokenizer.encode("x", bos=False)
    before = constraint.allowed()
    assert constraint.fitting([*ids, *wrong]) == len(ids)
    for token in ids:
        constraint.accept(token)
    assert set(np.flatnonzero(constraint.allowed())) == {EOS, END_OF_TURN}
    constraint.rollback(len(ids))
    assert (constraint.allowed() == before).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "("}, r"regex cannot be compiled: .*unclosed group"),
        ({"regex": "(?=a)b"}, "look-around"),
        ({"regex": r"[^\s\S]"}, "regex allows no answer at all"),
        ({"regex": "a" * (1 << 21)}, "regex has more than 16,384 bytes"),
        ({"regex": ""}, "regex must be a text"),
        ({"grammar": "start: word"}, 'grammar cannot be compiled: .*unknown name: "word"'),
        ({"grammar": "start: start"}, "grammar allows no answer at all"),
        ({"choices": []}, "choices must be a list"),
        ({"choices": "a,b"}, "choices must be a list"),
        ({"choices": ["a", ""]}, "none of them empty"),
        ({"choices": ["a"], "regex": "a"}, "regex and choices are given, but an answer has one form"),
        ({"response_format": "json"}, "response_format must be"),
        ({"response_format": {"type": "json_schema"}}, r"\['schema'\] must be a JSON schema"),
        ({"tool_choice": "auto"}, "tool_choice is given without tools"),
        ({"tools": [now], "tool_choice": "later"}, r"or the name of a tool \(now\), not 'later'"),
        ({"tools": [now], "regex": "a"}, "regex and tools are given"),
        ({"tools": [now], "raw": True}, "no place for tools"),
        ({"tools": [now], "tool_convention": "xml"}, "tool_convention must be json or python, not 'xml'"),
    ],
)
def test_unusable_forms_are_named(tokenizer: Tokenizer, options: dict[str, Any], message: str) -> None:
    model = tiny_model(tokenizer, answers("the end", tokenizer=tokenizer))
    with pytest.raises(UsageError, match=message):
        model.generate("x", **options)
    assert model.generate("x").text == "the end"


ENDLESS = {"type": "object", "properties": {"next": {"$ref": "#"}}, "required": ["next"]}


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"properties": {"a": {"items": {"not": {}}}}}, r"\.properties\.a\.items cannot be held: .*not"),
        ({"anyOf": [{"type": "null"}, {"format": "weird"}]}, r"\.anyOf\[1\] cannot be held: Unknown format"),
        ({"$defs": {"a": {"pattern": "("}}, "$ref": "#/$defs/a"}, "unclosed group"),
        ({"allOf": [{"type": "string"}, {"type": "integer"}]}, "Unsatisfiable schema"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "minLength is 3, maxLength is 2"),
        ({"type": "array", "items": {"if": {}}}, r"\.items cannot be held: Unimplemented keys: .*if"),
        (ENDLESS, "no value ends"),
        ({"type": "array", "items": {"$ref": "#"}, "minItems": 1}, "no value ends"),
        ({"enum": [f"v{i}" * 20 for i in range(20_000)]}, "the most are 262,144"),
    ],
)
def test_a_schema_that_cannot_be_held_is_named_with_its_path(
    grammars: Grammars, schema: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        grammars.constraint(schema_grammar(schema, "schema"))


@pytest.mark.parametrize("end", [{"type": "null"}, {"not": {}}])
def test_long_chains_of_rules_overflow_no_stack(grammars: Grammars, end: dict[str, Any]) -> None:
    links = {
        f"a{i}": {"type": "object", "properties": {"p": {"$ref": f"#/$defs/a{i + 1}"}}} for i in range(999)
    }
    schema = {"$ref": "#/$defs/a0", "$defs": {**links, "a999": end}}
    with pytest.raises(UsageError, match="Unimplemented") if "not" in end else contextlib.nullcontext():
        grammars.constraint(schema_grammar(schema, "schema"))
    rules = "".join(f'r{i}: "a" ((r{i + 1} "b")* | "c")? | "x"\n' for i in range(1000))
    grammars.constraint(Grammar("lark", f'start: r0\n{rules}r1000: "b"', "grammar")).allowed()


def test_numbers_that_json_does_not_keep_exact(grammars: Grammars) -> None:
    for number in (-(2**63), 2**63, 2**53 + 1):
        with pytest.raises(UsageError, match="schema has a number beyond 2"):
            schema_grammar({"enum": [number]}, "schema")


def test_a_grammar_that_explodes_ends_in_an_error(grammars: Grammars) -> None:
    constraint = grammars.constraint(Grammar("regex", "((a{1,1000}){1,1000}){1,1000}b", "regex"))
    letter = grammars.tokenizer.encode("a", bos=False)[0]

    def go_on() -> None:
        for _ in range(300):
            constraint.accept(letter)
            constraint.allowed()

    with pytest.raises(UsageError, match="regex cannot be held any further"):
        go_on()


def test_forms_combine_with_stop_strings_streams_and_usage(tokenizer: Tokenizer) -> None:
    model = tiny_model(tokenizer, answers("free text that no form allows", tokenizer=tokenizer))
    form: dict[str, Any] = {"regex": "[ab]{3} end [ab]{3}", "seed": 1, "temperature": 2.0}
    whole = model.generate("x", **form)
    assert re.fullmatch("[ab]{3} end [ab]{3}", whole.text) and whole.finish_reason == "stop"
    assert whole.usage.mask_s_per_token is not None and whole.usage.mask_s_per_token > 0
    stream = model.generate("x", stream=True, **form)
    assert "".join(stream) == whole.text
    stopped = model.generate("x", stop=" end", **form)
    assert stopped.text == whole.text[:3] and stopped.finish_reason == "stop"
    assert model.generate("x").usage.mask_s_per_token is None


@pytest.mark.parametrize(
    ("said", "text", "names"),
    [
        ("the end\nnow()", "the end", ["now"]),
        ("[now(), now()]", "", ["now", "now"]),
        ("the [now", "the [now", []),
        ("the end", "the end", []),
    ],
)
def test_an_answer_of_calls(tokenizer: Tokenizer, said: str, text: str, names: list[str]) -> None:
    model = tiny_model(tokenizer, answers(said, tokenizer=tokenizer))
    answer = model.generate("x", tools=[now])
    assert (answer.text, [call.name for call in answer.tool_calls]) == (text, names)
    assert answer.finish_reason == ("tool_calls" if names else "stop")
    assert ("tool_calls" in answer.to_dict()) == bool(names)
    stream = model.generate("x", stream=True, tools=[now])
    assert "".join(stream) == text and stream.completion.tool_calls == answer.tool_calls
    assert model.generate("x", tools=[now], tool_choice="none").text == said
    assert model.generate("x").text == said


def test_ids_of_calls_go_on_where_the_conversation_stopped(tokenizer: Tokenizer) -> None:
    model = tiny_model(tokenizer, answers("now()", tokenizer=tokenizer))
    called = model.generate("x", tools=[now]).tool_calls
    assert [call.id for call in called] == ["call_0"]
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "x"},
        {"role": "assistant", "content": "", "tool_calls": [call.to_dict() for call in called]},
        {"role": "tool", "tool_call_id": "call_0", "content": "12:00"},
    ]
    assert [call.id for call in model.generate(messages, tools=[now]).tool_calls] == ["call_1"]
