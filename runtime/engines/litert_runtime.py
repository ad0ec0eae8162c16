"""LiteRT as an `Engine`."""

from __future__ import annotations

from pathlib import Path

from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.engines.decoder import Decoder
from gemma_edge.runtime.engines.encoder_graph import EncoderGraph
from gemma_edge.runtime.engines.litert_version import litert_version


class LitertEngine:
    """See `Engine`."""

    name = "LiteRT"
    distribution = "ai-edge-litert"
    module = "ai_edge_litert.compiled_model"
    graph_suffix = ".tflite"
    packs_weights = True
    any_chunk = False  # signatures have fixed shapes

    @property
    def version(self) -> str:
        return litert_version()

    def largest_context(self, bundle: Bundle) -> int:
        return bundle.context  # in the shapes of the graph

    def load_decoder(self, bundle: Bundle, *, threads: int | None, context: int | None) -> Decoder:
        from gemma_edge.runtime.engines.litert_decoder import LitertDecoder

        return LitertDecoder(bundle, threads=threads, context=context)

    def pack_weights(self, bundle: Bundle) -> None:
        self.load_decoder(bundle, threads=None, context=None)  # warns where it cannot write

    def load_encoder(self, kind: Kind, path: Path, *, threads: int | None, digest: str) -> EncoderGraph:
        from gemma_edge.runtime.engines.litert_encoder import ENCODERS

        return ENCODERS[kind](path, threads, digest)
