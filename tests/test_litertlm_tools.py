"""Tools in a `.litertlm`, as LiteRT-LM's own tool API has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.chat_template import ChatTemplate
from gemma_edge.runtime.prompt.tool_schemas import normal_tools
from support.litert_lm_process import run_tools
from support.repository import ROOT

pytest.importorskip("litert_lm")
CHECKPOINT = ROOT / "pocket/checkpoint"
QUESTION = {"role": "user", "content": "Weather in Paris?"}
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Paris", "days": 2}}}
RESULT = {"temperature": 21, "wind": None}


def get_weather(city: str, days: int = 1, units: list[str] | None = None) -> dict[str, Any]:
    """Tells the weather.

    Args:
        city: The city.
    """
    return {}


def now() -> str:
    """Tells the time."""
    return ""


TOOLS = normal_tools([get_weather, now])


@pytest.fixture(scope="module")
def pocket(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pocket without its audio encoder: a generic_model, which it is with one, has no calls in LiteRT-LM."""
    out = tmp_path_factory.mktemp("litertlm") / "pocket.litertlm"
    return export_bundle(
        CHECKPOINT,
        out,
        recipe="int4_g32",
        context=512,
        format="litertlm",
        modalities=("text", "image"),
        verify=False,
        calibrate="none",
    ).path


@pytest.mark.parametrize("step", ["asked", "answered"])
def test_the_prompt_is_the_one_that_our_runtime_makes(pocket: Path, step: str, tmp_path: Path) -> None:
    theirs: list[Any] = [{"role": "system", "content": "Be brief."}, QUESTION]
    ours = list(theirs)
    if step == "answered":
        theirs += [{"role": "assistant", "tool_calls": [CALL]}]
        ours += [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
        responses = [{"type": "tool_response", "name": "get_weather", "response": RESULT}]
        theirs += [{"role": "tool", "content": responses}]
        ours += [{"role": "tool", "content": '{"temperature": 21, "wind": None}'}]
    made = run_tools(pocket, [tool.to_dict() for tool in TOOLS], theirs, tmp_path)
    template = ChatTemplate((CHECKPOINT / "chat_template.jinja").read_text())
    assert made["prompt"] == template.render(ours, tools=TOOLS, bos_token="")
    assert made["supported"] is True


def asked_of_pocket() -> list[dict[str, Any]]:
    """Pocket's questions whose answer is one call in Python, as LiteRT-LM reads it."""
    lines = (ROOT / "pocket/questions/questions.jsonl").read_text().splitlines()
    return [q for q in map(json.loads, lines) if q["task"] == "tools call python"]


@pytest.mark.skipif(not asked_of_pocket(), reason="Pocket was not taught to call tools")
def test_litert_lm_answers_with_parsed_calls(pocket: Path, tmp_path: Path) -> None:
    """Most are the calls that our runtime finds; arithmetic may decide a close call either way."""
    same = 0
    with Model.load(pocket) as model:
        for question in asked_of_pocket():
            tools, messages = question["tools"], question["messages"]
            theirs = run_tools(pocket, tools, messages, tmp_path)
            ours = model.generate(messages, tools=tools, tool_convention="python", temperature=0.0)
            found = [[call.name, call.arguments] for call in ours.tool_calls]
            same += bool(found) and theirs["calls"] == found
    assert same > len(asked_of_pocket()) // 2
