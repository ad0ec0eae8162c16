"""What it takes to see and to hear: an encoder's load, the time of one image or of the longest clip, memory.

Noise at the encoder's own size: an encoder's work depends on no pixel and no sample. Each is what the runtime
does for an attachment that is read already, the log-mel of a clip included.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.benchmarks.machine.memory import PeakSampler
from gemma_edge.benchmarks.records.measurement import timed

if TYPE_CHECKING:  # importing the runtime is part of what is measured
    from gemma_edge.runtime.artifacts.bundle import Bundle
    from gemma_edge.runtime.artifacts.modalities import Modality
    from gemma_edge.runtime.media.media_encoder import MediaEncoder

Json = dict[str, Any]
INTERVAL = 0.01  # seconds between samples of memory: an activation lives for a few of them
NOISE = 0.1  # standard deviation of samples, of full scale: a voice nearby


@dataclass(frozen=True)
class EncoderRun:
    """One encoder and what it took.

    Attributes:
        encoder: "vision" or "audio".
        pixels: height and width of the image; 0 for audio.
        seconds: length of the clip; 0 for an image.
        soft_tokens: rows that come of it.
        first_load_s: the first load in this process, with the page cache as it was; LiteRT packs weights in
            it if it never did.
        load_s: the second, after the first was released.
        samples_ns: of each repetition.
        peak_rss_anon, peak_rss_file, peak_rss: bytes of the process, from the first load to the last
            repetition.
    """

    encoder: str
    pixels: int
    seconds: float
    soft_tokens: int
    first_load_s: float
    load_s: float
    samples_ns: tuple[int, ...]
    peak_rss_anon: int
    peak_rss_file: int
    peak_rss: int

    @property
    def test(self) -> str:
        """ "image 768x768", "audio 30 s"."""
        return f"audio {self.seconds:g} s" if self.seconds else f"image {self.pixels}x{self.pixels}"

    @property
    def median_s(self) -> float:
        return statistics.median(self.samples_ns) / 1e9

    @property
    def real_time(self) -> float | None:
        """Seconds of sound for each second of encoding; None for an image."""
        return self.seconds / self.median_s if self.seconds else None

    def to_dict(self) -> Json:
        deviation = statistics.stdev(self.samples_ns) if len(self.samples_ns) > 1 else 0.0
        return {
            "encoder": self.encoder,
            "test": self.test,
            "pixels": self.pixels,
            "seconds": self.seconds,
            "soft_tokens": self.soft_tokens,
            "first_load_s": round(self.first_load_s, 4),
            "load_s": round(self.load_s, 4),
            "avg_ns": round(statistics.fmean(self.samples_ns)),
            "stddev_ns": round(deviation),
            "median_ns": round(self.median_s * 1e9),
            "samples_ns": list(self.samples_ns),
            "real_time": None if self.real_time is None else round(self.real_time, 3),
            "peak_rss_anon": self.peak_rss_anon,
            "peak_rss_file": self.peak_rss_file,
            "peak_rss": self.peak_rss,
        }

    @classmethod
    def from_dict(cls, data: Json) -> EncoderRun:
        """Raises KeyError, TypeError or ValueError for what `to_dict` did not write."""
        samples = tuple(int(ns) for ns in data["samples_ns"])
        if not samples or min(samples) <= 0:
            raise ValueError("samples_ns holds no positive times")
        return cls(
            encoder=str(data["encoder"]),
            samples_ns=samples,
            pixels=int(data["pixels"]),
            seconds=float(data["seconds"]),
            soft_tokens=int(data["soft_tokens"]),
            first_load_s=float(data["first_load_s"]),
            load_s=float(data["load_s"]),
            peak_rss_anon=int(data["peak_rss_anon"]),
            peak_rss_file=int(data["peak_rss_file"]),
            peak_rss=int(data["peak_rss"]),
        )

    def __str__(self) -> str:
        times = "" if self.real_time is None else f", {self.real_time:.1f}x real time"
        return f"{self.test}: {self.median_s:.2f} s{times}, {self.soft_tokens} tokens"


def measure_encoders(bundle: Bundle, reps: int, threads: int) -> list[EncoderRun]:
    """Each encoder of a bundle in turn, the one before it released, as for a prompt.

    Two loads, the first of which encodes once, and one more run come before `reps` that are measured.

    Raises:
        BundleError: an encoder is damaged.
    """
    return [_measure(bundle, modality, reps, threads) for modality in bundle.modalities.values()]


def _measure(bundle: Bundle, modality: Modality, reps: int, threads: int) -> EncoderRun:
    from gemma_edge.runtime.artifacts.modalities import AudioModality, VisionModality
    from gemma_edge.runtime.media.attachments import Reader
    from gemma_edge.runtime.media.encoder_pool import load_encoder

    rng = np.random.default_rng(0)
    data: NDArray[Any]
    pixels, seconds = 0, 0.0
    if isinstance(modality, AudioModality):
        seconds = Reader(bundle.modalities, context=bundle.context).clip_seconds()
        count = int(seconds * modality.log_mel.sampling_rate)
        data = NOISE * rng.standard_normal(count, dtype=np.float32)
    elif isinstance(modality, VisionModality):
        pixels = modality.config.image_size
        data = rng.integers(256, size=(3, pixels, pixels), dtype=np.uint8)
    loads: list[float] = []
    samples: tuple[int, ...] = ()
    with PeakSampler(interval=INTERVAL) as sampler:
        for repetitions in (0, reps):
            start = time.perf_counter()
            encoder = load_encoder(bundle, modality, threads=threads)
            loads.append(time.perf_counter() - start)
            encode = partial(_encode, encoder, modality, data)
            encode()
            samples = timed(encode, repetitions)
            encoder.close()
    peak = sampler.peak
    return EncoderRun(
        encoder=modality.kind,
        pixels=pixels,
        seconds=seconds,
        soft_tokens=modality.soft_tokens,
        first_load_s=loads[0],
        load_s=loads[1],
        samples_ns=samples,
        peak_rss_anon=peak.rss_anon,
        peak_rss_file=peak.rss_file,
        peak_rss=peak.rss,
    )


def _encode(encoder: MediaEncoder, modality: Modality, data: NDArray[Any]) -> None:
    encoder.encode(*modality.encoder_inputs(data))
