"""Progress on stderr: a bar on a terminal, silence elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType

from tqdm import tqdm

from gemma_edge.runtime.console import is_quiet


class ProgressBar:
    """A bar over `total` units; with total 0, only its title and the time."""

    def __init__(self, title: str, total: int, show: bool, unit: str = "") -> None:
        self._bar = tqdm(
            total=total or None,
            desc=title,
            unit=unit,
            unit_scale=True,
            file=sys.stderr,
            disable=not show or is_quiet() or not sys.stderr.isatty(),
            dynamic_ncols=True,
            leave=False,
        )

    def advance(self, units: int) -> None:
        """Moves the bar on."""
        self._bar.update(units)

    def __enter__(self) -> ProgressBar:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
