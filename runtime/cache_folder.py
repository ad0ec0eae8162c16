"""Where the runtime keeps what it can make again: packed weights, and models taken out of a .litertlm."""

from __future__ import annotations

import os
from pathlib import Path

CACHE_VARIABLE = "GEMMA_EDGE_CACHE"


def cache_folder() -> Path:
    """$GEMMA_EDGE_CACHE, by default gemma-edge below $XDG_CACHE_HOME or ~/.cache. It need not exist yet."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get(CACHE_VARIABLE) or os.path.join(home, "gemma-edge"))
