"""Gemma 3n as an `ExportFamily`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from gemma_edge.export.model.gemma3n import gemma3n_text_tensors as text_tensors
from gemma_edge.export.model.gemma3n import gemma3n_towers as towers
from gemma_edge.export.model.tensor_spec import TensorSpec
from gemma_edge.export.model.tower import Json, Tower
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.families.gemma3n_family import GEMMA3N


class Gemma3nExport:
    """Gemma 3n, multimodal and text-only."""

    name = GEMMA3N.name

    def read_config(self, folder: Path) -> Gemma3nConfig:
        return Gemma3nConfig.from_file(folder)

    def tensor_specs(self, config: Gemma3nConfig) -> dict[str, TensorSpec]:
        return text_tensors.tensor_specs(config)

    def unused_names(self, config: Gemma3nConfig) -> set[str]:
        return text_tensors.unused_names(config)

    def tower_of(self, name: str) -> Kind | None:
        return towers.tower_of(name)

    def read_tower(
        self, kind: Kind, data: Json, path: Path, processors: Callable[[str], Json], text: Gemma3nConfig
    ) -> Tower:
        return towers.read_tower(kind, data, path, processors, text)
