"""ONNX Runtime as an `Engine`."""

from __future__ import annotations

from pathlib import Path

from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.engines.decoder import Decoder
from gemma_edge.runtime.engines.encoder_graph import EncoderGraph


class OnnxEngine:
    """See `Engine`."""

    name = "ONNX Runtime"
    distribution = module = "onnxruntime"
    graph_suffix = ".onnx"
    packs_weights = False
    any_chunk = True

    @property
    def version(self) -> str:
        import onnxruntime

        return str(onnxruntime.__version__)

    def largest_context(self, bundle: Bundle) -> int:
        return bundle.config.max_position_embeddings

    def load_decoder(self, bundle: Bundle, *, threads: int | None, context: int | None) -> Decoder:
        from gemma_edge.runtime.engines.onnx_decoder import OnnxDecoder

        return OnnxDecoder(bundle, threads=threads, context=context)

    def load_encoder(self, kind: Kind, path: Path, *, threads: int | None, digest: str) -> EncoderGraph:
        from gemma_edge.runtime.engines.onnx_encoder import OnnxEncoder

        return OnnxEncoder(kind, path, threads=threads)
