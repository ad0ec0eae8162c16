"""The model families: one line each, found by the `model_type` of a config.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gemma_edge.runtime.errors import ConfigError
from gemma_edge.runtime.families.gemma3n_family import GEMMA3N
from gemma_edge.runtime.families.model_family import ModelFamily

FAMILIES: tuple[ModelFamily, ...] = (GEMMA3N,)


def family_of(data: Mapping[str, Any], path: str | Path = "config.json") -> ModelFamily:
    """The family of a parsed config.json, multimodal (`text_config` inside) or text-only.

    Args:
        path: names the file in errors.

    Raises:
        ConfigError: no family has its `model_type`.
    """
    text = data.get("text_config")
    model_type = (text if isinstance(text, Mapping) else data).get("model_type", data.get("model_type"))
    for family in FAMILIES:
        if model_type in family.model_types:
            return family
    known = " or ".join(name for family in FAMILIES for name in family.model_types)
    raise ConfigError(Path(path), "model_type", known, model_type)
