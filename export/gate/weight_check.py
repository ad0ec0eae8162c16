"""The gate's first half: every weight that an artifact stores, against the checkpoint's.

A tensor is read back from the finished files, some rows at a time, from where the graph itself says that it
lies, and compared with the checkpoint's rows in the same order. Nothing is run, so the network amplifies
nothing, and the bounds follow from how a tensor is stored:

**Error.** A block of `group` weights w, the largest of magnitude m, is stored as integers times a scale.
Rounding to the nearest of the 2 (2^(bits - 1) - 1) steps between -m and m is off by half a step at most, so
the root of the block's squared error is at most

    sqrt(group) * m / (2 (2^(bits - 1) - 1))  +  2^-8 |w|  +  2^-25 sqrt(group)

The other ways to choose a scale (`quantize`) are taken only where they leave a smaller squared error. The
second term is for a scale in bfloat16, the third for one among float16's denormals. Rows in another order,
halves of a byte exchanged, an inverted sign or another tensor are off by |w| or more.

**Slope.** An error that rounding cannot make may hide within that bound, such as scales that are all 2 % too
large. It shows in the regression. A scale fitted by least squares (clip "mse") makes the checkpoint's weights
over the stored ones a line of slope 1, but for the scale's own rounding; without a fit (clip "none") the
rounding errors do not correlate with the weights, so the stored over the checkpoint's have slope 1. With n
weights and a relative error e, the deviation stays below

    0.004 + 2.5 e / sqrt(n)  (mse),    0.004 + 8 e / sqrt(n) + 5 e^4  (none)

0.004 is 2^-8, the rounding of a bfloat16; the other terms are for few weights, and for steps so wide that the
errors do correlate. A scale among float16's denormals may be off by 2^-24 more. On 12,000 random tensors
(normal, uniform, heavy-tailed, sparse, ternary, not around zero; 1 to 131,072 weights; every group, scale
type and clip), by which these terms were chosen, the deviation stayed below that.

**Calibrated weights** (4 bits, `--calibrate`) are rounded up or down instead of to the nearest, over the same
scales. Within its range a weight is off by a step at most, so the root of a block's squared error is at most
sqrt(5) times the first term above: what is clipped is off as before. If all were rounded to the nearest and
the share r of their squares were their error, clip "mse" would give the stored over the checkpoint's weights
the slope 1 - r. Rounding to the other side adds noise that does not correlate with the weights, so the slope
may deviate from 1 - r as above. An embedding that is also a calibrated head has the head's slope.

Weights that stay fp32 are the checkpoint's, but for one rounding by a factor that is folded into them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.emit.reference.encoder_weights import FoldedWeights
from gemma_edge.export.formats.export_format import ExportFormat, ExportJob, WeightLayout
from gemma_edge.export.formats.registry import export_format
from gemma_edge.export.model.tensor_spec import EMBEDDING_NAME, PLE_NAME
from gemma_edge.export.model.weight_source import WeightSource
from gemma_edge.export.progress_bar import ProgressBar
from gemma_edge.export.weights.quantize import Clip
from gemma_edge.export.weights.recipe import load_recipe
from gemma_edge.export.weights.stored_matrix import StoredMatrix
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.row_table import RowTable
from gemma_edge.runtime.errors import ParityError

Array = NDArray[np.float32]
EDGE_ROWS, RANDOM_ROWS = 32, 192  # of a table: at each end, and in between
FP32_ROUNDING = 1e-6
TILE = 1 << 17  # weights that are summed at once: they fit a core's cache


@dataclass(frozen=True)
class StoredWeights:
    """What the check of weights found.

    Attributes:
        tensors: that were compared.
        relative_error: of all quantized weights, the root of their squared error over that of their squares.
    """

    tensors: int
    relative_error: float


def check_weights(bundle: Bundle, checkpoint: Checkpoint, *, progress: bool = False) -> StoredWeights:
    """Compares every stored tensor with the checkpoint's; of tables, rows at the edges and at random.

    Raises:
        ParityError: a tensor is missing, or is not the checkpoint's; the message names it.
    """
    format, clip = export_format(bundle.format), bundle.member("recipe", dict).get("clip", "mse")
    calibrated = "calibration" in bundle.manifest
    sums = _Sums()
    graphs = list(_graphs(bundle, checkpoint, format))
    total = sum(tensor.elements for _, layout, _ in graphs for tensor in layout.tensors)
    tensors = 0
    with ProgressBar("checking the weights", total, progress, "weights") as bar:
        for file, layout, source in graphs:
            stored = format.stored(bundle, file)
            _check_names(file, layout, stored)
            for tensor in layout.tensors:
                fed_back = calibrated and file == format.decoder and stored[tensor.name].bits == 4
                comparison = _Comparison(f"{file}: {tensor.name}", stored[tensor.name], clip, sums, fed_back)
                for chunk in layout.chunks(source, tensor):
                    comparison.add(chunk)
                    bar.advance(chunk.size)
                tensors += 1
        for name, layout in bundle.member("tables", dict).items():
            with RowTable(bundle.file(layout["file"]), layout) as table:
                _check_table(name, table, checkpoint, clip, sums, calibrated)
            tensors += 1
    return StoredWeights(tensors, math.sqrt(sums.error / sums.size) if sums.size else 0.0)


@dataclass
class _Sums:
    """Of all quantized weights."""

    error: float = 0.0
    size: float = 0.0


def plain_job(bundle: Bundle) -> ExportJob:
    """An export like that of `bundle`, as far as names and the order of weights go, at full precision."""
    return ExportJob(bundle.config, load_recipe("fp32"), bundle.context, 1)


def _graphs(
    bundle: Bundle, checkpoint: Checkpoint, format: ExportFormat
) -> Iterator[tuple[str, WeightLayout, WeightSource]]:
    """The files with weights, what each must hold in which order, and where that is read from."""
    job = plain_job(bundle)
    yield format.decoder, format.decoder_layout(job), checkpoint
    for kind, tower in checkpoint.towers.items():
        if kind in bundle.modalities:
            encoder = format.encoder_file(tower, job.recipe)
            yield encoder.graph, encoder.layout, FoldedWeights(checkpoint, tower.config)


def _check_names(file: str, layout: WeightLayout, stored: Iterable[str]) -> None:
    odd = sorted({tensor.name for tensor in layout.tensors} ^ set(stored))
    if odd:
        what = "is not in the file" if odd[0] not in stored else "is no weight of this model"
        raise ParityError(f"the stored weights are not the checkpoint's: {file}: {odd[0]} {what}")


class _Comparison:
    """One stored tensor against the checkpoint's values, which come in the order in which they are stored."""

    def __init__(
        self, name: str, stored: StoredMatrix, clip: Clip, sums: _Sums, calibrated: bool = False
    ) -> None:
        self.name, self.stored, self.clip, self.sums = name, stored, clip, sums
        self.calibrated = calibrated
        self.done = 0  # values compared

    def add(self, expected: Array) -> None:
        stored = self.stored
        if stored.bits == 32:
            got, self.done = stored.values(self.done, expected.size), self.done + expected.size
            check_exact(self.name, got, expected.reshape(-1))
            return
        row = self.done // stored.columns
        stop = row + len(expected)
        self.done += expected.size
        check_rounded(
            f"{self.name} from row {row}",
            stored.rows(row, stop),
            expected,
            (stored.bits, stored.block, self.clip),
            self.sums,
            Calibrated(stored.scale_values(row, stop)) if self.calibrated else None,
        )


