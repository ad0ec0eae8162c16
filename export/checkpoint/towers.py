"""The encoders of images and audio: what a checkpoint says of them, and their part of a bundle.

A checkpoint has an encoder when config.json describes it and its tensors are there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.emit.reference.reference_text import WeightSource
from gemma_edge.export.model.gemma3n import gemma3n_audio_tensors as audio_tensors
from gemma_edge.export.model.gemma3n import gemma3n_vision_tensors as vision_tensors
from gemma_edge.export.model.gemma3n.gemma3n_text_tensors import TensorSpec
from gemma_edge.runtime.artifacts.modalities import KINDS, Kind
from gemma_edge.runtime.families.config_fields import Fields, is_int
from gemma_edge.runtime.families.gemma3n_audio_config import AudioConfig
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.families.gemma3n_vision_config import VisionConfig
from gemma_edge.runtime.families.log_mel import LogMel

Json = dict[str, Any]

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


@dataclass(frozen=True)
class Encoder:
    """An encoder as a checkpoint describes it.

    Attributes:
        preprocessor: what makes its input of pixels or samples, as the manifest has it.
        soft_id, begin_id, end_id: token ids, as in `gemma_edge.runtime.artifacts.modalities.Modality`.
    """

    kind: Kind
    config: VisionConfig | AudioConfig
    preprocessor: Json
    soft_id: int
    begin_id: int
    end_id: int

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Its tensors, by name."""
        if isinstance(self.config, VisionConfig):
            return vision_tensors.vision_specs(self.config)
        return audio_tensors.audio_specs(self.config)

    def token_table(self, source: WeightSource) -> NDArray[np.float32]:
        """(vocab_size, text hidden): rows that stand for the modality's own token ids."""
        from gemma_edge.export.emit.reference.audio_folding import audio_token_table
        from gemma_edge.export.emit.reference.reference_vision import vision_token_table

        if isinstance(self.config, VisionConfig):
            return vision_token_table(source, self.config)
        return audio_token_table(source, self.config)

    def entry(self, graph: str, tokens: Json, resident: int, activations: int) -> Json:
        """The manifest's account of it.

        Args:
            graph: name of its file.
            tokens: the layout of its token table.
            resident, activations: bytes, see `Modality`.
        """
        size = {"size": self.config.image_size} if isinstance(self.config, VisionConfig) else {}
        return {
            "graph": graph,
            "config": self.config.to_dict(),
            "preprocessor": self.preprocessor,
            **size,
            "soft_tokens": self.config.soft_tokens,
            "soft_id": self.soft_id,
            "begin_id": self.begin_id,
            "end_id": self.end_id,
            "tokens": {**tokens, "first_id": self.config.vocab_offset},
            "memory": {"resident": resident, "activations": activations},
        }


def read_encoder(
    kind: Kind, data: Json, path: Path, processors: Callable[[str], Json], text: Gemma3nConfig
) -> Encoder:
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
        return Encoder(kind, vision, vision.to_dict()["image_processor"], **ids)
    section, name = _section(processors, "feature_extractor")
    log_mel = LogMel.from_dict(section, path.with_name(name))
    audio = AudioConfig.from_dict(data, path)
    if log_mel.feature_size != audio.input_feat_size:
        expected = f"{audio.input_feat_size}, as in config.json"
        Fields({}, path.with_name(name)).fail("feature_size", expected, log_mel.feature_size)
    return Encoder(kind, audio, _json(asdict(log_mel)), **ids)


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
