"""Modalities without encoders behind them, for tests of what is around an encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemma_edge.runtime.artifacts.modalities import AudioModality, Modality, VisionModality
from gemma_edge.runtime.families.gemma3n_audio_config import AudioConfig
from gemma_edge.runtime.families.gemma3n_vision_config import VisionConfig
from gemma_edge.runtime.families.log_mel import LogMel

IMAGE_TOKENS, AUDIO_TOKENS, IMAGE_SIZE = 4, 188, 32


def modalities(ids: dict[str, int], audio_tokens: int = AUDIO_TOKENS) -> dict[str, Modality]:
    """Images of 4 tokens, clips of `audio_tokens`; ids by the names of `Gemma3nProcessor`'s tokens."""
    vision = VisionConfig.from_dict(
        {
            "vision_config": {"model_args": {"msfa_output_resolution": 2}, "vocab_offset": ids["eoi"]},
            "vision_soft_tokens_per_image": IMAGE_TOKENS,
            "text_config": {},
        },
        preprocessor={"size": {"height": IMAGE_SIZE, "width": IMAGE_SIZE}},
    )
    audio = AudioConfig.from_dict(
        {
            "audio_config": {"vocab_offset": ids["eoa"]},
            "audio_soft_tokens_per_image": audio_tokens,
            "text_config": {},
        }
    )

    def common(kind: str, soft: str, begin: str, end: str, count: int) -> dict[str, Any]:
        return {
            "kind": kind,
            "graph": f"{kind}.onnx",
            "soft_tokens": count,
            "soft_id": ids[soft],
            "begin_id": ids[begin],
            "end_id": ids[end],
            "tokens_file": Path(f"{kind}_tokens.bin"),
            "tokens": {"rows": 2, "columns": 4},
            "first_id": ids[end],
            "resident": 0,
            "activations": 0,
        }

    return {
        "vision": VisionModality(**common("vision", "image", "boi", "eoi", IMAGE_TOKENS), config=vision),
        "audio": AudioModality(
            **common("audio", "audio", "boa", "eoa", audio_tokens), config=audio, log_mel=LogMel()
        ),
    }
