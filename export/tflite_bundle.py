"""The weights of a bundle of format "tflite": the decoder's, and both tables, each a .tflite of its own.

The tables are models too, one look-up each, which LiteRT-LM can call; our runtime reads their rows past the
engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from gemma_edge.export.bundle_writer import BundleWriter
from gemma_edge.export.checkpoint import Checkpoint
from gemma_edge.export.emit.tflite import emit_decoder, emit_embedder, emit_per_layer_embedder
from gemma_edge.export.emit.tflite_buffers import TfliteFile
from gemma_edge.export.model.tensors import EMBEDDING_NAME, PLE_NAME, head_name
from gemma_edge.export.progress import Progress
from gemma_edge.export.recipe import Recipe
from gemma_edge.runtime.config import Gemma3nConfig

DECODER, PER_LAYER_EMBEDDER, EMBEDDER = "decoder.tflite", "per_layer_embedder.tflite", "embedder.tflite"
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
