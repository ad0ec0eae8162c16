"""The image encoder of Gemma 3n and its embedder, written once against `VisionOps`.

It follows timm's `MobileNetV5Encoder` (mobilenetv5_300m_enc) and `get_image_features` of
`transformers.models.gemma3n.modeling_gemma3n` in eval mode. Feature maps are (height, width, channels).
"""

from __future__ import annotations

import math
from typing import TypeVar

from gemma_edge.export.model.gemma3n import modality_embedder as embedder
from gemma_edge.export.model.gemma3n.gemma3n_vision_tensors import (
    EMBEDDER,
    TOWER,
    Block,
    EdgeResidual,
    InvertedResidual,
    MobileAttention,
    stages,
)
from gemma_edge.export.model.ops import Weights
from gemma_edge.export.model.vision_ops import VisionOps
from gemma_edge.runtime.families.gemma3n_vision_config import VisionConfig

T = TypeVar("T")

GELU = "gelu_pytorch_tanh"


def soft_tokens(ops: VisionOps[T], config: VisionConfig, pixels: T) -> T:
    """Pixels in [0, 1], (image_size, image_size, 3) -> (soft tokens, text hidden)."""
    x = ops.flatten(encoder(ops, config, pixels), config.hidden_size)
    return embedder.soft_tokens(ops, Weights(EMBEDDER), ops.scale(x, math.sqrt(config.hidden_size)))


def encoder(ops: VisionOps[T], config: VisionConfig, pixels: T) -> T:
    """(image_size, image_size, 3) -> (grid, grid, hidden)."""
    w = Weights(TOWER)
    x = ops.conv2d(pixels, w["conv_stem.conv"], 2, w.raw("conv_stem.conv.bias"))
    x = ops.activation(ops.rms_norm(x, w["conv_stem.bn"]), GELU)
    ends = []
    for i, stage in enumerate(stages(config)):
        for j, each in enumerate(stage):
            x = block(ops, Weights(f"{TOWER}blocks.{i}.{j}."), each, x)
        ends.append(x)
    return fuse(ops, Weights(f"{TOWER}msfa."), ends[-2], ends[-1], config.pool)


def fuse(ops: VisionOps[T], w: Weights, fine: T, coarse: T, pool: int) -> T:
    """Multi-scale fusion: two feature maps, one of half the resolution, mixed and pooled to the grid."""
    x = ops.concat([fine, ops.upsample(coarse, 2)])
    x = contract(ops, w, expand(ops, w, x, "ffn.pw_exp"), "ffn.pw_proj")
    if pool > 1:
        x = ops.average_pool(x, pool)
    return ops.rms_norm(x, w["norm"])


def block(ops: VisionOps[T], w: Weights, block: Block, x: T) -> T:
    """One block of a stage."""
    match block:
        case EdgeResidual():
            return edge_residual(ops, w, block, x)
        case InvertedResidual():
            return inverted_residual(ops, w, block, x)
        case MobileAttention():
            return mobile_attention(ops, w, block, x)


def edge_residual(ops: VisionOps[T], w: Weights, block: EdgeResidual, x: T) -> T:
    y = ops.conv2d(x, w["conv_exp"], block.stride)
    y = ops.activation(ops.rms_norm(y, w["bn1"]), GELU)
    y = ops.rms_norm(ops.linear(y, w["conv_pwl"]), w["bn2"])
    return ops.add(y, x) if block.stride == 1 and block.out == block.channels else y


def inverted_residual(ops: VisionOps[T], w: Weights, block: InvertedResidual, x: T) -> T:
    y = x
    if block.start_kernel:
        stride = 1 if block.mid_kernel else block.stride
        y = ops.rms_norm(ops.depthwise_conv2d(y, w["dw_start.conv"], stride), w["dw_start.bn"])
    y = expand(ops, w, y, "pw_exp")
    if block.mid_kernel:
        y = ops.rms_norm(ops.depthwise_conv2d(y, w["dw_mid.conv"], block.stride), w["dw_mid.bn"])
        y = ops.activation(y, GELU)
    y = ops.scale_by(contract(ops, w, y, "pw_proj"), w.raw("layer_scale.gamma"))
    return ops.add(y, x) if block.stride == 1 and block.out == block.channels else y


def expand(ops: VisionOps[T], w: Weights, x: T, name: str) -> T:
    return ops.activation(contract(ops, w, x, name), GELU)


def contract(ops: VisionOps[T], w: Weights, x: T, name: str) -> T:
    return ops.rms_norm(ops.linear(x, w[f"{name}.conv"]), w[f"{name}.bn"])


def mobile_attention(ops: VisionOps[T], w: Weights, block: MobileAttention, x: T) -> T:
    normed = ops.rms_norm(x, w["norm"])

    def projected(part: str) -> T:
        y = normed
        if block.kv_stride > 1:
            y = ops.depthwise_conv2d(y, w[f"attn.{part}.down_conv"], block.kv_stride)
            y = ops.rms_norm(y, w[f"attn.{part}.norm"])
        return ops.linear(y, w[f"attn.{part}.proj"])

    q = ops.linear(normed, w["attn.query.proj"])
    attended = ops.multi_query_attention(q, projected("key"), projected("value"), block.heads, block.head_dim)
    y = ops.linear(attended, w["attn.output.proj"])
    return ops.add(ops.scale_by(y, w.raw("layer_scale.gamma")), x)
