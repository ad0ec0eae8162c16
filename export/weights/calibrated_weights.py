"""4-bit weights rounded with feedback from a calibration text, kept in a folder until they are written.

One pass of the reference over the text meets every weight beside the inputs of its product. The weight is
rounded there and then (`error_feedback.py`) and goes to a file, so that memory holds one layer's inputs and a
few rows of one weight. Inputs are those of the checkpoint's own weights: those that a network of rounded
weights has gave the same divergence on Pocket (0.030 and 0.029 nats a token at int4_g128).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from gemma_edge.export.emit.reference.reference_text import Array, ReferenceOps, final_hidden
from gemma_edge.export.model.ops import HeadProjection, Weight
from gemma_edge.export.model.tensor_spec import EMBEDDING_NAME, Part, head_name
from gemma_edge.export.model.weight_source import WeightSource, read_weight
from gemma_edge.export.weights.error_feedback import Feedback, feedback_of, round_with_feedback
from gemma_edge.export.weights.quantize import BlockQuantized, Clip, ScaleForm, quantize
from gemma_edge.export.weights.recipe import Precision, Recipe
from gemma_edge.export.weights.rounding import NearestRounding
from gemma_edge.export.weights.stored_tensor import CHUNK_ELEMENTS, StoredTensor, check_magnitude

# See `feedback_of`. Less than this, and few tokens decide too much. The rows of a tied head are also inputs
# of the model, where each weight counts by itself.
DAMPING, TIED_DAMPING = 0.1, 1.0
ELEMENTS = 4 * CHUNK_ELEMENTS  # of a weight that are rounded at once
CALIBRATED_BITS = 4


@dataclass(frozen=True)
class _Kept:
    """The file of a rounded weight: all integers, then all scales; and how it is to be stored."""

    path: Path
    rows: int
    columns: int
    precision: Precision
    form: ScaleForm


class CalibratedRounding:
    """The `Rounding` of a calibration: what it has not rounded, for want of inputs, goes to the nearest."""

    def __init__(self, folder: Path, clip: Clip) -> None:
        self.folder, self.nearest = folder, NearestRounding(clip)
        self.kept: dict[Weight, _Kept] = {}

    def blocks(self, tensor: StoredTensor, chunks: Iterable[Array]) -> Iterator[BlockQuantized]:
        found = [self.kept[w] for w in tensor.weights if isinstance(w, Weight) and w in self.kept]
        form = (tensor.precision, tensor.scale_form)
        if len(found) == len(tensor.weights) and all((one.precision, one.form) == form for one in found):
            for one in found:
                yield from _read(one)
        else:
            yield from self.nearest.blocks(tensor, chunks)

    def keep(self, weight: Weight, tensor: StoredTensor, rows: int, parts: Iterator[BlockQuantized]) -> None:
        """Writes the rows of a weight to a file of its own."""
        path = self.folder / f"{len(self.kept)}.calibrated"
        scales = []
        with open(path, "xb") as file:
            for part in parts:
                file.write(part.data.data)
                scales.append(part.scales)
            for scale in scales:
                file.write(np.ascontiguousarray(scale).data)
        self.kept[weight] = _Kept(path, rows, tensor.shape[-1], tensor.precision, tensor.scale_form)


def _read(kept: _Kept) -> Iterator[BlockQuantized]:
    blocks = kept.precision.blocks(kept.columns)
    group = kept.precision.group or kept.columns + kept.columns % 2
    row_bytes = blocks * group * kept.precision.bits // 8
    step = max(1, CHUNK_ELEMENTS // kept.columns)
    for row in range(0, kept.rows, step):
        count = min(step, kept.rows - row)
        data = np.fromfile(kept.path, np.uint8, count * row_bytes, offset=row * row_bytes)
        place = kept.rows * row_bytes + 4 * row * blocks
        scales = np.fromfile(kept.path, np.float32, count * blocks, offset=place)
        yield BlockQuantized(
            data.reshape(count, blocks, -1),
            scales.reshape(count, blocks),
            kept.precision.bits,
            group,
            kept.columns,
        )


def calibrate_weights(
    source: WeightSource,
    tensors: Sequence[StoredTensor],
    sequences: Sequence[Sequence[int]],
    clip: Clip,
    folder: Path,
    progress: Callable[[int], None] | None = None,
) -> CalibratedRounding:
    """Rounds the 4-bit weights among `tensors`, a decoder's, in one pass over `sequences` of token ids.

    Args:
        folder: for the rounded weights, until they are written; about as large as they are in the artifact.
        progress: given the number of weights read since its last call.
    """
    rounding = CalibratedRounding(folder, clip)
    wanted = {w: tensor for tensor in calibrated(tensors) for w in tensor.weights if isinstance(w, Weight)}
    lengths = [len(sequence) for sequence in sequences]
    ops = CalibratingOps(source, lengths, wanted, rounding, progress)
    hidden = final_hidden(ops, sequences)
    ops.meet(hidden, [Weight(head_name(source.config))])
    return rounding


def can_calibrate(recipe: Recipe) -> bool:
    """Whether a decoder in this recipe has weights whose rounding calibration chooses."""
    precisions = [recipe.parts[part] for part in (Part.DECODER, Part.HEAD, Part.SMALL)]
    return any(precision.bits == CALIBRATED_BITS for precision in (*precisions, *recipe.tensors.values()))


def calibrated(tensors: Iterable[StoredTensor]) -> Iterator[StoredTensor]:
    """Those whose rounding calibration chooses."""
    return (tensor for tensor in tensors if tensor.precision.bits == CALIBRATED_BITS)


def calibration_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Disk space that `calibrate_weights` takes: scales are fp32 here."""
    return sum(t.data.length + 4 * t.blocks * t.shape[0] for t in calibrated(tensors))


