"""Lines for people: text that is safe on a terminal, and messages beside the answers on stdout."""

from __future__ import annotations

import shutil
import sys
import unicodedata
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging

LOGGER = "gemma_edge"
_quiet = False
_handler: logging.Handler | None = None  # of -v


def set_volume(*, quiet: bool = False, verbose: bool = False) -> None:
    """Whether `tell` and progress are silent, and whether what is logged goes to stderr."""
    global _quiet, _handler
    _quiet = quiet
    if not (verbose or _handler):
        return
    import logging

    log = logging.getLogger(LOGGER)
    if _handler:
        log.removeHandler(_handler)
        log.setLevel(logging.NOTSET)
    _handler = None
    if verbose:
        _handler = logging.StreamHandler()
        _handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(_handler)
        log.setLevel(logging.INFO)


def is_quiet() -> bool:
    """Are only answers and errors wanted?"""
    return _quiet


def tell(text: str, *, always: bool = False) -> None:
    """Prints a line on stderr, unless only answers and errors are wanted; with `always`, then too."""
    if always or not _quiet:
        print(text, file=sys.stderr, flush=True)


class ProgressLine:
    """One line on stderr that is written over; silent where stderr is no terminal."""

    def __init__(self) -> None:
        self._show = sys.stderr.isatty()

    def show(self, text: str) -> None:
        """Shows `text` in the place of what was there, cut to the terminal's width."""
        if self._show:
            width = shutil.get_terminal_size().columns
            print(f"\r\x1b[K{without_controls(text)[: width - 1]}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Takes the line away, for others to print."""
        self.show("")


def without_controls(text: str) -> str:
    """`text` without control characters (Unicode's Cc) other than newline and tab."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def for_stdout(text: str) -> str:
    """A model's text as stdout may have it: without control characters at a terminal, whole in a pipe."""
    return without_controls(text) if sys.stdout.isatty() else text
