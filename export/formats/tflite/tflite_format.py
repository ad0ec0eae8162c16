"""The format "tflite" as an object: decoder, tables and encoders, a .tflite each.

The tables are models too, one look-up each, which LiteRT-LM can call; our runtime reads their rows past the
engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.checkpoint.side_files import SideFiles
from gemma_edge.export.emit.tflite.tflite_file import TfliteFile
from gemma_edge.export.emit.tflite.tflite_text import (
    CacheLayout,
    emit_decoder,
    emit_embedder,
    emit_per_layer_embedder,
)
from gemma_edge.export.formats.bundle_folder import BundleFolder
from gemma_edge.export.formats.export_format import Artifact, EncoderFile, ExportJob, Json
from gemma_edge.export.formats.observed_decoder import ObservedDecoder
from gemma_edge.export.formats.tflite.litert_facts import LITERT_BASE_BYTES, prefill_sizes, verify_sizes
from gemma_edge.export.formats.tflite.tflite_encoders import encoder_file
from gemma_edge.export.formats.tflite.tflite_stored import tflite_matrices
from gemma_edge.export.model.tensor_spec import EMBEDDING_NAME, PLE_NAME, head_name
from gemma_edge.export.model.tower import Tower
from gemma_edge.export.progress_bar import ProgressBar
from gemma_edge.export.weights.kv_scales import KvScales, measured_kv_scales
from gemma_edge.export.weights.recipe import Recipe
from gemma_edge.export.weights.rounding import Rounding
from gemma_edge.export.weights.stored_matrix import StoredMatrix
from gemma_edge.runtime.artifacts.artifact_formats import ARTIFACT_FORMATS
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.engines.kv_cache import litert_cache_bytes
from gemma_edge.runtime.families.model_family import TextConfig

DECODER, PER_LAYER_EMBEDDER, EMBEDDER = "decoder.tflite", "per_layer_embedder.tflite", "embedder.tflite"


class TfliteFormat:
    """The `ExportFormat` of LiteRT, which maps the decoder's packed weights."""

    runtime = ARTIFACT_FORMATS["tflite"]
    int8_by_default = False  # decoding would take 5 to 11 % more CPU time, see docs/speed.md
    mapped = True
    base_bytes = LITERT_BASE_BYTES
    decoder = DECODER

    def unsupported(self, config: TextConfig, recipe: Recipe) -> str | None:
        return None

    def decoder_layout(self, job: ExportJob) -> TfliteFile:
        return emit_decoder(job.config, job.recipe, context=job.context)

    def encoder_file(self, tower: Tower, recipe: Recipe) -> EncoderFile:
        return encoder_file(tower, recipe)

    def has_embedder(self, config: TextConfig) -> bool:
        return not config.tie_word_embeddings

    def kv_cache_bytes(self, job: ExportJob) -> int:
        return litert_cache_bytes(job.config, job.context, job.recipe.kv_cache, rings=True)

    def room_bytes(self, file_bytes: int) -> int:
        return file_bytes

    def stored(self, bundle: Bundle, graph: str) -> dict[str, StoredMatrix]:
        return tflite_matrices(bundle.file(graph))

    def observed_decoder(self, bundle: Bundle, scratch: Path) -> ObservedDecoder:
        from gemma_edge.export.formats.tflite.tflite_observer import TfliteObserver  # with the engine

        return TfliteObserver(bundle, scratch)

    def prepare(self, job: ExportJob, files: SideFiles, facts: Json, target: Path) -> Artifact:
        return TfliteFolder(self, job, files, facts, target)


def whole_decoder(
    job: ExportJob, layout: CacheLayout = "windowed", kv_scales: Mapping[int, KvScales] | None = None
) -> TfliteFile:
    """The decoder with all signatures. Each reads the same weights, so one is enough to lay them out."""
    return emit_decoder(
        job.config,
        job.recipe,
        context=job.context,
        prefill=prefill_sizes(job.chunk),
        verify=verify_sizes(job.context),
        layout=layout,
        kv_scales=kv_scales,
    )


class TfliteFolder(BundleFolder):
    """A folder of .tflite files."""

    def write_decoder(
        self, checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], rounding: Rounding, progress: bool
    ) -> Json:
        config, recipe = self.job.config, self.job.recipe
        tied = config.tie_word_embeddings
        scales = measured_kv_scales(checkpoint, recipe.kv_cache, prompts, progress)
        decoder = whole_decoder(self.job, kv_scales=scales)
        files = {DECODER: decoder, PER_LAYER_EMBEDDER: emit_per_layer_embedder(config, recipe)}
        if not tied:
            files[EMBEDDER] = emit_embedder(config, recipe)
        total = sum(t.elements for file in files.values() for t in file.tensors)
        with ProgressBar("writing weights", total, progress, unit="weights") as bar:
            for name, file in files.items():
                produce = partial(file.write, source=checkpoint, rounding=rounding, progress=bar.advance)
                self.writer.write(name, produce)
        embedding = (DECODER, head_name(config)) if tied else (EMBEDDER, EMBEDDING_NAME)
        per_layer = files[PER_LAYER_EMBEDDER]
        return {
            "embedding": files[embedding[0]].row_layout(embedding[1], embedding[0], config.embed_scale),
            "per_layer": per_layer.row_layout(PLE_NAME, PER_LAYER_EMBEDDER, config.ple_scale),
        }


FORMAT = TfliteFormat()
