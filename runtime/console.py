"""Lines for people, beside the answers on stdout."""

from __future__ import annotations

import sys


def tell(text: str) -> None:
    """Prints a line on stderr."""
    print(text, file=sys.stderr, flush=True)
