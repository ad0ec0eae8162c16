"""`gemma-edge chat --device`: turns are typed here, and answered there by a `chat` that waits for them.

The two ends talk in lines: a turn goes there as JSON, and a line of `--turn-end`'s word says that the answer
is over, with the tokens that the context has used and holds.
"""

from __future__ import annotations

import argparse
import codecs
import json
import secrets
import threading
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

from gemma_edge.cli.chat_commands import forgiving, parse_command
from gemma_edge.cli.ctrl_c import ctrl_c_calls
from gemma_edge.cli.device_answers import Place, local_bundle, options_of, place
from gemma_edge.devices.live_run import LiveRun
from gemma_edge.runtime.console import for_stdout, tell
from gemma_edge.runtime.errors import DeviceError, UsageError
from gemma_edge.runtime.media.attachments import kind_of

SESSION = "session"  # its name there


def chat_there(
    args: argparse.Namespace,
    configure: Callable[[argparse.ArgumentParser], None],
    read: Callable[[], str | None],
    used: list[int],
    *,
    interactive: bool,
) -> int:
    """Chats with a model on `args.device`; returns the exit code.

    Args:
        read: the next turn, or None at the end.
        used: tokens that the conversation takes, and those that the context holds; kept current.
        interactive: go on after an error and after Ctrl-C at the prompt.

    Raises:
        UsageError, DeviceError, BundleError: as `place`.
    """
    if args.tools:
        raise UsageError(
            "chat --tools runs functions where the model is: log in there, and leave --device out"
        )
    bundle, words = local_bundle(args)
    if words:
        raise UsageError(f"unexpected argument {words[0]!r}")
    session, args.session = args.session, None
    with place(args, bundle) as there:
        options = options_of(args, configure, there.folder)
        if session:
            options.append(f"--session={SESSION}")
            if Path(session).exists():
                there.folder.send(session, SESSION)
        if interactive:
            options.append("--forgiving")
            tell("Type /help for the commands, Ctrl-D to end.")
        mark, fifo = f"\x1e{secrets.token_hex(16)}", there.folder.fifo()
        argv = ["chat", f"--turn-end={mark}", *options, "--", there.bundle]
        try:
            with there.live(argv, fifo, "gemma-edge chat") as live, live.feed(fifo) as turns:
                answers = Answers(live, mark, used)
                while answers.over():
                    line = _next_turn(there, answers, read, interactive)
                    if line is None:
                        break
                    turns.write(f"{json.dumps(line)}\n".encode())
                    turns.flush()
                turns.close()
                answers.rest()
        finally:
            if session:
                there.folder.fetch(SESSION, Path(session))
        return live.exit_code or 0


class Answers:
    """What comes from there: text for stdout, and the marks between."""

    def __init__(self, live: LiveRun, mark: str, used: list[int]) -> None:
        self.live, self._mark, self._used = live, mark, used
        self._pieces, self._decoder = live.pieces(), codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self.wanted: tuple[str, Path] | None = None  # a file there, and where it goes here
        self._ready = False

    def over(self) -> bool:
        """Prints an answer until its mark; False at the end of all. Ctrl-C ends the answer there; before the
        program there is ready, Ctrl-C ends everything.
        """
        with ctrl_c_calls(self._cancel) if self._ready else nullcontext():
            for piece in self._pieces:
                self._held += self._decoder.decode(piece)
                before, found, after = self._held.partition(self._mark)
                if found and "\n" in after:
                    self._print(before)
                    line, _, self._held = after.partition("\n")
                    self._used[:] = map(int, line.split())
                    self._ready = True
                    return True
                if not found:
                    # What may become a mark waits.
                    cut = before.rfind("\x1e")
                    self._print(before if cut < 0 else before[:cut])
                    self._held = "" if cut < 0 else before[cut:]
        self._print(self._held)
        return False

    def rest(self) -> None:
        """Prints what comes until the program ends."""
        while self.over():
            pass

    def _cancel(self) -> None:
        threading.Thread(target=self.live.signal, args=("INT",), daemon=True).start()

    def _print(self, text: str) -> None:
        print(for_stdout(text), end="", flush=True)


def _next_turn(
    there: Place, answers: Answers, read: Callable[[], str | None], interactive: bool
) -> str | None:
    """The next line for there: files that a command names are sent before it, or fetched when it is done."""
    if answers.wanted is not None:
        name, target = answers.wanted
        answers.wanted = None
        with forgiving(interactive, (DeviceError, OSError)):
            there.folder.fetch(name, target)
            tell("Saved.")
    while True:
        with forgiving(interactive):
            if (turn := read()) is None:
                return None
            command = parse_command(turn.strip())
            if command == ("/quit", ""):
                return None
            if command and command[0] == "/attach" and command[1]:
                kind_of(command[1])
                return f"/attach {there.folder.send(command[1])}"
            if command and command[0] == "/save" and command[1]:
                answers.wanted = ("saved", Path(command[1]))
                return "/save saved"
            return turn
