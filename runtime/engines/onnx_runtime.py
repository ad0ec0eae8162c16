"""ONNX Runtime as an `Engine`."""

from __future__ import annotations

from pathlib import Path

from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.engines.decoder import Decoder
from gemma_edge.runtime.engines.encoder_graph import EncoderGraph
from gemma_edge.runtime.errors import DeviceError
from gemma_edge.runtime.files.cache_folder import CACHE_VARIABLE, cache_folder


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

    def pack_weights(self, bundle: Bundle) -> None:
        from gemma_edge.runtime.engines.packed_graph import pack_graph

        try:
            pack_graph(bundle)
        except OSError as error:
            reason = f"{cache_folder()}: {error.strerror}"
            raise DeviceError(f"{reason}. Set {CACHE_VARIABLE} to a folder with more room") from None

    def load_encoder(self, kind: Kind, path: Path, *, threads: int | None, digest: str) -> EncoderGraph:
        from gemma_edge.runtime.engines.onnx_encoder import OnnxEncoder

        return OnnxEncoder(kind, path, threads=threads)
