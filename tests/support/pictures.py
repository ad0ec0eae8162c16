"""Pictures to read, made from arithmetic: every mode, many sizes, and always the same."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIZES = [(1, 1), (1, 40), (40, 1), (3, 5), (64, 64), (127, 31), (50, 300), (640, 7), (257, 258)]


def painting(width: int, height: int, channels: int = 3, seed: int = 0) -> NDArray[np.uint8]:
    """(height, width, channels): edges, slopes and noise."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.SFC64(seed).random_raw(width * height * channels).astype(np.uint8)
    layers = [
        (x * (5 + c) + y * (3 * c + 1)) % 256 if (c + seed) % 2 else 255 * ((x // 7 + y // 5 + c) % 2)
        for c in range(channels)
    ]
    image = np.stack(layers, axis=-1).astype(np.int32) + noise.reshape(height, width, channels) % 32
    return np.clip(image, 0, 255).astype(np.uint8)


def pictures() -> Iterator[tuple[str, Image.Image]]:
    """Name and picture: 9 sizes in RGB, and 12 modes in 3 sizes."""
    for width, height in SIZES:
        yield f"RGB_{width}x{height}", Image.fromarray(painting(width, height))
    for width, height in ((20, 30), (90, 61), (33, 200)):
        rgb, rgba = (
            Image.fromarray(painting(width, height, 3, 1)),
            Image.fromarray(painting(width, height, 4, 2)),
        )
        greys = painting(width, height, 1, 3)[..., 0]
        keyed = rgb.quantize(16)
        keyed.info["transparency"] = 3
        keyed_grey = Image.fromarray(greys)
        keyed_grey.info["transparency"] = 200
        modes = {
            "RGBA": rgba,
            "LA": rgba.convert("LA"),
            "L": Image.fromarray(greys),
            "1": Image.fromarray(greys).convert("1"),
            "P": rgb.quantize(64),
            "P_transparent": keyed,
            "L_transparent": keyed_grey,
            "P_alphas": rgba.quantize(32),
            "CMYK": rgb.convert("CMYK"),
            "YCbCr": rgb.convert("YCbCr"),
            "I": Image.fromarray(greys.astype(np.int32)),
            "F": Image.fromarray(greys.astype(np.float32)),
        }
        for mode, image in modes.items():
            yield f"{mode}_{width}x{height}", image
