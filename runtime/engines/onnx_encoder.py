"""An encoder of images or audio: one graph, one call, loaded when a prompt needs it.

`open_encoder` takes a graph of either engine: ONNX Runtime's here, LiteRT's in `litert_encoder.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import onnxruntime as ort
from numpy.typing import NDArray

from gemma_edge.runtime.engines.cores import physical_cores, release_free_memory
from gemma_edge.runtime.errors import BundleError

Signature = dict[str, tuple[str, int]]  # name: (type, dimensions)


class Encoder(Protocol):
    """An encoder of any engine.

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


def open_encoder(
    path: str | Path, signature: Signature, *, threads: int | None = None, digest: str = ""
) -> Encoder:
    """The encoder in a file: a .tflite or .litertlm is LiteRT's, all others ONNX Runtime's.

    Arguments and errors are those of `OnnxEncoder`; `digest` is the SHA-256 of a .tflite, "" to compute it.
    """
    if Path(path).suffix in (".tflite", ".litertlm"):
        from gemma_edge.runtime.engines.litert_encoder import open_litert_encoder

        return open_litert_encoder(Path(path), signature, threads, digest)
    return OnnxEncoder(path, signature, threads=threads)


class OnnxEncoder:
    """A graph with one output; see `Encoder`.

    Args:
        path: the graph; its weights lie beside it.
        signature: what it must have: its inputs and its output by name, with type and number of dimensions.
        threads: of the engine; a thread a physical core if None.

    Raises:
        BundleError: there is no such file, or it is not a graph of that signature.
    """

    def __init__(self, path: str | Path, signature: Signature, *, threads: int | None = None) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or physical_cores()
        options.inter_op_num_threads = 1
        # An encoder runs once for a prompt: what it needed belongs to the decoder afterwards.
        options.enable_cpu_mem_arena = False
        # A pattern is one block for a whole pass: 30 MB more at the peak of 30 s of audio, and no faster.
        options.enable_mem_pattern = False
        options.log_severity_level = 3
        try:
            self._session: ort.InferenceSession | None = ort.InferenceSession(
                path, options, providers=["CPUExecutionProvider"]
            )
        except Exception as error:  # onnxruntime raises many types of its own
            raise BundleError(path, "graph", "an encoder that ONNX Runtime loads", str(error)) from None
        values = [*self._session.get_inputs(), *self._session.get_outputs()]
        self.metadata: dict[str, str] = self._session.get_modelmeta().custom_metadata_map
        self.shapes = {v.name: tuple(n if isinstance(n, int) else None for n in v.shape) for v in values}
        found = {v.name: (v.type, len(v.shape)) for v in values}
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
