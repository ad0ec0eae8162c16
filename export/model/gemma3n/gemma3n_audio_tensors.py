"""Every tensor of the audio encoder and its embedder, in checkpoint and graph.

Names are those of a multimodal checkpoint below `model.`: `audio_tower.*` and `embed_audio.*`. A graph has a
few tensors less: what depends on weights alone is computed once (`fold_audio`), so that a
twenty-fifth of the encoder, the projections of relative positions, is never shipped.
"""

from __future__ import annotations

from collections.abc import Iterator

from gemma_edge.export.model.gemma3n.modality_embedder import LINEAR, TABLE, embedder_specs
from gemma_edge.export.model.tensor_spec import Part, TensorSpec
from gemma_edge.runtime.families.gemma3n_audio_config import AudioConfig

TOWER, EMBEDDER = "audio_tower.", "embed_audio."
# Names of a checkpoint, and what stands for them in a graph.
PER_DIM_SCALE, QUERY_SCALE = "attention.attn.per_dim_scale", "attention.attn.query_scale"
POSITION_PROJECTION = "attention.attn.relative_position_embedding.pos_proj.weight"
POSITIONS = "attention.attn.positions"
PADDING = EMBEDDER + "padding"


def audio_specs(config: AudioConfig) -> dict[str, TensorSpec]:
    """The tensors of a checkpoint, by name, in the order of use."""
    return {spec.name: spec for spec in _checkpoint(config)}


def folded_specs(config: AudioConfig) -> dict[str, TensorSpec]:
    """The tensors of a graph, by name."""
    specs = {}
    for name, spec in audio_specs(config).items():
        if name.endswith(PER_DIM_SCALE):
            new = TensorSpec(layer_of(name) + QUERY_SCALE, (config.hidden_size,), Part.VECTOR)
        elif name.endswith(POSITION_PROJECTION):
            span = config.past + config.conf_attention_context_right + 1
            new = TensorSpec(layer_of(name) + POSITIONS, (span, config.hidden_size), Part.VECTOR)
        elif name == EMBEDDER + TABLE:
            new = TensorSpec(PADDING, (config.text_hidden_size,), Part.VECTOR)
        elif name == EMBEDDER + "hard_embedding_norm.weight":
            continue
        else:
            new = spec
        specs[new.name] = new
    return specs


def largest_map(config: AudioConfig) -> int:
    """Elements of the largest feature map of the longest clip: the first convolution's."""
    frames = -(-config.max_frames // config.sscp_conv_stride_size[0][0])
    return frames * config.frequencies()[1] * config.sscp_conv_channel_size[0]


def layer_of(name: str) -> str:
    """`audio_tower.conformer.3.` of a name below it."""
    return ".".join(name.split(".")[:3]) + "."


def _checkpoint(c: AudioConfig) -> Iterator[TensorSpec]:
    bins, channels = c.frequencies(), (1, *c.sscp_conv_channel_size)
    subsampling = f"{TOWER}subsample_conv_projection."
    for i, kernel in enumerate(c.sscp_conv_kernel_size):
        stage = f"{subsampling}conv_{i}."
        shape = (channels[i + 1], channels[i], *kernel)
        yield TensorSpec(f"{stage}conv.weight", shape, Part.VECTOR)
        yield TensorSpec(f"{stage}norm.weight", (channels[i + 1],), Part.VECTOR)
    yield TensorSpec(
        f"{subsampling}input_proj_linear.weight", (c.hidden_size, channels[-1] * bins[-1]), LINEAR
    )
    for layer in range(c.conf_num_hidden_layers):
        for name, size, part in _layer(c):
            yield TensorSpec(f"{TOWER}conformer.{layer}.{name}", size, part)
    yield from embedder_specs(EMBEDDER, c.hidden_size, c.vocab_size, c.text_hidden_size)


def _layer(c: AudioConfig) -> Iterator[tuple[str, tuple[int, ...], Part]]:
    width = c.hidden_size
    yield from _feed_forward("ffw_layer_start", width)
    yield "attention.pre_attn_norm.weight", (width,), Part.VECTOR
    yield PER_DIM_SCALE, (c.head_dim,), Part.VECTOR
    yield POSITION_PROJECTION, (width, width), LINEAR
    for name in ("q_proj", "k_proj", "v_proj"):
        yield f"attention.attn.{name}.weight", (width, width), LINEAR
    yield "attention.post.weight", (width, width), LINEAR
    yield "attention.post_norm.weight", (width,), Part.VECTOR
    yield "lconv1d.pre_layer_norm.weight", (width,), Part.VECTOR
    yield "lconv1d.linear_start.weight", (2 * width, width), LINEAR
    yield "lconv1d.depthwise_conv1d.weight", (width, 1, c.conf_conv_kernel_size), Part.VECTOR
    yield "lconv1d.conv_norm.weight", (width,), Part.VECTOR
    yield "lconv1d.linear_end.weight", (width, width), LINEAR
    yield from _feed_forward("ffw_layer_end", width)
    yield "norm.weight", (width,), Part.VECTOR


def _feed_forward(name: str, width: int) -> Iterator[tuple[str, tuple[int, ...], Part]]:
    yield f"{name}.pre_layer_norm.weight", (width,), Part.VECTOR
    yield f"{name}.ffw_layer_1.weight", (4 * width, width), LINEAR
    yield f"{name}.ffw_layer_2.weight", (width, 4 * width), LINEAR
    yield f"{name}.post_layer_norm.weight", (width,), Part.VECTOR
