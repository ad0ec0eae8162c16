"""Where the runtime keeps files that it can make again, and how large they may become."""

from __future__ import annotations

import os
from pathlib import Path

from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.files.whole_file import write_whole
from gemma_edge.runtime.units import parse_size

CACHE_VARIABLE = "GEMMA_EDGE_CACHE"
LIMIT_VARIABLE = "GEMMA_EDGE_CACHE_LIMIT"
DEFAULT_LIMIT = 8 << 30  # bytes: packed weights and parts of E2B and of E4B as .litertlm
_LIMIT = ".limit"


def cache_folder() -> Path:
    """$GEMMA_EDGE_CACHE, by default gemma-edge below $XDG_CACHE_HOME or ~/.cache. It need not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get(CACHE_VARIABLE) or os.path.join(home, "gemma-edge"))


def cache_limit() -> int:
    """Bytes that kept files may take: $GEMMA_EDGE_CACHE_LIMIT, else what `set_cache_limit` wrote, else 8 GiB.

    Raises:
        UsageError: the variable is no size.
    """
    try:
        text = os.environ.get(LIMIT_VARIABLE) or (cache_folder() / _LIMIT).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return DEFAULT_LIMIT
    try:
        return parse_size(text)
    except UsageError as error:
        raise UsageError(
            f"the cache limit (${LIMIT_VARIABLE} or `gemma-edge cache --limit`): {error}"
        ) from None


def set_cache_limit(size: int) -> None:
    """Writes the limit, in bytes, into the cache folder. It holds from the next file that is kept."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / _LIMIT, f"{size}\n")
