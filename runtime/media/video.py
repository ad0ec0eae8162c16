"""Videos in, a few frames and the sound track out: what the model sees and hears of them.

    for frame in sample_frames("clip.mp4", 768, count=frames_within(2048)):
        rows = encoder.encode(frame.pixels)

Gemma 3n has no notion of video: frames are images, and the sound is a recording. Both are decoded with PyAV
(extra `video`), a frame at a time; limits are checked before anything is decoded.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.errors import MediaError, UsageError
from gemma_edge.runtime.install_hint import install_hint
from gemma_edge.runtime.media.images import Resample, pixels
from gemma_edge.runtime.media.recordings import SAMPLE_RATE

Array = NDArray[np.float32]

PER_SECOND = 1.0  # frames: more show little that is new at a resolution of 16 x 16 tokens
IMAGE_TOKENS = 256
MAX_SECONDS = 24 * 3600
MAX_FRAME_PIXELS = 36_000_000  # 8K, with some room; a decoder holds several frames
# What cameras and browsers write. FFmpeg would also follow playlists, to other files and to the network.
DEMUXERS = "mov,mp4,matroska,webm,avi,mpegts,mpeg,ogg,flv,asf"


@dataclass(frozen=True)
class Frame:
    """A frame of a video: its time in seconds, and its pixels as `load_image` gives them."""

    seconds: float
    pixels: Array


def frames_within(tokens: int, per_image: int = IMAGE_TOKENS) -> int:
    """How many frames fit a budget of soft tokens; at least one."""
    return max(1, tokens // per_image)


def sample_frames(
    path: str | Path,
    size: int,
    *,
    count: int,
    per_second: float = PER_SECOND,
    resample: Resample = "bilinear",
) -> Iterator[Frame]:
    """Frames in the middle of equal parts of a video: `per_second` of them, but at most `count`.

    Args:
        path: MP4, MOV, WebM, Matroska, AVI, MPEG, Ogg, FLV or WMV.
        size: height and width of the pixels.
        count: the most frames, at least 1; see `frames_within`.
        per_second: wanted frames a second, above 0.
        resample: as for `load_image`.

    Yields:
        At least one frame; fewer than planned where the file ends earlier than it says.

    Raises:
        MediaError: missing, damaged, without pictures, too large, or no video.
        UsageError: PyAV or Pillow is not installed, or a bad `count` or `per_second`.
    """
    if count < 1 or per_second <= 0:
        raise UsageError(f"count must be 1 or more and per_second above 0, not {count} and {per_second}")
    path = Path(path)
    with _opened(path) as container:
        if not container.streams.video:
            raise MediaError(path, "streams", "a video", "none")
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise MediaError(path, "video", "a codec that FFmpeg knows", "another", "Convert it first.")
        width, height = stream.codec_context.width, stream.codec_context.height
        if not 0 < width * height <= MAX_FRAME_PIXELS:
            expected = f"at most {MAX_FRAME_PIXELS // 1_000_000} megapixels"
            raise MediaError(path, "size", expected, f"{width} x {height}")
        duration = _duration(path, container, stream)
        wanted = max(1, min(count, round(duration * per_second)))
        found = False
        for seconds in (np.arange(wanted) + 0.5) * (duration / wanted):
            frame = _frame_at(container, stream, float(seconds))
            if frame is None:
                continue
            found = True
            yield Frame(float(frame.time or 0.0), pixels(frame.to_image(), size, resample))
        if not found:
            raise MediaError(path, "video", "at least one frame", "none", "The file is damaged.")


def has_pictures(path: str | Path) -> bool:
    """Whether a file has moving pictures; the cover of a recording is none. Raises as `sample_frames`."""
    with _opened(Path(path)) as container:
        disposition = _av(Path(path)).stream.Disposition
        return any(not stream.disposition & disposition.attached_pic for stream in container.streams.video)


def has_sound(path: str | Path) -> bool:
    """Whether a video has a sound track. Raises as `sample_frames` does."""
    with _opened(Path(path)) as container:
        return bool(container.streams.audio)


def sound(path: str | Path) -> Iterator[Array]:
    """The first sound track as 16 kHz mono samples, in blocks: what `split_at_pauses` takes.

    Raises:
        MediaError: missing, damaged, without sound, or no video.
        UsageError: PyAV is not installed.
    """
    path = Path(path)
    with _opened(path) as container:
        if not container.streams.audio:
            raise MediaError(path, "streams", "a sound track", "none")
        stream = container.streams.audio[0]
        if stream.codec_context is None:
            raise MediaError(path, "sound track", "a codec that FFmpeg knows", "another", "Convert it first.")
        resampler = _av(path).AudioResampler(format="flt", layout="mono", rate=SAMPLE_RATE)
        for frame in container.decode(stream):
            try:
                blocks = resampler.resample(frame)
            except ValueError as error:  # the layout, the format or the rate changes on the way
                raise MediaError(path, "sound track", "one layout, format and rate", error) from None
            for block in blocks:
                yield _samples(block)
        for block in resampler.resample(None):
            yield _samples(block)


def _samples(block: Any) -> Array:
    return np.asarray(block.to_ndarray(), np.float32).reshape(-1)


def _av(path: Path) -> ModuleType:
    try:
        return importlib.import_module("av")
    except ImportError:
        raise UsageError(f"{path}: reading videos needs av: {install_hint('video')}") from None


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """The container; errors of FFmpeg come out by the name of the file."""
    av = _av(path)
    if not path.is_file():
        raise MediaError(path, "file", "a video", "a folder" if path.is_dir() else "no such file")
    try:
        options = {"protocol_whitelist": "file", "format_whitelist": DEMUXERS}
        with av.open(str(path), options=options, metadata_errors="replace") as container:
            yield container
    except av.FFmpegError as error:
        raise MediaError(path, "data", "a whole video", error.strerror, "The file is damaged.") from None


def _duration(path: Path, container: Any, stream: Any) -> float:
    """Seconds, as the file claims; 0 where it does not say."""
    if stream.duration is not None and stream.time_base is not None:
        seconds = float(stream.duration * stream.time_base)
    else:
        seconds = (container.duration or 0) / 1_000_000
    if not 0 <= seconds <= MAX_SECONDS:
        raise MediaError(path, "duration", f"at most {MAX_SECONDS // 3600} hours", f"{seconds:.0f} s")
    return seconds


def _frame_at(container: Any, stream: Any, seconds: float) -> Any | None:
    """The first frame that is not before `seconds`, or the last one there is after the seek."""
    start = (stream.start_time or 0) * stream.time_base
    container.seek(int((seconds + start) / stream.time_base), stream=stream)
    last = None
    for frame in container.decode(stream):
        last = frame
        if frame.time is None or frame.time - float(start) >= seconds:
            break
    return last
