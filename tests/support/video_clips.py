"""Videos to read, made frame by frame."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

av = pytest.importorskip("av")

RATE = 10  # frames a second


def write_clip(path: Path, seconds: int, tone: float = 0.0) -> Path:
    """Grey frames, brighter by the second, and a tone if it is above 0 Hz."""
    with av.open(str(path), "w") as container:
        video = container.add_stream("mpeg4", rate=RATE)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        audio = container.add_stream("aac", rate=44_100, layout="mono") if tone else None
        for i in range(seconds * RATE):
            grey = np.full((48, 64, 3), 30 + 20 * (i // RATE), np.uint8)
            container.mux(video.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(video.encode())
        if audio:
            times = np.arange(seconds * 44_100) / 44_100
            samples = (0.5 * np.sin(2 * np.pi * tone * times)).astype(np.float32)
            for start in range(0, len(samples), 1024):
                frame = av.AudioFrame.from_ndarray(samples[None, start : start + 1024], "fltp", "mono")
                frame.sample_rate, frame.pts = 44_100, start
                container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return path
