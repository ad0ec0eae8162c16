"""The export formats by name. A new one is a folder beside this file and a line here."""

from __future__ import annotations

import importlib

from gemma_edge.export.formats.export_format import ExportFormat
from gemma_edge.runtime.errors import UsageError

# Imported on demand: each format needs packages that the others do without. The first one is the default.
MODULES = {
    "onnx": "gemma_edge.export.formats.onnx.onnx_format",
    "tflite": "gemma_edge.export.formats.tflite.tflite_format",
    "litertlm": "gemma_edge.export.formats.litertlm.litertlm_format",
}
FORMAT_NAMES = tuple(MODULES)
DEFAULT_FORMAT = FORMAT_NAMES[0]


def export_format(name: str) -> ExportFormat:
    """The format of that name.

    Raises:
        UsageError: the name is unknown, or a package that the format needs is not installed.
    """
    if name not in MODULES:
        raise UsageError(f"unknown format {name!r}: choose from {', '.join(FORMAT_NAMES)}")
    try:
        found: ExportFormat = importlib.import_module(MODULES[name]).FORMAT
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("gemma_edge"):
            raise
        raise UsageError(
            f'--format {name} needs the package {error.name}: pip install "gemma-edge[export]"'
        ) from None
    return found
