"""The model families that can be exported. A new one is a folder in `model/` and a line here."""

from __future__ import annotations

from pathlib import Path

from gemma_edge.export.model.export_family import ExportFamily
from gemma_edge.export.model.gemma3n.gemma3n_export import Gemma3nExport
from gemma_edge.runtime.errors import ConfigError
from gemma_edge.runtime.families.family_registry import family_of
from gemma_edge.runtime.text_files import read_json

EXPORT_FAMILIES: tuple[ExportFamily, ...] = (Gemma3nExport(),)


def export_family(folder: Path) -> ExportFamily:
    """The family of a checkpoint, by its config.json.

    A config.json that no family reads gets the first one, whose `read_config` says what is wrong with it.
    """
    path = folder / "config.json"
    try:
        name = family_of(read_json(path, ConfigError), path).name
    except ConfigError:
        return EXPORT_FAMILIES[0]
    return next(family for family in EXPORT_FAMILIES if family.name == name)
