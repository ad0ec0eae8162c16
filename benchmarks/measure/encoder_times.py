"""Encoders: their load, the time of one image or of the longest clip, their memory.

Noise at the encoder's own size: an encoder's work depends on no pixel and no sample. Each is what the runtime
does for an attachment that is read already, the log-mel of a clip included.
"""

from __future__ import annotations

import time
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.benchmarks.records.measurement import EncoderRun, timed
from gemma_edge.devices.machine.memory import PeakSampler

if TYPE_CHECKING:  # importing the runtime is part of what is measured
    from gemma_edge.runtime.artifacts.bundle import Bundle
    from gemma_edge.runtime.artifacts.modalities import Modality
    from gemma_edge.runtime.media.media_encoder import MediaEncoder

INTERVAL = 0.01  # seconds between samples of memory: an activation lives for a few of them
NOISE = 0.1  # standard deviation of samples, of full scale: a voice nearby


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
