"""Tools and forms as subjects: schemas, messages with calls, answers, grammars."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from .mutators import TEXTS, damaged_bytes, damaged_text, json_bytes
from .readers import models

Files = dict[str, bytes]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "minLength": 1, "maxLength": 12},
        "days": {"type": "integer", "minimum": 0, "maximum": 14},
        "units": {"anyOf": [{"enum": ["C", "F"]}, {"type": "null"}]},
        "at": {"type": "array", "items": {"$ref": "#/$defs/point"}, "maxItems": 3},
        "options": {"type": "object", "properties": {"dry": {"type": "boolean"}}, "required": ["dry"]},
    },
    "required": ["city", "units"],
    "additionalProperties": False,
    "$defs": {
        "point": {"type": "array", "items": {"type": "number", "minimum": 0, "maximum": 9}, "maxItems": 2}
    },
}
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": "weather", "description": "Tells it.", "parameters": WEATHER}},
    {"name": "now", "description": "Tells the time."},
]
CALLS = [
    {
        "id": "a",
        "type": "function",
        "function": {"name": "weather", "arguments": {"city": "Pa'\"r", "days": 2}},
    },
    {"id": "b", "type": "function", "function": {"name": "now", "arguments": "{}"}},
]
MESSAGES = [
    {"role": "user", "content": "x"},
    {"role": "assistant", "content": None, "tool_calls": CALLS},
    {"role": "tool", "tool_call_id": "a", "content": {"temperature": [21, None]}},
    {"role": "tool", "name": "now", "content": "12:00"},
]
ANSWERS = (
    '{"name": "weather", "parameters": {"city": "Pa\\"ris", "at": [[1, 2.5]], "units": null}}',
    '[{"name": "now", "arguments": {}}, {"name": "weather", "parameters": {"city": "é"}}]',
    "Well.\n[weather(city='Pa\\'ris', units=None, options={'dry': True}), now()]",
    'Well: ```tool_code\nprint(default_api.weather(city="x", days=-1e3))\nnow()\n```\nThat is all.',
    'weather(city="a\\u00e9\\ud83d\\ude42", at=[[[]], (1, 2,)])\nnow()',
)
GRAMMAR = """
start: greeting (", " name)* ENDING?
greeting: "hello" | "good " /[a-z]{1,8}/
name: %json {"type": "string", "maxLength": 4} | /[A-Z][a-z]*/
ENDING: "." | /!+/
"""


def tool_files() -> Files:
    return {"tools.json": json.dumps(TOOLS).encode(), "messages.json": json.dumps(MESSAGES).encode()}


def damaged_tools(rng: Random, files: Files) -> Files:
    name = rng.choice(sorted(files))
    return {name: json_bytes(rng, json.loads(files[name]))}


def read_tools(folder: Path) -> None:
    from gemma_edge.cli.tool_files import tools_from
    from gemma_edge.runtime.errors import UsageError
    from gemma_edge.runtime.prompt.chat_template import ChatTemplate
    from gemma_edge.runtime.prompt.tool_calls import CONVENTIONS
    from gemma_edge.runtime.prompt.tool_grammar import tool_grammar

    tools = tools_from(folder / "tools.json")
    try:
        messages = json.loads((folder / "messages.json").read_bytes())
    except (ValueError, RecursionError):
        raise UsageError("messages.json: no JSON") from None
    for convention in CONVENTIONS:
        ChatTemplate().render(messages, tools=tools, convention=convention)
        _pocket_template().render(messages, tools=tools, convention=convention)
        _grammars().constraint(tool_grammar(tools, convention, required=False)).allowed()


def answer_files() -> Files:
    return {f"answer-{number}": text.encode() for number, text in enumerate(ANSWERS)}


def damaged_answer(rng: Random, files: Files) -> Files:
    """Answers cut, joined, nested and damaged."""
    text = rng.choice(ANSWERS)
    for _ in range(rng.choice((1, 1, 2, 4))):
        change = rng.randrange(5)
        at = rng.randrange(len(text) + 1)
        if change == 0:
            text = damaged_text(rng, text)
        elif change == 1:
            text = text[:at] + rng.choice(ANSWERS)
        elif change == 2:
            text = text[:at] + rng.choice("[{(`\"'") * rng.choice((1, 100, 20_000)) + text[at:]
        elif change == 3:
            text = text[:at] + rng.choice((*TEXTS, "now(", '{"name":')) * rng.choice((1, 50)) + text[at:]
        else:
            text = damaged_bytes(rng, text.encode("utf-8", "replace")).decode("utf-8", "replace")
    return {"answer-0": text.encode("utf-8", "replace")}


def read_answer(folder: Path) -> None:
    from gemma_edge.runtime.prompt.call_finder import CallFinder
    from gemma_edge.runtime.prompt.tool_calls import CONVENTIONS, find_calls, write_calls
    from gemma_edge.runtime.prompt.tool_schemas import normal_tools

    text, tools = (folder / "answer-0").read_text("utf-8"), normal_tools(TOOLS)
    found = find_calls(text, tools)
    for convention in CONVENTIONS:
        if found.calls and all(call.name in ("weather", "now") for call in found.calls):
            again = find_calls(write_calls(found.calls, convention), tools)
            assert convention == "python" or again.calls == found.calls, (
                "a call is not read as it was written"
            )
    streamed, rng = CallFinder(tools), Random(len(text))
    passed, at = "", 0
    while at < len(text):
        step = rng.choice((1, 3, 17, 4000))
        passed, at = passed + streamed.push(text[at : at + step]), at + step
    passed += streamed.flush()
    assert (passed, streamed.calls) == (found.text, found.calls), "a stream differs from the whole"


def schema_files() -> Files:
    return {"schema.json": json.dumps(WEATHER).encode()}


def read_schema(folder: Path) -> None:
    """An answer of random logits, held to the schema, fits it."""
    from gemma_edge.runtime.errors import UsageError
    from gemma_edge.runtime.files.json_schema_check import misfit_argument
    from gemma_edge.runtime.prompt.answer_form import response_grammar

    raw = (folder / "schema.json").read_bytes()
    try:
        schema = json.loads(raw)
    except (ValueError, RecursionError):
        raise UsageError("schema.json: no JSON") from None
    grammar = response_grammar({"type": "json_schema", "json_schema": {"schema": schema}})
    text = _sampled(grammar, len(raw))
    if text is not None:
        wrong = misfit_argument(json.loads(text), schema)
        assert wrong is None, "an answer does not fit its schema"


def grammar_files() -> Files:
    return {"grammar.lark": GRAMMAR.encode()}


def damaged_grammar(rng: Random, raw: bytes) -> bytes:
    text = raw.decode()
    for _ in range(rng.choice((1, 2, 3))):
        at = rng.randrange(len(text) + 1)
        piece = rng.choice(
            ('"', "/", "(", ")*", "|", "{9999}", "(a|b)*", "start", "name", " & ~/a/", "%json {}")
        )
        text = damaged_text(rng, text) if rng.random() < 0.3 else text[:at] + piece + text[at:]
    return text.encode("utf-8", "replace")


def read_grammar(folder: Path) -> None:
    from gemma_edge.runtime.prompt.grammar_constraint import Grammar

    text = (folder / "grammar.lark").read_text("utf-8")
    _sampled(Grammar("lark", text, "grammar"), len(text))


def _sampled(grammar: Any, seed: int) -> str | None:
    """An answer of random logits; None if it does not end within 60 tokens."""
    from gemma_edge.runtime.sampling import Sampler, Sampling

    grammars = _grammars()
    sampler = Sampler(Sampling(temperature=2.0, seed=seed), constraint=grammars.constraint(grammar))
    rng, ids = np.random.default_rng(seed), list[int]()
    for _ in range(60):
        token = sampler.pick(rng.standard_normal(grammars.tokenizer.vocab_size).astype(np.float32) * 3)
        if token in grammars.end_ids:
            return str(grammars.tokenizer.decode(ids))
        ids.append(token)
    return None


@cache
def _grammars() -> Any:
    from gemma_edge.runtime.prompt.grammar_constraint import Grammars
    from gemma_edge.runtime.prompt.tokenizer import Tokenizer

    return Grammars(Tokenizer(models() / "checkpoint" / "tokenizer.model"), (1, 106))


@cache
def _pocket_template() -> Any:
    from gemma_edge.runtime.prompt.chat_template import ChatTemplate

    path = Path(__file__).parents[2] / "pocket/checkpoint/chat_template.jinja"
    return ChatTemplate(path.read_text("utf-8"), path)
