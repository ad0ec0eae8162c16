"""Checkpoints that an export refuses."""

from __future__ import annotations

import json
from pathlib import Path

PREFIX = "model.language_model."


def poke(checkpoint: Path, name: str, element: int, bits: int = 0x7FC0) -> None:
    """Overwrites one bf16 weight; the default is a NaN."""
    path = checkpoint / "model.safetensors"
    raw = bytearray(path.read_bytes())
    length = int.from_bytes(raw[:8], "little")
    start = 8 + length + json.loads(raw[8 : 8 + length])[PREFIX + name]["data_offsets"][0] + 2 * element
    raw[start : start + 2] = bits.to_bytes(2, "little")
    path.write_bytes(raw)
