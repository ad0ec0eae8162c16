"""The sections of a .litertlm that see and hear, as LiteRT-LM calls them.

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

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.checkpoint.towers import Encoder
from gemma_edge.export.emit.reference.reference_text import WeightSource
from gemma_edge.export.emit.tflite.tflite_audio import BOOL, FLOAT
from gemma_edge.export.emit.tflite.tflite_file import TfliteFile
from gemma_edge.export.formats.onnx.onnx_encoder_files import weight_source
from gemma_edge.export.formats.tflite.tflite_bundle import GRAPHS, emit_encoder
from gemma_edge.export.weights.recipe import Recipe
from gemma_edge.runtime.artifacts.litertlm_reader import (
    AUDIO_ADAPTER,
    AUDIO_ENCODER,
    END_OF_AUDIO,
    VISION_ADAPTER,
    VISION_ENCODER,
)
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.artifacts.tflite_check import FEATURES, MASK, VISION
from gemma_edge.runtime.families.gemma3n_vision_config import VisionConfig
from gemma_edge.runtime.families.log_mel import LogMel

NEWLINES = "\n\n"  # around an image or a clip, as the model was trained


@dataclass(frozen=True)
class Section:
    """A model of a .litertlm, under its model type, and what its weights are written from."""

    model_type: str
    model: TfliteFile
    source: WeightSource


def encoder_sections(
    encoders: Mapping[Kind, Encoder], recipe: Recipe, checkpoint: WeightSource
) -> dict[str, Section]:
    """The sections of some encoders, by their names as files; reads only the token tables."""
    sections = {}
    for kind, encoder in encoders.items():
        source = weight_source(encoder, checkpoint)
        end = encoder.token_table(checkpoint)[encoder.end_id - encoder.config.vocab_offset]
        rows = encoder.config.soft_tokens
        # LiteRT-LM takes an audio encoder of one signature.
        model = emit_encoder(encoder, recipe, one_length=True)
        if kind == "vision":
            sections[GRAPHS[kind]] = Section(VISION_ENCODER, model, source)
            sections["vision_adapter.tflite"] = Section(VISION_ADAPTER, emit_end_row(rows, end), source)
        else:
            sections[GRAPHS[kind]] = Section(AUDIO_ENCODER, model, source)
            adapter = emit_audio_adapter(rows, len(end))
            sections["audio_adapter.tflite"] = Section(AUDIO_ADAPTER, adapter, source)
            sections["end_of_audio.tflite"] = Section(END_OF_AUDIO, emit_row(end), source)
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
    file.layout()
    return file


def emit_audio_adapter(rows: int, hidden: int) -> TfliteFile:
    """mask bool (1, rows), features f32 (1, rows, hidden), in the order of LiteRT-LM -> their product."""
    file = TfliteFile({})
    graph = file.graph("audio")
    mask, features = graph.input(MASK, (1, rows), "bool"), graph.input(FEATURES, (1, rows, hidden))
    kept = graph.op("CAST", [mask], (1, rows), "CastOptions", inDataType=BOOL, outDataType=FLOAT)
    kept = graph.op("RESHAPE", [kept, graph.constant((1, rows, 1), "int32")], (1, rows, 1))
    graph.outputs["rows"] = graph.op("MUL", [features, kept], (1, rows, hidden), "MulOptions")
    file.layout()
    return file


def emit_row(row: NDArray[np.float32]) -> TfliteFile:
    """Nothing -> f32 (1, 1, hidden): `row`."""
    file = TfliteFile({})
    graph = file.graph("end")
    shape = (1, 1, len(row))
    constant = graph.constant(row.reshape(shape))
    # An output must be computed.
    graph.outputs["rows"] = graph.op("MUL", [constant, graph.constant([1.0])], shape, "MulOptions")
    file.layout()
    return file


def describe_encoders(metadata: Any, encoders: Mapping[Kind, Encoder], pieces: Mapping[int, str]) -> None:
    """Tells LiteRT-LM how images and clips are prepared and surrounded.

    With images alone the model is `gemma3n`. With audio it is a `generic_model` that says all there is to
    say: what LiteRT-LM hears for `gemma3n` is normalized by constants that no checkpoint has.

    Args:
        metadata: the LlmMetadata.
        pieces: texts of the tokens around and instead of images and clips, by id.
    """
    if not encoders:
        metadata.llm_model_type.gemma3n.SetInParent()
        return
    vision, audio = encoders.get("vision"), encoders.get("audio")
    if vision and not audio and isinstance(vision.config, VisionConfig):
        described = metadata.llm_model_type.gemma3n
        described.image_tensor_height = described.image_tensor_width = vision.config.image_size
        described.start_of_image_token.token_str = pieces[vision.begin_id]
        described.end_of_image_token.token_str = pieces[vision.end_id]
        return
    generic = metadata.llm_model_type.generic_model
    generic.delimiter_regex = "(" + "|".join(re.escape(pieces[e.soft_id]) for e in encoders.values()) + ")"
    if vision and isinstance(vision.config, VisionConfig):
        generic.image_enabled = True
        generic.image_token_regex = re.escape(pieces[vision.soft_id])
        generic.image_tensor_height = generic.image_tensor_width = vision.config.image_size
        generic.start_of_image_token.token_str = pieces[vision.begin_id]
        generic.end_of_image_token.token_str = pieces[vision.end_id]
        generic.image_prefix = generic.image_suffix = NEWLINES
        generic.add_image_end = False  # it is one of the adapter's rows
    if audio:
        generic.audio_enabled = True
        generic.audio_token_regex = re.escape(pieces[audio.soft_id])
        generic.start_of_audio_token.token_str = pieces[audio.begin_id]
        generic.end_of_audio_token.token_str = pieces[audio.end_id]
        generic.audio_prefix = generic.audio_suffix = NEWLINES
        generic.add_audio_end = True
        _describe_features(generic, LogMel.from_dict(audio.preprocessor))


def _describe_features(generic: Any, log_mel: LogMel) -> None:
    generic.audio_sample_rate_hz, generic.audio_num_channels = log_mel.sampling_rate, 1
    generic.audio_frame_length, generic.audio_hop_length = log_mel.frame_length, log_mel.hop_length
    generic.audio_fft_length = log_mel.fft_length
    generic.audio_input_scale = log_mel.input_scale_factor
    generic.audio_pre_emphasis_factor = log_mel.preemphasis
    generic.audio_num_mel_bins = log_mel.feature_size
    generic.audio_mel_low_hz, generic.audio_mel_high_hz = log_mel.min_frequency, log_mel.max_frequency
    # LiteRT-LM cuts the logarithm, not what it is taken of.
    generic.audio_mel_floor = math.log(log_mel.mel_floor)
    generic.audio_normalize_mel = generic.audio_add_floor_to_mel_before_log = False
    generic.audio_semicausal_padding = generic.audio_non_zero_hanning = False
    generic.audio_periodic_hanning = True
    generic.audio_fft_padding_type = 1  # zeros behind the frame
