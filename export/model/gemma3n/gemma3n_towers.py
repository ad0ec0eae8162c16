"""Gemma 3n's encoders of images and audio, read from a checkpoint's config files.

A checkpoint has an encoder if config.json describes it and its tensors are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gemma_edge.export.model.gemma3n import gemma3n_audio_tensors as audio_tensors
from gemma_edge.export.model.gemma3n import gemma3n_vision_tensors as vision_tensors
from gemma_edge.export.model.tower import Json, Tower
from gemma_edge.runtime.artifacts.modalities import KINDS, Kind
from gemma_edge.runtime.families.config_fields import Fields, is_int
from gemma_edge.runtime.families.gemma3n_audio_config import AudioConfig
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.families.gemma3n_vision_config import VisionConfig
from gemma_edge.runtime.families.log_mel import LogMel

# The first parts of the names of an encoder's tensors, below `model.`.
TOWERS: dict[Kind, tuple[str, str]] = {
    "vision": (vision_tensors.TOWER.split(".")[0], vision_tensors.EMBEDDER.rstrip(".")),
    "audio": (audio_tensors.TOWER.rstrip("."), audio_tensors.EMBEDDER.rstrip(".")),
}
# Fields of config.json: soft token, begin and end; with the values that transformers has for absent ones.
IDS: dict[Kind, dict[str, tuple[str, int]]] = {
    "vision": {
        "soft_id": ("image_token_id", 262_145),
        "begin_id": ("boi_token_id", 255_999),
        "end_id": ("eoi_token_id", 262_144),
    },
    "audio": {
        "soft_id": ("audio_token_id", 262_273),
        "begin_id": ("boa_token_id", 256_000),
        "end_id": ("eoa_token_id", 262_272),
    },
}


def read_tower(
    kind: Kind, data: Json, path: Path, processors: Callable[[str], Json], text: Gemma3nConfig
) -> Tower:
    """From a checkpoint's config files.

    Args:
        data: the parsed config.json at `path`, which has the member `vision_config` or `audio_config`.
        processors: the parsed side file of a name, {} where there is none.

    Raises:
        ConfigError: a field is malformed or unsupported.
    """
    fields = Fields(data, path)
    ids = {}
    for field, (key, default) in IDS[kind].items():
        expected = f"a token id below vocab_size = {text.vocab_size}"
        ids[field] = fields.get(key, default, lambda v: is_int(v) and 0 <= v < text.vocab_size, expected)
    if kind == "vision":
        section, _ = _section(processors, "image_processor")
        vision = VisionConfig.from_dict(data, path, section or None)
        specs = vision_tensors.vision_specs(vision)
        return Tower(kind, vision, specs, vision.to_dict()["image_processor"], **ids)
    section, name = _section(processors, "feature_extractor")
    log_mel = LogMel.from_dict(section, path.with_name(name))
    audio = AudioConfig.from_dict(data, path)
    if log_mel.feature_size != audio.input_feat_size:
        expected = f"{audio.input_feat_size}, as in config.json"
        Fields({}, path.with_name(name)).fail("feature_size", expected, log_mel.feature_size)
    return Tower(kind, audio, audio_tensors.audio_specs(audio), _json(asdict(log_mel)), **ids)


def _section(processors: Callable[[str], Json], key: str) -> tuple[Json, str]:
    """The part of the processors' files that is about one of them, and the name of the file it is in.

    Newer ones are in processor_config.json, each under its key; others in preprocessor_config.json, all in
    one, and processor_config.json, if there is one, says nothing about them.
    """
    for name in ("processor_config.json", "preprocessor_config.json"):
        if isinstance(section := processors(name).get(key), dict):
            return section, name
    return processors(name), name


def _json(values: Mapping[str, Any]) -> Json:
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def tower_of(name: str) -> Kind | None:
    """Whose tensor a name below `model.` is: an encoder's, or none of them."""
    first = name.partition(".")[0]
    return next((kind for kind in KINDS if first in TOWERS[kind]), None)
