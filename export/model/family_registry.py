"""The model families. A new one is a folder beside this file and a line here."""

from __future__ import annotations

from pathlib import Path

from gemma_edge.export.model.gemma3n.gemma3n_family import Gemma3nFamily
from gemma_edge.export.model.model_family import ModelFamily
from gemma_edge.runtime.errors import ConfigError
from gemma_edge.runtime.text_files import read_json

FAMILIES: tuple[ModelFamily, ...] = (Gemma3nFamily(),)


def family_of(folder: Path) -> ModelFamily:
    """The family of a checkpoint, by the `model_type` of its config.json.

    A config.json that no family reads gets the first one, whose `read_config` says what is wrong with it.
    """
    try:
        data = read_json(folder / "config.json", ConfigError)
    except ConfigError:
        return FAMILIES[0]
    text = data.get("text_config")
    inner = text if isinstance(text, dict) else data
    model_type = inner.get("model_type", data.get("model_type"))
    return next((family for family in FAMILIES if model_type in family.model_types), FAMILIES[0])
