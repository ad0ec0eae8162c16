"""Writes an artifact that is a folder with a manifest, file by file."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.checkpoint.side_files import SideFiles
from gemma_edge.export.emit.reference.encoder_weights import FoldedWeights, token_table
from gemma_edge.export.formats.export_format import ExportFormat, ExportJob, Json
from gemma_edge.export.model.tower import Tower
from gemma_edge.export.progress_bar import ProgressBar
from gemma_edge.export.publish import BundleWriter
from gemma_edge.export.weights.recipe import FP32
from gemma_edge.export.weights.rounding import NearestRounding, Rounding
from gemma_edge.export.weights.row_table_writer import write_row_table
from gemma_edge.runtime.artifacts.modalities import Kind

TOKENIZER, TEMPLATE, GENERATION = "tokenizer.model", "chat_template.jinja", "generation_config.json"
TOKENS: dict[Kind, str] = {"vision": "vision_tokens.bin", "audio": "audio_tokens.bin"}


class BundleFolder(ABC):
    """The `Artifact` of a format whose artifact is a folder; subclasses write the decoder."""

    def __init__(
        self, format: ExportFormat, job: ExportJob, files: SideFiles, facts: Json, target: Path
    ) -> None:
        self.format, self.job, self.files, self.facts = format, job, files, facts
        self.writer = BundleWriter(target)
        self.path = self.writer.folder
        self.manifest: Json = {}

    @abstractmethod
    def write_decoder(
        self, checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], rounding: Rounding, progress: bool
    ) -> Json:
        """Writes decoder and tables; returns the manifest's `tables`: the layout of each table."""

    def write(
        self, checkpoint: Checkpoint, prompts: Sequence[Sequence[int]], rounding: Rounding, progress: bool
    ) -> None:
        """Writes every file, and the manifest last."""
        self.write_side_files()
        tables = self.write_decoder(checkpoint, prompts, rounding, progress)
        modalities = self.write_encoders(checkpoint, progress)
        self.manifest = {
            **self.facts,
            "config": self.job.config.to_dict(),
            "tables": tables,
            "added_tokens": self.files.tokenizer_files.added_tokens,
            **({"modalities": modalities} if modalities else {}),
        }
        self.writer.write_manifest(self.manifest)

    def write_side_files(self) -> None:
        """Writes tokenizer, chat template and sampling defaults."""
        self.writer.write_bytes(TOKENIZER, self.files.tokenizer_files.model)
        if self.files.chat_template is not None:
            self.writer.write_bytes(TEMPLATE, self.files.chat_template.encode())
        if self.files.generation:
            text = json.dumps(self.files.generation, indent=1) + "\n"
            self.writer.write_bytes(GENERATION, text.encode())

    def write_encoders(self, checkpoint: Checkpoint, progress: bool) -> Json:
        """Writes every encoder and the rows of its own token ids; returns the manifest's `modalities`."""
        if not self.job.towers:
            return {}
        recipe = self.job.recipe
        files = {kind: self.format.encoder_file(tower, recipe) for kind, tower in self.job.towers.items()}
        total = sum(tensor.elements for file in files.values() for tensor in file.layout.tensors)
        modalities: Json = {}
        with ProgressBar("writing encoders", total, progress, unit="weights") as bar:
            for kind, file in files.items():
                tower = self.job.towers[kind]
                source, nearest = FoldedWeights(checkpoint, tower.config), NearestRounding(recipe.clip)
                file.write(self.writer, source, nearest, bar.advance)
                tokens = self.write_tokens(tower, checkpoint)
                modalities[kind] = tower.entry(file.graph, tokens, file.resident, file.activations)
        return modalities

    def write_tokens(self, tower: Tower, checkpoint: Checkpoint) -> Json:
        """Writes the rows of a modality's own token ids, fp32; returns their layout."""
        table, file = token_table(checkpoint, tower.config), TOKENS[tower.kind]
        layout: Json = self.writer.write(
            file, lambda f: write_row_table(f, [table], table.shape[1], FP32, file=file)
        )
        return layout

    def record_agreement(self, agreement: Json) -> None:
        self.writer.write_manifest({**self.manifest, "agreement": agreement})

    def publish(self) -> Path:
        return self.writer.publish()
