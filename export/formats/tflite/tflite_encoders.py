"""The encoders of images and audio for LiteRT: their models and their memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from gemma_edge.export.emit.tflite.tflite_audio import emit_audio
from gemma_edge.export.emit.tflite.tflite_file import TfliteFile
from gemma_edge.export.emit.tflite.tflite_vision import emit_vision
from gemma_edge.export.formats.export_format import EncoderFile
from gemma_edge.export.model.tower import Inputs, Tower
from gemma_edge.export.model.weight_source import WeightSource
from gemma_edge.export.publish import BundleWriter
from gemma_edge.export.weights.recipe import Recipe
from gemma_edge.export.weights.rounding import Rounding
from gemma_edge.runtime.artifacts.modalities import Kind

GRAPHS: dict[Kind, str] = {"vision": "vision.tflite", "audio": "audio.tflite"}
# Measured with LiteRT 2.3 on encoders of published size at int8. Loaded: 16 MB (images), 34 (audio). A run:
# 259 MB for an image, whose largest map has 113; 160 for 30 s of audio, whose first has 49.
LOADED_BYTES = 34 << 20
MAPS: dict[Inputs, float] = {"pixels": 2.4, "log_mel": 3.4}
EMITTERS: dict[Inputs, Callable[[Any, Recipe, bool], TfliteFile]] = {
    "pixels": lambda config, recipe, _: emit_vision(config, recipe),
    "log_mel": lambda config, recipe, one: emit_audio(config, recipe, [config.max_frames] if one else None),
}


def encoder_file(tower: Tower, recipe: Recipe, one_length: bool = False) -> EncoderFile:
    """An encoder's model; reads no weight. `one_length` as in `emit_encoder`."""
    graph, model = GRAPHS[tower.kind], emit_encoder(tower, recipe, one_length)

    def write(
        writer: BundleWriter, source: WeightSource, rounding: Rounding, advance: Callable[[int], None]
    ) -> None:
        writer.write(graph, lambda file: model.write(file, source, rounding, advance))

    return EncoderFile(graph, model, *encoder_memory(tower), write)


def emit_encoder(tower: Tower, recipe: Recipe, one_length: bool = False) -> TfliteFile:
    """An encoder; reads no weight.

    Args:
        one_length: an audio encoder has one signature, for the longest clip.
    """
    return EMITTERS[tower.model.inputs](tower.config, recipe, one_length)


def encoder_memory(tower: Tower) -> tuple[int, int]:
    """Bytes of anonymous memory that the loaded encoder takes, and that one run adds.

    The weights are pages of the packed file. A run holds a few of its largest feature maps at once.
    """
    return LOADED_BYTES, int(MAPS[tower.model.inputs] * 4 * tower.model.largest_map(tower.config))
