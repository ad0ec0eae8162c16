"""The blocks of the image encoder, and every tensor of it and its embedder.

The layout is timm's MobileNetV5 (`timm/models/mobilenetv5.py`, mobilenetv5_300m_enc): a stem, four stages of
blocks, and an adapter that fuses the last two. Names are those of a multimodal checkpoint below `model.`:
`vision_tower.timm_model.*` and `embed_vision.*`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

from gemma_edge.export.model.gemma3n.modality_embedder import LINEAR, embedder_specs
from gemma_edge.export.model.tensor_spec import Part, TensorSpec
from gemma_edge.runtime.families.gemma3n_vision_config import VisionConfig

TOWER, EMBEDDER = "vision_tower.timm_model.", "embed_vision."
STEM_KERNEL = 3
FUSION_EXPANSION = 2


@dataclass(frozen=True)
class EdgeResidual:
    """A full convolution that expands, and a linear layer back."""

    channels: int
    expanded: int
    out: int
    kernel: int
    stride: int


@dataclass(frozen=True)
class InvertedResidual:
    """Linear layers that expand and contract; depthwise convolutions before them and between (0: none)."""

    channels: int
    expanded: int
    out: int
    start_kernel: int
    mid_kernel: int
    stride: int


@dataclass(frozen=True)
class MobileAttention:
    """Attention of many query heads over one head of keys and values, of a map coarser by `kv_stride`."""

    channels: int
    heads: int
    head_dim: int
    kernel: int
    kv_stride: int


Block = EdgeResidual | InvertedResidual | MobileAttention


@dataclass(frozen=True)
class Pointwise(TensorSpec):
    """A linear layer, (out, in), that checkpoints store as a 1x1 convolution, (out, in, 1, 1)."""

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return (*self.shape, 1, 1)


@cache
def stages(config: VisionConfig) -> tuple[tuple[Block, ...], ...]:
    """The blocks of each stage."""
    builder = _Builder(config.channel_multiplier)
    edge, residual, attention = builder.edge, builder.residual, builder.attention
    first = [edge(128, stride=2), edge(128), edge(128)]
    second = [residual(256, 6, 3, 5, stride=2)]
    second += [residual(256, 4, start) for start in (5, 3, 5, 3)]
    third = [residual(640, 6, 5, 5, stride=2), *(residual(640, 4, 5) for _ in range(7)), residual(640, 1)]
    for _ in range(14):
        third += [attention(heads=12, head_dim=64, kv_stride=2), residual(640, 2)]
    fourth = [residual(1280, 6, 5, 5, stride=2)]
    for _ in range(19):
        fourth += [attention(heads=16, head_dim=96, kv_stride=1), residual(1280, 2)]
    return tuple(first), tuple(second), tuple(third), tuple(fourth)


def stem_channels(config: VisionConfig) -> int:
    """Channels after the stem, which timm does not scale with the rest."""
    return _Builder(config.channel_multiplier).channels


def fused_channels(config: VisionConfig) -> int:
    """Channels of the last two stages together."""
    return sum(out_channels(stage[-1]) for stage in stages(config)[-2:])


def out_channels(block: Block) -> int:
    return block.channels if isinstance(block, MobileAttention) else block.out


def largest_map(config: VisionConfig) -> int:
    """Elements of the largest feature map of an image."""
    side = config.image_size // 2  # after the stem
    largest = stem_channels(config) * side * side
    for stage in stages(config):
        for block in stage:
            if isinstance(block, MobileAttention):
                continue
            if isinstance(block, EdgeResidual):
                side //= block.stride  # strides are the expanding layer's
            largest = max(largest, block.expanded * side * side)
            if isinstance(block, InvertedResidual):
                side //= block.stride
    return largest


class _Builder:
    """Makes blocks one after the other: each begins with the channels that the last one ended with."""

    def __init__(self, multiplier: float) -> None:
        self.multiplier, self.channels = multiplier, 64

    def edge(self, out: int, stride: int = 1) -> Block:
        channels, self.channels = self.channels, rounded(out * self.multiplier)
        return EdgeResidual(channels, rounded(4 * channels), self.channels, 3, stride)

    def residual(self, out: int, expansion: int, start: int = 0, mid: int = 0, stride: int = 1) -> Block:
        channels, self.channels = self.channels, rounded(out * self.multiplier)
        return InvertedResidual(channels, rounded(expansion * channels), self.channels, start, mid, stride)

    def attention(self, heads: int, head_dim: int, kv_stride: int) -> Block:
        return MobileAttention(self.channels, heads, head_dim, 3, kv_stride)


def rounded(channels: float) -> int:
    """To a multiple of 8, not below 8, and not below 90 % (timm's make_divisible)."""
    result = max(8, int(channels + 4) // 8 * 8)
    return result + 8 if result < 0.9 * channels else result


def vision_specs(config: VisionConfig) -> dict[str, TensorSpec]:
    """The tensors of the encoder and its embedder, by name, in the order of use."""
    return {spec.name: spec for spec in _specs(config)}


def _specs(c: VisionConfig) -> Iterator[TensorSpec]:
    stem = stem_channels(c)
    yield TensorSpec(f"{TOWER}conv_stem.conv.weight", (stem, 3, STEM_KERNEL, STEM_KERNEL), Part.VECTOR)
    yield TensorSpec(f"{TOWER}conv_stem.conv.bias", (stem,), Part.VECTOR)
    yield TensorSpec(f"{TOWER}conv_stem.bn.weight", (stem,), Part.VECTOR)
    for i, stage in enumerate(stages(c)):
        for j, block in enumerate(stage):
            yield from block_specs(f"{TOWER}blocks.{i}.{j}.", block)
    fused = fused_channels(c)
    expanded = rounded(FUSION_EXPANSION * fused)
    for name, out, into in (("pw_exp", expanded, fused), ("pw_proj", c.hidden_size, expanded)):
        yield from _linear_and_norm(f"{TOWER}msfa.ffn.{name}.conv", f"{TOWER}msfa.ffn.{name}.bn", out, into)
    yield TensorSpec(f"{TOWER}msfa.norm.weight", (c.hidden_size,), Part.VECTOR)
    yield from embedder_specs(EMBEDDER, c.hidden_size, c.vocab_size, c.text_hidden_size)


def block_specs(prefix: str, block: Block) -> Iterator[TensorSpec]:
    """The tensors of one block."""
    match block:
        case EdgeResidual():
            shape = (block.expanded, block.channels, block.kernel, block.kernel)
            yield TensorSpec(f"{prefix}conv_exp.weight", shape, Part.VECTOR)
            yield TensorSpec(f"{prefix}bn1.weight", (block.expanded,), Part.VECTOR)
            yield from _linear_and_norm(f"{prefix}conv_pwl", f"{prefix}bn2", block.out, block.expanded)
        case InvertedResidual():
            if block.start_kernel:
                yield from _depthwise_and_norm(f"{prefix}dw_start", block.channels, block.start_kernel)
            yield from _linear_and_norm(
                f"{prefix}pw_exp.conv", f"{prefix}pw_exp.bn", block.expanded, block.channels
            )
            if block.mid_kernel:
                yield from _depthwise_and_norm(f"{prefix}dw_mid", block.expanded, block.mid_kernel)
            yield from _linear_and_norm(
                f"{prefix}pw_proj.conv", f"{prefix}pw_proj.bn", block.out, block.expanded
            )
            yield TensorSpec(f"{prefix}layer_scale.gamma", (block.out,), Part.VECTOR)
        case MobileAttention():
            c, queries = block.channels, block.heads * block.head_dim
            yield TensorSpec(f"{prefix}norm.weight", (c,), Part.VECTOR)
            yield Pointwise(f"{prefix}attn.query.proj.weight", (queries, c), LINEAR)
            for part in ("key", "value"):
                if block.kv_stride > 1:
                    shape = (c, 1, block.kernel, block.kernel)
                    yield TensorSpec(f"{prefix}attn.{part}.down_conv.weight", shape, Part.VECTOR)
                    yield TensorSpec(f"{prefix}attn.{part}.norm.weight", (c,), Part.VECTOR)
                yield Pointwise(f"{prefix}attn.{part}.proj.weight", (block.head_dim, c), LINEAR)
            yield Pointwise(f"{prefix}attn.output.proj.weight", (c, queries), LINEAR)
            yield TensorSpec(f"{prefix}layer_scale.gamma", (c,), Part.VECTOR)


def _linear_and_norm(conv: str, norm: str, out: int, into: int) -> Iterator[TensorSpec]:
    yield Pointwise(f"{conv}.weight", (out, into), LINEAR)
    yield TensorSpec(f"{norm}.weight", (out,), Part.VECTOR)


def _depthwise_and_norm(prefix: str, channels: int, kernel: int) -> Iterator[TensorSpec]:
    yield TensorSpec(f"{prefix}.conv.weight", (channels, 1, kernel, kernel), Part.VECTOR)
    yield TensorSpec(f"{prefix}.bn.weight", (channels,), Part.VECTOR)
