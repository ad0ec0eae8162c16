"""The format "onnx" as an object: a folder for ONNX Runtime."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.checkpoint.side_files import SideFiles
from gemma_edge.export.emit.onnx.external_data import ExternalData
from gemma_edge.export.emit.onnx.onnx_graph import serialize
from gemma_edge.export.emit.onnx.onnx_text import emit_decoder, unsupported
from gemma_edge.export.formats.bundle_folder import BundleFolder
from gemma_edge.export.formats.export_format import Artifact, EncoderFile, ExportJob, Json
from gemma_edge.export.formats.observed_decoder import ObservedDecoder
from gemma_edge.export.formats.onnx.onnx_encoders import encoder_file
from gemma_edge.export.formats.onnx.onnx_stored import onnx_matrices
from gemma_edge.export.model.ops import Weight
from gemma_edge.export.model.tensor_spec import EMBEDDING_NAME, PLE_NAME, head_name
from gemma_edge.export.model.tower import Tower
from gemma_edge.export.progress_bar import ProgressBar
from gemma_edge.export.weights.kv_scales import measured_kv_scales
from gemma_edge.export.weights.recipe import Recipe
from gemma_edge.export.weights.rounding import Rounding
from gemma_edge.export.weights.row_table_writer import write_row_table
from gemma_edge.export.weights.stored_matrix import StoredMatrix
from gemma_edge.export.weights.stored_tensor import check_magnitude
from gemma_edge.runtime.artifacts.artifact_formats import ARTIFACT_FORMATS
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.onnx_files import DECODER, DECODER_DATA
from gemma_edge.runtime.engines.kv_cache import cache_layouts
from gemma_edge.runtime.families.model_family import TextConfig
from gemma_edge.runtime.install_hint import require

PLE, EMBEDDINGS = "ple.bin", "embeddings.bin"
TABLE_CHUNK = 1 << 20  # elements of a table in memory at once


class OnnxFormat:
    """The `ExportFormat` of ONNX Runtime, which packs the decoder's weights on the heap."""

    runtime = ARTIFACT_FORMATS["onnx"]
    int8_by_default = True
    mapped = False
    # Measured as RssAnon with ONNX Runtime 1.31 and CPython 3.11 on x86-64: interpreter, NumPy and engine
    # 21 MiB, E2B's graph of 1,750 nodes 16 MiB, buffers of one step the rest.
    base_bytes = 44 << 20
    decoder = DECODER

    def unsupported(self, config: TextConfig, recipe: Recipe) -> str | None:
        return unsupported(config, recipe)

    def decoder_layout(self, job: ExportJob) -> ExternalData:
        return emit_decoder(job.config, job.recipe, DECODER_DATA).data

    def encoder_file(self, tower: Tower, recipe: Recipe) -> EncoderFile:
        return encoder_file(tower, recipe)

    def has_embedder(self, config: TextConfig) -> bool:
        return not config.tie_word_embeddings

    def kv_cache_bytes(self, job: ExportJob) -> int:
        """Caches, and the rotary tables of every kind of layer."""
        config = job.config
        caches = cache_layouts(config, job.recipe.kv_cache).values()
        rotary = 2 * len(set(config.layer_types)) * job.context * config.head_dim * 2
        return sum(layout.bytes(job.context) for layout in caches) + rotary

    def room_bytes(self, file_bytes: int) -> int:
        return file_bytes

    def stored(self, bundle: Bundle, graph: str) -> dict[str, StoredMatrix]:
        return onnx_matrices(bundle, graph)

    def observed_decoder(self, bundle: Bundle, scratch: Path) -> ObservedDecoder:
        from gemma_edge.export.formats.onnx.onnx_observer import OnnxObserver  # with the engine

        return OnnxObserver(bundle)

    def prepare(self, job: ExportJob, files: SideFiles, facts: Json, target: Path) -> Artifact:
        require("onnx", "export", "--format onnx")
        return OnnxFolder(self, job, files, facts, target)


class OnnxFolder(BundleFolder):
    """A folder with decoder.onnx, its weights, and the tables of rows."""

    def write_decoder(
        self, checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], rounding: Rounding, progress: bool
    ) -> Json:
        config, recipe = self.job.config, self.job.recipe
        scales = measured_kv_scales(checkpoint, recipe.kv_cache, prompts, progress)
        emitted = emit_decoder(config, recipe, DECODER_DATA, scales)
        data, tied = emitted.data, config.tie_word_embeddings
        tables = {"per_layer": (PLE_NAME, PLE, config.ple_scale)}
        if not tied:
            tables["embedding"] = (EMBEDDING_NAME, EMBEDDINGS, config.embed_scale)
        total = sum(t.elements for t in data.tensors)
        total += sum(checkpoint.specs[name].size for name, _, _ in tables.values())
        with ProgressBar("writing weights", total, progress, unit="weights") as bar:
            self.writer.write(DECODER_DATA, lambda f: data.write(f, checkpoint, rounding, bar.advance))
            self.writer.write_bytes(DECODER, serialize(emitted.model))
            layouts = {key: self.write_table(checkpoint, *table, bar) for key, table in tables.items()}
        embedding = head_rows(config, data) if tied else layouts["embedding"]
        return {"embedding": embedding, "per_layer": layouts["per_layer"]}

    def write_table(
        self, checkpoint: Checkpoint, name: str, file: str, scale: float, bar: ProgressBar
    ) -> Json:
        """Writes a table of rows; returns its layout. At 32 bits it keeps the checkpoint's own dtype."""
        spec, recipe = checkpoint.specs[name], self.job.recipe
        precision = recipe.precision(spec)
        total, columns = spec.shape
        step = max(1, TABLE_CHUNK // columns)

        def chunk(start: int) -> NDArray[Any]:
            stop = min(start + step, total)
            if precision.bits != 32:
                return check_magnitude(checkpoint, name, checkpoint.rows(name, start, stop))
            raw = checkpoint.raw_rows(name, start, stop)
            checkpoint.check_finite(name, raw.astype(np.float32, copy=False), start)
            return raw

        chunks = map(chunk, range(0, total, step))
        layout: Json = self.writer.write(
            file,
            lambda f: write_row_table(
                f, chunks, columns, precision, recipe.clip, bar.advance, file=file, scale=scale
            ),
        )
        return layout


def head_rows(config: TextConfig, data: ExternalData) -> Json:
    """The layout of token embeddings inside the tied head's data: no second copy of the table."""
    head = next(t for t in data.tensors if t.weights == (Weight(head_name(config)),))
    rows, columns = head.shape
    layout: Json = {
        "file": data.location,
        "rows": rows,
        "columns": columns,
        "encoding": "float32" if head.scales is None else f"int{head.precision.bits}",
        "data": {"offset": head.data.offset, "stride": head.data.length // rows},
        "scale": config.embed_scale,
    }
    if head.scales is not None:
        layout["group"] = head.precision.group
        layout["scales"] = {"offset": head.scales.offset, "stride": 4 * head.blocks, "dtype": "float32"}
    return layout


FORMAT = OnnxFormat()