def _check_table(
    name: str, table: RowTable, checkpoint: Checkpoint, clip: Clip, sums: _Sums, calibrated: bool
) -> None:
    """Rows of a mapped table, which the runtime multiplies by a factor: at both ends, and at random."""
    tensor = {"embedding": EMBEDDING_NAME, "per_layer": PLE_NAME}[name]
    count, layout = table.rows, table.layout
    ids = {*range(min(EDGE_ROWS, count)), *range(max(0, count - EDGE_ROWS), count)}
    ids |= set(np.random.default_rng(0).integers(0, count, RANDOM_ROWS).tolist())
    rows = sorted(ids)
    got = table.lookup(rows) / np.float32(layout.scale)
    expected = np.concatenate([checkpoint.rows(tensor, row, row + 1) for row in rows])
    where = f"table {name} ({tensor})"
    if layout.scales is None:
        check_exact(where, got.reshape(-1), expected.reshape(-1))
    else:
        form = (int(layout.encoding[-1]), layout.group, clip)
        head = calibrated and tensor == EMBEDDING_NAME and form[0] == 4
        check_rounded(where, got, expected, form, sums, Calibrated(None) if head else None)


def check_exact(name: str, got: Array, expected: Array) -> None:
    """Raises ParityError unless the values are equal but for a rounding."""
    if got.shape != expected.shape:
        raise ParityError(f"the stored weights are not the checkpoint's: {name}: another shape")
    off = np.abs(got - expected) > FP32_ROUNDING * np.abs(expected)
    if off.any() or not np.isfinite(got).all():
        index = int(np.flatnonzero(off | ~np.isfinite(got))[0])
        raise ParityError(
            f"the stored weights are not the checkpoint's: {name}: weight {index} is {got[index]:.6g}, "
            f"the checkpoint's {expected[index]:.6g}"
        )


