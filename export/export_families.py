"""The model families that can be exported. A new one is a folder in `model/` and a line here."""

from __future__ import annotations

from pathlib import Path

from gemma_edge.export.model.export_family import ExportFamily
from gemma_edge.export.model.gemma3n.gemma3n_export import GEMMA3N_EXPORT
from gemma_edge.export.model.tensor_spec import TensorSpec
from gemma_edge.export.model.tower import EncoderModel
from gemma_edge.runtime.errors import ConfigError
from gemma_edge.runtime.families.family_registry import family_of
from gemma_edge.runtime.families.model_family import EncoderConfig, TextConfig
from gemma_edge.runtime.files.text_files import read_json

EXPORT_FAMILIES: tuple[ExportFamily, ...] = (GEMMA3N_EXPORT,)


def export_family(folder: Path) -> ExportFamily:
    """The family of a checkpoint, by its config.json.

    A config.json that no family reads gets the first one, whose `read_config` says what is wrong with it.
    """
    path = folder / "config.json"
    try:
        found = family_of(read_json(path, ConfigError), path)
    except ConfigError:
        return EXPORT_FAMILIES[0]
    return next(family for family in EXPORT_FAMILIES if family.runtime is found)


def family_with(config: TextConfig) -> ExportFamily:
    """The family that a parsed config belongs to."""
    return next(family for family in EXPORT_FAMILIES if isinstance(config, family.config_type))


def encoder_model(config: EncoderConfig) -> EncoderModel:
    """The description of the encoder that has this config."""
    encoders = (encoder for family in EXPORT_FAMILIES for encoder in family.encoders.values())
    return next(encoder for encoder in encoders if isinstance(config, encoder.config_type))


def tensor_specs(config: TextConfig) -> dict[str, TensorSpec]:
    """Every tensor that the text model reads, by canonical name, in the order of use."""
    return family_with(config).tensor_specs(config)
