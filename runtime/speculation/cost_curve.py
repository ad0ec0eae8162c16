"""`CostCurve`: what a decoder's call of several rows costs on this machine, and the file that keeps it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gemma_edge.runtime.files.cache_folder import cache_folder
from gemma_edge.runtime.files.kept_files import keep_cheap

SUFFIX = ".costs"
FILE_BYTES = 4096  # of all files of a machine: 1 MiB
ALL_BYTES = 1 << 20
MOST_ROWS, DEAREST = 256, 1e3
REPETITIONS = 3  # of each size; the quickest counts


class CostCurve:
    """The time of a call of n rows, over that of one.

    Args:
        ratios: by rows, two or more each. What is dearer than more rows are, or than as many calls of one, is
            taken for a disturbance of the measurement.
    """

    def __init__(self, ratios: Mapping[int, float]) -> None:
        self.rows, self.costs = [1, *sorted(ratios)], [1.0]
        cheapest = np.minimum.accumulate([min(ratios[n], n) for n in self.rows[:0:-1]])[::-1]
        self.costs += np.maximum(1.0, cheapest).tolist()

    def of(self, rows: int) -> float:
        """What a call costs, in decode steps; beyond the largest that was measured, by its cost a row."""
        if rows > self.rows[-1]:
            return self.costs[-1] * rows / self.rows[-1]
        return float(np.interp(rows, self.rows, self.costs))

    @classmethod
    def measured(
        cls, seconds: Callable[[int], float], sizes: Sequence[int], repetitions: int = REPETITIONS
    ) -> CostCurve:
        """The curve of `seconds(rows)`, which takes some; the sizes take turns.

        Of many sizes, powers of two are measured, and what lies between them is interpolated.
        """
        probed = [size for size in sizes if size & (size - 1) == 0] or sizes
        rounds = [[seconds(rows) for rows in (1, *probed)] for _ in range(repetitions)]
        best = [min(times) for times in zip(*rounds, strict=True)]
        return cls({rows: round(t / best[0], 2) for rows, t in zip(probed, best[1:], strict=True)})

    def to_json(self) -> dict[str, float]:
        """Costs by rows, from two on."""
        return {str(rows): cost for rows, cost in zip(self.rows[1:], self.costs[1:], strict=True)}


class CostFile:
    """Keeps a machine's curve in the cache folder; one that cannot be kept is measured again.

    Args:
        name: of the file, but for its suffix: says which bundle, engine, CPU and threads.
    """

    def __init__(self, name: str) -> None:
        self.name = f"{name}{SUFFIX}"

    def read(self) -> CostCurve | None:
        """The curve; None where there is none, or it is damaged."""
        try:
            with open(cache_folder() / self.name, "rb") as file:
                return _curve_of(json.loads(file.read(FILE_BYTES)))
        except (OSError, ValueError, RecursionError):
            return None

    def write(self, curve: CostCurve) -> None:
        """Keeps a curve, where there is room."""
        text = json.dumps(curve.to_json())

        def make(path: Path) -> None:
            path.write_text(text, encoding="utf-8")

        keep_cheap(self.name, ALL_BYTES, len(text), make)


def _curve_of(value: Any) -> CostCurve | None:
    if not isinstance(value, dict) or not value:
        return None
    ratios: dict[int, float] = {}
    for rows, cost in value.items():
        number = isinstance(cost, int | float) and not isinstance(cost, bool) and math.isfinite(cost)
        if not (rows.isdecimal() and 2 <= int(rows) <= MOST_ROWS and number and 1 <= cost <= DEAREST):
            return None
        ratios[int(rows)] = float(cost)
    return CostCurve(ratios)


class MachineCosts:
    """The curve of one loaded decoder on this machine: read from its file, or measured once and kept.

    Args:
        file: where it is kept; None for nowhere.
        curve: if it is known.
    """

    def __init__(self, file: CostFile | None = None, curve: CostCurve | None = None) -> None:
        self._file, self._curve = file, curve or (file.read() if file else None)

    @property
    def curve(self) -> CostCurve | None:
        """The curve; None until it is measured."""
        return self._curve

    def measure(self, seconds: Callable[[int], float], sizes: Sequence[int]) -> CostCurve:
        """See `CostCurve.measured`."""
        self._curve = CostCurve.measured(seconds, sizes)
        if self._file:
            self._file.write(self._curve)
        return self._curve
