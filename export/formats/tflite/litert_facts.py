"""Facts about LiteRT that its formats share."""

from __future__ import annotations

from collections.abc import Sequence

# Measured with LiteRT 2.3, beside the cache and the activations: a graph of each signature, and its kernels.
LITERT_BASE_BYTES = 110 << 20
# Prefill signatures below the largest: the rest of a prompt is cut into them.
SIZE_STEP, SMALLEST_PREFILL = 4, 16
# Tokens of the signatures that verify drafts. Each takes the engine time to set up. On a CPU with AMX, 4 rows
# cost as much as 8 (2.5 and 2.6 decode steps, int4_g32, 10 layers of E2B's shapes): one signature is enough.
VERIFY_ROWS = (8,)


def prefill_sizes(chunk: int) -> Sequence[int]:
    """Tokens of the prefill signatures: `chunk` and its fourths, down to 16."""
    sizes = [chunk]
    while sizes[-1] // SIZE_STEP >= SMALLEST_PREFILL:
        sizes.append(sizes[-1] // SIZE_STEP)
    return sizes


def verify_sizes(context: int) -> Sequence[int]:
    """Tokens of the signatures that verify drafts: those that the context has room for."""
    return [rows for rows in VERIFY_ROWS if rows < context]
