"""The plan: what stays resident, what is mapped, and the peak it predicts - before any weight is read.

| class | what | memory it costs |
|---|---|---|
| resident | decoder layers, projections, head | the engine's packed copy on the heap |
| mapped | per-layer table, token embeddings | none: rows are read from the file when a token needs them |
| on demand | encoders of images and audio | their own size, only while a prompt is encoded |

There are two phases, and the peak is the larger one's: attachments are encoded, one encoder at a time, before
the decoder is loaded; then the prompt is prefilled and answered. In a conversation a later image is encoded
beside the decoder, which `beside_bytes` is about.

The prediction is of anonymous memory (RssAnon), which cannot be reclaimed; file pages can, and are under a
limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

from gemma_edge.export.checkpoint.towers import Encoder
from gemma_edge.export.model.gemma3n.gemma3n_text_tensors import (
    EMBEDDING_NAME,
    PLE_NAME,
    Part,
    TensorSpec,
    tensor_specs,
)
from gemma_edge.export.plan_table import ON_DEMAND
from gemma_edge.export.weights.external_data import StoredTensor
from gemma_edge.export.weights.recipe import Recipe, list_recipes, load_recipe
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.engines.kv_cache import cache_layouts, windowed_cache_bytes
from gemma_edge.runtime.errors import CeilingError
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.units import format_size

# Measured as RssAnon with ONNX Runtime 1.31 and CPython 3.11 on x86-64: interpreter, NumPy and engine 21 MiB,
# E2B's graph of 1,750 nodes 16 MiB, buffers of one step the rest.
BASE_BYTES = 44 << 20
# SentencePiece with 262,144 pieces holds 50 MB (measured); a vocabulary of another size in proportion.
TOKENIZER_BYTES_PER_PIECE = 190
# Beside its integers, MatMulNBits keeps an fp32 scale and an fp32 sum for every block.
BLOCK_OVERHEAD_BYTES = 8
# File pages that a step touches again and again (norms, the graph): they must fit beside what is anonymous.
WORKING_FILE_BYTES = 48 << 20


# Measured with LiteRT 2.3, beside the cache and the activations: a graph of each signature, and its kernels.
LITERT_BASE_BYTES = 110 << 20


@dataclass(frozen=True)
class PartPlan:
    """One part of the bundle. Sizes are bytes; `bits` are stored bits a weight, scales included.

    The memory of a part on demand is that of one run of it, its activations included.
    """

    part: str
    residency: str  # "resident", "mapped" or "on demand"
    elements: int
    file_bytes: int
    memory_bytes: int
    bits: float


@dataclass(frozen=True)
class Plan:
    """What a bundle of this config, recipe, context and chunk will hold and need. Bytes."""

    recipe: str
    context: int
    chunk: int
    parts: tuple[PartPlan, ...]
    kv_cache_bytes: int
    activation_bytes: int
    base_bytes: int
    bytes_per_token: int  # weights that one decode step reads from memory, as the engine has packed them
    file_bytes: int
    format: str = "onnx"

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of anonymous memory: the larger of its phases."""
        return max(self._decoder_bytes + self.activation_bytes, self._encoder_bytes) + self.base_bytes

    @property
    def beside_bytes(self) -> int:
        """The same where an encoder is loaded beside the decoder."""
        return self._decoder_bytes + max(self.activation_bytes, self._encoder_bytes) + self.base_bytes

    @property
    def _decoder_bytes(self) -> int:
        return self.kv_cache_bytes + sum(p.memory_bytes for p in self.parts if p.residency != ON_DEMAND)

    @property
    def _encoder_bytes(self) -> int:
        return max((p.memory_bytes for p in self.parts if p.residency == ON_DEMAND), default=0)

    @property
    def needed_bytes(self) -> int:
        """The smallest ceiling that the plan is accepted under."""
        return self.peak_bytes + WORKING_FILE_BYTES

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "peak_bytes": self.peak_bytes, "beside_bytes": self.beside_bytes}


class WeightLayout(Protocol):
    """Where a format's emitter has laid out its weights."""

    tensors: list[StoredTensor]
    size: int


