"""Gemma 3n as a `ModelFamily`."""

from __future__ import annotations

from gemma_edge.runtime.families.gemma3n_audio_config import AudioConfig
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.families.gemma3n_template import GEMMA3N_TEMPLATE
from gemma_edge.runtime.families.gemma3n_vision_config import VisionConfig
from gemma_edge.runtime.families.log_mel import LogMel
from gemma_edge.runtime.families.model_family import ModelFamily

GEMMA3N = ModelFamily(
    name="gemma3n",
    model_types=("gemma3n", "gemma3n_text"),
    text_config=Gemma3nConfig.from_dict,
    vision_config=VisionConfig.from_dict,
    audio_config=AudioConfig.from_dict,
    log_mel=LogMel.from_dict,
    chat_template=GEMMA3N_TEMPLATE,
)
