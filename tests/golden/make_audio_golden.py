"""Makes audio.npz: what `transformers` computes of a few clips, and inside a small random audio encoder.

    python tests/golden/make_audio_golden.py

`clip.NAME` are samples, i16; `features.NAME` and `mask.NAME` what Gemma3nAudioFeatureExtractor makes of
them divided by 32,768. One pass of the encoder is recorded block by block, as `BLOCK.in` and `BLOCK.out`,
(rows, width) or, inside the subsampling, (time, frequency, channels). Its weights are `weight.NAME`, `config`
is JSON.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import Gemma3nAudioFeatureExtractor

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.audio_clips import odd_clips
from support.random_gemma3n_audio import (
    SMALL,
    TransformersAudio,
    audio_config,
    first,
    random_features,
    random_source,
)

OUT = Path(__file__).with_name("audio.npz")
FRAMES, VALID = 150, 118  # ten soft tokens, two of them padding
CLIPS = ("one_after_it", "tone", "last_sample_alone", "faint")
BLOCKS = {
    "feed_forward": "conformer.0.ffw_layer_start",
    "attention": "conformer.0.attention",
    "light_convolution": "conformer.0.lconv1d",
    "conformer_block": "conformer.1",
    "subsample": "subsample_conv_projection",
}


def main() -> None:
    arrays: dict[str, Any] = {
        "config": json.dumps(SMALL),
        "made_with": f"transformers {transformers.__version__}",
    }
    extractor = Gemma3nAudioFeatureExtractor()
    for name in CLIPS:
        samples = np.clip(np.round(odd_clips()[name] * 32_768), -32_768, 32_767).astype(np.int16)
        made = extractor((samples / np.float32(32_768)).astype(np.float32), return_tensors="np")
        arrays[f"clip.{name}"] = samples
        arrays[f"features.{name}"] = made["input_features"][0]
        arrays[f"mask.{name}"] = made["input_features_mask"][0]

    source = random_source(audio_config())
    model = TransformersAudio(source)
    arrays |= {f"weight.{name}": array for name, array in source.weights.items()}

    def record(block: str) -> Any:
        def hook(_: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
            arrays[f"{block}.in"], arrays[f"{block}.out"] = inputs[0][0].numpy(), output[0].numpy()

        return hook

    for block, path in BLOCKS.items():
        model.tower.get_submodule(path).register_forward_hook(record(block))
    norm = model.tower.subsample_conv_projection.conv_0.norm
    norm.register_forward_hook(record("cumulative_norm"))
    arrays["features"] = random_features(source.audio, FRAMES)
    arrays["mask"] = first(VALID, FRAMES)
    arrays["soft_tokens"] = model.soft_tokens(arrays["features"], arrays["mask"])
    arrays["hard_tokens"] = model.hard_tokens()
    np.savez_compressed(OUT, **arrays)
    print(f"{OUT}: {OUT.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