def weight_layout(
    config: Gemma3nConfig, recipe: Recipe, context: int, chunk: int, format: str
) -> WeightLayout:
    """The decoder's weights as the emitter of `format` stores them; reads none."""
    if format == "tflite":
        from gemma_edge.export.formats.tflite.tflite_bundle import emit_windowed

        return emit_windowed(config, recipe, context, chunk)
    if format == "litertlm":
        from gemma_edge.export.formats.litertlm.litertlm_file import emit_models
        from gemma_edge.runtime.artifacts.litertlm_bundle import DECODER

        return emit_models(config, recipe, context, chunk)[DECODER]
    from gemma_edge.export.emit.onnx.onnx_text import emit_decoder

    return emit_decoder(config, recipe, "decoder.onnx.data").data


def encoder_layout(encoder: Encoder, recipe: Recipe, format: str) -> tuple[WeightLayout, int]:
    """An encoder's weights as the emitter of `format` stores them, and the memory it takes; reads none."""
    if format != "onnx":
        from gemma_edge.export.formats.tflite import tflite_bundle

        return tflite_bundle.emit_encoder(encoder, recipe), sum(tflite_bundle.encoder_memory(encoder))
    from gemma_edge.export.formats.onnx.onnx_encoder_files import emit_encoder, encoder_memory

    data = emit_encoder(encoder, recipe)[1]
    return data, sum(encoder_memory(encoder, data))


def make_plan(
    config: Gemma3nConfig,
    recipe: Recipe,
    context: int,
    chunk: int,
    format: str = "onnx",
    encoders: Mapping[Kind, Encoder] = MappingProxyType({}),
) -> Plan:
    """The plan of a bundle. With LiteRT the packed weights are a mapped file, so that they cost no memory."""
    data = weight_layout(config, recipe, context, chunk, format)
    mapped = format != "onnx"
    parts = [_decoder_part(data, part, mapped) for part in Part if any(t.part == part for t in data.tensors)]
    parts.append(_table_part(tensor_specs(config)[PLE_NAME], recipe))
    if not config.tie_word_embeddings or format == "litertlm":  # which has its embedder by itself
        parts.append(_table_part(tensor_specs(config)[EMBEDDING_NAME], recipe))
    rotary = 0
    if format == "litertlm":  # every cache goes in whole and comes out whole
        kv = sum(layout.row_bytes * context for layout in cache_layouts(config).values())
    elif mapped:
        kv = windowed_cache_bytes(config, context)
    else:
        kv = sum(layout.bytes(context) for layout in cache_layouts(config, recipe.kv_cache).values())
        rotary = 2 * len(set(config.layer_types)) * context * config.head_dim * 2
    base = LITERT_BASE_BYTES if mapped else BASE_BYTES
    tables = sum(p.file_bytes for p in parts if p.part in (Part.PLE, Part.EMBEDDING))
    on_demand = [_encoder_part(encoder, recipe, format) for encoder in encoders.values()]
    parts += on_demand
    return Plan(
        recipe=recipe.name,
        context=context,
        chunk=chunk,
        parts=tuple(parts),
        kv_cache_bytes=kv + rotary,
        activation_bytes=activation_bytes(config, chunk),
        base_bytes=base + TOKENIZER_BYTES_PER_PIECE * config.vocab_size,
        bytes_per_token=sum(t.bytes for t in data.tensors)
        if mapped
        else sum(p.memory_bytes or p.file_bytes for p in parts if p.residency == "resident"),
        file_bytes=data.size + tables + sum(p.file_bytes for p in on_demand),
        format=format,
    )


def activation_bytes(config: Gemma3nConfig, chunk: int) -> int:
    """Largest set of tensors alive at once in a prefill call of `chunk` tokens, and one row of logits.

    In the feed-forward block: gate, up and two temporaries of its width, beside the streams before and after
    prediction, their updates, and the per-layer inputs of the call.
    """
    width = max(config.intermediate_size)
    streams = config.altup_num_inputs * config.hidden_size
    per_token = 4 * width + 4 * streams + 6 * config.hidden_size + 3 * config.ple_row_size
    attention = config.num_attention_heads * (config.sliding_window + chunk)
    return 4 * (chunk * (per_token + attention) + 3 * config.vocab_size)


