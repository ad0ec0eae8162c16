"""Turns as a user types them: several lines as one, editing, completion and a history that lasts.

A turn is a line. What a terminal pastes is one turn, whatever lines it has, and so is what stands between two
\"\"\". Editing needs Python's readline; without it lines are read as they come.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

from gemma_edge.runtime.console import tell

QUOTES = '"""'
HISTORY_VARIABLE = "GEMMA_EDGE_HISTORY"  # another file for it, or "" for none
HISTORY_LINES = 1000
Read = Callable[[], str | None]


def read_turn(read: Read, more: Read | None = None) -> str | None:
    """The next turn; None at the end.

    Args:
        read: the next line, or None.
        more: the same for the lines after the first; default: `read`.
    """
    line = read()
    if line is None or not line.strip().startswith(QUOTES):
        return line
    lines = [line.strip().removeprefix(QUOTES)]
    while not lines[-1].rstrip().endswith(QUOTES):
        if (line := (more or read)()) is None:
            return "\n".join(lines).strip("\n")
        lines.append(line.removesuffix("\n"))
    lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
    return "\n".join(lines).strip("\n")


def history_file() -> Path | None:
    """Where turns are kept from one chat to the next."""
    if (named := os.environ.get(HISTORY_VARIABLE)) is not None:
        return Path(named) if named else None
    home = os.environ.get("XDG_STATE_HOME") or os.path.join(os.path.expanduser("~"), ".local", "state")
    return Path(home, "gemma-edge", "chat_history")


class TurnEditor:
    """Reads turns at a terminal.

    Args:
        commands: those that Tab completes; the ones that end in a space take a path, which it completes too.
        prompt: what is shown before a turn.
    """

    def __init__(self, commands: Sequence[str], prompt: Callable[[], str]) -> None:
        self.commands, self.prompt = commands, prompt
        self._turns: list[str] = []
        self._file = history_file()
        self._readline = _readline() if sys.stdout.isatty() else None
        if self._readline:
            self._prepare(self._readline)

    def read(self) -> str | None:
        """The next turn; None at Ctrl-D."""
        turn = read_turn(lambda: self._line(self.prompt()), lambda: self._line("... "))
        if turn is not None and turn.strip():
            self._remember(turn.strip())
        return turn

    def _prepare(self, readline: ModuleType) -> None:
        readline.set_auto_history(False)  # a turn is one entry, whatever lines it has
        readline.set_completer(self._complete)
        readline.set_completer_delims("")  # a path may have any character in it
        readline.parse_and_bind("bind ^I rl_complete" if _is_editline(readline) else "tab: complete")
        if not _is_editline(readline):
            readline.parse_and_bind("set enable-bracketed-paste on")
        readline.clear_history()
        for turn in _load(self._file):
            readline.add_history(turn)
            self._turns.append(turn)

    def _line(self, prompt: str) -> str | None:
        sys.stdout.flush()
        try:
            if sys.stdout.isatty():
                return input(prompt)
            print(prompt, end="", file=sys.stderr, flush=True)  # stdout is a file, for answers only
            return sys.stdin.readline() or None
        except EOFError:
            tell("")
            return None

    def _remember(self, turn: str) -> None:
        if self._readline and self._turns[-1:] != [turn]:
            self._readline.add_history(turn)
            self._turns.append(turn)
            _save(self._file, self._turns)

    def _complete(self, text: str, state: int) -> str | None:
        found = completions(text, self.commands)
        return found[state] if state < len(found) else None


def completions(text: str, commands: Sequence[str]) -> list[str]:
    """What a beginning of a turn may become: a command, or a command and a path."""
    for command in commands:
        if command.endswith(" ") and text.lower().startswith(command):
            start = text[len(command) :].lstrip()
            paths = glob.glob(glob.escape(os.path.expanduser(start)) + "*")
            return [f"{command}{path}{os.sep * os.path.isdir(path)}" for path in sorted(paths)]
    if not text.startswith("/"):
        return []
    return [command for command in commands if command.startswith(text.lower())]


def _readline() -> ModuleType | None:
    try:
        import readline
    except ImportError:
        return None
    return readline


def _is_editline(readline: ModuleType) -> bool:
    return "libedit" in (readline.__doc__ or "")


def _load(path: Path | None) -> list[str]:
    """Turns, a JSON string a line; a damaged line is left out."""
    turns = []
    with contextlib.suppress(OSError, UnicodeDecodeError):
        for line in path.read_text(encoding="utf-8").splitlines()[-HISTORY_LINES:] if path else ():
            with contextlib.suppress(ValueError):
                if isinstance(turn := json.loads(line), str) and "\0" not in turn:
                    turns.append(turn)
    return turns


def _save(path: Path | None, turns: Sequence[str]) -> None:
    """Replaces the file, which its owner alone may read; where none can be written there is no history."""
    if path is None:
        return
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        partial = path.with_name(f"{path.name}.{os.getpid()}")
        try:
            descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
            with open(descriptor, "w", encoding="utf-8") as file:
                file.writelines(f"{json.dumps(turn)}\n" for turn in turns[-HISTORY_LINES:])
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)
