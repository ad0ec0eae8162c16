"""`Closed`: what stands in the place of a closed model's parts."""

from __future__ import annotations

from typing import Any, NoReturn

from gemma_edge.runtime.errors import UsageError


class Closed:
    """Any use of it, but to close it once more, says that the model is closed."""

    def close(self) -> None:
        """Does nothing."""

    def __getattr__(self, name: str) -> NoReturn:
        raise UsageError("the model is closed: load it again with Model.load")


CLOSED: Any = Closed()
