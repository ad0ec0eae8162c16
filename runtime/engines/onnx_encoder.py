"""Encoders of images and audio on ONNX Runtime; see `EncoderGraph`."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import onnxruntime as ort
from numpy.typing import NDArray

from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.engines.cores import release_free_memory
from gemma_edge.runtime.engines.encoder_graph import SIGNATURES
from gemma_edge.runtime.engines.integer_activations import NARROW_ACTIVATIONS
from gemma_edge.runtime.engines.onnx_session import open_session, session_options
from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.host.cpu_fingerprint import adds_in_16_bits

F32 = "tensor(float)"  # ONNX Runtime's name of the type


@cache
def narrow_activations() -> dict[str, ort.OrtValue]:
    """What replaces constants of the graph where the CPU needs it, kept for as long as the process lives."""
    chosen = NARROW_ACTIVATIONS if adds_in_16_bits() else {}
    return {name: ort.OrtValue.ortvalue_from_numpy(value) for name, value in chosen.items()}


class OnnxEncoder:
    """A graph with one output.

    Args:
        kind: the graph must have the signature of this kind.
        path: the graph; its weights lie beside it.
        threads: of the engine; a thread a physical core if None.

    Raises:
        BundleError: there is no such file, or it is not a graph of that signature.
    """

    def __init__(self, kind: Kind, path: Path, *, threads: int | None = None) -> None:
        options = session_options(threads)
        for name, value in narrow_activations().items():
            options.add_initializer(name, value)
        try:
            self._session: ort.InferenceSession | None = open_session(path, options)
        except Exception as error:  # onnxruntime raises many types of its own
            raise BundleError(path, "graph", "an encoder that ONNX Runtime loads", str(error)) from None
        values = [*self._session.get_inputs(), *self._session.get_outputs()]
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.shapes = {v.name: tuple(n if isinstance(n, int) else None for n in v.shape) for v in values}
        found = {v.name: (v.type, len(v.shape)) for v in values}
        signature = {name: (F32, dimensions) for name, dimensions in SIGNATURES[kind].items()}
        for name in sorted({*signature, *found}):
            if signature.get(name) != found.get(name):
                raise BundleError(path, name, signature.get(name, "nothing"), found.get(name, "nothing"))
        release_free_memory()  # packing weights leaves holes

    def run(self, **inputs: NDArray[Any]) -> NDArray[Any]:
        if self._session is None:
            raise ValueError("the encoder is closed")
        (output,) = self._session.run(None, inputs)
        release_free_memory()
        return output

    def close(self) -> None:
        self._session = None
        release_free_memory()
