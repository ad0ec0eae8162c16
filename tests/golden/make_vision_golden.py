"""Makes vision.npz: what transformers and timm compute in the image encoder of a tiny synthetic checkpoint.

    python tests/golden/make_vision_golden.py

Weights are not stored: `random_gemma3n_vision.draw` draws the same ones everywhere. Feature maps are (height,
width, channels) fp32. `layout` is JSON: names and shapes of the published encoder's tensors.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))

from gemma_edge.export.synth.synth_checkpoint import synthesize
from support.random_gemma3n_vision import GOLDEN_BLOCKS, Array, random_pixels, transformers_model

OUT = Path(__file__).with_name("vision.npz")


def channels_last(x: torch.Tensor) -> Array:
    array: Array = x[0].detach().numpy().astype(np.float32).transpose(1, 2, 0)
    return array


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        model = transformers_model(synthesize(Path(folder) / "tiny", encoders=True, progress=False).path)
    tower = model.vision_tower.timm_model
    arrays: dict[str, Any] = {}

    def record(name: str, module: torch.nn.Module) -> None:
        def hook(_: torch.nn.Module, inputs: Any, out: torch.Tensor) -> None:
            arrays[f"{name}.in"], arrays[f"{name}.out"] = channels_last(inputs[0].clone()), channels_last(out)

        module.register_forward_hook(hook)

    for stage, index in GOLDEN_BLOCKS:
        record(f"blocks.{stage}.{index}", tower.blocks[stage][index])
    table = model.config.vision_config
    ids = torch.arange(table.vocab_offset, table.vocab_offset + table.vocab_size)
    with torch.no_grad():
        pixels = torch.from_numpy(random_pixels(64))[None]
        arrays["soft_tokens"] = model.get_image_features(pixels).pooler_output[0].numpy()
        arrays["token_table"] = model.embed_vision(input_ids=ids).numpy()
    with torch.device("meta"):
        published = timm.create_model("mobilenetv5_300m_enc")
    arrays["layout"] = json.dumps([[name, list(t.shape)] for name, t in published.state_dict().items()])
    arrays["made_with"] = f"transformers {transformers.__version__}, timm {timm.__version__}"
    np.savez_compressed(OUT, **arrays)
    print(f"{OUT}: {OUT.stat().st_size:,} bytes: {', '.join(arrays)}")


if __name__ == "__main__":
    main()
