"""The plan: resident and mapped memory and the predicted peak, before any weight is read.

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

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

from gemma_edge.export.export_families import family_with, tensor_specs
from gemma_edge.export.formats.export_format import ExportFormat, ExportJob, WeightLayout
from gemma_edge.export.model.tensor_spec import EMBEDDING_NAME, PLE_NAME, Part, TensorSpec
from gemma_edge.export.model.tower import Tower
from gemma_edge.export.plan_table import ON_DEMAND, needed_size
from gemma_edge.export.weights.recipe import KV_CACHES, Recipe, list_recipes, load_recipe
from gemma_edge.export.weights.stored_tensor import StoredTensor
from gemma_edge.runtime.errors import CeilingError, UsageError
from gemma_edge.runtime.families.model_family import TextConfig
from gemma_edge.runtime.units import format_size

# SentencePiece with 262,144 pieces holds 50 MB (measured); a vocabulary of another size in proportion.
TOKENIZER_BYTES_PER_PIECE = 190
# Beside its integers, MatMulNBits keeps an fp32 scale and an fp32 sum for every block.
BLOCK_OVERHEAD_BYTES = 8
# File pages that a step touches again and again (norms, the graph): they must fit beside what is anonymous.
WORKING_FILE_BYTES = 48 << 20


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
    snapshot_bytes: int = 0  # for KV snapshots of other conversations

    @property
    def peak_bytes(self) -> int:
        """Predicted peak of anonymous memory: the larger of its phases."""
        return max(self.answer_bytes, self._encoder_bytes + self.base_bytes)

    @property
    def answer_bytes(self) -> int:
        """The phase of prefill and answer."""
        return self._decoder_bytes + self.activation_bytes + self.base_bytes

    @property
    def beside_bytes(self) -> int:
        """The same where an encoder is loaded beside the decoder."""
        return self._decoder_bytes + max(self.activation_bytes, self._encoder_bytes) + self.base_bytes

    @property
    def _decoder_bytes(self) -> int:
        weights = sum(p.memory_bytes for p in self.parts if p.residency != ON_DEMAND)
        return self.kv_cache_bytes + self.snapshot_bytes + weights

    @property
    def _encoder_bytes(self) -> int:
        return max((p.memory_bytes for p in self.parts if p.residency == ON_DEMAND), default=0)

    @property
    def needed_bytes(self) -> int:
        """The smallest ceiling that the plan is accepted under: the peak and `WORKING_FILE_BYTES`."""
        return self.peak_bytes + WORKING_FILE_BYTES

    def to_dict(self) -> dict[str, Any]:
        names = ("peak_bytes", "beside_bytes", "needed_bytes")
        return {**asdict(self), **{name: getattr(self, name) for name in names}}


def make_plan(job: ExportJob, format: ExportFormat) -> Plan:
    """The plan of an artifact; reads no weight.

    Raises:
        UsageError: the format cannot hold this model in this precision.
    """
    config, recipe = job.config, job.recipe
    if reason := format.unsupported(config, recipe):
        raise UsageError(reason)
    data = format.decoder_layout(job)
    resident = [
        _decoder_part(data, part, format.mapped) for part in Part if any(t.part == part for t in data.tensors)
    ]
    specs = tensor_specs(config)
    names = [PLE_NAME, *([EMBEDDING_NAME] if format.has_embedder(config) else [])]
    tables = [_table_part(specs[name], recipe) for name in names]
    on_demand = [_encoder_part(tower, recipe, format) for tower in job.towers.values()]
    if format.mapped:
        bytes_per_token = sum(t.bytes for t in data.tensors)
    else:
        bytes_per_token = sum(p.memory_bytes or p.file_bytes for p in resident)
    return Plan(
        recipe=recipe.name,
        context=job.context,
        chunk=job.chunk,
        parts=(*resident, *tables, *on_demand),
        kv_cache_bytes=format.kv_cache_bytes(job),
        activation_bytes=family_with(config).text.activation_bytes(config, job.chunk),
        base_bytes=base_bytes(config, format),
        bytes_per_token=bytes_per_token,
        file_bytes=data.size + sum(p.file_bytes for p in (*tables, *on_demand)),
        format=format.runtime.name,
        snapshot_bytes=job.snapshots,
    )


def base_bytes(config: TextConfig, format: ExportFormat) -> int:
    """Anonymous memory of interpreter, engine, graph and tokenizer."""
    return format.base_bytes + TOKENIZER_BYTES_PER_PIECE * config.vocab_size


def check_ceiling(plan: Plan, ceiling: int, job: ExportJob, format: ExportFormat) -> None:
    """Refuses a plan above `ceiling` bytes and says which changes would make it fit.

    Raises:
        CeilingError: the plan needs more.
    """
    if plan.needed_bytes <= ceiling:
        return
    remedies = _remedies(ceiling, job, format)
    text = "; ".join(remedies) if remedies else "no recipe of ours fits this model under it"
    peak, room = format_size(plan.peak_bytes), format_size(WORKING_FILE_BYTES)
    raise CeilingError(
        f"recipe {plan.recipe} with a context of {plan.context} needs {needed_size(plan.needed_bytes)} "
        f"(a peak of {peak} and {room} for file pages in use), the ceiling is {format_size(ceiling)}. "
        f"What would fit: {text}"
    )


def _remedies(ceiling: int, job: ExportJob, format: ExportFormat) -> list[str]:
    """Changes that fit: an int8 cache, a smaller chunk, a shorter context, then fewer bits."""

    def first_fit(flag: str, changes: Iterable[tuple[object, ExportJob]]) -> str | None:
        for value, changed in changes:
            if (size := make_plan(changed, format).needed_bytes) <= ceiling:
                return f"{flag} {value} ({format_size(size)})"
        return None

    def contexts() -> Iterator[int]:
        context = job.context // 2
        while context >= 512:
            yield context
            context //= 2

    recipe = job.recipe
    caches = [c for c in KV_CACHES if c == "int8" != recipe.kv_cache]
    found = [
        first_fit("--kv-cache", ((c, replace(job, recipe=replace(recipe, kv_cache=c))) for c in caches)),
        first_fit("--chunk", ((n, replace(job, chunk=n)) for n in (128, 64, 32) if n < job.chunk)),
        first_fit("--context", ((n, replace(job, context=n)) for n in contexts())),
        _largest_recipe(ceiling, job, format),
    ]
    return [remedy for remedy in found if remedy]


def _largest_recipe(ceiling: int, job: ExportJob, format: ExportFormat) -> str | None:
    """The largest of our recipes that fits: it keeps the most of the model."""
    ours = [recipe for name in list_recipes() if (recipe := load_recipe(name)).name == name]
    fitting = [
        (size, recipe.name)
        for recipe in ours
        if recipe.name != job.recipe.name and not format.unsupported(job.config, recipe)
        if (size := make_plan(replace(job, recipe=recipe), format).needed_bytes) <= ceiling
    ]
    if not fitting:
        return None
    size, name = max(fitting)
    return f"--recipe {name} ({format_size(size)})"


def _decoder_part(data: WeightLayout, part: Part, mapped: bool) -> PartPlan:
    tensors = [t for t in data.tensors if t.part == part]
    elements = sum(t.elements for t in tensors)
    file_bytes = sum(t.bytes for t in tensors)
    in_place = part == Part.VECTOR or mapped  # used from the mapped file
    memory = 0 if in_place else sum(step_bytes(tensor, mapped) for tensor in tensors)
    residency = "mapped" if mapped else "resident"
    return PartPlan(part.value, residency, elements, file_bytes, memory, 8 * file_bytes / elements)


def step_bytes(tensor: StoredTensor, mapped: bool) -> int:
    """What a step of decoding reads of a matrix: as the file has it where that is mapped, else prepacked."""
    if mapped:
        return tensor.bytes
    overhead = 0 if tensor.scales is None else BLOCK_OVERHEAD_BYTES * tensor.shape[0] * tensor.blocks
    return tensor.data.length + overhead


def _encoder_part(tower: Tower, recipe: Recipe, format: ExportFormat) -> PartPlan:
    file = format.encoder_file(tower, recipe)
    elements, size = sum(t.elements for t in file.layout.tensors), file.layout.size
    memory = file.resident + file.activations
    return PartPlan(tower.kind, ON_DEMAND, elements, size, memory, 8 * size / elements)


def _table_part(spec: TensorSpec, recipe: Recipe) -> PartPlan:
    rows, columns = spec.shape
    precision = recipe.precision(spec)
    if precision.bits == 32:
        row_bytes = 2 * columns  # the checkpoint's own type, bf16 in practice
    else:
        blocks = precision.blocks(columns)
        row_bytes = blocks * ((precision.group or columns) * precision.bits // 8 + 2)
    total = rows * row_bytes
    part = Part.EMBEDDING if spec.name == EMBEDDING_NAME else spec.part  # a tied head is a part of its own
    return PartPlan(part.value, "mapped", rows * columns, total, 0, 8 * row_bytes / columns)
