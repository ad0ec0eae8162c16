"""Streams recordings as segments of 16 kHz mono, in bounded memory.

    for segment in read_audio("meeting.wav"):
        features, mask = log_mel(segment.samples)

WAV of integers is read with the standard library; WAV of floats, FLAC, OGG, MP3 and AIFF with `soundfile`,
and any rate but 16 kHz is converted with `soxr` (both in the extra `audio`). The encoder takes 30 s at most:
what is longer is cut where it is quietest, and every segment knows its place in the recording.
"""

from __future__ import annotations

import importlib
import os
import struct
import wave
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import BinaryIO, NoReturn

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.errors import MediaError, UsageError
from gemma_edge.runtime.families.log_mel import LogMel
from gemma_edge.runtime.install_hint import install_hint

Array = NDArray[np.float32]

SAMPLE_RATE = 16_000
MAX_SECONDS = 30.0  # Gemma3nAudioFeatureExtractor cuts off what is longer
# A cut is the middle of the quietest stretch of this length in the second half of what fits a segment.
QUIET_HOPS, HOP = 30, SAMPLE_RATE // 100
SILENCE = 1e-3  # -60 dBFS
MIN_RATE, MAX_RATE = 4_000, 384_000  # Hz: what speech is recorded at, and no bomb when resampled
BLOCK_SAMPLES = 1 << 18  # of all channels together, decoded at once
# Writers to a pipe cannot go back to fill in the length of the data: they claim the largest one.
UNKNOWN_LENGTH = 0x7FFF_F000
MAX_CHANNELS = 64
MAX_LEVEL = 65_536.0  # full scale is 1; floats that were never scaled from 16-bit integers still pass
MAX_CHUNKS = 1_000  # of a RIFF file before its samples
CONVERT = "Convert it: ffmpeg -i FILE -ar 16000 -ac 1 out.wav"


@dataclass(frozen=True)
class Segment:
    """A stretch of a recording.

    Attributes:
        start, end: seconds from the beginning of the recording; segments touch, none is left out.
        samples: (n,) f32 at 16 kHz, mono.
    """

    start: float
    end: float
    samples: Array

    @property
    def silent(self) -> bool:
        """No sample reaches -60 dBFS: there is nothing to hear."""
        return not np.any(np.abs(self.samples) >= SILENCE)


def read_audio(path: str | Path, *, max_seconds: float = MAX_SECONDS) -> Iterator[Segment]:
    """The recording in segments of at most `max_seconds`.

    Headers are checked before this returns, samples as they are decoded. About a segment is in memory.

    Raises:
        MediaError: missing, empty, damaged, cut off, not a recording, NaN samples, shorter than a frame.
        UsageError: it needs `soundfile` or `soxr`, which are not installed; `max_seconds` is not 1 to 3600.
    """
    if not 1 <= max_seconds <= 3600:
        raise UsageError(f"max_seconds must be 1 to 3600, not {max_seconds}")
    path = Path(path)
    rate, blocks = _open(path)
    samples = _at_least_a_frame(path, _resampled(path, _checked(path, rate, blocks), rate))
    return split_at_pauses(samples, max_seconds)


def decoded_segments(
    path: str | Path, blocks: Iterable[Array], *, max_seconds: float = MAX_SECONDS
) -> Iterator[Segment]:
    """The same of 16 kHz mono samples that were decoded elsewhere: a video's sound. `path` is for errors."""
    path = Path(path)
    checked = _checked(path, SAMPLE_RATE, (block[:, None] for block in blocks))
    return split_at_pauses(_at_least_a_frame(path, checked), max_seconds)


def split_at_pauses(blocks: Iterable[Array], max_seconds: float = MAX_SECONDS) -> Iterator[Segment]:
    """Cuts a stream of 16 kHz mono samples into segments, each at most `max_seconds` long."""
    limit = int(max_seconds * SAMPLE_RATE)
    held, start = np.zeros(0, np.float32), 0
    for block in blocks:
        held = np.concatenate([held, block])
        while len(held) > limit:
            cut = _quietest(held[:limit])
            yield Segment(start / SAMPLE_RATE, (start + cut) / SAMPLE_RATE, held[:cut].copy())
            held, start = held[cut:], start + cut
    if len(held):
        yield Segment(start / SAMPLE_RATE, (start + len(held)) / SAMPLE_RATE, held)