@dataclass(frozen=True)
class Calibrated:
    """Of calibrated weights, the scales (rows, blocks); None where their slope is not to be judged."""

    scales: Array | None


def check_rounded(
    name: str,
    got: Array,
    expected: Array,
    form: tuple[int, int, Clip],
    sums: _Sums | None = None,
    calibrated: Calibrated | None = None,
) -> None:
    """Raises ParityError unless `got` can be the rounding of `expected`, both (rows, columns).

    Args:
        form: bits, weights of a row that share a scale, and how the scale was chosen.
        sums: added to.
        calibrated: None for weights that were rounded to the nearest.
    """
    bits, block, clip = form
    if got.shape != expected.shape:
        raise ParityError(f"the stored weights are not the checkpoint's: {name}: another shape")
    ours, theirs = _blocks(expected, block), _blocks(got, block)
    largest, error, size, both = _sums_of_blocks(ours, theirs)
    bound = largest * math.sqrt(block) / (2 * ((1 << (bits - 1)) - 1))
    if calibrated:
        bound *= math.sqrt(5)
    bound = bound + 2.0**-8 * np.sqrt(size) + 2.0**-25 * math.sqrt(block)
    off = ~(np.sqrt(error) <= bound)  # a NaN is off, too
    if off.any():
        row, place = (int(i) for i in np.argwhere(off)[0])
        raise ParityError(
            f"the stored weights are not the checkpoint's: {name}: row +{row}, block {place} is off by "
            f"{math.sqrt(error[row, place] / max(size[row, place], 1e-300)):.1%}, more than {bits} bits in "
            f"groups of {block} can be"
        )
    total, square = float(error.sum()), float(size.sum())
    if sums is not None:
        sums.error, sums.size = sums.error + total, sums.size + square
    product = float(both.sum())
    stored_square = 2 * product - square + total
    if min(stored_square, square) <= 0 or (calibrated and calibrated.scales is None):
        return  # all zero, or judged elsewhere
    relative, count = math.sqrt(total / square), expected.size
    few = relative / math.sqrt(count)
    allowed = 2.0**-8 + (2.5 * few if clip == "mse" else 8 * few + 5 * relative**4)
    allowed += 2.0**-24 * (1 << (bits - 1)) / float(largest.mean())
    if clip == "none":
        excess = product / square - 1
    elif calibrated and calibrated.scales is not None:
        excess = product / square - (1 - _nearest_error(ours, calibrated.scales, bits) / square)
    else:
        excess = 1 - product / stored_square
    if not abs(excess) <= allowed:
        raise ParityError(
            f"the stored weights are not the checkpoint's: {name}: all are {abs(excess):.1%} too "
            f"{'large' if excess > 0 else 'small'}, more than {allowed:.1%}"
        )


def _sums_of_blocks(ours: Array, theirs: Array) -> tuple[NDArray[np.float64], ...]:
    """Of every block (rows, blocks, block): our largest magnitude, and the sums of the squares of the
    difference, of our squares, and of the products; (rows, blocks) each.
    """
    sums = np.empty((4, *ours.shape[:2]))
    step = max(1, TILE // max(1, ours[0].size))
    for row in range(0, len(ours), step):
        a, b, (largest, *others) = ours[row : row + step], theirs[row : row + step], sums[:, row : row + step]
        np.maximum(a.max(axis=2), -a.min(axis=2), out=largest)
        # Squares of fp32 have a narrow range; what is beyond it is summed in fp64, which takes longer.
        moderate = ((largest > 2.0**-40) | (largest == 0)).all() and largest.max(initial=0) < 2.0**40
        difference = a - b
        for total, x, y in zip(others, (difference, a, a), (difference, a, b), strict=True):
            total[...] = np.einsum("rbg,rbg->rb", x, y, dtype=np.float32 if moderate else np.float64)
    return tuple(sums)


def _nearest_error(blocks: Array, scales: Array, bits: int) -> float:
    """The squared error of `blocks` (rows, blocks, block) at the nearest multiples of `scales` in range."""
    steps = np.where(scales == 0, np.float32(1), scales)[..., None]
    most = 1 << (bits - 1)
    nearest = np.clip(np.rint(blocks / steps), -most, most - 1) * scales[..., None]
    return float(np.square(blocks - nearest, dtype=np.float64).sum())


def _blocks(rows: Array, block: int) -> Array:
    """(rows, columns) as (rows, blocks, block), padded with zeros."""
    padding = -rows.shape[1] % block
    padded = np.pad(rows, ((0, 0), (0, padding))) if padding else rows
    return padded.reshape(len(rows), -1, block)