class MeetingOps(ReferenceOps, ABC):
    """The reference, where `meet` sees every weight of a product beside the product's inputs."""

    def linear(self, x: Array, weight: Weight, bias: Weight | None = None) -> Array:
        self.meet(x, [weight])
        return super().linear(x, weight, bias)

    def project_heads(self, x: Array, projections: list[HeadProjection]) -> Array:
        self.meet(x, [projection.weight for projection in projections])
        return super().project_heads(x, projections)

    @abstractmethod
    def meet(self, x: Array, weights: Sequence[Weight]) -> None:
        """Before `x`, (tokens, columns), is multiplied with these; perhaps again for each of them."""


class CalibratingOps(MeetingOps):
    """The reference, which rounds each weight of `tensors` when it first meets its inputs."""

    def __init__(
        self,
        source: WeightSource,
        lengths: list[int],
        tensors: Mapping[Weight, StoredTensor],
        rounding: CalibratedRounding,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__(source, lengths, lengths, progress)
        self.tensors, self.rounding = tensors, rounding
        self.latest: tuple[Array, list[Feedback]] | None = None  # gate and up share their inputs

    def meet(self, x: Array, weights: Sequence[Weight]) -> None:
        """Rounds weights that are multiplied with `x`, (tokens, columns)."""
        new = [weight for weight in weights if weight in self.tensors and weight not in self.rounding.kept]
        if not new:
            return
        if self.latest is None or self.latest[0] is not x:
            tied = new[0].name == EMBEDDING_NAME
            self.latest = x, feedback_of(x, TIED_DAMPING if tied else DAMPING)
        for weight in new:
            tensor, feedback = self.tensors[weight], self.latest[1]
            start, stop = weight.rows or (0, self.specs[weight.name].shape[0])
            parts = self.rounded(replace(weight, rows=(start, stop)), tensor, feedback)
            self.rounding.keep(weight, tensor, stop - start, parts)

    def rounded(
        self, weight: Weight, tensor: StoredTensor, feedback: list[Feedback]
    ) -> Iterator[BlockQuantized]:
        """The rows of `weight`, some at a time."""
        start, stop = weight.rows or (0, 0)
        step = max(1, ELEMENTS // tensor.shape[-1])
        precision, form = tensor.precision, tensor.scale_form
        for row in range(start, stop, step):
            rows = read_weight(self.source, replace(weight, rows=(row, min(row + step, stop))))
            check_magnitude(self.source, weight.name, rows)
            clip = self.rounding.nearest.clip
            nearest = quantize(rows, precision.bits, precision.group, clip, form.type, form.positive)
            yield round_with_feedback(rows, nearest, feedback)
