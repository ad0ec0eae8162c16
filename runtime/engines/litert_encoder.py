"""Encoders of images and audio on LiteRT (XNNPACK on CPU); see `EncoderGraph`.

Weights are packed once, into a file that is mapped from then on, as the decoder's are: what an encoder takes
of anonymous memory is its activations.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ai_edge_litert.compiled_model import CompiledModel
from numpy.typing import NDArray

from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.artifacts.tflite_check import (
    FEATURES,
    IMAGES,
    LOG_MEL,
    MASK,
    VISION,
    check_audio,
    check_vision,
)
from gemma_edge.runtime.artifacts.tflite_reader import TfliteModel, read_tflite
from gemma_edge.runtime.engines.cores import physical_cores, release_free_memory
from gemma_edge.runtime.engines.encoder_graph import EncoderGraph
from gemma_edge.runtime.engines.litert_model import (
    Buffer,
    engine_errors,
    load_model,
    run_first,
    run_signature,
)

Arrays = dict[str, NDArray[Any]]


class LitertVision:
    """An image encoder: `run(pixels=f32 (1, 3, size, size))`."""

    def __init__(self, path: Path, threads: int | None, digest: str) -> None:
        # Engines follow what a file says, over its end too: it is checked before one sees it.
        model = read_tflite(path)
        graph = check_vision(model)
        self.metadata: dict[str, str] = {}
        self.shapes: dict[str, tuple[int | None, ...]] = {
            "pixels": (1, 3, graph.size, graph.size),
            "soft_tokens": (1, graph.soft_tokens, graph.hidden),
        }
        self._engine = _Engine(model, threads, digest)

    def run(self, **inputs: NDArray[Any]) -> NDArray[Any]:
        return self._engine.run(VISION, {IMAGES: inputs["pixels"].transpose(0, 2, 3, 1)})

    def close(self) -> None:
        self._engine.close()


class LitertAudio:
    """An audio encoder: `run(log_mel=f32 (1, frames, bins), valid=f32 (1, frames, 1))`.

    The clip is padded to the shortest of the graph's lengths that it fits.
    """

    def __init__(self, path: Path, threads: int | None, digest: str) -> None:
        model = read_tflite(path)  # checked, as an image encoder is
        graph = check_audio(model)
        self._lengths = graph.frames
        self.metadata = {"max_frames": str(graph.frames[-1])}
        self.shapes: dict[str, tuple[int | None, ...]] = {
            "log_mel": (1, None, graph.bins),
            "soft_tokens": (1, graph.soft_tokens, graph.hidden),
        }
        self._engine = _Engine(model, threads, digest)

    def run(self, **inputs: NDArray[Any]) -> NDArray[Any]:
        log_mel, valid = inputs["log_mel"], inputs["valid"][:, :, 0] > 0
        length = next(length for length in self._lengths if length >= log_mel.shape[1])
        return self._engine.run(f"audio_{length}", {LOG_MEL: log_mel, MASK: valid})

    def close(self) -> None:
        self._engine.close()


ENCODERS: dict[Kind, Callable[[Path, int | None, str], EncoderGraph]] = {
    "vision": LitertVision,
    "audio": LitertAudio,
}


class _Engine:
    """The engine's model, and the buffers of the signatures that were called.

    Args:
        digest: SHA-256 that the bundle records of the file; "" for none.
    """

    def __init__(self, model: TfliteModel, threads: int | None, digest: str) -> None:
        self.signatures = model.signatures
        self.path = model.path
        self.model: CompiledModel | None = load_model(model.path, digest, threads or physical_cores())
        self.buffers: dict[str, tuple[dict[str, Buffer], dict[str, Buffer]]] = {}
        release_free_memory()

    def run(self, name: str, inputs: Arrays) -> NDArray[Any]:
        """The features; an input shorter than the signature's is followed by zeros."""
        if self.model is None:
            raise ValueError("the encoder is closed")
        first = not self.buffers
        bound_inputs, bound_outputs = self.bind(self.model, name)
        for key, value in inputs.items():
            array = bound_inputs[key].array
            array[:, value.shape[1] :] = 0
            array[:, : value.shape[1]] = value
            bound_inputs[key].push()
        index = self.model.get_signature_index(name)
        order = self.model.get_signature_by_index(index)
        tensors = (
            [bound_inputs[key].tensor for key in order["inputs"]],
            [bound_outputs[key].tensor for key in order["outputs"]],
        )
        if first:
            run_first(self.path, self.model, index, *tensors)
        else:
            run_signature(self.path, self.model, index, *tensors)
        bound_outputs[FEATURES].pull()
        features = bound_outputs[FEATURES].array.copy()
        release_free_memory()
        return features

    def bind(self, model: CompiledModel, name: str) -> tuple[dict[str, Buffer], dict[str, Buffer]]:
        if name not in self.buffers:
            signature = self.signatures[name]
            with engine_errors(self.path):
                inputs = {
                    key: Buffer(model.create_input_buffer_by_name(name, key), t.shape, np.dtype(t.type).type)
                    for key, t in signature.inputs.items()
                }
                outputs = {
                    key: Buffer(model.create_output_buffer_by_name(name, key), t.shape, np.dtype(t.type).type)
                    for key, t in signature.outputs.items()
                }
            self.buffers[name] = inputs, outputs
        return self.buffers[name]

    def close(self) -> None:
        self.buffers = {}
        self.model = None
        release_free_memory()