def check_ceiling(
    plan: Plan,
    ceiling: int,
    config: Gemma3nConfig,
    recipe: Recipe,
    encoders: Mapping[Kind, Encoder] = MappingProxyType({}),
) -> None:
    """Refuses a plan above `ceiling` bytes and says which changes would make it fit.

    Raises:
        CeilingError: the plan needs more.
    """
    if plan.needed_bytes <= ceiling:
        return
    remedies = _remedies(ceiling, config, recipe, plan, encoders)
    text = "; ".join(remedies) if remedies else "no recipe of ours fits this model under it"
    raise CeilingError(
        f"recipe {plan.recipe} with a context of {plan.context} needs {format_size(plan.needed_bytes)}, "
        f"the ceiling is {format_size(ceiling)}. What would fit: {text}"
    )


def _remedies(
    ceiling: int, config: Gemma3nConfig, recipe: Recipe, plan: Plan, encoders: Mapping[Kind, Encoder]
) -> list[str]:
    """Changes that fit: an int8 cache, a smaller chunk, a shorter context, then fewer bits."""

    def needed(recipe: Recipe, context: int, chunk: int) -> int:
        return make_plan(config, recipe, context, chunk, plan.format, encoders).needed_bytes

    found = []
    if recipe.kv_cache != "int8":
        size = needed(replace(recipe, kv_cache="int8"), plan.context, plan.chunk)
        if size <= ceiling:
            found.append(f"--kv-cache int8 ({format_size(size)})")
    for chunk in (128, 64, 32):
        if chunk < plan.chunk and needed(recipe, plan.context, chunk) <= ceiling:
            found.append(f"--chunk {chunk} ({format_size(needed(recipe, plan.context, chunk))})")
            break
    context = plan.context // 2
    while context >= 512:
        if needed(recipe, context, plan.chunk) <= ceiling:
            found.append(f"--context {context} ({format_size(needed(recipe, context, plan.chunk))})")
            break
        context //= 2
    others = [load_recipe(name) for name in list_recipes() if load_recipe(name).name == name]
    if plan.format == "onnx":
        others = [other for other in others if not other.channelwise]
    sizes = [(needed(other, plan.context, plan.chunk), other.name) for other in others]
    # The largest recipe that fits keeps the most of the model.
    fitting = sorted((size, name) for size, name in sizes if size <= ceiling and name != plan.recipe)
    if fitting:
        found.append(f"--recipe {fitting[-1][1]} ({format_size(fitting[-1][0])})")
    return found


def _decoder_part(data: WeightLayout, part: Part, mapped: bool) -> PartPlan:
    tensors = [t for t in data.tensors if t.part == part]
    elements = sum(t.elements for t in tensors)
    file_bytes = sum(t.bytes for t in tensors)
    memory = 0
    for tensor in tensors:
        if part == Part.VECTOR or mapped:
            continue  # used in place from the mapped file
        memory += tensor.data.length
        if tensor.scales is not None:
            memory += BLOCK_OVERHEAD_BYTES * tensor.shape[0] * tensor.blocks
    residency = "mapped" if mapped else "resident"
    return PartPlan(part.value, residency, elements, file_bytes, memory, 8 * file_bytes / elements)


def _encoder_part(encoder: Encoder, recipe: Recipe, format: str) -> PartPlan:
    layout, memory = encoder_layout(encoder, recipe, format)
    elements = sum(t.elements for t in layout.tensors)
    bits = 8 * layout.size / elements
    return PartPlan(encoder.kind, ON_DEMAND, elements, layout.size, memory, bits)


def _table_part(spec: TensorSpec, recipe: Recipe) -> PartPlan:
    rows, columns = spec.shape
    precision = recipe.precision(spec)
    if precision.bits == 32:
        row_bytes = 2 * columns  # the checkpoint's own type, bf16 in practice
    else:
        blocks = precision.blocks(columns)
        row_bytes = blocks * ((precision.group or columns) * precision.bits // 8 + 2)
    total = rows * row_bytes
    return PartPlan(spec.part.value, "mapped", rows * columns, total, 0, 8 * row_bytes / columns)
