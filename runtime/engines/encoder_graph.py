"""`EncoderGraph`: the protocol of a loaded encoder of images or audio: one graph, one call."""

from __future__ import annotations

from typing import Any, Protocol

from numpy.typing import NDArray

from gemma_edge.runtime.artifacts.modalities import Kind

# Inputs and output of each kind by name, with their number of dimensions; all are float32.
SIGNATURES: dict[Kind, dict[str, int]] = {
    "vision": {"pixels": 4, "soft_tokens": 3},
    "audio": {"log_mel": 3, "valid": 3, "soft_tokens": 3},
}


class EncoderGraph(Protocol):
    """A loaded encoder on any engine.

    Attributes:
        shapes: of the inputs and the output by name; None for a dimension that varies.
        metadata: what the graph says of itself.
    """

    shapes: dict[str, tuple[int | None, ...]]
    metadata: dict[str, str]

    def run(self, **inputs: NDArray[Any]) -> NDArray[Any]:
        """The output for these inputs, by name; all with their batch axis of 1.

        Raises:
            ValueError: `close` was called.
        """

    def close(self) -> None:
        """Gives the memory of the weights back. Harmless when repeated."""
