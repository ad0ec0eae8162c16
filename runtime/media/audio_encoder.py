"""`AudioEncoder`: log-mel frames to the soft tokens that stand for a clip in a prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.errors import BundleError, UsageError
from gemma_edge.runtime.media.media_encoder import MediaEncoder

MAX_FRAMES = "max_frames"  # metadata of the graph: the longest clip


class AudioEncoder(MediaEncoder):
    """Log-mel frames in, rows of the text model's input out.

        with AudioEncoder("bundle/audio.onnx") as encoder:
            rows = encoder.encode(*log_mel(segment.samples))

    Attributes:
        bins: mel bins of a frame.
        max_frames: the longest clip.
    """

    kind = "audio"

    def __init__(self, path: str | Path, *, threads: int | None = None, digest: str = "") -> None:
        super().__init__(path, threads=threads, digest=digest)
        features, tokens = self._graph.shapes["log_mel"], self._graph.shapes["soft_tokens"]
        bins, soft_tokens, hidden = features[2], tokens[1], tokens[2]
        if bins is None or soft_tokens is None or hidden is None or features[1] is not None:
            raise BundleError(path, "log_mel", "(1, frames, bins), bins alone fixed", features)
        self.bins, self.soft_tokens, self.hidden_size = bins, soft_tokens, hidden
        frames = self._graph.metadata.get(MAX_FRAMES, "")
        if not frames.isdecimal():
            raise BundleError(path, f"metadata.{MAX_FRAMES}", "a number of frames", repr(frames))
        self.max_frames = int(frames)

    def encode(
        self, log_mel: NDArray[np.float32], mask: NDArray[np.bool_] | None = None
    ) -> NDArray[np.float32]:
        """One clip.

        Args:
            log_mel: (frames, bins), as `gemma_edge.runtime.families.log_mel` computes it.
            mask: (frames,), True where a frame belongs to the clip; all of them if None.

        Returns:
            (soft_tokens, hidden_size): rows for the audio soft tokens of a prompt, not to be scaled. Those
            that no frame belongs to hold the padding embedding.

        Raises:
            UsageError: no frame, or more than `max_frames`: about 30 s.
            ValueError: the wrong number of bins, a mask of another length, or the encoder is closed.
        """
        frames = len(log_mel)
        if not 1 <= frames <= self.max_frames:
            raise UsageError(f"a clip must have 1 to {self.max_frames} frames of 10 ms, not {frames}")
        valid = np.ones(frames, bool) if mask is None else np.asarray(mask, bool)
        if log_mel.shape != (frames, self.bins) or valid.shape != (frames,):
            expected = f"log_mel must be (frames, {self.bins}) and mask (frames,)"
            raise ValueError(f"{expected}, not {log_mel.shape} and {valid.shape}")
        rows = self._graph.run(
            log_mel=np.ascontiguousarray(log_mel[None], np.float32),
            valid=valid.astype(np.float32)[None, :, None],
        )
        return np.asarray(rows[0], np.float32)
