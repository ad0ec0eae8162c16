"""`open_source`: a checkpoint, or what adapters and a slice make of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from gemma_edge.export.checkpoint.adapted_checkpoint import open_adapted
from gemma_edge.export.checkpoint.checkpoint import Checkpoint, resolve
from gemma_edge.export.checkpoint.sliced_checkpoint import SlicedCheckpoint
from gemma_edge.export.model.model_slice import Slice
from gemma_edge.runtime.artifacts.modalities import KINDS, Kind
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.files.json_shape import misfit

ADAPTERS_SHAPE = [{"name": "text", "weight": "number", "sha256": "text"}]
SLICE_SHAPE = {"name": "text?", "intermediate_size": ["size"], "skipped_layers": ["size"]}


def open_source(
    source: str | Path,
    adapters: Sequence[str] = (),
    encoders: Collection[Kind] = KINDS,
    slice: str | None = None,
) -> Checkpoint:
    """The checkpoint of a folder or a Hugging Face id, with adapters merged, and then cut.

    Args:
        adapters: folders or ids, each perhaps with a weight behind it: "lora/", "lora/=0.5".
        encoders: as of `Checkpoint.open`.
        slice: a published slice's name, or widths and layers, see `parse_slice`; None for the whole model.

    Raises:
        CheckpointError: an adapter cannot be merged into this checkpoint.
        UsageError: a weight that is no number, an adapter that names another base model, or no such slice.
    """
    if adapters:
        checkpoint = open_adapted(source, adapters, encoders)
    else:
        checkpoint = Checkpoint.open(resolve(str(source)), encoders)
    if slice is None:
        return checkpoint
    try:
        return SlicedCheckpoint(checkpoint, slice)
    except BaseException:
        checkpoint.close()
        raise


def check_changes(checkpoint: Checkpoint, manifest: Mapping[str, Any], path: Path) -> None:
    """Raises UsageError unless the checkpoint was changed as the manifest at `path` says of its bundle's."""
    own = checkpoint.changes()
    adapters = _fitting(manifest.get("adapters"), ADAPTERS_SHAPE) or []
    if [each["sha256"] for each in adapters] != [each["sha256"] for each in own.get("adapters", [])]:
        told = " ".join(f"--adapter {each['name']}={each['weight']}" for each in adapters) or "no --adapter"
        raise UsageError(f"{path}: the bundle was exported with other adapters: give {told}")
    cut, given = (_slice(record) for record in (manifest.get("slice"), own.get("slice")))
    if (cut and (cut.widths, cut.skipped)) != (given and (given.widths, given.skipped)):
        told = f"--slice {cut}" if cut else "the whole model, and no --slice"
        raise UsageError(f"{path}: the bundle was exported with another slice: give {told}")


def _slice(record: object) -> Slice | None:
    if (fields := _fitting(record, SLICE_SHAPE)) is None:
        return None
    widths, skipped = (tuple(map(int, fields[key])) for key in ("intermediate_size", "skipped_layers"))
    return Slice(widths, skipped, fields.get("name"))


def _fitting(record: Any, shape: object) -> Any:
    return None if misfit(record, shape) else record
