"""Builds the encoder sections of a .litertlm, with LiteRT-LM's names.

| section | tensors |
|---|---|
| `tf_lite_vision_encoder` | images f32 (1, size, size, 3) in [0, 1] -> features f32 (1, tokens, hidden) |
| `tf_lite_vision_adapter` | features -> f32 (1, tokens + 1, hidden): the end-of-image token's row below |
| `tf_lite_audio_encoder_hw` | src_inputs f32 (1, frames, bins), mask bool (1, frames) -> features f32 (1, tokens, hidden), mask bool (1, tokens) |
| `tf_lite_audio_adapter` | mask, features -> f32 (1, tokens, hidden) |
| `tf_lite_end_of_audio` | nothing -> f32 (1, 1, hidden): the end-of-audio token's row |

The encoders hold the whole of their model, so that our runtime runs the same sections; the adapters, which
other models use for that, only bring the rows into the form that LiteRT-LM puts into a prompt.
"""  # noqa: E501

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.emit.reference.encoder_weights import FoldedWeights, token_table
from gemma_edge.export.emit.tflite.tflite_audio import BOOL, FLOAT
from gemma_edge.export.emit.tflite.tflite_file import TfliteFile
from gemma_edge.export.emit.tflite.tflite_text import emit_embedder, emit_per_layer_embedder
from gemma_edge.export.formats.export_format import ExportJob
from gemma_edge.export.formats.tflite.tflite_encoders import emit_encoder
from gemma_edge.export.model.tower import Tower
from gemma_edge.export.model.weight_source import WeightSource
from gemma_edge.runtime.artifacts.litertlm_bundle import AUDIO as AUDIO_FILE
from gemma_edge.runtime.artifacts.litertlm_bundle import ENCODER_SECTIONS, SECTIONS
from gemma_edge.runtime.artifacts.litertlm_bundle import VISION as VISION_FILE
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.artifacts.tflite_check import FEATURES, MASK, VISION

# Files of the sections of an encoder; `ENCODER_SECTIONS` of the runtime has the model type of each.
SECTION_FILES: dict[Kind, tuple[str, ...]] = {
    "vision": (VISION_FILE, "vision_adapter.tflite"),
    "audio": (AUDIO_FILE, "audio_adapter.tflite", "end_of_audio.tflite"),
}


@dataclass(frozen=True)
class Section:
    """A model of a .litertlm, and the source of its weights."""

    model: TfliteFile
    source: WeightSource


def section_types(towers: Mapping[Kind, Tower]) -> dict[str, str]:
    """Model types of all models, by their names as files, in the order in which they are written."""
    files = [*SECTIONS, *(file for kind in towers for file in SECTION_FILES[kind])]
    kinds = SECTIONS | ENCODER_SECTIONS
    return {file: kinds[file][1] for file in files if kinds[file][0] == "TFLiteModel"}


def model_sections(job: ExportJob, decoder: TfliteFile, checkpoint: WeightSource) -> dict[str, Section]:
    """The models by the names of `section_types`; reads only the token tables of encoders."""
    models = (decoder, emit_embedder(job.config, job.recipe), emit_per_layer_embedder(job.config, job.recipe))
    sections = {
        file: Section(model, checkpoint) for file, model in zip(section_types({}), models, strict=True)
    }
    for kind, tower in job.towers.items():
        source = FoldedWeights(checkpoint, tower.config)
        end = token_table(checkpoint, tower.config)[tower.end_id - tower.config.vocab_offset]
        rows = tower.config.soft_tokens
        # LiteRT-LM takes an audio encoder of one signature.
        encoder = emit_encoder(tower, job.recipe, one_length=True)
        if kind == "vision":
            parts = [encoder, emit_end_row(rows, end)]
        else:
            parts = [encoder, emit_audio_adapter(rows, len(end)), emit_row(end)]
        sections |= {f: Section(m, source) for f, m in zip(SECTION_FILES[kind], parts, strict=True)}
    return sections


def emit_end_row(rows: int, end: NDArray[np.float32]) -> TfliteFile:
    """f32 (1, rows, hidden) -> (1, rows + 1, hidden), `end` (hidden) below.

    LiteRT-LM puts nothing between an image and the text after it, where the model was trained with the
    end-of-image token.
    """
    file = TfliteFile({})
    graph = file.graph(VISION)
    features = graph.input(FEATURES, (1, rows, len(end)))
    below = graph.constant(end.reshape(1, 1, -1))
    shape = (1, rows + 1, len(end))
    graph.outputs["rows"] = graph.op(
        "CONCATENATION", [features, below], shape, "ConcatenationOptions", axis=1
    )
    return file


def emit_audio_adapter(rows: int, hidden: int) -> TfliteFile:
    """mask bool (1, rows), features f32 (1, rows, hidden), in the order of LiteRT-LM -> their product."""
    file = TfliteFile({})
    graph = file.graph("audio")
    mask, features = graph.input(MASK, (1, rows), "bool"), graph.input(FEATURES, (1, rows, hidden))
    kept = graph.op("CAST", [mask], (1, rows), "CastOptions", inDataType=BOOL, outDataType=FLOAT)
    kept = graph.op("RESHAPE", [kept, graph.constant((1, rows, 1), "int32")], (1, rows, 1))
    graph.outputs["rows"] = graph.op("MUL", [features, kept], (1, rows, hidden), "MulOptions")
    return file


def emit_row(row: NDArray[np.float32]) -> TfliteFile:
    """Nothing -> f32 (1, 1, hidden): `row`."""
    file = TfliteFile({})
    graph = file.graph("end")
    shape = (1, 1, len(row))
    constant = graph.constant(row.reshape(shape))
    # An output must be computed.
    graph.outputs["rows"] = graph.op("MUL", [constant, graph.constant([1.0])], shape, "MulOptions")
    return file
