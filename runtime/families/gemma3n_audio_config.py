"""`AudioConfig`: the audio encoder's config, frozen, from a checkpoint's config.json.

Field names are those of `transformers.models.gemma3n.Gemma3nAudioConfig` 5.x, and so are the defaults,
because a config.json may omit any field that equals its default.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from gemma_edge.runtime.families.config_fields import (
    MAX_LAYERS,
    MAX_SIZE,
    MAX_SOFT_TOKENS,
    Fields,
    is_int,
    is_number,
)

# transformers uses this one in most norms of the encoder, whatever rms_norm_eps says.
RMS_NORM_EPS = 1e-6
STAGES = 2  # subsampling convolutions: the reference has two, always


@dataclass(frozen=True)
class AudioConfig:
    """An audio encoder and its embedder. Sizes are in elements; pairs are (time, frequency)."""

    vocab_size: int
    vocab_offset: int
    input_feat_size: int
    hidden_size: int
    gradient_clipping: float
    conf_attention_chunk_size: int
    conf_attention_context_left: int
    conf_attention_context_right: int
    conf_attention_logit_cap: float
    conf_num_attention_heads: int
    conf_num_hidden_layers: int
    conf_conv_kernel_size: int
    conf_reduction_factor: int
    conf_residual_weight: float
    sscp_conv_channel_size: tuple[int, ...]
    sscp_conv_group_norm_eps: float
    sscp_conv_kernel_size: tuple[tuple[int, int], ...]
    sscp_conv_stride_size: tuple[tuple[int, int], ...]
    text_hidden_size: int
    soft_tokens: int

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.conf_num_attention_heads

    @property
    def past(self) -> int:
        """Tokens before its own that a query sees."""
        return max(0, self.conf_attention_context_left - 1)

    @property
    def time_stride(self) -> int:
        """Frames of log-mel in a token of the conformer."""
        return math.prod(time for time, _ in self.sscp_conv_stride_size)

    @property
    def frames_per_token(self) -> int:
        """Frames of log-mel in a soft token."""
        return self.time_stride * self.conf_reduction_factor

    @property
    def max_frames(self) -> int:
        """Frames of log-mel that give `soft_tokens` tokens."""
        return self.soft_tokens * self.frames_per_token

    def tokens(self, frames: int) -> int:
        """Soft tokens of a clip, before they are padded to `soft_tokens`."""
        return -(-frames // self.frames_per_token)

    def frequencies(self) -> list[int]:
        """Bins of the input, and after each subsampling convolution."""
        bins = [self.input_feat_size]
        for (_, kernel), (_, stride) in zip(
            self.sscp_conv_kernel_size, self.sscp_conv_stride_size, strict=True
        ):
            bins.append((bins[-1] + 2 - kernel) // stride + 1)
        return bins

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for a manifest; `from_dict` of them gives an equal config."""
        audio: dict[str, Any] = asdict(self)
        text, tokens = audio.pop("text_hidden_size"), audio.pop("soft_tokens")
        return {
            "audio_config": {k: list(v) if isinstance(v, tuple) else v for k, v in audio.items()},
            "text_config": {"hidden_size": text},
            "audio_soft_tokens_per_image": tokens,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], path: str | Path = "config.json") -> AudioConfig:
        """From a parsed multimodal config.json; `path` only names it in errors.

        Raises:
            ConfigError: there is no `audio_config`, or a field of it is malformed or unsupported.
        """
        outer = Fields(dict(data), Path(path))
        text = Fields(data.get("text_config"), Path(path), "text_config.")
        return _Parser(data.get("audio_config"), Path(path), "audio_config.").config(
            text_hidden_size=text.size("hidden_size", 2048),
            soft_tokens=outer.size("audio_soft_tokens_per_image", 188, maximum=MAX_SOFT_TOKENS),
        )


class _Parser(Fields):
    def config(self, *, text_hidden_size: int, soft_tokens: int) -> AudioConfig:
        hidden, heads = self.size("hidden_size", 1536), self.size("conf_num_attention_heads", 8)
        if hidden % heads or hidden % 2:
            self.fail(f"{self.prefix}hidden_size", f"an even multiple of the {heads} attention heads", hidden)
        self.get(
            "rms_norm_eps", RMS_NORM_EPS, lambda v: is_number(v) and v == RMS_NORM_EPS, str(RMS_NORM_EPS)
        )
        config = AudioConfig(
            vocab_size=self.size("vocab_size", 128),
            vocab_offset=self.size("vocab_offset", 262_272, minimum=0),
            input_feat_size=self.size("input_feat_size", 128),
            hidden_size=hidden,
            gradient_clipping=self.number("gradient_clipping", 1e10),
            conf_attention_chunk_size=self.size("conf_attention_chunk_size", 12),
            conf_attention_context_left=self.size("conf_attention_context_left", 13, minimum=0),
            conf_attention_context_right=self.size("conf_attention_context_right", 0, minimum=0),
            conf_attention_logit_cap=self.number("conf_attention_logit_cap", 50.0),
            conf_num_attention_heads=heads,
            conf_num_hidden_layers=self.size("conf_num_hidden_layers", 12, maximum=MAX_LAYERS),
            conf_conv_kernel_size=self.size("conf_conv_kernel_size", 5),
            conf_reduction_factor=self.size("conf_reduction_factor", 4),
            conf_residual_weight=self.number("conf_residual_weight", 0.5),
            sscp_conv_channel_size=self.sizes("sscp_conv_channel_size", [128, 32]),
            sscp_conv_group_norm_eps=self.number("sscp_conv_group_norm_eps", 1e-3),
            sscp_conv_kernel_size=self.pairs("sscp_conv_kernel_size", [[3, 3], [3, 3]]),
            sscp_conv_stride_size=self.pairs("sscp_conv_stride_size", [[2, 2], [2, 2]]),
            text_hidden_size=text_hidden_size,
            soft_tokens=soft_tokens,
        )
        if min(config.frequencies()) < 1:
            self.fail(
                f"{self.prefix}input_feat_size", "bins enough for the convolutions", config.input_feat_size
            )
        return config

    def sizes(self, key: str, default: list[int]) -> tuple[int, ...]:
        def ok(value: Any) -> bool:
            return isinstance(value, (list, tuple)) and len(value) == STAGES and all(map(_is_size, value))

        return tuple(self.get(key, default, ok, f"{STAGES} positive integers"))

    def pairs(self, key: str, default: list[list[int]]) -> tuple[tuple[int, int], ...]:
        def ok(value: Any) -> bool:
            return (
                isinstance(value, (list, tuple))
                and len(value) == STAGES
                and all(isinstance(v, (list, tuple)) and len(v) == 2 and all(map(_is_size, v)) for v in value)
            )

        value = self.get(key, default, ok, f"{STAGES} pairs (time, frequency) of positive integers")
        return tuple((int(time), int(frequency)) for time, frequency in value)


def _is_size(value: object) -> bool:
    return is_int(value) and 0 < value <= MAX_SIZE  # type: ignore[operator]
