"""What a model family gives the exporter: its config, its tensors and its encoders.

A family is a folder beside this file with an object of this protocol, and a line in `export_families.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from gemma_edge.export.model.tensor_spec import TensorSpec
from gemma_edge.export.model.tower import Json, Tower
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig


class ExportFamily(Protocol):
    """The exporter's half of a model family; `name` is that of the runtime's half."""

    @property
    def name(self) -> str: ...

    def read_config(self, folder: Path) -> Gemma3nConfig:
        """The config of the text model.

        Raises:
            ConfigError: config.json is missing, malformed or unsupported.
        """

    def tensor_specs(self, config: Gemma3nConfig) -> dict[str, TensorSpec]:
        """Every tensor that the text model reads, by canonical name, in the order of use."""

    def unused_names(self, config: Gemma3nConfig) -> set[str]:
        """Tensors that a checkpoint may hold although no layer reads them."""

    def tower_of(self, name: str) -> Kind | None:
        """The encoder that a tensor below `model.` belongs to, if any."""

    def read_tower(
        self, kind: Kind, data: Json, path: Path, processors: Callable[[str], Json], text: Gemma3nConfig
    ) -> Tower:
        """An encoder that config.json describes.

        Args:
            data: the parsed config.json at `path`.
            processors: the parsed side file of a name, {} if it is missing.

        Raises:
            ConfigError: a field is malformed or unsupported.
        """
