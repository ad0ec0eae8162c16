"""`--budget`: how many bits each layer's weights get, so that a step of decoding reads so many bytes at most.

What rounding costs is measured, not guessed. One pass of the reference over a text gives, for every unit (the
attention of a layer, its feed-forward, its small projections, the head) and every precision, the error that
rounding leaves in the products, relative to their size. A few short passes with one kind of unit rounded give
what such an error does to the answer: the divergence of the next-token distributions. Their product is what
a unit costs in a precision. All units begin with the fewest bits; the bytes that are left go, one unit after
the other, where each byte takes away the most.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.emit.reference.reference_text import evaluate_blocks, final_hidden
from gemma_edge.export.formats.export_format import ExportFormat, ExportJob
from gemma_edge.export.gate.parity import divergence
from gemma_edge.export.model.ops import Weight
from gemma_edge.export.model.tensor_spec import Part, head_name
from gemma_edge.export.model.weight_source import WeightSource, read_weight
from gemma_edge.export.plan import make_plan, step_bytes
from gemma_edge.export.weights.calibrated_weights import MeetingOps
from gemma_edge.export.weights.quantize import Clip, dequantize, quantize
from gemma_edge.export.weights.recipe import Precision, Recipe
from gemma_edge.export.weights.stored_tensor import CHUNK_ELEMENTS, StoredTensor
from gemma_edge.runtime.errors import CeilingError
from gemma_edge.runtime.units import format_size

Array = NDArray[np.float32]
# The fewest bytes first. The parts that every step reads; tables of rows keep what the recipe says.
PRECISIONS = (Precision(4, 128), Precision(4, 32), Precision(8, 128))
CHOSEN_PARTS = (Part.DECODER, Part.HEAD, Part.SMALL)
SAMPLED_TOKENS, SAMPLED_ROWS, ROWS_AT_ONCE = 256, 256, 64  # of a product, whose error is measured
ANSWER_TOKENS = 96  # over which the divergence of a kind is measured
KINDS = ("attention", "feed-forward", "small projections", "head")


@dataclass(frozen=True)
class Unit:
    """Weights that get one precision, as some engine may store them as one.

    Attributes:
        layer: None for what belongs to none.
        kind: one of KINDS.
    """

    layer: int | None
    kind: str


@dataclass(frozen=True)
class Choice:
    """What a unit got.

    Attributes:
        bytes: that a step reads of it.
        cost: expected divergence that its rounding adds, in nats a token; a share of the sum says most.
    """

    unit: Unit
    precision: Precision
    bytes: int
    cost: float


class PrecisionBudget:
    """The choice for one export. Nothing is read before `choose`.

    Args:
        budget: bytes of weights that a step may read, `Plan.bytes_per_token`.

    Raises:
        CeilingError: nothing fits; the message says what would.
        UsageError: the format cannot hold the model.
    """

    def __init__(self, job: ExportJob, format: ExportFormat, budget: int) -> None:
        self.job, self.format, self.budget = job, format, budget
        recipes = [_uniform(job.recipe, precision) for precision in PRECISIONS]
        usable = [recipe for recipe in recipes if format.unsupported(job.config, recipe) is None]
        self.precisions = [recipe.parts[Part.DECODER] for recipe in usable]
        jobs = [replace(job, recipe=recipe) for recipe in usable]
        self.least = make_plan(jobs[0], format).bytes_per_token
        if self.least > budget:
            raise CeilingError(
                f"--budget {format_size(budget)}: the weights that a token reads take at least "
                f"{format_size(self.least)} of this model in {format.runtime.name}. Give that, or cut the "
                "model with --slice"
            )
        # One list for each precision, of the same tensors in the same order.
        self.stored = [
            [t for t in format.decoder_layout(job).tensors if t.part in CHOSEN_PARTS] for job in jobs
        ]

    @property
    def elements(self) -> int:
        """Weights that `choose` reads: all, once for the errors, once exact, and once for each kind."""
        return (2 + len(KINDS)) * sum(tensor.elements for tensor in self.stored[0])

    @property
    def name(self) -> str:
        """Of the recipe: the same for the same budget."""
        return budget_name(self.job.recipe, self.budget)

    def choose(
        self,
        source: WeightSource,
        sequences: Sequence[Sequence[int]],
        progress: Callable[[int], None] | None = None,
    ) -> tuple[Recipe, list[Choice]]:
        """The recipe, and what each unit got.

        Args:
            sequences: token ids of the text to measure on.
            progress: given the number of weights read since its last call, `elements` in all.
        """
        errors = self._errors(source, sequences, progress)
        answers = self._divergences(source, [sequences[0][:ANSWER_TOKENS]], progress)
        whole: dict[str, float] = defaultdict(float)
        for unit, of_precision in errors.items():
            whole[unit.kind] += of_precision[0]
        # What one unit of relative error in a kind does to the answer.
        weight = {kind: answers[kind] / whole[kind] if whole[kind] else 0.0 for kind in answers}
        sizes = self._sizes()
        costs = {unit: [weight[unit.kind] * error for error in errors[unit]] for unit in sizes}
        taken = _spend(costs, sizes, self.budget - self.least)
        own, tensors = self.job.recipe.parts, dict[str, Precision]()
        for tensor in self.stored[0]:
            precision = self.precisions[taken[unit_of(tensor)]]
            if precision != own[tensor.part]:
                tensors |= dict.fromkeys(map(_module, _weights(tensor)), precision)
        recipe = replace(  # its parts stay: encoders have them, too
            self.job.recipe,
            name=self.name,
            description=f"Bits by measured cost, {format_size(self.budget)} of weights a token at most.",
            tensors=tensors,
        )
        choices = [
            Choice(unit, self.precisions[at], sizes[unit][at], costs[unit][at]) for unit, at in taken.items()
        ]
        return recipe, choices

    def _sizes(self) -> dict[Unit, list[int]]:
        """Bytes a step, for each precision."""
        sizes: dict[Unit, list[int]] = defaultdict(lambda: [0] * len(self.precisions))
        for at, tensors in enumerate(self.stored):
            for tensor in tensors:
                sizes[unit_of(tensor)][at] += step_bytes(tensor, self.format.mapped)
        return dict(sizes)

    def _errors(
        self,
        source: WeightSource,
        sequences: Sequence[Sequence[int]],
        progress: Callable[[int], None] | None,
    ) -> dict[Unit, list[float]]:
        """Of every unit the sum of its products' relative squared errors, for each precision."""
        stored = [{w: t for t in tensors for w in _weights(t)} for tensors in self.stored]
        lengths = [len(sequence) for sequence in sequences]
        ops = _MeasuringOps(source, lengths, lengths, progress)
        ops.stored, ops.clip = stored, self.job.recipe.clip
        ops.meet(final_hidden(ops, sequences), [Weight(head_name(source.config))])
        return ops.errors

    def _divergences(
        self,
        source: WeightSource,
        sequences: Sequence[Sequence[int]],
        progress: Callable[[int], None] | None,
    ) -> dict[str, float]:
        """Of every kind the mean divergence of the answer when its units have the fewest bits."""
        rounded: dict[str, WeightSource] = {}
        for kind in KINDS:
            if tensors := [tensor for tensor in self.stored[0] if unit_of(tensor).kind == kind]:
                rounded[kind] = _RoundedSource(source, tensors, self.job.recipe.clip)
        return divergences(source, rounded, sequences, progress)


