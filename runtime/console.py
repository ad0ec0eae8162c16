"""Lines for people: text that is safe on a terminal, and messages beside the answers on stdout."""

from __future__ import annotations

import sys
import unicodedata


def tell(text: str) -> None:
    """Prints a line on stderr."""
    print(text, file=sys.stderr, flush=True)


def without_controls(text: str) -> str:
    """`text` without control characters (Unicode's Cc) other than newline and tab."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


def for_stdout(text: str) -> str:
    """A model's text as stdout may have it: without control characters at a terminal, whole in a pipe."""
    return without_controls(text) if sys.stdout.isatty() else text
