"""Log-mel spectrograms for Gemma 3n's audio encoder, in NumPy.

Follows `transformers.models.gemma3n.feature_extraction_gemma3n`: HTK preemphasis within each frame, a
periodic Hann window, a magnitude (not power) spectrum of twice the frame's length, triangular mel filters on
the HTK scale, and the natural logarithm above a floor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.families.config_fields import Fields, is_number

Array = NDArray[np.float32]
PAD_MULTIPLE = 128  # samples; the default of Gemma3nAudioFeatureExtractor.__call__
MAX_FEATURES, MAX_FRAME_MS, MAX_SAMPLING_RATE = 1024, 1000.0, 384_000  # bounds of what a file may ask for
BLOCK_FRAMES = 512  # frames whose spectrum is in memory at once


@dataclass(frozen=True)
class LogMel:
    """The feature extractor. Fields are those of preprocessor_config.json, with the published values.

    Frequencies are in Hz, lengths in milliseconds. `per_bin_mean` and `per_bin_stddev` normalize each bin.
    """

    feature_size: int = 128
    sampling_rate: int = 16_000
    frame_length_ms: float = 32.0
    hop_length_ms: float = 10.0
    min_frequency: float = 125.0
    max_frequency: float = 7600.0
    preemphasis: float = 0.97
    preemphasis_htk_flavor: bool = True
    fft_overdrive: bool = True
    input_scale_factor: float = 1.0
    mel_floor: float = 1e-5
    per_bin_mean: tuple[float, ...] | None = None
    per_bin_stddev: tuple[float, ...] | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], path: str | Path = "preprocessor_config.json") -> Self:
        """From a parsed preprocessor_config.json; absent fields have their published values.

        Raises:
            ConfigError: a field has the wrong type or size, or asks for dither, which is noise.
        """
        values = Fields({k: v for k, v in data.items() if v is not None}, Path(path))
        if data.get("dither"):
            values.fail("dither", "0 (no noise is added)", data["dither"])
        size = values.size("feature_size", cls.feature_size, maximum=MAX_FEATURES)

        def per_bin(key: str) -> tuple[float, ...] | None:
            def ok(value: Any) -> bool:
                return value is None or (
                    isinstance(value, list) and len(value) == size and all(map(is_number, value))
                )

            value = values.get(key, None, ok, f"{size} numbers or null")
            return None if value is None else tuple(value)

        def flag(key: str, default: bool) -> bool:
            return bool(values.get(key, default, lambda v: isinstance(v, bool), "true or false"))

        made = cls(
            feature_size=size,
            sampling_rate=values.size("sampling_rate", cls.sampling_rate, 1_000, MAX_SAMPLING_RATE),
            frame_length_ms=values.number("frame_length_ms", cls.frame_length_ms, MAX_FRAME_MS),
            hop_length_ms=values.number("hop_length_ms", cls.hop_length_ms, MAX_FRAME_MS),
            min_frequency=values.number("min_frequency", cls.min_frequency),
            max_frequency=values.number("max_frequency", cls.max_frequency),
            preemphasis=float(
                values.get("preemphasis", cls.preemphasis, lambda v: is_number(v) and v >= 0, "0 or more")
            ),
            preemphasis_htk_flavor=flag("preemphasis_htk_flavor", cls.preemphasis_htk_flavor),
            fft_overdrive=flag("fft_overdrive", cls.fft_overdrive),
            input_scale_factor=values.number("input_scale_factor", cls.input_scale_factor),
            mel_floor=values.number("mel_floor", cls.mel_floor),
            per_bin_mean=per_bin("per_bin_mean"),
            per_bin_stddev=per_bin("per_bin_stddev"),
        )
        if made.frame_length < 2 or made.hop_length < 1:
            values.fail("frame_length_ms, hop_length_ms", "samples in a frame and in a hop", "none")
        if made.min_frequency >= made.max_frequency:
            values.fail("max_frequency", f"above min_frequency = {made.min_frequency:g}", made.max_frequency)
        return made

    @property
    def frame_length(self) -> int:
        """Samples in a frame."""
        return round(self.sampling_rate * self.frame_length_ms / 1000)

    @property
    def hop_length(self) -> int:
        """Samples from one frame to the next."""
        return round(self.sampling_rate * self.hop_length_ms / 1000)

    @property
    def fft_length(self) -> int:
        length = 1 << math.ceil(math.log2(self.frame_length))
        return 2 * length if self.fft_overdrive else length

    @property
    def shortest(self) -> int:
        """Samples of the shortest clip that has a frame; padding makes up for the rest of it."""
        # One sample more than a frame: preemphasis looks at a neighbour.
        return (self.frame_length // PAD_MULTIPLE) * PAD_MULTIPLE + 1

    def frames(self, samples: int) -> int:
        """Frames of a clip of `samples` samples."""
        padded = -(-samples // PAD_MULTIPLE) * PAD_MULTIPLE
        return max(0, (padded - self.frame_length - 1) // self.hop_length + 1)

    @cached_property
    def window(self) -> Array:
        """(frame_length,): a periodic Hann window."""
        phase = 2 * np.pi * np.arange(self.frame_length, dtype=np.float32) / self.frame_length
        return (0.5 * (1 - np.cos(phase))).astype(np.float32)

    @cached_property
    def filters(self) -> NDArray[np.float64]:
        """(fft_length / 2 + 1, feature_size): triangles between equally spaced points of the mel scale."""
        bins = np.arange(self.fft_length // 2 + 1, dtype=np.float32) * (self.sampling_rate / self.fft_length)
        low, high = (2595 * math.log10(1 + f / 700) for f in (self.min_frequency, self.max_frequency))
        points = 700 * (10 ** (np.linspace(low, high, self.feature_size + 2) / 2595) - 1)
        widths = np.diff(points)
        distances = points[None, :] - bins[:, None]
        falling, rising = -distances[:, :-2] / widths[:-1], distances[:, 2:] / widths[1:]
        return np.maximum(0.0, np.minimum(falling, rising))

    def __call__(self, samples: Array) -> tuple[Array, NDArray[np.bool_]]:
        """Log-mel of one clip.

        Args:
            samples: (n,) at `sampling_rate`, in [-1, 1].

        Returns:
            (frames, feature_size) natural logarithms; (frames,) True where a frame begins within the clip.

        Raises:
            ValueError: fewer than `shortest` samples: there would be no frame.
        """
        samples = np.asarray(samples, np.float32)
        if samples.ndim != 1 or len(samples) < self.shortest:
            raise ValueError(f"{self.shortest} samples or more are needed, got shape {samples.shape}")
        count = self.frames(len(samples))
        mask = np.arange(count) * self.hop_length < len(samples)
        padded = np.pad(samples, (0, -len(samples) % PAD_MULTIPLE))
        if self.input_scale_factor != 1.0:
            padded = padded * np.float32(self.input_scale_factor)
        views = np.lib.stride_tricks.sliding_window_view(padded, self.frame_length + 1)[:: self.hop_length]
        out = np.empty((count, self.feature_size), np.float32)
        for row in range(0, count, BLOCK_FRAMES):
            out[row : row + BLOCK_FRAMES] = self._spectrum(views[row : row + BLOCK_FRAMES])
        return out, mask

    def _spectrum(self, views: Array) -> NDArray[np.float64]:
        """(frames, frame_length + 1) samples -> (frames, feature_size)."""
        if self.preemphasis > 0 and self.preemphasis_htk_flavor:
            first = views[:, :1] * (1 - self.preemphasis)
            frames = np.concatenate([first, views[:, 1:-1] - self.preemphasis * views[:, :-2]], axis=1)
        elif self.preemphasis > 0:
            frames = views[:, 1:] - self.preemphasis * views[:, :-1]
        else:
            frames = views[:, :-1]
        magnitudes = np.abs(np.fft.rfft(frames * self.window, n=self.fft_length, axis=1))
        mel = np.log(np.maximum(magnitudes @ self.filters, self.mel_floor))
        if self.per_bin_mean is not None:
            mel = mel - np.array(self.per_bin_mean)
        if self.per_bin_stddev is not None:
            mel = mel / np.array(self.per_bin_stddev)
        return mel


def log_mel(samples: Array) -> tuple[Array, NDArray[np.bool_]]:
    """`LogMel` with the published values: (n,) at 16 kHz -> (frames, 128) and (frames,)."""
    return LogMel()(samples)
