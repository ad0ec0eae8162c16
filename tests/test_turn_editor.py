"""Chat at a real terminal: turns of several lines, commands, completion, history, how full the context is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.cli.chat import COMMANDS
from gemma_edge.cli.turn_editor import completions, read_turn
from support.terminal import Terminal

pytest.importorskip("readline")
# `gemma-edge chat` with a decoder that follows a rule in the place of a bundle.
CHAT = """
import sys
from pathlib import Path
from support.rule_decoder import answers, tiny_model
from support.tiny_tokenizer import tiny_tokenizer
from gemma_edge.cli.main import main
from gemma_edge.runtime.model import Model
tokenizer = tiny_tokenizer(Path.cwd())
made = tiny_model(tokenizer, answers(*["the first", "the second", "the third"], tokenizer=tokenizer))
Model.load = lambda path, **options: made
sys.exit(main(["chat", "b", *sys.argv[1:]]))
"""
PROMPT = r"\d+% > "


def chat(folder: Path, *options: str) -> Terminal:
    tests = Path(__file__).parent
    variables = {"PYTHONPATH": f"{tests}:{tests.parent / 'src'}", "HOME": str(folder), "XDG_STATE_HOME": ""}
    return Terminal([sys.executable, "-c", CHAT, *options], folder, variables)


def turns(terminal: Terminal, folder: Path) -> list[Any]:
    """What the user has said, as the conversation keeps it."""
    terminal.type("/save saved.json\r")
    terminal.read_to("Saved")
    said: list[Any] = []

    def collect(value: Any) -> None:
        if isinstance(value, dict) and value.get("role") == "user":
            said.append(value["content"])
        for each in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
            collect(each)

    data = (folder / "saved.json").read_bytes()
    collect(json.JSONDecoder().raw_decode(data[data.index(b"{") :].decode("utf-8", "replace"))[0])
    return said


def test_what_is_pasted_is_one_turn(tmp_path: Path) -> None:
    with chat(tmp_path) as terminal:
        terminal.read_to(PROMPT)
        terminal.type("\x1b[200~one\ntwo\n\nthree\x1b[201~")
        terminal.type("\r")
        terminal.read_to("the first")
        terminal.read_to(PROMPT)
        assert turns(terminal, tmp_path) == ["one\ntwo\n\nthree"]


def test_three_quotes_begin_and_end_a_turn(tmp_path: Path) -> None:
    with chat(tmp_path) as terminal:
        terminal.read_to(PROMPT)
        terminal.type('"""one\r')
        terminal.read_to(r"\.\.\. ")
        terminal.type("/help is no command here\r")
        terminal.read_to(r"\.\.\. ")
        terminal.type('three"""\r')
        terminal.read_to("the first")
        terminal.read_to(PROMPT)
        assert turns(terminal, tmp_path) == ["one\n/help is no command here\nthree"]


@pytest.mark.parametrize("word", ["/?", "/HELP", "/help", "/Help"])
def test_help_in_every_spelling(tmp_path: Path, word: str) -> None:
    with chat(tmp_path) as terminal:
        terminal.read_to(PROMPT)
        terminal.type(f"{word}\r")
        terminal.read_to("attach an image")


@pytest.mark.parametrize("word", ["/exit", "/bye", "/quit", "/QUIT", "\x04"])
def test_the_end_in_every_spelling(tmp_path: Path, word: str) -> None:
    with chat(tmp_path) as terminal:
        terminal.read_to(PROMPT)
        terminal.type(f"{word}\r" if word.startswith("/") else word)
        assert terminal.ended() == 0


def test_the_prompt_shows_how_full_the_context_is_and_clear_empties_it(tmp_path: Path) -> None:
    with chat(tmp_path) as terminal:
        assert "0% > " in terminal.read_to(PROMPT)
        terminal.type("hi\r")
        terminal.read_to("the first")
        assert "0% > " not in terminal.read_to(r"[1-9]\d*% > ")
        terminal.type("/context\r")
        terminal.read_to(r"[1-9]\d* of 512 tokens")
        terminal.type("/clear\r")
        terminal.read_to("Conversation forgotten")
        terminal.read_to(r"\b0% > ")


def test_an_answer_that_the_limit_cuts_says_so(tmp_path: Path) -> None:
    with chat(tmp_path, "--max-tokens", "1") as terminal:
        terminal.read_to(PROMPT)
        terminal.type("hi\r")
        terminal.read_to(r"\[cut off after 1 tokens: --max-tokens\]")


def test_tab_completes_commands_and_paths(tmp_path: Path) -> None:
    (tmp_path / "my photo.txt").write_text("no picture")
    with chat(tmp_path) as terminal:
        terminal.read_to(PROMPT)
        terminal.type("/att\t")
        terminal.read_to("/attach ")
        terminal.type("~/my\t\r")
        # The path is whole, with its space, and its "~" is the home folder.
        terminal.read_to(rf"error: {tmp_path}/my photo\.txt: file: expected an image")


def test_history_lasts(tmp_path: Path) -> None:
    with chat(tmp_path) as terminal:
        terminal.read_to(PROMPT)
        terminal.type("\x1b[200~one\ntwo\x1b[201~")
        terminal.type("\r")
        terminal.read_to("the first")
        terminal.read_to(PROMPT)
        terminal.type("\x04")
        terminal.ended()
    history = tmp_path / ".local" / "state" / "gemma-edge" / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600
    with history.open("a") as file:
        file.write('{"damaged"\n')
    with chat(tmp_path) as terminal:
        terminal.read_to(PROMPT)
        terminal.type("\x1b[A\r")  # the key that goes up
        terminal.read_to("the first")
        terminal.read_to(PROMPT)
        assert turns(terminal, tmp_path) == ["one\ntwo"]


# Without a terminal. ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "turn"),
    [
        (["one\n", "two\n"], "one\n"),
        (['"""one"""\n'], "one"),
        (['"""\n', "one\n", "\n", "two\n", '"""\n'], "one\n\ntwo"),
        (['  """one\n', "two"], "one\ntwo"),  # the end of the input ends it
        ([], None),
    ],
)
def test_turns_are_read_from_lines(lines: list[str], turn: str | None) -> None:
    left = iter(lines)
    assert read_turn(lambda: next(left, None)) == turn


def test_completions(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    (tmp_path / "a folder").mkdir()
    assert completions("/a", COMMANDS) == ["/attach "]
    assert completions("/", COMMANDS) == list(COMMANDS)
    assert completions("/RES", COMMANDS) == ["/reset"]
    assert completions("what", COMMANDS) == []
    paths = [f"/attach {tmp_path}/a folder/", f"/attach {tmp_path}/a.png"]
    assert completions(f"/attach {tmp_path}/a", COMMANDS) == paths
