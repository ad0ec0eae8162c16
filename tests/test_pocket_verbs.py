"""Every verb that answers, on the checkpoint in git: the answers of its tasks, in both engines."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from gemma_edge.benchmarks.measure.questions import Question, read_questions
from gemma_edge.cli.main import main
from gemma_edge.export.exporter import export_bundle
from support.repository import ROOT

CHECKPOINT = ROOT / "pocket" / "checkpoint"
SAMPLES = CHECKPOINT / "samples"
Verb = Callable[..., str]


@pytest.fixture(autouse=True)
def pocket_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts of pocket import each other by name, as scripts do."""
    monkeypatch.syspath_prepend(str(ROOT / "pocket" / "training"))


@pytest.fixture(scope="module", params=["onnx", "tflite"])
def bundle(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("PIL")
    folder = tmp_path_factory.mktemp("verbs") / request.param
    return export_bundle(
        CHECKPOINT, folder, recipe="int8", format=request.param, context=512, verify=False
    ).path


@pytest.fixture
def said(bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Verb:
    """What a verb prints on stdout, with `stdin` typed into it."""

    def run(verb: str, *arguments: str, stdin: str = "") -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        assert main([verb, str(bundle), *arguments]) == 0
        return capsys.readouterr().out.strip()

    return run


def sample(task: str) -> tuple[Question, str]:
    """The sample of a task, and its file if it has one."""
    question = next(q for q in read_questions(SAMPLES / "questions.jsonl") if q.task == task)
    content = question.messages[-1]["content"]
    files = (
        [part[part["type"]] for part in content if part["type"] != "text"] if question.kind != "text" else []
    )
    return question, "".join(files)


def test_run(said: Verb) -> None:
    question, _ = sample("facts")
    assert said("run", question.messages[-1]["content"]) == question.answer


def test_run_with_a_picture(said: Verb) -> None:
    question, file = sample("image what")
    assert said("run", question.messages[-1]["content"][-1]["text"], "-a", file) == question.answer


def test_describe(said: Verb) -> None:
    from held_out import SHOWN_SEED
    from pictures import describe, unseen_images

    (shown,) = unseen_images("image what", 1, SHOWN_SEED)
    assert said("describe", sample("image what")[1]) == describe(Random(0), shown.turns[0].media).answer


def test_describe_a_sound(said: Verb) -> None:
    question, file = sample("speech commands")
    assert said("describe", file) == f"A voice says: {question.answer}"


def test_transcribe(said: Verb) -> None:
    question, file = sample("speech commands")
    assert said("transcribe", "--text", file) == question.answer


def test_transcribe_another_language(said: Verb) -> None:
    from speech import COMMANDS

    question, file = sample("translated commands")
    assert said("transcribe", "--text", file) == COMMANDS[question.answer]


def test_translate(said: Verb) -> None:
    question, file = sample("translated commands")
    assert said("translate", "--text", file) == question.answer


@pytest.mark.parametrize("convention", ["json", "python"])
def test_run_with_tools(said: Verb, convention: str) -> None:
    question, _ = sample("tools call python")
    words = ("--tools", str(SAMPLES / "tools.json"), "--tool-convention", convention)
    call = json.loads(said("run", *words, question.messages[-1]["content"]))
    assert [call["function"]] == json.loads(question.answer)
    fact, _ = sample("facts")
    assert said("run", *words, fact.messages[-1]["content"]) == fact.answer


def test_chat_remembers(said: Verb) -> None:
    out = said("chat", stdin="My name is Ana. I have a dog.\nWhat is 12 + 5?\nWhat is my name?\n")
    assert "17" in out and "Your name is Ana." in out


def test_chat_tells_what_a_tool_returned(said: Verb, tmp_path: Path) -> None:
    module = tmp_path / "house.py"
    module.write_text(
        'def get_time(city: str) -> dict:\n    """Get the time in a city."""\n    return {"time": "14:05"}\n'
    )
    out = said("chat", "--tools", str(module), "--yes", stdin="What time is it in Oslo?\n")
    assert "In Oslo it is 14:05." in out
