"""The export formats by name: those of the runtime, each in a folder beside this file."""

from __future__ import annotations

import importlib
from pathlib import Path

from gemma_edge.export.formats.export_format import ExportFormat
from gemma_edge.runtime.artifacts.artifact_formats import ARTIFACT_FORMATS
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.install_hint import distribution, install_hint

FORMAT_NAMES = tuple(ARTIFACT_FORMATS)
DEFAULT_FORMAT = FORMAT_NAMES[0]


def format_of_target(out: str | Path | None, format: str | None) -> str:
    """The name of the format of an export to `out`: `format`, or the one whose suffix `out` has.

    Raises:
        UsageError: `out` has the suffix of another format.
    """
    suffix = "" if out is None else Path(out).suffix
    found = next((each.name for each in ARTIFACT_FORMATS.values() if each.suffix == suffix != ""), None)
    if format is not None and found is not None and found != format:
        raise UsageError(f"{out}: a {suffix} is a file of --format {found}, not {format}; name a folder")
    return format or found or DEFAULT_FORMAT


def export_format(name: str) -> ExportFormat:
    """The format of that name.

    Raises:
        UsageError: the name is unknown, or a package that the format needs is not installed.
    """
    if name not in ARTIFACT_FORMATS:
        raise UsageError(f"unknown format {name!r}: choose from {', '.join(FORMAT_NAMES)}")
    try:
        # On demand: each format needs packages that the others do without.
        module = importlib.import_module(f"gemma_edge.export.formats.{name}.{name}_format")
        found: ExportFormat = module.FORMAT
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("gemma_edge"):
            raise
        raise UsageError(
            f"--format {name} needs {distribution(str(error.name))}: {install_hint('export')}"
        ) from None
    return found
