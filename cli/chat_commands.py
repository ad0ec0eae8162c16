"""The commands of `gemma-edge chat`: lines that begin with a slash; and what one that fails does."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from gemma_edge.runtime.console import tell
from gemma_edge.runtime.errors import FileError, UsageError

HELP = """\
/attach FILE  attach an image, a recording or a video to the next turn
/save FILE    keep the conversation in a file, for --session
/reset        forget the conversation (also /clear)
/context      show how much of the context is used
/help         show this list (also /?)
/quit         end (also /exit, /bye and Ctrl-D)
Ctrl-C        end the current answer
\"\"\"           begin and end a turn of several lines
Tab           complete a command or a path"""
COMMANDS = ("/attach ", "/save ", "/reset", "/context", "/help", "/quit")
TURN_ERRORS = (UsageError, FileError, OSError)  # it does not fit, a file is not there
_ALIASES = {"/clear": "/reset", "/?": "/help", "/exit": "/quit", "/bye": "/quit"}
_COMMAND = re.compile(r"/[a-z?]*|/(attach|save)\s.*", re.IGNORECASE)


def parse_command(text: str) -> tuple[str, str] | None:
    """A stripped turn as a command and its file, "" for none; None for a turn that is a question."""
    if not _COMMAND.fullmatch(text):
        return None
    verb, _, file = text.partition(" ")
    path = os.path.expanduser(file.strip().strip("'\""))  # a terminal quotes a file that is dropped on it
    return _ALIASES.get(verb.lower(), verb.lower()), path


def share(tokens: int, context: int) -> str:
    """What the terminal shows before a turn: the share of the context that is used."""
    return f"{tokens / context:.0%} > "


@contextmanager
def forgiving(interactive: bool, errors: tuple[type[Exception], ...] = TURN_ERRORS) -> Iterator[None]:
    """At a terminal, says what went wrong with a turn and lets the chat go on; elsewhere, errors pass."""
    try:
        yield
    except errors as error:
        if not interactive:
            raise
        tell(f"error: {error}", always=True)
    except KeyboardInterrupt:
        if not interactive:
            raise
        tell("\nType /quit or Ctrl-D to end.")
