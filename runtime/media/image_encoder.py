"""`VisionEncoder`: pixels to the soft tokens that stand for an image in a prompt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.media.media_encoder import MediaEncoder


class VisionEncoder(MediaEncoder):
    """Pixels in, rows of the text model's input out.

        with VisionEncoder("bundle/vision.onnx") as encoder:
            rows = encoder.encode(load_image("photo.jpg", encoder.image_size))

    Attributes:
        image_size: height and width of the pixels.
    """

    kind = "vision"

    def __init__(self, path: str | Path, *, threads: int | None = None, digest: str = "") -> None:
        super().__init__(path, threads=threads, digest=digest)
        pixels, tokens = self._graph.shapes["pixels"], self._graph.shapes["soft_tokens"]
        height, soft_tokens, hidden = pixels[2], tokens[1], tokens[2]
        if height is None or soft_tokens is None or hidden is None or pixels != (1, 3, height, height):
            raise BundleError(path, "pixels", "(1, 3, size, size)", pixels)
        self.image_size, self.soft_tokens, self.hidden_size = height, soft_tokens, hidden

    def encode(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """One image.

        Args:
            pixels: (3, image_size, image_size) in [0, 1], as `gemma_edge.runtime.media.images` gives them.

        Returns:
            (soft_tokens, hidden_size): rows for the image soft tokens of a prompt, not to be scaled.

        Raises:
            ValueError: pixels of another shape, or the encoder is closed.
        """
        if pixels.shape != (3, self.image_size, self.image_size):
            raise ValueError(f"pixels must be (3, {self.image_size}, {self.image_size}), not {pixels.shape}")
        rows = self._graph.run(pixels=np.ascontiguousarray(pixels[None], np.float32))
        return np.asarray(rows[0], np.float32)
