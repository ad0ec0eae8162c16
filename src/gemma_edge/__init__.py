"""Gemma 3n on phones and single-board computers.

    from gemma_edge import Model

    with Model.load("out/") as model:
        print(model.generate("Why is the sky blue?").text)

Importing this package loads none of its modules; a name does when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gemma_edge.runtime.lazy import lazy_names

if TYPE_CHECKING:
    from gemma_edge.export.exporter import export_bundle
    from gemma_edge.runtime.errors import GemmaEdgeError
    from gemma_edge.runtime.hub.pull_bundle import pull_bundle
    from gemma_edge.runtime.model import Model
    from gemma_edge.runtime.version import __version__
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "GemmaEdgeError": "runtime.errors",
            "Model": "runtime.model",
            "__version__": "runtime.version",
            "export_bundle": "export.exporter",
            "pull_bundle": "runtime.hub.pull_bundle",
        },
    )

__all__ = ["GemmaEdgeError", "Model", "__version__", "export_bundle", "pull_bundle"]
