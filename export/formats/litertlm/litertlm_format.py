"""The format "litertlm" as an object: one file for LiteRT-LM, which our runtime opens too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.checkpoint.side_files import SideFiles
from gemma_edge.export.emit.reference.encoder_weights import token_table
from gemma_edge.export.emit.tflite.tflite_file import TfliteFile
from gemma_edge.export.emit.tflite.tflite_text import emit_decoder
from gemma_edge.export.formats.export_format import Artifact, EncoderFile, ExportJob, Json
from gemma_edge.export.formats.litertlm.litertlm_file import (
    Contents,
    check_header,
    record_agreement,
    write_litertlm,
)
from gemma_edge.export.formats.litertlm.litertlm_sections import (
    model_sections,
    section_types,
)
from gemma_edge.export.formats.litertlm.llm_metadata import LlmFacts, llm_metadata, pad_tokenizer
from gemma_edge.export.formats.observed_decoder import ObservedDecoder
from gemma_edge.export.formats.tflite.litert_facts import LITERT_BASE_BYTES
from gemma_edge.export.formats.tflite.tflite_encoders import GRAPHS, encoder_file, encoder_memory
from gemma_edge.export.formats.tflite.tflite_format import EMBEDDER, PER_LAYER_EMBEDDER, whole_decoder
from gemma_edge.export.formats.tflite.tflite_stored import tflite_matrices
from gemma_edge.export.model.tower import Tower
from gemma_edge.export.progress_bar import ProgressBar
from gemma_edge.export.publish import FileWriter
from gemma_edge.export.weights.kv_scales import measured_kv_scales
from gemma_edge.export.weights.recipe import Recipe
from gemma_edge.export.weights.rounding import NearestRounding, Rounding
from gemma_edge.export.weights.stored_matrix import StoredMatrix
from gemma_edge.runtime.artifacts.artifact_formats import ARTIFACT_FORMATS
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.litertlm_bundle import DECODER, TOKENIZER, TOKENS
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.engines.kv_cache import litert_cache_bytes
from gemma_edge.runtime.families.model_family import TextConfig
from gemma_edge.runtime.install_hint import require


class LitertlmFormat:
    """The `ExportFormat` of LiteRT-LM."""

    runtime = ARTIFACT_FORMATS["litertlm"]
    int8_by_default = True
    mapped = True
    base_bytes = LITERT_BASE_BYTES
    decoder = DECODER

    def unsupported(self, config: TextConfig, recipe: Recipe) -> str | None:
        return None

    def decoder_layout(self, job: ExportJob) -> TfliteFile:
        return emit_decoder(job.config, job.recipe, context=job.context, layout="litertlm")

    def encoder_file(self, tower: Tower, recipe: Recipe) -> EncoderFile:
        return encoder_file(tower, recipe, one_length=True)

    def has_embedder(self, config: TextConfig) -> bool:
        return True

    def kv_cache_bytes(self, job: ExportJob) -> int:
        """Every cache goes in whole and comes out whole."""
        return litert_cache_bytes(job.config, job.context, job.recipe.kv_cache, rings=False)

    def room_bytes(self, file_bytes: int) -> int:
        """The models, and the file made of them."""
        return 2 * file_bytes

    def stored(self, bundle: Bundle, graph: str) -> dict[str, StoredMatrix]:
        return tflite_matrices(bundle.file(graph))

    def observed_decoder(self, bundle: Bundle, scratch: Path) -> ObservedDecoder:
        from gemma_edge.export.formats.tflite.tflite_observer import TfliteObserver  # with the engine

        return TfliteObserver(bundle, scratch)

    def prepare(self, job: ExportJob, files: SideFiles, facts: Json, target: Path) -> Artifact:
        require("litert_lm_builder", "export", "--format litertlm")
        return LitertlmArtifact(job, files, facts, target)


class LitertlmArtifact:
    """A .litertlm on its way: its models are files in the writer's folder until the container holds them."""

    def __init__(self, job: ExportJob, files: SideFiles, facts: Json, target: Path) -> None:
        self.job, self.writer = job, FileWriter(target)
        self.path = self.writer.folder / f"model{FORMAT.runtime.suffix}"
        added = files.tokenizer_files.added_tokens
        tokenizer = pad_tokenizer(files.tokenizer_files.model, added, job.config.vocab_size)
        llm = LlmFacts(
            job.config, files.stop_ids, job.context, files.chat_template, files.sampling, job.towers
        )
        self.types = section_types(job.towers)
        names = [*self.types, TOKENIZER, *([TOKENS] if job.towers else [])]
        manifest = {
            **facts,
            **({"modalities": modality_entries(job.towers)} if job.towers else {}),
            "generation": files.generation,
            "sha256": dict.fromkeys(names, "0" * 64),
        }
        self.contents = Contents(job.config, tokenizer, llm_metadata(llm, tokenizer), manifest)
        check_header(self.contents, self.types.values(), tokens=bool(job.towers))

    def write(
        self, checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], rounding: Rounding, progress: bool
    ) -> None:
        writer = self.writer
        scales = measured_kv_scales(checkpoint, self.job.recipe.kv_cache, prompts, progress)
        sections = model_sections(self.job, whole_decoder(self.job, "litertlm", scales), checkpoint)
        total = sum(tensor.elements for section in sections.values() for tensor in section.model.tensors)
        with ProgressBar("writing weights", total, progress, unit="weights") as bar:
            for name, section in sections.items():
                own = rounding if section.source is checkpoint else NearestRounding(self.job.recipe.clip)
                write = partial(section.model.write, source=section.source, rounding=own)
                writer.write(name, partial(write, progress=bar.advance))
        writer.write_bytes(TOKENIZER, self.contents.tokenizer)
        if self.job.towers:
            tables = [token_table(checkpoint, tower.config) for tower in self.job.towers.values()]
            writer.write_bytes(TOKENS, b"".join(table.astype("<f4").tobytes() for table in tables))
        hashes = {name: record["sha256"] for name, record in writer.records.items()}
        contents = replace(self.contents, manifest={**(self.contents.manifest or {}), "sha256": hashes})
        models = {
            self.types[name]: writer.folder / name for name in (EMBEDDER, PER_LAYER_EMBEDDER, *sections)
        }
        tokens = writer.folder / TOKENS if self.job.towers else None
        write_litertlm(self.path, contents, models, tokens)
        for name in writer.records:
            (writer.folder / name).unlink()

    def record_agreement(self, agreement: Json) -> None:
        record_agreement(self.path, agreement)

    def publish(self) -> Path:
        return self.writer.publish_file(self.path)


def modality_entries(towers: Mapping[Kind, Tower]) -> Json:
    """The manifest's `modalities`: the tables of the encoders' own token ids lie in one file, fp32."""
    entries: Json = {}
    offset = 0
    for kind, tower in towers.items():
        rows, columns = tower.config.vocab_size, tower.config.text_hidden_size
        layout = {
            "file": TOKENS,
            "rows": rows,
            "columns": columns,
            "encoding": "float32",
            "data": {"offset": offset, "stride": 4 * columns},
            "scale": 1.0,
        }
        entries[kind] = tower.entry(GRAPHS[kind], layout, *encoder_memory(tower))
        offset += 4 * rows * columns
    return entries


FORMAT = LitertlmFormat()
