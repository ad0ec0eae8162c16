"""The engines: one line each, and the way from a bundle or a file to its engine."""

from __future__ import annotations

from pathlib import Path

from gemma_edge.runtime.artifacts.artifact_formats import ARTIFACT_FORMATS
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.engines.decoder import Decoder
from gemma_edge.runtime.engines.engine import Engine
from gemma_edge.runtime.engines.litert_runtime import LitertEngine
from gemma_edge.runtime.engines.onnx_runtime import OnnxEngine
from gemma_edge.runtime.errors import BundleError

# By the names that `ArtifactFormat.engine` has.
ENGINES: dict[str, Engine] = {
    "onnxruntime": OnnxEngine(),
    "litert": LitertEngine(),
}


def engine_of(format: str) -> Engine:
    """The engine that runs bundles of a format, such as "tflite"."""
    return ENGINES[ARTIFACT_FORMATS[format].engine]


def engine_for_graph(path: Path) -> Engine:
    """The engine that runs the graph in a file, by the file's suffix.

    Raises:
        BundleError: no engine does.
    """
    for engine in ENGINES.values():
        if path.suffix == engine.graph_suffix:
            return engine
    suffixes = " or ".join(engine.graph_suffix for engine in ENGINES.values())
    raise BundleError(path, "suffix", suffixes, path.suffix)


def load_decoder(bundle: Bundle, *, threads: int | None = None, context: int | None = None) -> Decoder:
    """The decoder of a bundle, loaded on the engine of its format.

    Args:
        threads: worker threads; None for one a physical core.
        context: tokens of KV cache; None for the context that the bundle was planned for.

    Raises:
        BundleError: the decoder is damaged, or of another model.
        UsageError: `context` is larger than `Engine.largest_context`.
    """
    return engine_of(bundle.format).load_decoder(bundle, threads=threads, context=context)
