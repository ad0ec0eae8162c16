"""Lines for people: text that is safe on a terminal, and messages beside the answers on stdout."""

from __future__ import annotations

import shutil
import sys
import unicodedata


def tell(text: str) -> None:
    """Prints a line on stderr."""
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