def divergences(
    source: WeightSource,
    others: Mapping[str, WeightSource],
    sequences: Sequence[Sequence[int]],
    progress: Callable[[int], None] | None = None,
) -> dict[str, float]:
    """The mean divergence of the next tokens' distributions, in nats, with each of `others` as weights."""
    sums, rows = dict.fromkeys(others, 0.0), 0
    every = [evaluate_blocks(each, sequences, progress=progress) for each in (source, *others.values())]
    for exact, *blocks in zip(*every, strict=True):
        rows += len(exact)
        for name, block in zip(others, blocks, strict=True):
            sums[name] += sum(map(divergence, exact, block))
    return {name: total / rows for name, total in sums.items()}


def budget_name(recipe: Recipe, budget: int) -> str:
    """The name of the recipe that a budget makes of one."""
    return f"{recipe.name}_budget_{budget}"


def unit_of(tensor: StoredTensor) -> Unit:
    """The unit of a stored weight of `CHOSEN_PARTS`."""
    parts = next(iter(_weights(tensor))).name.split(".")
    layer = int(parts[1]) if parts[0] == "layers" else None
    if tensor.part == Part.DECODER:
        return Unit(layer, "feed-forward" if parts[2] == "mlp" else "attention")
    return Unit(layer, "head" if tensor.part == Part.HEAD else "small projections")


def choice_rows(choices: Iterable[Choice]) -> Iterator[tuple[str, ...]]:
    """A table of what was chosen: kind, precision, units, bytes, share of the cost."""
    found = list(choices)
    total = sum(choice.cost for choice in found) or 1.0
    yield "part", "bits", "group", "units", "bytes a token", "of the cost"
    groups: dict[tuple[str, Precision], list[Choice]] = defaultdict(list)
    for choice in found:
        groups[choice.unit.kind, choice.precision].append(choice)
    order = {kind: at for at, kind in enumerate(KINDS)}
    for (kind, precision), members in sorted(
        groups.items(), key=lambda item: (order[item[0][0]], item[0][1].bits, -item[0][1].group)
    ):
        size, cost = sum(one.bytes for one in members), sum(one.cost for one in members)
        yield (
            kind,
            str(precision.bits),
            str(precision.group),
            str(len(members)),
            format_size(size),
            f"{cost / total:.0%}",
        )


