"""What results say about a bundle: its model and recipe, its sizes, its engine."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.manifest import EXPORT_AGAIN, MANIFEST
from gemma_edge.runtime.engines.engine_registry import engine_of
from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.files.kept_files import made_from
from gemma_edge.runtime.host.cpu_fingerprint import cpu_fingerprint


class BundleFacts(NamedTuple):
    """What a record says about the bundle that was measured."""

    model: str
    recipe: str
    bytes_per_token: int  # bytes of weights that decoding one token reads
    parameters: int  # in all of its parts
    file_bytes: int
    format: str  # "onnx", "tflite", "litertlm"
    engine: str  # "ONNX Runtime", "LiteRT"
    distribution: str  # of the engine; its version is part of a record
    packs_weights: bool  # the engine writes packed weights into the cache folder during its first load
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
    engine = engine_of(bundle.format)
    parts = plan.get("parts") if isinstance(plan, dict) else None
    return BundleFacts(
        model,
        str(name),
        bytes_per_token,
        parameters=sum(int(part.get("elements", 0)) for part in parts or ()),
        file_bytes=sum(record.bytes for record in bundle.files.values()),
        format=bundle.format,
        engine=engine.name,
        distribution=engine.distribution,
        packs_weights=engine.packs_weights,
        context=bundle.context,
        chunk=bundle.chunk,
        kv_cache=bundle.kv_cache,
        encoders=tuple(bundle.modalities),
    )


def packing_notes(path: Path) -> list[str]:
    """What a result must say where weights are mapped that the engine by itself would keep on the heap."""
    bundle = Bundle.open(path)
    engine = engine_of(bundle.format)
    ours = f"-{engine.version}-{cpu_fingerprint()}-"
    if engine.packs_weights or not any(ours in file.name for file in _kept_of(bundle)):
        return []
    return ["packed weights were kept beforehand (`gemma-edge cache --pack`), and are mapped"]


def bundle_files(path: Path) -> list[Path]:
    """All files that loading a bundle reads: its own, and those that the runtime keeps of it in the cache
    folder, such as packed weights.
    """
    bundle = Bundle.open(path)
    return [*bundle.paths(), *_kept_of(bundle)]


def _kept_of(bundle: Bundle) -> list[Path]:
    return sorted({file for record in bundle.files.values() for file in made_from(record.sha256)})
