"""Odd clips at 16 kHz, and files that hold them."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
RATE = 16_000


def odd_clips() -> dict[str, Array]:
    """Twenty clips: lengths around every boundary, and signals around every edge of the arithmetic."""
    rng = np.random.default_rng(7)
    time = np.arange(8_000) / RATE

    def noise(count: int, level: float = 0.1) -> NDArray[np.float64]:
        return level * rng.standard_normal(count)

    speech = noise(24_000) * (1 + np.sin(2 * np.pi * 4 * np.arange(24_000) / RATE))
    clips = {
        "shortest": noise(513),
        "one_sample_more": noise(514),
        "last_that_needs_padding": noise(639),
        "multiple_of_128": noise(640),
        "one_after_it": noise(641),
        "second_frame": noise(700),
        "prime": noise(7919),
        "thirty_seconds": noise(480_000),
        "a_sample_less": noise(479_999),
        "silence": np.zeros(4_000),
        "tone": 0.5 * np.sin(2 * np.pi * 1_000 * time),
        "tone_of_a_bin": np.sin(2 * np.pi * RATE / 1024 * 64 * time),
        "sweep": 0.3 * np.sin(2 * np.pi * (50 + 7_000 * time) * time),
        "constant": np.full(3_000, 0.25),
        "impulse": np.eye(1, 5_000, 2_500)[0],
        "last_sample_alone": np.eye(1, 5_000, 4_999)[0],
        "clipped": np.sign(noise(6_000)),
        "faint": noise(6_000, 1e-7),
        "louder_than_full_scale": noise(6_000, 50.0),
        "speech_like": speech,
    }
    return {name: samples.astype(np.float32) for name, samples in clips.items()}


def as_integers(samples: Array, width: int) -> bytes:
    """PCM of `width` bytes a sample, as WAV has it."""
    scaled = np.clip(
        np.round(samples.astype(np.float64) * 2 ** (8 * width - 1)), -(2 ** (8 * width - 1)), None
    )
    integers = np.minimum(scaled, 2 ** (8 * width - 1) - 1).astype("<i8")
    if width == 1:
        integers = integers + 128
    return integers.reshape(-1, 1).view(np.uint8)[:, :width].tobytes()


def write_wav(path: Path, samples: Array, *, rate: int = RATE, width: int = 2, channels: int = 1) -> Path:
    """`samples`: (n,), the same in every channel, or (n, channels)."""
    every = samples if samples.ndim == 2 else np.repeat(samples[:, None], channels, axis=1)
    with wave.open(str(path), "wb") as file:
        file.setnchannels(every.shape[1])
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(as_integers(every.reshape(-1), width))
    return path
