"""Gemma 3n's encoders of images and audio: their descriptions, and their configs read from a checkpoint.

A checkpoint has an encoder if config.json describes it and its tensors are stored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from gemma_edge.export.model.gemma3n import gemma3n_audio as audio
from gemma_edge.export.model.gemma3n import gemma3n_audio_tensors as audio_tensors
from gemma_edge.export.model.gemma3n import gemma3n_vision as vision
from gemma_edge.export.model.gemma3n import gemma3n_vision_tensors as vision_tensors
from gemma_edge.export.model.gemma3n import modality_embedder as embedder
from gemma_edge.export.model.ops import BaseOps, Weight, Weights
from gemma_edge.export.model.tower import EncoderModel, Json, Tower
from gemma_edge.export.model.weight_source import WeightSource
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.families.config_fields import Fields, is_int
from gemma_edge.runtime.families.gemma3n_audio_config import RMS_NORM_EPS as AUDIO_EPS
from gemma_edge.runtime.families.gemma3n_audio_config import AudioConfig
from gemma_edge.runtime.families.gemma3n_vision_config import RMS_NORM_EPS as VISION_EPS
from gemma_edge.runtime.families.gemma3n_vision_config import VisionConfig
from gemma_edge.runtime.families.log_mel import LogMel
from gemma_edge.runtime.families.model_family import EncoderConfig, TextConfig


def token_table(
    prefix: str, ops: BaseOps[Any], source: WeightSource, config: EncoderConfig, first: int
) -> Any:
    """See `EncoderModel`; `prefix` is that of the embedder."""
    rows = source.rows(prefix + embedder.TABLE, first, config.vocab_size)
    return embedder.hard_tokens(ops, Weights(prefix), rows)


def fold_audio(ops: BaseOps[Any], source: WeightSource, config: AudioConfig, name: str) -> Any:
    """A weight-only part of the audio encoder; see `EncoderModel`."""
    layer = audio_tensors.layer_of(name)
    if name.endswith(audio_tensors.QUERY_SCALE):
        return audio.query_scale(config, source.read(layer + audio_tensors.PER_DIM_SCALE))
    if name.endswith(audio_tensors.POSITIONS):
        return ops.linear(audio.relative_positions(config), Weight(layer + audio_tensors.POSITION_PROJECTION))
    # Whatever is padded has the embedding of the last id of the vocabulary, an audio one.
    return token_table(audio_tensors.EMBEDDER, ops, source, config, config.vocab_size - 1)[0]


ENCODERS: dict[Kind, EncoderModel] = {
    "vision": EncoderModel(
        name="gemma3n_vision",
        config_type=VisionConfig,
        inputs="pixels",
        eps=VISION_EPS,
        prefixes=(vision_tensors.TOWER.split(".")[0], vision_tensors.EMBEDDER.rstrip(".")),
        specs=vision_tensors.vision_specs,
        graph_specs=vision_tensors.vision_specs,
        soft_tokens=vision.soft_tokens,
        largest_map=vision_tensors.largest_map,
        token_table=partial(token_table, vision_tensors.EMBEDDER),
    ),
    "audio": EncoderModel(
        name="gemma3n_audio",
        config_type=AudioConfig,
        inputs="log_mel",
        eps=AUDIO_EPS,
        prefixes=(audio_tensors.TOWER.rstrip("."), audio_tensors.EMBEDDER.rstrip(".")),
        specs=audio_tensors.audio_specs,
        graph_specs=audio_tensors.folded_specs,
        soft_tokens=audio.soft_tokens,
        largest_map=audio_tensors.largest_map,
        token_table=partial(token_table, audio_tensors.EMBEDDER),
        fold=fold_audio,
    ),
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
    kind: Kind, data: Json, path: Path, processors: Callable[[str], Json], text: TextConfig
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
        config = VisionConfig.from_dict(data, path, section or None)
        processor, size = config.to_dict()["image_processor"], config.image_size
        return Tower(kind, ENCODERS[kind], config, processor, size, **ids)
    section, name = _section(processors, "feature_extractor")
    log_mel = LogMel.from_dict(section, path.with_name(name))
    heard = AudioConfig.from_dict(data, path)
    if log_mel.feature_size != heard.input_feat_size:
        expected = f"{heard.input_feat_size}, as in config.json"
        Fields({}, path.with_name(name)).fail("feature_size", expected, log_mel.feature_size)
    return Tower(kind, ENCODERS[kind], heard, _json(asdict(log_mel)), None, **ids)


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
