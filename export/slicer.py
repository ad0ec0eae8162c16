"""`slice_checkpoint`: a smaller checkpoint, cut out of one whose FFNs are nested, tensor by tensor."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_edge.export.checkpoint.checkpoint import SLICE_NAME, public_name
from gemma_edge.export.checkpoint.new_checkpoint import check_new, lay_out_shards, new_checkpoint, write_index
from gemma_edge.export.checkpoint.open_source import open_source
from gemma_edge.export.checkpoint.shards import INDEX_NAME
from gemma_edge.export.checkpoint.sliced_checkpoint import SlicedCheckpoint
from gemma_edge.export.export_families import family_with
from gemma_edge.export.exporter import DEFAULT_CHUNK, describe_source, plan_export
from gemma_edge.export.model.model_slice import Slice
from gemma_edge.export.plan import Plan
from gemma_edge.export.plan_table import needed_size
from gemma_edge.export.progress_bar import ProgressBar
from gemma_edge.export.weights.recipe import DEFAULT_RECIPE, load_recipe
from gemma_edge.runtime.errors import CeilingError, UsageError
from gemma_edge.runtime.families.model_family import TextConfig
from gemma_edge.runtime.units import format_size

KEPT_FILES = ("*.json", "*.model", "*.jinja", "*.md", "LICENSE*")  # beside config, index and weights
CHUNK_BYTES = 8 << 20


@dataclass(frozen=True)
class Sliced:
    """What `slice_checkpoint` made: the folder, the slice, the config of its text model, bytes of weights."""

    path: Path
    slice: Slice
    config: TextConfig
    bytes: int


def slice_checkpoint(source: str | Path, out: str | Path, slice: str, *, progress: bool = False) -> Sliced:
    """Writes a slice of a checkpoint as a checkpoint, with its encoders, tokenizer and templates.

    Memory is a few MB whatever the size: weights are copied in chunks, in the dtype in which they are stored.

    Args:
        source: a checkpoint folder, or a Hugging Face id.
        out: the folder to make; it may exist if it is empty.
        slice: as of `export_bundle`.
        progress: show a bar on stderr when that is a terminal.

    Raises:
        CheckpointError, ConfigError: the checkpoint is bad.
        UsageError: the model has no such slice, or `out` is not an empty folder.
        GemmaEdgeError: the disk is full or refuses. Nothing is left behind, nor after an interrupt.
    """
    path = check_new(Path(out))
    with open_source(source, slice=slice) as checkpoint:
        assert isinstance(checkpoint, SlicedCheckpoint)
        tensors = {tensor.key: tensor for tensor in checkpoint.cut_tensors()}
        shards, total = lay_out_shards((key, t.whole.dtype, t.shape) for key, t in tensors.items())
        with new_checkpoint(path, total) as folder, ProgressBar("weights", total, progress, "B") as bar:
            for name, content in _documents(checkpoint, source).items():
                (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            for file in _kept_files(checkpoint.path):
                shutil.copyfile(file, folder / file.name)
            for shard in shards:
                with open(folder / shard.name, "xb") as output:
                    output.write(shard.header)
                    for key in shard.offsets:
                        for chunk in tensors[key].chunks(CHUNK_BYTES):
                            output.write(chunk.data)
                            bar.advance(chunk.size)
            write_index(folder, shards, total)
        return Sliced(path, checkpoint.slice, checkpoint.config, total)


def best_slice(source: str, budget: int) -> tuple[Slice, Plan]:
    """The published slice of a model that scores best among those whose export fits; reads no weight.

    Args:
        budget: bytes of memory for a bundle in `DEFAULT_RECIPE` with all encoders and the default context.

    Raises:
        UsageError: no slices of such a model are published.
        CeilingError: none fits.
    """
    config, towers = describe_source(source, None)
    published = [each for each in family_with(config).slicing.slices(config) if _cuts(each, config)]
    if not published:
        raise UsageError(f"{source}: no slices of such a model are published: give widths and layers")
    smallest = None
    for each in published:
        cut, _ = describe_source(source, None, slice=str(each))
        plan = plan_export(cut, load_recipe(DEFAULT_RECIPE), None, DEFAULT_CHUNK, towers=towers)
        if plan.needed_bytes <= budget:
            return each, plan
        if smallest is None or plan.needed_bytes < smallest[1].needed_bytes:
            smallest = each, plan
    assert smallest
    needs = f"{smallest[0]}, the smallest, needs {needed_size(smallest[1].needed_bytes)}"
    raise CeilingError(f"no published slice fits into {format_size(budget)}: {needs} in {DEFAULT_RECIPE}")


def _cuts(slice: Slice, config: TextConfig) -> bool:
    return bool(slice.skipped) or slice.widths != config.intermediate_size


def _documents(checkpoint: SlicedCheckpoint, source: str | Path) -> Mapping[str, Any]:
    """The files that differ from the whole model's: config.json, and what was cut from which checkpoint."""
    record = checkpoint.changes()["slice"]
    whole = {"name": public_name(str(source)), "revision": checkpoint.whole.revision()}
    return {"config.json": checkpoint.config_json, SLICE_NAME: {**record, "of": whole}}


def _kept_files(folder: Path) -> Iterator[Path]:
    """Tokenizer, templates, configs of encoders, card and licence."""
    ours = {"config.json", SLICE_NAME, INDEX_NAME}
    found = {path for pattern in KEPT_FILES for path in folder.glob(pattern)}
    return (path for path in sorted(found) if path.is_file() and path.name not in ours)
