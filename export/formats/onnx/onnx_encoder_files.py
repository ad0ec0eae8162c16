"""The encoders of images and audio in a bundle of format "onnx": their graphs, weights and token tables."""

from __future__ import annotations

from collections.abc import Callable

from onnx import ModelProto

from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.checkpoint.towers import Encoder, Json
from gemma_edge.export.emit.onnx.onnx_audio import emit_audio
from gemma_edge.export.emit.onnx.onnx_vision import emit_vision
from gemma_edge.export.emit.reference.audio_folding import FoldedAudio
from gemma_edge.export.emit.reference.reference_text import WeightSource
from gemma_edge.export.model.gemma3n.gemma3n_vision_tensors import (
    EdgeResidual,
    InvertedResidual,
    MobileAttention,
    stages,
    stem_channels,
)
from gemma_edge.export.progress_bar import Progress
from gemma_edge.export.publish import BundleWriter
from gemma_edge.export.weights.external_data import ExternalData
from gemma_edge.export.weights.recipe import FP32, Recipe
from gemma_edge.export.weights.row_table_writer import write_row_table
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.families.gemma3n_vision_config import VisionConfig

GRAPHS: dict[Kind, str] = {"vision": "vision.onnx", "audio": "audio.onnx"}
# Measured with ONNX Runtime 1.31 on encoders of published size at int8. Loaded: 10 MiB (audio), 26 (images).
# A run: 332 MiB for an image, whose largest map has 108; 202 to 489 for 30 s of audio, whose first has 47.
GRAPH_BYTES = 16 << 20
VISION_MAPS, AUDIO_MAPS = 3.2, 10
TOKENS: dict[Kind, str] = {"vision": "vision_tokens.bin", "audio": "audio_tokens.bin"}


def emit_encoder(encoder: Encoder, recipe: Recipe) -> tuple[ModelProto, ExternalData]:
    """The graph and the layout of its weights; reads none."""
    location = f"{GRAPHS[encoder.kind]}.data"
    if isinstance(encoder.config, VisionConfig):
        vision = emit_vision(encoder.config, recipe, location)
        return vision.model, vision.data
    audio = emit_audio(encoder.config, recipe, location)
    return audio.model, audio.data


def weight_source(encoder: Encoder, checkpoint: WeightSource) -> WeightSource:
    """What `emit_encoder`'s data is written from."""
    if isinstance(encoder.config, VisionConfig):
        return checkpoint
    return FoldedAudio(checkpoint, encoder.config)


def write_encoders(checkpoint: Checkpoint, recipe: Recipe, writer: BundleWriter, progress: bool) -> Json:
    """Writes every encoder of the checkpoint; returns the manifest's `modalities`."""
    emitted = {kind: emit_encoder(encoder, recipe) for kind, encoder in checkpoint.encoders.items()}
    total = sum(tensor.elements for _, data in emitted.values() for tensor in data.tensors)
    modalities: Json = {}
    with Progress("writing encoders", total, progress, unit="weights") as bar:
        for kind, (model, data) in emitted.items():
            encoder = checkpoint.encoders[kind]
            modalities[kind] = _write(encoder, model, data, recipe, checkpoint, writer, bar.advance)
    return modalities


def _write(
    encoder: Encoder,
    model: ModelProto,
    data: ExternalData,
    recipe: Recipe,
    checkpoint: Checkpoint,
    writer: BundleWriter,
    advance: Callable[[int], None],
) -> Json:
    graph = GRAPHS[encoder.kind]
    source = weight_source(encoder, checkpoint)
    writer.write(data.location, lambda f: data.write(f, source, recipe.clip, advance))
    writer.write_bytes(graph, bytes(model.SerializeToString(deterministic=True)))
    tokens = write_token_table(encoder, checkpoint, writer)
    return encoder.entry(graph, tokens, *encoder_memory(encoder, data))


def encoder_memory(encoder: Encoder, data: ExternalData) -> tuple[int, int]:
    """Bytes of anonymous memory that the loaded encoder takes, and that one run of it takes on top.

    Integer weights are unpacked when they are used and stay pages of their file; fp32 ones the engine packs.
    What a run takes is a few of its largest feature maps, and what the heap has not given back: factors are
    measured on the published encoders with ONNX Runtime 1.31.
    """
    packed = sum(t.data.length for t in data.tensors if t.precision.bits == 32)
    if isinstance(encoder.config, VisionConfig):
        activations = int(VISION_MAPS * 4 * largest_map(encoder.config))
    else:
        audio = encoder.config
        frames, bins = audio.sscp_conv_stride_size[0]
        first = (
            (audio.max_frames // frames) * (audio.input_feat_size // bins) * audio.sscp_conv_channel_size[0]
        )
        activations = int(AUDIO_MAPS * 4 * first)
    return GRAPH_BYTES + packed, activations


def largest_map(config: VisionConfig) -> int:
    """Elements of the largest feature map of an image."""
    side = config.image_size // 2  # after the stem
    largest = stem_channels(config) * side * side
    for stage in stages(config):
        for block in stage:
            if isinstance(block, MobileAttention):
                continue
            if isinstance(block, EdgeResidual):
                side //= block.stride  # strides are the expanding layer's
            largest = max(largest, block.expanded * side * side)
            if isinstance(block, InvertedResidual):
                side //= block.stride
    return largest


def write_token_table(encoder: Encoder, source: WeightSource, writer: BundleWriter) -> Json:
    """Writes the rows of the encoder's own token ids, fp32; returns their layout."""
    table = encoder.token_table(source)
    file = TOKENS[encoder.kind]
    layout: Json = writer.write(file, lambda f: write_row_table(f, [table], table.shape[1], FP32, file=file))
    return layout
