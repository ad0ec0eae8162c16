"""The Gemma 3n audio encoder, written once against `AudioOps`.

It follows `transformers.models.gemma3n.modeling_gemma3n` (Gemma3nAudioEncoder, Gemma3nMultimodalEmbedder, and
the padding of Gemma3nModel.forward) in eval mode: two convolutions that subsample the log-mel frames by 4, a
conformer with local attention, a reduction by 4, and the embedder.
"""

from __future__ import annotations

import math
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.model.audio_ops import AudioOps, LocalWindow
from gemma_edge.export.model.gemma3n import modality_embedder as embedder
from gemma_edge.export.model.gemma3n.gemma3n_audio_tensors import (
    EMBEDDER,
    PADDING,
    POSITIONS,
    QUERY_SCALE,
    TOWER,
)
from gemma_edge.export.model.ops import Weight, Weights
from gemma_edge.runtime.families.gemma3n_audio_config import AudioConfig

T = TypeVar("T")
MAX_TIMESCALE = 1e4  # of the sinusoids that relative positions are made of


def soft_tokens(ops: AudioOps[T], config: AudioConfig, log_mel: T, valid: T) -> T:
    """What stands for a clip in the text model's input: (soft_tokens, text hidden).

    Args:
        log_mel: (frames, bins, 1), at most `config.max_frames` frames.
        valid: (frames, 1), 1 where a frame belongs to the clip and 0 where it is padding.

    Rows that belong to no frame hold the embedding of the last audio id, as in transformers.
    """
    encoded, valid = encode(ops, config, log_mel, valid)
    embedded = embedder.soft_tokens(ops, Weights(EMBEDDER), encoded)
    return ops.fill(embedded, valid, Weight(PADDING), config.soft_tokens)


def encode(ops: AudioOps[T], config: AudioConfig, log_mel: T, valid: T) -> tuple[T, T]:
    """The tower's output: (tokens, hidden) with zeros where not valid, and (tokens, 1) validity."""
    x = subsample(ops, config, log_mel)
    valid = ops.every(valid, config.time_stride)
    for layer in range(config.conf_num_hidden_layers):
        x = conformer_block(ops, config, Weights(f"{TOWER}conformer.{layer}."), x, valid)
    x, valid = (ops.every(y, config.conf_reduction_factor) for y in (x, valid))
    return ops.multiply(x, valid), valid


def subsample(ops: AudioOps[T], config: AudioConfig, x: T) -> T:
    """(frames, bins, 1) -> (tokens, hidden)."""
    w = Weights(f"{TOWER}subsample_conv_projection.")
    for i, stride in enumerate(config.sscp_conv_stride_size):
        x = ops.convolve(x, w[f"conv_{i}.conv"], stride)
        x = ops.relu(ops.cumulative_norm(x, w[f"conv_{i}.norm"], config.sscp_conv_group_norm_eps))
    width = config.sscp_conv_channel_size[-1] * config.frequencies()[-1]
    return ops.linear(ops.flatten(x, width), w["input_proj_linear"])


def conformer_block(ops: AudioOps[T], config: AudioConfig, w: Weights, x: T, valid: T) -> T:
    """(tokens, hidden) -> (tokens, hidden)."""
    x = feed_forward(ops, config, Weights(f"{w.prefix}ffw_layer_start."), x)
    x = attention(ops, config, Weights(f"{w.prefix}attention."), x, valid)
    x = light_convolution(ops, config, Weights(f"{w.prefix}lconv1d."), ops.multiply(x, valid))
    x = feed_forward(ops, config, Weights(f"{w.prefix}ffw_layer_end."), x)
    return ops.rms_norm(ops.clip(x, config.gradient_clipping), w["norm"])


def feed_forward(ops: AudioOps[T], config: AudioConfig, w: Weights, x: T) -> T:
    normed = ops.rms_norm(ops.clip(x, config.gradient_clipping), w["pre_layer_norm"])
    fed = ops.linear(ops.activation(ops.linear(normed, w["ffw_layer_1"]), "silu"), w["ffw_layer_2"])
    fed = ops.rms_norm(ops.clip(fed, config.gradient_clipping), w["post_layer_norm"])
    return ops.add(x, ops.scale(fed, config.conf_residual_weight))


def attention(ops: AudioOps[T], config: AudioConfig, w: Weights, x: T, valid: T) -> T:
    normed = ops.rms_norm(ops.clip(x, config.gradient_clipping), w["pre_attn_norm"])
    q, k, v = (ops.linear(normed, w[f"attn.{name}_proj"]) for name in "qkv")
    attended = ops.local_attention(
        ops.scale_by(q, w.raw(_below_attention(QUERY_SCALE))),
        k,
        v,
        w.raw(_below_attention(POSITIONS)),
        valid,
        LocalWindow(
            config.conf_num_attention_heads,
            config.conf_attention_chunk_size,
            config.past,
            config.conf_attention_context_right,
        ),
        config.conf_attention_logit_cap,
    )
    out = ops.clip(ops.linear(attended, w["post"]), config.gradient_clipping)
    return ops.add(x, ops.rms_norm(out, w["post_norm"]))


def _below_attention(name: str) -> str:
    return name.removeprefix("attention.")


def light_convolution(ops: AudioOps[T], config: AudioConfig, w: Weights, x: T) -> T:
    """A gated linear unit, a causal convolution a column, and back."""
    doubled = ops.linear(ops.rms_norm(x, w["pre_layer_norm"]), w["linear_start"])
    width = config.hidden_size
    gated = ops.multiply(ops.columns(doubled, 0, width), ops.sigmoid(ops.columns(doubled, width, 2 * width)))
    mixed = ops.clip(ops.causal_convolve(gated, w["depthwise_conv1d"]), config.gradient_clipping)
    activated = ops.activation(ops.rms_norm(mixed, w["conv_norm"]), "silu")
    return ops.add(ops.linear(activated, w["linear_end"]), x)


# What depends on weights alone. --------------------------------------------------------------------


def query_scale(config: AudioConfig, per_dim_scale: NDArray[np.float32]) -> NDArray[np.float32]:
    """(head_dim,) -> (hidden,): head_dim^-0.5 * softplus(scale) / softplus(0), the same for every head."""
    scale = np.logaddexp(per_dim_scale.astype(np.float64), 0) / math.log(2) / math.sqrt(config.head_dim)
    return np.tile(scale, config.conf_num_attention_heads).astype(np.float32)


def relative_positions(config: AudioConfig) -> NDArray[np.float32]:
    """(span, hidden): sines and cosines of the distances past ... -future, as (query - key) in tokens."""
    half = config.hidden_size // 2
    rates = np.exp(np.arange(half) * (-math.log(MAX_TIMESCALE) / max(half - 1, 1)))
    distances = np.arange(config.past, -config.conf_attention_context_right - 1, -1)
    angles = distances[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)
