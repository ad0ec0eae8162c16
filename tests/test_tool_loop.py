"""The loop of tools: what is run, what the model is told, and how it ends."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.cli import chat as chat_repl
from gemma_edge.cli import main as cli
from gemma_edge.cli.tool_files import tools_from
from gemma_edge.runtime.conversations.conversation import Conversation
from gemma_edge.runtime.conversations.tool_loop import MAX_RESULT_CHARACTERS, run_call
from gemma_edge.runtime.errors import FileError, GemmaEdgeError, UsageError
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.prompt.tool_calls import ToolCall
from support.rule_decoder import answers, tiny_model
from support.tiny_tokenizer import tiny_tokenizer


class Tools:
    """Tools that note how they were called."""

    def __init__(self) -> None:
        self.ran: list[tuple[Any, ...]] = []

    def add(self, a: int, b: int) -> int:
        """Adds."""
        self.ran.append(("add", a, b))
        return a + b

    def fail(self) -> None:
        """Fails."""
        self.ran.append(("fail",))
        raise ValueError("no\nway")

    @property
    def both(self) -> list[Any]:
        return [self.add, self.fail]


@pytest.fixture
def tools() -> Tools:
    return Tools()


def model_that_says(tmp_path: Path, *said: str) -> Model:
    tokenizer = tiny_tokenizer(tmp_path)
    return tiny_model(tokenizer, answers(*said, tokenizer=tokenizer), context=4096)


def conversation_that_says(tmp_path: Path, tools: list[Any], *said: str) -> Conversation:
    return Conversation(model_that_says(tmp_path, *said), options={"tools": tools})


def results(conversation: Conversation) -> list[str]:
    return [message["content"] for message in conversation.messages if message["role"] == "tool"]


def test_calls_are_run_and_their_results_told(tmp_path: Path, tools: Tools) -> None:
    conversation = conversation_that_says(tmp_path, tools.both, "the\nadd(a=2, b=3)", "add(a=5, b=1)", "done")
    answer = conversation.run("x")
    assert (answer.text, answer.finish_reason) == ("done", "stop")
    assert tools.ran == [("add", 2, 3), ("add", 5, 1)]
    assert [message["role"] for message in conversation.messages] == [
        *("user", "assistant", "tool", "assistant", "tool", "assistant")
    ]
    assert conversation.messages[1] == {
        "role": "assistant",
        "content": "the",
        "tool_calls": [ToolCall("call_0", "add", {"a": 2, "b": 3}).to_dict()],
    }
    assert conversation.messages[2] == {
        "role": "tool",
        "tool_call_id": "call_0",
        "name": "add",
        "content": "5",
    }
    assert conversation.messages[4]["tool_call_id"] == "call_1"
    prompt = conversation.model.prompt(conversation.messages).text
    assert "```tool_outputs\n5\n```" in prompt and prompt.count("<start_of_turn>user") == 3


def test_errors_are_told_to_the_model(tmp_path: Path, tools: Tools) -> None:
    said = ("fail()", "[add(a=2), fly()]", '{"name": "fly", "parameters": {}}', "done")
    conversation = conversation_that_says(tmp_path, tools.both, *said)
    assert conversation.run("x").text == "[add(a=2), fly()]"  # no tool of that name: a text
    conversation = conversation_that_says(tmp_path, tools.both, "fail()", "add(a=2)", *said[2:])
    assert conversation.run("x").text == "done"
    assert results(conversation) == [
        '{"error": "ValueError: no\\\\nway"}',
        '{"error": "b: missing"}',
        '{"error": "there is no tool \'fly\'; the tools are add, fail"}',
    ]
    assert tools.ran == [("fail",), ("fail",)]


def test_only_approved_calls_are_run(tmp_path: Path, tools: Tools) -> None:
    conversation = conversation_that_says(tmp_path, tools.both, "[add(a=1, b=1), add(a=2, b=2)]", "done")
    conversation.run("x", approve=lambda call: call.arguments["a"] == 2)
    assert tools.ran == [("add", 2, 2)]
    assert results(conversation) == ['{"error": "the user does not allow this call"}', "4"]


def test_the_limit_of_steps_leaves_a_conversation_that_goes_on(tmp_path: Path, tools: Tools) -> None:
    conversation = conversation_that_says(tmp_path, tools.both, *["add(a=1, b=1)"] * 3, "done")
    answer = conversation.run("x", max_steps=3)
    assert answer.finish_reason == "tool_calls" and len(tools.ran) == 2
    assert conversation.messages[-1] == {"role": "assistant", "content": ""}
    assert conversation.run("y").text == "done"
    with pytest.raises(UsageError, match="max_steps must be 1 or more"):
        conversation.run("y", max_steps=0)


def test_a_call_of_a_described_tool_is_left_to_the_caller(tmp_path: Path) -> None:
    described = {"name": "now", "parameters": {}}
    conversation = conversation_that_says(tmp_path, [described], "now()", "done")
    answer = conversation.run("x")
    assert [call.name for call in answer.tool_calls] == ["now"] and results(conversation) == []
    with pytest.raises(UsageError, match=r"messages\[2\] comes before the result of call 'call_0'"):
        conversation.run("y")
    assert len(conversation.messages) == 2
    turn = conversation.turns[-1]
    turn.messages.append({"role": "tool", "content": "12:00"})
    assert "".join(conversation.go_on(turn)) == "done"


def test_an_error_loses_nothing_of_the_conversation(tmp_path: Path, tools: Tools) -> None:
    conversation = conversation_that_says(tmp_path, tools.both, "the end", "add(a=1, b=1)")
    conversation.run("x")
    before = [dict(message) for message in conversation.messages]

    def interrupted(call: ToolCall) -> bool:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        conversation.run("y", approve=interrupted)
    assert conversation.messages == before


def test_results_are_text_and_bounded() -> None:
    call = ToolCall("call_0", "f")
    assert run_call(call, lambda: {"é": [1, None]}) == '{"é": [1, null]}'
    assert run_call(call, lambda: {1}) == "{1}"
    long = run_call(call, lambda: "x" * (MAX_RESULT_CHARACTERS + 5))
    assert long.endswith("x... (5 characters left out)")


# The command line. --------------------------------------------------------------------------------

MODULE = '''
from os import getcwd

def add(a: int, b: int) -> int:
    """Adds."""
    return a + b

def _hidden(a):
    pass

class Thing:
    pass
'''
SCHEMAS = [{"name": "now", "description": "Tells the time."}]


@pytest.fixture
def module(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(MODULE)
    return path


def test_tools_of_files(module: Path, tmp_path: Path) -> None:
    assert [tool.name for tool in tools_from(module)] == ["add"]
    module.write_text(f"{MODULE}\nTOOLS = [add, {{'name': 'now'}}]\n")
    assert [tool.name for tool in tools_from(module)] == ["add", "now"]
    for written in (SCHEMAS, {"tools": SCHEMAS}, SCHEMAS[0]):
        (tmp_path / "tools.json").write_text(json.dumps(written))
        assert [tool.name for tool in tools_from(tmp_path / "tools.json")] == ["now"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("tools.txt", "", "expected a .json file of schemas or a .py file"),
        ("tools.json", "[", "expected JSON"),
        ("tools.json", "[" * 10_000, "nested too deep"),
        ("tools.json", "[]", "it has no tools"),
        ("tools.json", "[3]", r"tools\[0\] must be"),
        ("tools.py", "1 / 0", "ZeroDivisionError: division by zero"),
        ("tools.py", "def (", "SyntaxError"),
        ("tools.py", "x = 3", "it has no tools"),
        ("tools.py", "def f(x): pass", "tool f: parameter 'x' has no type hint"),
        ("absent.py", None, "no such file"),
        ("absent.json", None, "no such file"),
    ],
)
def test_unusable_files_of_tools(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises((UsageError, FileError), match=message):
        tools_from(tmp_path / name)


def run_on(monkeypatch: pytest.MonkeyPatch, model: Model, *arguments: object) -> int:
    monkeypatch.setattr(Model, "load", lambda path, **options: model)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    return cli.main([str(argument) for argument in arguments])


def test_run_prints_calls_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tools.json").write_text(json.dumps(SCHEMAS))
    model = model_that_says(tmp_path, "the\nnow()")
    assert run_on(monkeypatch, model, "run", "-m", "out/", "x", "--tools", tmp_path / "tools.json") == 0
    text, call = capsys.readouterr().out.splitlines()
    assert text == "the" and json.loads(call) == ToolCall("call_0", "now").to_dict()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (("--choices", "yes, no"), {"yes", "no"}),
        (("--regex", "[ab]{2}"), {"aa", "ab", "ba", "bb"}),
        (("--grammar", "g.lark"), {"the", "end"}),
        (("--json-schema", "s.json"), {"1", "2"}),
    ],
)
def test_run_holds_answers_to_a_form(
    options: tuple[str, str],
    expected: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("llguidance")
    monkeypatch.chdir(tmp_path)
    Path("g.lark").write_text('start: "the" | "end"')
    Path("s.json").write_text('{"enum": [1, 2]}')
    assert run_on(monkeypatch, model_that_says(tmp_path, "free"), "run", "-m", "out/", "x", *options) == 0
    assert capsys.readouterr().out.strip() in expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--tool-choice", "auto"), "need --tools"),
        (("--json-schema", "absent.json"), "no such file"),
        (("--choices", "a,,b"), "none of them empty"),
        (("--regex", "("), "cannot be compiled"),
        (("--regex", "a", "--choices", "a"), "choose one"),
    ],
)
def test_unusable_options_of_forms(
    options: tuple[str, ...], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GEMMA_EDGE_TRACEBACK", "1")
    with pytest.raises(GemmaEdgeError, match=message):
        run_on(monkeypatch, model_that_says(tmp_path, "free"), "run", "-m", "out/", "x", *options)


@pytest.mark.parametrize(("typed", "told"), [("y\n", "5"), ("n\n", "does not allow"), ("", "does not allow")])
def test_chat_asks_before_it_runs_a_tool(
    typed: str,
    told: str,
    module: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = model_that_says(tmp_path, "add(a=2, b=3)", "the end")
    conversation = Conversation(model, options={"tools": tools_from(module)})
    monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    lines = iter(["x", None])
    chat_repl.chat(conversation, lambda: next(lines), interactive=True, approve=chat_repl.approved)
    assert told in results(conversation)[0]
    printed = capsys.readouterr()
    assert "Run add(a=2, b=3)? [y/N]" in printed.err and "the end" in printed.out


@pytest.mark.parametrize(("options", "ran"), [((), False), (("--yes",), True)])
def test_chat_from_a_pipe_runs_a_tool_only_if_told(
    options: tuple[str, ...],
    ran: bool,
    module: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module.write_text(f"{MODULE}\nadd.__code__ = (lambda a, b: print('ran') or a + b).__code__\n")
    model = model_that_says(tmp_path, "add(a=2, b=3)", "the end")
    monkeypatch.setattr(Model, "load", lambda path, **options: model)
    monkeypatch.setattr(sys, "stdin", io.StringIO("x\n"))
    assert cli.main(["chat", "-m", "out/", "--tools", str(module), *options]) == 0
    printed = capsys.readouterr().out
    assert ("ran" in printed) == ran and "the end" in printed
