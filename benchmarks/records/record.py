"""Results as data: one JSON object a line, with everything needed to judge a number later."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

from gemma_edge.benchmarks.machine.cpu_features import CPUINFO
from gemma_edge.benchmarks.machine.cpu_info import cpu_flags, pairs
from gemma_edge.benchmarks.records.record_shape import ANY_RECORD, SHAPES
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.manifest import EXPORT_AGAIN, MANIFEST
from gemma_edge.runtime.cache_folder import cache_folder
from gemma_edge.runtime.errors import BundleError, FileError
from gemma_edge.runtime.json_shape import misfit
from gemma_edge.runtime.text_files import read_text

RECORD_SCHEMA = 1
MAX_RESULTS_BYTES = 256 << 20
Json = dict[str, Any]

_PACKAGES = ("gemma-edge", "numpy", "onnxruntime", "ai-edge-litert", "sentencepiece")


class RecordError(FileError):
    """A results file holds a line that is not a record."""


class BundleFacts(NamedTuple):
    """What a record says about the bundle that was measured."""

    model: str
    recipe: str
    bytes_per_token: int  # bytes of weights that decoding one token reads
    parameters: int  # in all of its parts
    file_bytes: int
    format: str  # "onnx", "tflite", "litertlm"
    context: int  # tokens of KV cache that it was planned for
    chunk: int  # tokens of one prefill call
    kv_cache: str  # "fp32", "int8"
    encoders: tuple[str, ...] = ()  # of "vision" and "audio"


def bundle_facts(path: Path) -> BundleFacts:
    """Reads them from the manifest.

    Raises:
        BundleError: not a bundle, or one whose plan does not say what a token costs.
    """
    bundle = Bundle.open(path)
    plan, recipe = bundle.manifest.get("plan"), bundle.manifest.get("recipe")
    bytes_per_token = plan.get("bytes_per_token") if isinstance(plan, dict) else None
    if not isinstance(bytes_per_token, int) or bytes_per_token <= 0:
        field, manifest = "plan.bytes_per_token", path / MANIFEST
        raise BundleError(manifest, field, "a number of bytes", bytes_per_token, EXPORT_AGAIN)
    name = recipe.get("name") if isinstance(recipe, dict) else recipe
    config = bundle.config
    shape = f"{config.num_hidden_layers} layers, hidden {config.hidden_size}"
    model = f"Gemma 3n: {shape}, feed-forward {max(config.intermediate_size)}"
    parts = plan.get("parts") if isinstance(plan, dict) else None
    return BundleFacts(
        model,
        str(name),
        bytes_per_token,
        parameters=sum(int(part.get("elements", 0)) for part in parts or ()),
        file_bytes=sum(record.bytes for record in bundle.files.values()),
        format=bundle.format,
        context=bundle.context,
        chunk=bundle.chunk,
        kv_cache=bundle.kv_cache,
        encoders=tuple(bundle.modalities),
    )


def bundle_files(path: Path) -> list[Path]:
    """All files that loading a bundle reads: its own, and what the runtime has kept of it in its cache
    folder.
    """
    own = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    bundle = Bundle.open(path)
    if bundle.format == "onnx":
        return own
    kept = {
        file for record in bundle.files.values() for file in cache_folder().glob(f"{record.sha256[:32]}-*")
    }
    return [*own, *sorted(kept)]


def environment() -> Json:
    """The machine and the software, as far as a speed or a size depends on them."""
    cpu = pairs(CPUINFO.read_text(encoding="utf-8", errors="replace") if CPUINFO.is_file() else "")
    return {
        "cpu": cpu.get("model name") or cpu.get("Model") or cpu.get("Hardware") or platform.processor(),
        "cpu_flags": cpu_flags(cpu),
        "cores": os.cpu_count(),
        "cores_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "machine": platform.machine(),
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
    }


def now() -> str:
    """The time as records have it: UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def readme_row(row: str, bar: str, value: str) -> Json:
    """A line of the README's table: what was measured, what it should reach, what it was."""
    return {"row": row, "bar": bar, "value": value}


def write_record(
    path: Path,
    kind: str,
    *,
    name: str,
    model: str,
    recipe: str,
    metrics: Json,
    raw: Json,
    readme: Iterable[Json] = (),
) -> Json:
    """Appends one record to a JSONL file, making its folder.

    Args:
        kind: what script measured it: "compare", "ceiling", "encoders", "export", "load", "parity",
            "quality".
        name: the short name of what was measured, as it stands in the table.
        metrics: what follows from the samples, units in the keys.
        raw: every sample.
        readme: rows of the README's table, made by `readme_row`.

    Returns:
        The record as written.
    """
    record = {
        "schema": RECORD_SCHEMA,
        "kind": kind,
        "name": name,
        "model": model,
        "recipe": recipe,
        "time": now(),
        "environment": environment(),
        "metrics": metrics,
        "raw": raw,
        "readme": list(readme),
    }
    append_record(path, record)
    return record


def append_record(path: Path, record: Json) -> None:
    """Appends one JSON object to a JSONL file, making its folder. Raises ValueError for NaN and infinity."""
    line = json.dumps(record, allow_nan=False, ensure_ascii=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")  # one write: two processes' records do not mix


def read_records(path: Path) -> list[Json]:
    """All records of a JSONL file.

    Raises:
        RecordError: a line that is not a record, or of a newer schema; it names the line.
    """
    lines = read_text(path, RecordError, what="a JSONL file", limit=MAX_RESULTS_BYTES).split("\n")
    return [_record(path, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _record(path: Path, number: int, line: str) -> Json:
    field = f"line {number}"
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RecordError(path, field, "a JSON object", error) from None
    if not isinstance(record, dict) or not isinstance(record.get("schema"), int):
        raise RecordError(path, field, "a record with a schema", line[:40])
    if record["schema"] > RECORD_SCHEMA:
        remedy = "Update gemma-edge to read it."
        raise RecordError(path, f"{field}: schema", f"at most {RECORD_SCHEMA}", record["schema"], remedy)
    for key in ("kind", "name", "time"):
        if not isinstance(record.get(key), str):
            raise RecordError(path, f"{field}: {key}", "a string", record.get(key))
    rows = record.get("readme", [])
    if not isinstance(rows, list) or not all(_is_row(row) for row in rows):
        raise RecordError(path, f"{field}: readme", "a list of objects with row, bar and value", rows)
    if found := misfit(record, SHAPES.get(record["kind"], ANY_RECORD)):
        where, expected = found
        raise RecordError(path, f"{field}: {where}", expected, "something else", f"Take line {number} out.")
    return record


def _is_row(row: object) -> bool:
    return isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("row", "bar", "value"))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