def _spend(
    costs: Mapping[Unit, Sequence[float]], sizes: Mapping[Unit, Sequence[int]], left: int
) -> dict[Unit, int]:
    """For each unit the index of its precision: greedily, the step that saves the most cost a byte."""
    taken = dict.fromkeys(sizes, 0)
    while True:
        steps = [
            ((costs[unit][at] - costs[unit][to]) / max(1, sizes[unit][to] - sizes[unit][at]), unit, to)
            for unit, at in taken.items()
            for to in range(at + 1, len(sizes[unit]))
            if sizes[unit][to] - sizes[unit][at] <= left and costs[unit][to] < costs[unit][at]
        ]
        if not steps:
            return taken
        _, unit, to = max(steps, key=lambda step: step[0])
        left -= sizes[unit][to] - sizes[unit][taken[unit]]
        taken[unit] = to


def _uniform(recipe: Recipe, precision: Precision) -> Recipe:
    """The recipe with one precision for all that a step reads."""
    return replace(recipe, parts={**recipe.parts, **dict.fromkeys(CHOSEN_PARTS, precision)}, tensors={})


def _weights(tensor: StoredTensor) -> Iterator[Weight]:
    return (weight for weight in tensor.weights if isinstance(weight, Weight))


def _module(weight: Weight) -> str:
    """What a recipe calls it: the module within a layer, all of whose matrices are of one unit."""
    return ".".join(weight.name.split(".")[:3])


def _rounded(rows: Array, tensor: StoredTensor, clip: Clip) -> Array:
    """Rows of a weight as `tensor` stores them."""
    precision, form = tensor.precision, tensor.scale_form
    if precision.bits == 32:
        return rows
    return dequantize(quantize(rows, precision.bits, precision.group, clip, form.type, form.positive))


class _MeasuringOps(MeetingOps):
    """The reference, which measures what rounding a weight does to its product."""

    stored: list[dict[Weight, StoredTensor]]
    clip: Clip

    def __post_init__(self) -> None:
        super().__post_init__()
        self.errors: dict[Unit, list[float]] = {}
        self.met: set[Weight] = set()

    def meet(self, x: Array, weights: Sequence[Weight]) -> None:
        """Measures weights that are multiplied with `x`, (tokens, columns)."""
        for weight in weights:
            if weight in self.stored[0] and weight not in self.met:
                self.met.add(weight)
                step = max(1, len(x) // SAMPLED_TOKENS)
                noise, power = self._noise(np.ascontiguousarray(x[::step]), weight)
                found = self.errors.setdefault(unit_of(self.stored[0][weight]), [0.0] * len(self.stored))
                for at, value in enumerate(noise):
                    found[at] += value / power if power else 0.0

    def _noise(self, x: Array, weight: Weight) -> tuple[list[float], float]:
        """Squared errors of the sampled outputs for each precision, and the squares of these outputs."""
        first, stop = weight.rows or (0, self.specs[weight.name].shape[0])
        pieces = max(1, min(SAMPLED_ROWS, stop - first) // ROWS_AT_ONCE)
        noise, power = [0.0] * len(self.stored), 0.0
        for start in np.linspace(first, max(first, stop - ROWS_AT_ONCE), pieces).astype(int):
            rows = read_weight(
                self.source, replace(weight, rows=(int(start), min(int(start) + ROWS_AT_ONCE, stop)))
            )
            power += float(np.sum(np.square(x @ rows.T)))
            for at, stored in enumerate(self.stored):
                off = _rounded(rows, stored[weight], self.clip) - rows
                noise[at] += float(np.sum(np.square(x @ off.T)))
        return noise, power


class _RoundedSource:
    """A `WeightSource` with some weights rounded as they are read."""

    def __init__(self, source: WeightSource, tensors: Iterable[StoredTensor], clip: Clip) -> None:
        self.source, self.config, self.clip = source, source.config, clip
        self.tensors = {weight.name: tensor for tensor in tensors for weight in _weights(tensor)}

    def read(self, name: str) -> Array:
        return self._stored(name, self.source.read(name))

    def rows(self, name: str, start: int, stop: int) -> Array:
        return self._stored(name, self.source.rows(name, start, stop))

    def _stored(self, name: str, weights: Array) -> Array:
        tensor = self.tensors.get(name)
        if tensor is None or weights.ndim != 2:
            return weights
        step = max(1, CHUNK_ELEMENTS // weights.shape[1])
        made = np.empty_like(weights)
        for row in range(0, len(weights), step):
            made[row : row + step] = _rounded(weights[row : row + step], tensor, self.clip)
        return made
