"""`VisionConfig`: the image encoder's config, frozen, from a checkpoint's configs.

Field names are those of `transformers.models.gemma3n.Gemma3nVisionConfig` 5.x, and so are the defaults,
because a config.json may omit any field that equals its default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.families.config_fields import MAX_SOFT_TOKENS, Fields, is_int, is_number

ARCHITECTURE = "mobilenetv5_300m_enc"  # timm's name of the only encoder that Gemma 3n has
RMS_NORM_EPS = 1e-6  # timm's, in all norms of the encoder
ENCODER_WIDTH = 2048  # of what comes out of timm's encoder, whatever its channel multiplier
STRIDE = 16  # pixels of the image in one of the fused feature map, in each direction
LAST_STRIDE = 32  # and of the coarsest one
MAX_IMAGE_SIZE = 4096
POOLS = (1, 2, 3)  # of the sizes that MobileNetV5 is published for: 256, 512 and 768 for 16 x 16 soft tokens
RESAMPLE = {2: "bilinear", 3: "bicubic"}  # Pillow's numbers, as preprocessor_config.json has them


@dataclass(frozen=True)
class VisionConfig:
    """An image encoder, its embedder, and the pixels that go in.

    Attributes:
        vocab_offset, vocab_size: ids of the tokens that the embedder's own table is for.
        channel_multiplier: of the channels of all stages; 1 in published checkpoints.
        grid: rows and columns of soft tokens; an image becomes grid * grid of them.
        image_size: height and width of the pixels.
        resample: "bilinear" or "bicubic".
    """

    vocab_size: int
    vocab_offset: int
    hidden_size: int
    channel_multiplier: float
    grid: int
    text_hidden_size: int
    image_size: int
    resample: str

    @property
    def soft_tokens(self) -> int:
        """Soft tokens of an image."""
        return self.grid * self.grid

    @property
    def pool(self) -> int:
        """Pixels of the fused feature map in a soft token, in each direction."""
        return self.image_size // STRIDE // self.grid

    @property
    def image_sizes(self) -> tuple[int, ...]:
        """The sizes of pixels that the encoder can be given: they become equally many soft tokens."""
        unit = _size_unit(self.grid)
        return tuple(sorted({*(unit * pool for pool in POOLS), self.image_size}))

    def resized(self, image_size: int) -> VisionConfig:
        """The same encoder for pixels of another of `image_sizes`. Raises UsageError for other sizes."""
        if image_size not in self.image_sizes:
            sizes = ", ".join(map(str, self.image_sizes))
            raise UsageError(f"the image size of this encoder must be one of {sizes}, not {image_size}")
        return replace(self, image_size=image_size)

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for a manifest; `from_dict` of them gives an equal config."""
        return {
            "vision_config": {
                "architecture": ARCHITECTURE,
                "vocab_size": self.vocab_size,
                "vocab_offset": self.vocab_offset,
                "hidden_size": self.hidden_size,
                "model_args": {
                    "channel_multiplier": self.channel_multiplier,
                    "msfa_output_resolution": self.grid,
                },
            },
            "text_config": {"hidden_size": self.text_hidden_size},
            "vision_soft_tokens_per_image": self.soft_tokens,
            "image_processor": {
                "size": {"height": self.image_size, "width": self.image_size},
                "resample": next(key for key, name in RESAMPLE.items() if name == self.resample),
            },
        }

    @classmethod
    def from_dict(
        cls,
        data: Mapping[str, Any],
        path: str | Path = "config.json",
        preprocessor: Mapping[str, Any] | None = None,
    ) -> VisionConfig:
        """From a parsed multimodal config.json; `path` only names it in errors.

        Args:
            preprocessor: the parsed preprocessor_config.json, or processor_config.json, of that checkpoint.
                Without it, the values published for Gemma 3n: 768 x 768, bilinear.

        Raises:
            ConfigError: there is no `vision_config`, or a field of it is malformed or unsupported.
        """
        path = Path(path)
        soft_tokens = Fields(dict(data), path).size(
            "vision_soft_tokens_per_image", 256, maximum=MAX_SOFT_TOKENS
        )
        text_hidden = Fields(data.get("text_config"), path, "text_config.").size("hidden_size", 2048)
        pixels = preprocessor or data
        source = path.with_name("preprocessor_config.json") if preprocessor else path
        image_size, resample = _pixels(pixels.get("image_processor", preprocessor or {}), source)
        fields = Fields(data.get("vision_config"), path, "vision_config.")
        fields.get("architecture", ARCHITECTURE, lambda v: v == ARCHITECTURE, ARCHITECTURE)
        fields.get("rms_norm_eps", RMS_NORM_EPS, lambda v: v == RMS_NORM_EPS, str(RMS_NORM_EPS))
        fields.get("hidden_size", ENCODER_WIDTH, lambda v: v == ENCODER_WIDTH, str(ENCODER_WIDTH))
        arguments = Fields(fields.data.get("model_args") or {}, path, "vision_config.model_args.")
        for key in arguments.data:
            if key not in ("channel_multiplier", "msfa_output_resolution"):
                arguments.fail(arguments.prefix + key, "no such argument", "one that is not supported")
        multiplier = arguments.get(
            "channel_multiplier", 1.0, lambda v: is_number(v) and 0 < v <= 1, "a number above 0, at most 1"
        )
        grid = arguments.size("msfa_output_resolution", 16)
        if soft_tokens != grid * grid:
            fields.fail("vision_soft_tokens_per_image", f"{grid} x {grid} = {grid * grid}", soft_tokens)
        unit = _size_unit(grid)
        if image_size % unit:
            Fields({}, source).fail("size", f"a multiple of {unit}", image_size)
        return cls(
            vocab_size=fields.size("vocab_size", 128),
            vocab_offset=fields.size("vocab_offset", 262_144, minimum=0),
            hidden_size=ENCODER_WIDTH,
            channel_multiplier=float(multiplier),
            grid=grid,
            text_hidden_size=text_hidden,
            image_size=image_size,
            resample=resample,
        )


def _size_unit(grid: int) -> int:
    """What an image's size must be a multiple of, so that every feature map is whole."""
    return math.lcm(STRIDE * grid, LAST_STRIDE)


def _pixels(data: object, path: Path) -> tuple[int, str]:
    """Height, which is the width, and filter; what the encoder is not given is refused."""
    fields = Fields(data, path)
    size = Fields(fields.data.get("size", {"height": 768, "width": 768}), path, "size.")
    height = size.size("height", 768, maximum=MAX_IMAGE_SIZE)
    size.get("width", 768, lambda v: v == height, f"the height, {height}")
    fields.get("do_normalize", False, lambda v: not v, "false")
    fields.get("do_center_crop", False, lambda v: not v, "false")
    fields.get("do_resize", True, bool, "true")
    fields.get("do_rescale", True, bool, "true")
    fields.get("rescale_factor", 1 / 255, lambda v: is_number(v) and abs(v - 1 / 255) < 1e-9, "1/255")
    allowed = ", ".join(f"{key} ({name})" for key, name in RESAMPLE.items())
    resample = fields.get("resample", 2, lambda v: is_int(v) and v in RESAMPLE, allowed)
    return height, RESAMPLE[resample]