def _quietest(samples: Array) -> int:
    """Where to cut: in the second half, never in the last QUIET_HOPS / 2 hops; the latest of equals."""
    first = len(samples) // 2
    hops = (len(samples) - first) // HOP
    energy = np.square(samples[first : first + hops * HOP]).reshape(hops, HOP).sum(axis=1)
    stretches = np.convolve(energy, np.ones(QUIET_HOPS, np.float32), "valid")
    latest = len(stretches) - 1 - int(np.argmin(stretches[::-1]))
    return first + (latest + QUIET_HOPS // 2) * HOP


# Decoding: (frames, channels) f32 in [-1, 1]. ------------------------------------------------------


def _open(path: Path) -> tuple[int, Iterator[Array]]:
    """The sample rate, and the samples in blocks."""
    if path.exists() and not path.is_file():
        raise MediaError(path, "file", "a recording", "a folder, a device or a pipe")
    try:
        file = open(path, "rb")  # noqa: SIM115 - a generator reads it and closes it
    except FileNotFoundError:
        raise MediaError(path, "file", "a recording", "no such file") from None
    except OSError as error:
        raise MediaError(path, "file", "a readable recording", error.strerror) from None
    try:
        magic = file.read(12)
        if not magic:
            raise MediaError(path, "file", "a recording", "an empty file")
        if magic[:4] == b"RIFF" and magic[8:] == b"WAVE":
            _check_wav(path, file)
            file.seek(0)
            try:
                return _wave_blocks(path, file)
            except wave.Error:  # floats, A-law, or (before Python 3.12) WAVE_FORMAT_EXTENSIBLE
                pass
        elif not _is_known(magic):
            start = repr(magic[:8])[2:-1]
            raise MediaError(path, "file", "WAV, FLAC, OGG, MP3 or AIFF", f"data starting {start!r}", CONVERT)
    except BaseException:
        file.close()
        raise
    file.close()
    return _soundfile_blocks(path)


def _is_known(magic: bytes) -> bool:
    """Is this what `soundfile` may see? Its decoders are many, and not all are written for hostile data."""
    if magic[:4] in (b"fLaC", b"OggS", b"RF64"):
        return True
    if magic[:4] == b"FORM":
        return magic[8:12] in (b"AIFF", b"AIFC")
    # MP3: a tag, or the sync word of a frame of layer III.
    return magic[:3] == b"ID3" or (len(magic) > 1 and magic[0] == 0xFF and magic[1] & 0xE6 == 0xE2)


def _check_wav(path: Path, file: BinaryIO) -> None:
    """Raises MediaError unless the header makes sense and the samples that it promises are there.

    `file` is after "WAVE".
    """
    end = os.fstat(file.fileno()).st_size
    described = False
    for _ in range(MAX_CHUNKS):
        header = file.read(8)
        if len(header) < 8:
            break
        name, size = struct.unpack("<4sI", header)
        present = end - file.tell()
        if name == b"fmt " and min(size, present) >= 16:
            _, channels, rate, _, _, bits = struct.unpack("<HHIIHH", file.read(16))
            if not 1 <= channels <= MAX_CHANNELS:
                raise MediaError(path, "channels", f"1 to {MAX_CHANNELS}", channels, CONVERT)
            _check_rate(path, rate)
            if not 1 <= bits <= 64:
                raise MediaError(path, "bits per sample", "8, 16, 24 or 32", bits, CONVERT)
            described, size = True, size - 16
        if name == b"data" and described:
            if size == 0:
                raise MediaError(path, "data chunk", "samples", f"a length of 0 and {present} more bytes")
            if size > present and size < UNKNOWN_LENGTH:
                remedy = "The recording was cut off, or its header lies. " + CONVERT
                raise MediaError(path, "data chunk", f"{size} bytes of samples", f"{present} bytes", remedy)
            return
        file.seek(size + size % 2, os.SEEK_CUR)
    raise MediaError(path, "header", "a fmt chunk, and a data chunk with samples", "none", CONVERT)


def _wave_blocks(path: Path, file: BinaryIO) -> tuple[int, Iterator[Array]]:
    try:
        reader = wave.open(file)  # noqa: SIM115 - closed by the generator
    except (EOFError, struct.error):
        raise MediaError(path, "header", "a WAV header", "an incomplete one", CONVERT) from None
    width, channels, rate = reader.getsampwidth(), reader.getnchannels(), reader.getframerate()
    if width > 4:
        raise MediaError(path, "bits per sample", "8, 16, 24 or 32", 8 * width, CONVERT)

    def blocks() -> Iterator[Array]:
        with file, reader:
            while data := reader.readframes(max(1, BLOCK_SAMPLES // channels)):
                whole = len(data) // (width * channels) * width * channels
                yield _from_integers(data[:whole], width).reshape(-1, channels)

    return rate, blocks()


def _from_integers(data: bytes, width: int) -> Array:
    """Little-endian PCM of `width` bytes a sample -> f32 in [-1, 1)."""
    if width == 1:  # the only unsigned one
        return (np.frombuffer(data, np.uint8).astype(np.float32) - 128) / np.float32(128)
    if width == 3:
        wide = np.zeros((len(data) // 3, 4), np.uint8)
        wide[:, 1:] = np.frombuffer(data, np.uint8).reshape(-1, 3)
        data, width = wide.tobytes(), 4
    integers = np.frombuffer(data, f"<i{width}")
    return integers.astype(np.float32) / np.float32(1 << (8 * width - 1))


def _soundfile_blocks(path: Path) -> tuple[int, Iterator[Array]]:
    soundfile = _optional(path, "soundfile")

    def damaged(error: Exception) -> NoReturn:
        reason = getattr(error, "error_string", str(error))
        raise MediaError(path, "file", "a recording that can be decoded", repr(reason), CONVERT) from None

    try:
        reader = soundfile.SoundFile(path)
    except soundfile.SoundFileError as error:
        damaged(error)
    _check_rate(path, reader.samplerate)

    def blocks() -> Iterator[Array]:
        frames, promised = 0, reader.frames
        with reader:
            while True:
                try:
                    block = reader.read(max(1, BLOCK_SAMPLES // reader.channels), "float32", always_2d=True)
                except soundfile.SoundFileError as error:
                    damaged(error)
                if not len(block):
                    break
                frames += len(block)
                yield block
        # An MP3 promises its length in a tag, and a padded last frame may make a difference of 1,152.
        if frames < promised - 1152:
            raise MediaError(path, "length", f"{promised} samples", frames, "It was cut off. " + CONVERT)

    return reader.samplerate, blocks()


def _check_rate(path: Path, rate: int) -> None:
    if not MIN_RATE <= rate <= MAX_RATE:
        raise MediaError(path, "sample rate", f"{MIN_RATE} to {MAX_RATE} Hz", f"{rate} Hz", CONVERT)


def _optional(path: Path, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except (ImportError, OSError):  # OSError: soundfile without a libsndfile
        raise UsageError(
            f"{path}: reading it needs {module}: {install_hint('audio')}, or convert it to a WAV of "
            "16-bit integers at 16 kHz"
        ) from None


# From decoded blocks to 16 kHz mono. ---------------------------------------------------------------


def _checked(path: Path, rate: int, blocks: Iterator[Array]) -> Iterator[Array]:
    """(frames, channels) -> (frames,), the channels' mean; raises MediaError where there is no sound."""
    done = 0
    for block in blocks:
        sound = (np.abs(block) <= MAX_LEVEL).all(axis=1)  # a NaN compares false
        if not sound.all():
            at = int(np.argmin(sound))
            level = float(np.abs(block[at]).max())
            got = f"{level:.3g}" if np.isfinite(level) else "a NaN or infinity"
            got = f"{got} at {(done + at) / rate:.3f} s"
            raise MediaError(
                path, "samples", "finite numbers around -1 to 1", got, "The recording is damaged."
            )
        done += len(block)
        yield block[:, 0] if block.shape[1] == 1 else block.mean(axis=1, dtype=np.float32)


def _resampled(path: Path, blocks: Iterator[Array], rate: int) -> Iterator[Array]:
    if rate == SAMPLE_RATE:
        return blocks
    soxr = _optional(path, "soxr")
    stream = soxr.ResampleStream(rate, SAMPLE_RATE, 1, dtype="float32")

    def converted() -> Iterator[Array]:
        for block in blocks:
            yield stream.resample_chunk(np.ascontiguousarray(block))
        yield stream.resample_chunk(np.zeros(0, np.float32), last=True)

    return converted()


def _at_least_a_frame(path: Path, blocks: Iterator[Array]) -> Iterator[Array]:
    """The same blocks; raises MediaError if there are too few samples for the encoder."""
    total = 0
    for block in blocks:
        total += len(block)
        yield block
    if total < LogMel().shortest:
        milliseconds = 1000 * total / SAMPLE_RATE
        raise MediaError(path, "length", "32 ms of sound or more", f"{milliseconds:.1f} ms")
