"""The weights of a bundle of format "tflite": decoder, tables and encoders, each a .tflite of its own.

The tables are models too, one look-up each, which LiteRT-LM can call; our runtime reads their rows past the
engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.checkpoint.towers import Encoder
from gemma_edge.export.emit.tflite.tflite_audio import emit_audio
from gemma_edge.export.emit.tflite.tflite_file import TfliteFile
from gemma_edge.export.emit.tflite.tflite_text import emit_decoder, emit_embedder, emit_per_layer_embedder
from gemma_edge.export.emit.tflite.tflite_vision import emit_vision
from gemma_edge.export.formats.onnx.onnx_encoder_files import largest_map, weight_source, write_token_table
from gemma_edge.export.model.gemma3n.gemma3n_text_tensors import EMBEDDING_NAME, PLE_NAME, head_name
from gemma_edge.export.progress_bar import Progress
from gemma_edge.export.publish import BundleWriter
from gemma_edge.export.weights.recipe import Recipe
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.families.gemma3n_vision_config import VisionConfig

DECODER, PER_LAYER_EMBEDDER, EMBEDDER = "decoder.tflite", "per_layer_embedder.tflite", "embedder.tflite"
GRAPHS: dict[Kind, str] = {"vision": "vision.tflite", "audio": "audio.tflite"}
# Measured with LiteRT 2.3 on encoders of published size at int8. Loaded: 16 MB (images), 34 (audio). A run:
# 259 MB for an image, whose largest map has 113; 160 for 30 s of audio, whose first has 49.
LOADED_BYTES, VISION_MAPS, AUDIO_MAPS = 34 << 20, 2.4, 3.4
# Prefill signatures below the largest: what a prompt's rest is cut into.
SIZE_STEP, SMALLEST_PREFILL = 4, 16


def prefill_sizes(chunk: int) -> Sequence[int]:
    """Tokens of the prefill signatures: `chunk` and its fourths, down to 16."""
    sizes = [chunk]
    while sizes[-1] // SIZE_STEP >= SMALLEST_PREFILL:
        sizes.append(sizes[-1] // SIZE_STEP)
    return sizes


def emit_windowed(config: Gemma3nConfig, recipe: Recipe, context: int, chunk: int) -> TfliteFile:
    """The decoder as our own runtime drives it; reads no weight."""
    return emit_decoder(config, recipe, context=context, prefill=prefill_sizes(chunk))


def write_weights(
    checkpoint: Checkpoint, recipe: Recipe, decoder: TfliteFile, writer: BundleWriter, progress: bool
) -> dict[str, Any]:
    """Writes decoder and tables; returns the layouts of the tables for the manifest."""
    config = checkpoint.config
    tied = config.tie_word_embeddings
    files = {DECODER: decoder, PER_LAYER_EMBEDDER: emit_per_layer_embedder(config, recipe)}
    if not tied:
        files[EMBEDDER] = emit_embedder(config, recipe)
    total = sum(t.elements for file in files.values() for t in file.tensors)
    with Progress("writing weights", total, progress, unit="weights") as bar:
        for name, file in files.items():
            produce = partial(file.write, source=checkpoint, clip=recipe.clip, progress=bar.advance)
            writer.write(name, produce)
    embedding = (DECODER, head_name(config)) if tied else (EMBEDDER, EMBEDDING_NAME)
    return {
        "embedding": files[embedding[0]].row_layout(embedding[1], embedding[0], config.embed_scale),
        "per_layer": files[PER_LAYER_EMBEDDER].row_layout(PLE_NAME, PER_LAYER_EMBEDDER, config.ple_scale),
    }


def emit_encoder(encoder: Encoder, recipe: Recipe, one_length: bool = False) -> TfliteFile:
    """An encoder; reads no weight.

    Args:
        one_length: an audio encoder has one signature, for the longest clip.
    """
    if isinstance(encoder.config, VisionConfig):
        return emit_vision(encoder.config, recipe)
    return emit_audio(encoder.config, recipe, [encoder.config.max_frames] if one_length else None)


def write_encoders_tflite(
    checkpoint: Checkpoint, recipe: Recipe, writer: BundleWriter, progress: bool
) -> dict[str, Any]:
    """Writes every encoder of the checkpoint and its token table; returns the manifest's `modalities`."""
    files = {kind: emit_encoder(encoder, recipe) for kind, encoder in checkpoint.encoders.items()}
    total = sum(tensor.elements for file in files.values() for tensor in file.tensors)
    modalities: dict[str, Any] = {}
    with Progress("writing encoders", total, progress, unit="weights") as bar:
        for kind, file in files.items():
            encoder = checkpoint.encoders[kind]
            source = weight_source(encoder, checkpoint)
            produce = partial(file.write, source=source, clip=recipe.clip, progress=bar.advance)
            writer.write(GRAPHS[kind], produce)
            tokens = write_token_table(encoder, checkpoint, writer)
            modalities[kind] = encoder.entry(GRAPHS[kind], tokens, *encoder_memory(encoder))
    return modalities


def encoder_memory(encoder: Encoder) -> tuple[int, int]:
    """Bytes of anonymous memory that the loaded encoder takes, and that one run of it takes on top.

    The weights are pages of the packed file. A run holds a few of its largest feature maps at once.
    """
    config = encoder.config
    if isinstance(config, VisionConfig):
        return LOADED_BYTES, int(VISION_MAPS * 4 * largest_map(config))
    frames = -(-config.max_frames // config.sscp_conv_stride_size[0][0])
    first = frames * config.frequencies()[1] * config.sscp_conv_channel_size[0]
    return LOADED_BYTES, int(AUDIO_MAPS * 4 * first)
