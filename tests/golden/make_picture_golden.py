"""Makes pictures.npz: what transformers' SigLIP processor (torchvision) makes of `support.pictures`.

    python tests/golden/make_picture_golden.py

40 x 40, resized as Gemma 3n's preprocessor_config.json says, and stored as bytes: the processor gives
multiples of 1 / 255.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from transformers.models.siglip.image_processing_siglip import SiglipImageProcessor

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.pictures import pictures

OUT = Path(__file__).with_name("pictures.npz")


def main() -> None:
    processor = SiglipImageProcessor(do_normalize=False, resample=2, size={"height": 40, "width": 40})
    arrays = {}
    for name, image in pictures():
        values = np.asarray(processor(image, return_tensors="np")["pixel_values"][0]) * 255
        if np.abs(values - values.round()).max() > 1e-3:
            raise ValueError(f"{name}: not multiples of 1/255")
        arrays[name] = values.round().astype(np.uint8)
    np.savez_compressed(OUT, **arrays)
    print(f"{OUT}: {OUT.stat().st_size:,} bytes, {len(arrays)} pictures")


if __name__ == "__main__":
    main()
