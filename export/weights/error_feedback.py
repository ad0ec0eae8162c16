"""Rounds weights up or down so that the errors of a product cancel: GPTQ's error compensation.

A row w of weights meets inputs x whose second moments H = mean(x x^T) a calibration text has shown. The error
of the product with integers q and scales s is e H e^T, e = w - q s, so an error of one weight can be made up
for by the weights behind it. H (damped) is factored as U D U^T, U unit upper triangular; weight k is then
rounded from

    w_k + sum over j < k of e_j U_jk

which leaves e H e^T = sum of D_kk (what rounding weight k was off by)^2. This is GPTQ in the form of LDLQ
(Chee et al., 2023, "QuIP"), which needs no inverse of H. Columns go in the order of falling H_kk, so that the
last ones, which nothing makes up for, matter least.

Two rules keep what a short text has not shown in bounds. The scales are those of `quantize`, and a weight is
rounded up or down, never further: its error stays below one step whatever the text was, as the gate demands
(`weight_check.py`). And of wide inputs, columns of different spans of SPAN count as independent, so that
memory does not grow with the square of the width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.weights.quantize import TINIEST, BlockQuantized, pack_nibbles
from gemma_edge.runtime.artifacts.row_table import Bytes, Floats

SPAN = 2048  # columns whose errors may make up for one another
PANEL = 64  # columns whose feedback is applied one by one; that of all before them is one matrix product


@dataclass(frozen=True)
class Feedback:
    """How columns [start, start + len(order)) of a weight make up for one another.

    order: columns from `start`, in the order in which they are rounded.
    upper: f32 (columns, columns), U in that order.
    """

    start: int
    order: NDArray[np.int64]
    upper: Floats


def feedback_of(inputs: Floats, damping: float) -> list[Feedback]:
    """From inputs (tokens, columns) of a product.

    Args:
        damping: added to the diagonal of H, as a share of its mean: how much each weight counts by itself.
    """
    found = []
    for start in range(0, inputs.shape[1], SPAN):
        part = inputs[:, start : start + SPAN]
        moments = (part.T @ part).astype(np.float64) / len(part)
        diagonal = np.diag(moments)
        # Inputs that are all zero say nothing; every weight then counts alike.
        moments[np.diag_indices_from(moments)] += damping * (diagonal.mean() or 1.0)
        order = np.argsort(-diagonal, kind="stable")
        # A lower factor of the reversed matrix is an upper factor of the matrix.
        backward = order[::-1]
        factor = np.linalg.cholesky(moments[np.ix_(backward, backward)])[::-1, ::-1]
        found.append(Feedback(start, order, np.ascontiguousarray(factor / np.diag(factor), np.float32)))
    return found


def round_with_feedback(weights: Floats, nearest: BlockQuantized, feedback: list[Feedback]) -> BlockQuantized:
    """`nearest`, what `quantize` makes of `weights` (N, K), with each weight rounded up or down by feedback.

    Raises:
        ValueError: `nearest` has other bits than 4.
    """
    if nearest.bits != 4:
        raise ValueError(f"4 bits are rounded with feedback, not {nearest.bits}")
    rows, blocks = nearest.scales.shape
    unsigned: Bytes = np.full((rows, blocks * nearest.group), 8, np.uint8)
    for part in feedback:
        stop = part.start + len(part.order)
        # Columns are the leading axis: a step of the loop then works on contiguous rows.
        scales = np.ascontiguousarray(nearest.scales.T)[(part.start + part.order) // nearest.group]
        columns = _transposed(weights[:, part.start : stop])[part.order]
        values = _rounded(columns, scales, part.upper)
        unsigned[:, part.start : stop] = _transposed(values[np.argsort(part.order)])
    data = pack_nibbles(unsigned.reshape(rows, blocks, nearest.group), axis=2)
    return BlockQuantized(
        np.ascontiguousarray(data), nearest.scales, nearest.bits, nearest.group, nearest.columns
    )


def _transposed(matrix: NDArray[Any]) -> NDArray[Any]:
    """A copy, 64 rows at a time: NumPy copies a large matrix in an order that misses the caches."""
    result = np.empty(matrix.shape[::-1], matrix.dtype)
    for row in range(0, len(matrix), 64):
        result[:, row : row + 64] = matrix[row : row + 64].T
    return result


def _rounded(weights: Floats, scales: Floats, upper: Floats) -> Bytes:
    """Integers -8 to 7, plus 8, of weights (columns, N) with scales (columns, N); overwrites `weights` with
    errors.
    """
    values: Bytes = np.empty(weights.shape, np.uint8)
    for first in range(0, len(weights), PANEL):
        panel = slice(first, min(first + PANEL, len(weights)))
        # Rows before `first` hold errors by now, those from it on weights.
        aims = weights[panel] + upper[:first, panel].T @ weights[:first]
        divisors: Floats = np.where(scales[panel] == 0, np.float32(1), scales[panel])
        exact = weights[panel] / divisors
        exact[np.abs(weights[panel]) < TINIEST] = 0
        low, high = (np.clip(side(exact), -8, 7) for side in (np.floor, np.ceil))
        for k, (aim, value) in enumerate(zip(aims, exact, strict=True)):
            error = weights[first + k]
            aim += upper[first : first + k, first + k] @ weights[first : first + k]
            np.divide(aim, divisors[k], out=value)
            np.rint(value, out=value)
            np.maximum(value, low[k], out=value)
            np.minimum(value, high[k], out=value)
            np.multiply(value, scales[first + k], out=aim)
            np.subtract(error, aim, out=error)
        exact += 8
        values[panel] = exact
    return values
