"""Writes the checkpoint folder: bf16 weights under published names, and the side files."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def write_checkpoint(model: Any, side: Path, folder: Path) -> None:
    """A folder that `transformers` and gemma-edge read; `side` has the files beside the weights."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(side, folder)
    saved = {name: weight for name, weight in model.state_dict().items() if name != "lm_head.weight"}
    halves = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in saved.items()}
    save_file(halves, folder / "model.safetensors", metadata={"format": "pt"})
