"""Facts about LiteRT that its formats share."""

from __future__ import annotations

from collections.abc import Sequence

# Measured with LiteRT 2.3, beside the cache and the activations: a graph of each signature, and its kernels.
LITERT_BASE_BYTES = 110 << 20
# Prefill signatures below the largest: the rest of a prompt is cut into them.
SIZE_STEP, SMALLEST_PREFILL = 4, 16


def prefill_sizes(chunk: int) -> Sequence[int]:
    """Tokens of the prefill signatures: `chunk` and its fourths, down to 16."""
    sizes = [chunk]
    while sizes[-1] // SIZE_STEP >= SMALLEST_PREFILL:
        sizes.append(sizes[-1] // SIZE_STEP)
    return sizes
