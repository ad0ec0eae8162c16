"""`ModelFamily`: how the configs of one family of checkpoints are read, and its default chat template."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_edge.runtime.families.gemma3n_audio_config import AudioConfig
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.families.gemma3n_vision_config import VisionConfig
from gemma_edge.runtime.families.log_mel import LogMel

Json = Mapping[str, Any]
# The configs of all families. What is written against these uses the fields that all of them have.
TextConfig = Gemma3nConfig
PixelsConfig = VisionConfig
LogMelConfig = AudioConfig
EncoderConfig = PixelsConfig | LogMelConfig


@dataclass(frozen=True)
class ModelFamily:
    """One family. Every reader raises ConfigError and takes the path that errors name.

    Attributes:
        name: as the modules of `export.model` have it.
        model_types: values of `model_type` in its config.json.
        text_config: reads a parsed config.json.
        vision_config: reads a parsed config.json and preprocessor_config.json (None if there is none).
        audio_config: reads a parsed config.json.
        log_mel: reads a parsed preprocessor_config.json.
        chat_template: for a checkpoint without one.
    """

    name: str
    model_types: tuple[str, ...]
    text_config: Callable[[Any, Path], Gemma3nConfig]
    vision_config: Callable[[Json, Path, Json | None], VisionConfig]
    audio_config: Callable[[Json, Path], AudioConfig]
    log_mel: Callable[[Json, Path], LogMel]
    chat_template: str
