"""The encoders of images and audio for ONNX Runtime: their graphs and their memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gemma_edge.export.emit.onnx.external_data import ExternalData
from gemma_edge.export.emit.onnx.onnx_audio import emit_audio
from gemma_edge.export.emit.onnx.onnx_graph import EmittedGraph, serialize
from gemma_edge.export.emit.onnx.onnx_vision import emit_vision
from gemma_edge.export.formats.export_format import EncoderFile
from gemma_edge.export.model.tower import Inputs, Tower
from gemma_edge.export.model.weight_source import WeightSource
from gemma_edge.export.publish import BundleWriter
from gemma_edge.export.weights.recipe import Recipe
from gemma_edge.export.weights.rounding import Rounding
from gemma_edge.runtime.artifacts.modalities import Kind

GRAPHS: dict[Kind, str] = {"vision": "vision.onnx", "audio": "audio.onnx"}
# Measured with ONNX Runtime 1.31 on encoders of published size at int8. Loaded: 10 MiB (audio), 313 MB
# (images, 294 of them packed weights). A run: 349 MB for an image of 768 pixels, whose largest map has 113;
# 240 MB of 512, 85 MB of 256; 202 to 489 MiB for 30 s of audio, whose first map has 47.
GRAPH_BYTES = 16 << 20
MAPS: dict[Inputs, float] = {"pixels": 3.2, "log_mel": 10}
EMITTERS: dict[Inputs, Callable[[Any, Recipe, str], EmittedGraph]] = {
    "pixels": emit_vision,
    "log_mel": emit_audio,
}


def encoder_file(tower: Tower, recipe: Recipe) -> EncoderFile:
    """An encoder's graph and the layout of its weights; reads none."""
    graph = GRAPHS[tower.kind]
    emitted = emit_encoder(tower, recipe)
    data = emitted.data

    def write(
        writer: BundleWriter, source: WeightSource, rounding: Rounding, advance: Callable[[int], None]
    ) -> None:
        writer.write(data.location, lambda file: data.write(file, source, rounding, advance))
        writer.write_bytes(graph, serialize(emitted.model))

    return EncoderFile(graph, data, *encoder_memory(tower, data), write)


def emit_encoder(tower: Tower, recipe: Recipe) -> EmittedGraph:
    """The graph and the layout of its weights; reads none."""
    return EMITTERS[tower.model.inputs](tower.config, recipe, f"{GRAPHS[tower.kind]}.data")


def encoder_memory(tower: Tower, data: ExternalData) -> tuple[int, int]:
    """Bytes of anonymous memory that the loaded encoder takes, and that one run adds.

    The engine packs weights that are fp32 or channel-wise; it unpacks the others on use, and they stay
    pages of their file. A run takes a few of the largest feature maps, and memory that the heap has not given
    back, a part of which goes with the packed weights: see the figures above.
    """
    packed = sum(t.data.length for t in data.tensors if t.precision.group == 0)
    largest = tower.model.largest_map(tower.config)
    return GRAPH_BYTES + packed, int(MAPS[tower.model.inputs] * 4 * largest) + packed // 4
