"""A checkpoint folder, read lazily: tensors of the text model and of the encoders, from safetensors shards.

Everything that can be wrong with a header, an index or a shape is found when the folder is opened, from the
headers alone. Tensors are read with `os.preadv` into arrays of their own: memory is bounded by what is
asked for, no mapped pages pile up, and any number of threads may read at once.

Names are canonical (`gemma_edge.export.model.tensor_spec`), whatever the layout: multimodal
(`model.language_model.*`, the older `language_model.model.*`) or text-only (`model.*`, or no prefix). An
encoder is there when config.json describes it and any of its tensors is stored; then all of them must be.
"""

from __future__ import annotations

import hashlib
import os
import weakref
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.checkpoint.shards import (
    AGAIN,
    FLOAT_DTYPES,
    INDEX_NAME,
    SINGLE_NAME,
    Shard,
    ShardTensor,
    close_shards,
    open_indexed,
    open_shard,
    read_into,
)
from gemma_edge.export.export_families import export_family
from gemma_edge.export.model.export_family import ExportFamily
from gemma_edge.export.model.tensor_spec import TensorSpec
from gemma_edge.export.model.tower import Tower
from gemma_edge.runtime.artifacts.modalities import KINDS, Kind
from gemma_edge.runtime.errors import CheckpointError, GemmaEdgeError, UsageError, printable
from gemma_edge.runtime.families.model_family import TextConfig
from gemma_edge.runtime.files.text_files import read_bytes, read_json, read_text
from gemma_edge.runtime.hub.hub_address import HUB_ID
from gemma_edge.runtime.hub.hub_reader import gated, not_found
from gemma_edge.runtime.install_hint import install_hint

# Longest first, so that "model.language_model." is not taken for "model.".
PREFIXES = ("model.language_model.", "language_model.model.", "language_model.", "model.", "")
FOREIGN = ("multi_modal_projector",)  # first part of names that are no part of Gemma 3n
SIDE_FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "preprocessor_config.json",
    "processor_config.json",
)
HUB_PATTERNS = ["*.json", "*.safetensors", "*.model", "*.jinja", "README.md"]  # which states the licence
MAX_SIDE_BYTES = 64 << 20  # Gemma's tokenizer.json has 33 MB
SLICE_NAME = "slice.json"  # in a folder that `gemma-edge slice` wrote: what is left of which checkpoint
ADAPTER_CONFIG = "adapter_config.json"
SAMPLE_BYTES = 256  # of each tensor, in the fingerprint


class Checkpoint:
    """The model in a local checkpoint folder. Make one with `Checkpoint.open`; `close` it or use `with`.

    Attributes:
        path: the folder.
        config: of the text model, from its config.json.
        encoders: of images and audio, those that there are.
        specs: every tensor that can be read, by canonical name: `tensor_specs(config)`, and those of the
            encoders below `model.`.
    """

    def __init__(
        self,
        path: Path,
        config: TextConfig,
        shards: list[Shard],
        source: Path,
        encoders: Collection[Kind] = KINDS,
    ) -> None:
        self.family = export_family(path)
        self.path, self.config, self.specs = path, config, self.family.tensor_specs(config)
        self._shards = shards
        self.towers = self._read_encoders(encoders)
        for encoder in self.towers.values():
            self.specs |= encoder.specs
        self._names = _Names(self.family, set(self.towers), self.family.unused_names(config))
        self._where = _locate(shards, self.specs, self._names, source)
        self._finalizer = weakref.finalize(self, close_shards, shards)

    def _read_encoders(self, wanted: Collection[Kind]) -> dict[Kind, Tower]:
        tensors = [tensor for shard in self._shards for tensor in shard.tensors]
        stored = {self.family.tower_of(_below_model(tensor.key)) for tensor in tensors}
        return described(self.path, [kind for kind in wanted if kind in stored])[1]

    @classmethod
    def open(cls, path: str | Path, encoders: Collection[Kind] = KINDS) -> Checkpoint:
        """Opens a folder and checks every header, name, shape and dtype; no weight is read.

        Args:
            encoders: those that are wanted; others are as if they were not there.

        Raises:
            ConfigError: config.json is missing, malformed or unsupported.
            CheckpointError: a shard or index is missing, truncated or lies; a tensor is missing, unknown,
                mis-shaped or not floating point.
        """
        path = Path(path)
        if not path.is_dir():
            raise CheckpointError(
                path, "folder", "a checkpoint folder", "a file" if path.exists() else "nothing"
            )
        config = export_family(path).read_config(path)
        shards: list[Shard] = []
        try:
            if (single := path / SINGLE_NAME).exists():
                source = single
                shards.append(open_shard(single))
            else:
                source = path / INDEX_NAME
                open_indexed(source, shards)
            return cls(path, config, shards, source, encoders)
        except BaseException:
            close_shards(shards)
            raise

    def close(self) -> None:
        """Closes the shards; reads fail afterwards. Harmless when repeated."""
        self._finalizer()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def canonical_name(self, stored: str) -> str | None:
        """The name in `specs` of a tensor that a file calls `stored`; None for weights that are not read."""
        return self._names.canonical(stored)

    # Tensors. -------------------------------------------------------------------------------------

    def dtype(self, name: str) -> str:
        """The stored dtype: "BF16", "F16" or "F32"."""
        return self._where[name][1].dtype

    def read(self, name: str) -> NDArray[np.float32]:
        """One whole tensor as float32, shape `specs[name].shape`.

        Raises:
            KeyError: `name` is not in `specs`.
            CheckpointError: a NaN or infinity in it, or the file has become shorter.
        """
        return self.rows(name, 0, self.specs[name].shape[0])

    def rows(self, name: str, start: int, stop: int) -> NDArray[np.float32]:
        """Rows start..stop of the first dimension as float32, shape (stop - start, ...). Raises as `read`
        does.
        """
        array = self.raw_rows(name, start, stop).astype(np.float32, copy=False)
        self.check_finite(name, array, start)
        return array

    def iter_rows(self, name: str, chunk_rows: int) -> Iterator[NDArray[np.float32]]:
        """The tensor as successive `rows` of `chunk_rows`; the last may be shorter."""
        total = self.specs[name].shape[0]
        for start in range(0, total, chunk_rows):
            yield self.rows(name, start, min(start + chunk_rows, total))

    def raw_rows(self, name: str, start: int, stop: int) -> NDArray[Any]:
        """As `rows`, in the stored dtype (BF16 as `ml_dtypes.bfloat16`) and not checked for NaN."""
        shard, tensor = self._where[name]
        if not 0 <= start <= stop <= tensor.shape[0]:
            raise IndexError(f"{name}: rows {start}..{stop} of {tensor.shape[0]}")
        row_bytes = (tensor.stop - tensor.start) // tensor.shape[0]
        array = np.empty((stop - start, *self.specs[name].shape[1:]), FLOAT_DTYPES[tensor.dtype])
        read_into(shard, array.reshape(-1).view(np.uint8).data, tensor.start + start * row_bytes, tensor.key)
        return array

    def check_finite(self, name: str, array: NDArray[np.float32], first_row: int = 0) -> None:
        """Raises CheckpointError when `array`, the rows of `name` from `first_row` on, holds a NaN or
        infinity.
        """
        # A NaN or infinity always survives a sum, and a sum needs no temporary; a finite sum may overflow.
        with np.errstate(over="ignore", invalid="ignore"):
            if np.isfinite(np.add.reduce(array, axis=None)):
                return
        bad = np.flatnonzero(~np.isfinite(array))
        if bad.size:
            index = [int(i) for i in np.unravel_index(bad[0], array.shape)]
            index[0] += first_row
            shard, tensor = self._where[name]
            raise CheckpointError(
                shard.path,
                f"{tensor.key}{index}",
                "a finite weight",
                array.flat[bad[0]],
                "The weights are damaged.",
            )

    # The rest of the folder. ----------------------------------------------------------------------

    def changes(self) -> dict[str, Any]:
        """What a manifest says of changes to the model in the folder: adapters, a slice."""
        return {"slice": record} if (record := _slice_record(self.path)) else {}

    def stored(self) -> Iterator[tuple[Shard, ShardTensor, tuple[str, str] | None]]:
        """Every tensor in the files, used or not, with what comes before its name in the text model, and that
        name; None for tensors of encoders, and for others that are no part of the text model.
        """
        for shard in self._shards:
            for tensor in shard.tensors:
                yield shard, tensor, self._names.in_text_model(tensor.key)

    def revision(self) -> str:
        """A fingerprint of the source, in hex: SHA-256 over config.json, and of every shard the name, size,
        header and first bytes of each tensor.

        It is cheap, and it tells one set of weights from another, but it does not prove that every byte is
        the same.
        """
        digest = hashlib.sha256(read_bytes(self.path / "config.json", CheckpointError))
        for shard in self._shards:
            digest.update(f"\0{shard.path.name}\0{shard.size}\0".encode())
            digest.update(shard.header)
            for tensor in shard.tensors:
                sample = bytearray(min(SAMPLE_BYTES, tensor.stop - tensor.start))
                read_into(shard, memoryview(sample), tensor.start, tensor.key)
                digest.update(sample)
        return digest.hexdigest()

    def files(self) -> dict[str, Path]:
        """The side files that are present (tokenizer, chat template, other configs), by name."""
        return {name: self.path / name for name in SIDE_FILES if (self.path / name).is_file()}

    def json(self, name: str) -> dict[str, Any]:
        """A side file's JSON object, or {} when there is no such file. Raises CheckpointError when
        malformed.
        """
        path = self.files().get(name)
        return _read_json(path) if path else {}

    def generation_config(self) -> dict[str, Any]:
        """generation_config.json, or {}."""
        return self.json("generation_config.json")

    def chat_template(self) -> str | None:
        """The Jinja chat template from wherever the checkpoint keeps it, or None.

        In order: chat_template.jinja, chat_template.json, tokenizer_config.json (a string, or a list of named
        templates of which "default" is taken).
        """
        files = self.files()
        if path := files.get("chat_template.jinja"):
            return read_text(path, CheckpointError)
        for name in ("chat_template.json", "tokenizer_config.json"):
            value = self.json(name).get("chat_template")
            if value is None:
                continue
            templates = _named_templates(value)
            if "default" not in templates:
                got = f"templates {sorted(templates)}" if templates else type(value).__name__
                raise CheckpointError(
                    files[name], "chat_template", "a string or a template named default", got
                )
            return templates["default"]
        return None


def _slice_record(folder: Path) -> dict[str, Any] | None:
    """What `gemma-edge slice` wrote of the slice that a folder holds; None if it holds another model."""
    path = folder / SLICE_NAME
    return read_json(path, CheckpointError) if path.exists() else None


def _read_json(path: Path) -> dict[str, Any]:
    return read_json(path, CheckpointError, limit=MAX_SIDE_BYTES, remedy=AGAIN)


def has_weights(path: Path) -> bool:
    """Whether a folder has any: without, it can be planned for and not be exported."""
    return any((path / name).exists() for name in (SINGLE_NAME, INDEX_NAME))


def described(path: Path, encoders: Collection[Kind] = KINDS) -> tuple[TextConfig, dict[Kind, Tower]]:
    """What config.json says of the text model, and of those of `encoders` that it describes.

    Raises:
        ConfigError: a field is malformed or unsupported.
    """
    family, file = export_family(path), path / "config.json"
    config = family.read_config(path)
    data = _read_json(file)

    def processors(name: str) -> dict[str, Any]:
        return _read_json(path / name) if (path / name).is_file() else {}

    kinds = [kind for kind in KINDS if kind in encoders and data.get(f"{kind}_config") is not None]
    return config, {kind: family.read_tower(kind, data, file, processors, config) for kind in kinds}


def public_name(source: str) -> str:
    """What a manifest calls a checkpoint or an adapter: its id, or the name of its folder alone."""
    folder = Path(source).expanduser()
    return Path(os.path.abspath(folder)).name if folder.is_dir() else source


def resolve(source: str, *, adapter: bool = False) -> Path:
    """A local checkpoint folder, or a Hugging Face id (`owner/name`) downloaded into the hub's own cache.

    Args:
        adapter: the folder of an adapter is wanted instead.

    Raises:
        UsageError: neither a folder nor an id, an unknown or gated id, an adapter where a checkpoint
            belongs, or the `hub` extra is not installed.
        GemmaEdgeError: the download failed.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path if adapter else _no_adapter(path, source)
    if path.exists() or not HUB_ID.fullmatch(source):
        raise UsageError(
            f"{source}: neither a checkpoint folder nor a Hugging Face id such as google/gemma-3n-E2B-it"
        )
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
    except ImportError:
        raise UsageError(
            f"{source}: no such folder; to download it from Hugging Face: {install_hint('hub')}"
        ) from None
    try:
        path = Path(snapshot_download(source, allow_patterns=HUB_PATTERNS))
    except GatedRepoError:
        raise gated(source) from None
    except RepositoryNotFoundError:
        raise not_found(source) from None
    except Exception as error:  # the client's HTTP library, and so its errors, differ between versions
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise GemmaEdgeError(
            f"{source}: could not be downloaded: {reason}. Check the connection, or give a local folder."
        ) from error
    return path if adapter else _no_adapter(path, source)


def _no_adapter(path: Path, source: str) -> Path:
    """`path`. Raises UsageError if it holds an adapter and no checkpoint."""
    if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file():
        base = printable(_read_json(path / ADAPTER_CONFIG).get("base_model_name_or_path") or "BASE")
        raise UsageError(f"{source} is an adapter of {base}: gemma-edge export {base} OUT --adapter {source}")
    return path


def _named_templates(value: object) -> dict[str, str]:
    if isinstance(value, str):
        return {"default": value}
    items = value if isinstance(value, list) else []
    return {
        str(item.get("name")): item["template"]
        for item in items
        if isinstance(item, dict) and isinstance(item.get("template"), str)
    }


def _below_model(key: str) -> str:
    """A stored name relative to `model.`, where it has that prefix."""
    return key.removeprefix("model.")


@dataclass(frozen=True)
class _Names:
    """How stored names map to canonical ones: the encoders that are wanted, and names that no layer reads."""

    family: ExportFamily
    towers: Collection[Kind]
    unused: Collection[str]

    def canonical(self, key: str) -> str | None:
        """A name relative to the text model, or to `model.` for a tensor of an encoder; None for others."""
        below = _below_model(key)
        if (kind := self.family.tower_of(below)) is not None:
            return below if kind in self.towers else None
        if (found := self.in_text_model(key)) is None:
            return None
        return None if found[1] in self.unused else found[1]

    def in_text_model(self, key: str) -> tuple[str, str] | None:
        """The prefix, and the name below it, of a tensor of the text model; None for others."""
        below = _below_model(key)
        if self.family.tower_of(below) is not None or below.startswith(FOREIGN):
            return None
        prefix = next(prefix for prefix in PREFIXES if key.startswith(prefix))
        return prefix, key[len(prefix) :]


def _locate(
    shards: list[Shard],
    specs: dict[str, TensorSpec],
    names: _Names,
    source: Path,
) -> dict[str, tuple[Shard, ShardTensor]]:
    """Canonical name -> where it lies; every spec is found, with its shape and a float dtype, and nothing
    else.
    """
    where: dict[str, tuple[Shard, ShardTensor]] = {}
    for shard in shards:
        for tensor in shard.tensors:
            if (name := names.canonical(tensor.key)) is None:
                continue
            if name not in specs:
                raise CheckpointError(
                    shard.path,
                    tensor.key,
                    "only tensors of the model in config.json",
                    f"an extra tensor of shape {tensor.shape}",
                    "Check that config.json belongs to these weights.",
                )
            if name in where:
                raise CheckpointError(
                    shard.path, tensor.key, f"{name} once", f"also {where[name][1].key}", AGAIN
                )
            if tensor.shape != specs[name].stored_shape:
                raise CheckpointError(
                    shard.path,
                    tensor.key,
                    f"shape {specs[name].stored_shape}",
                    tensor.shape,
                    "Check that config.json belongs to these weights.",
                )
            if tensor.dtype not in FLOAT_DTYPES:
                raise CheckpointError(
                    shard.path,
                    tensor.key,
                    f"one of {', '.join(FLOAT_DTYPES)}",
                    tensor.dtype,
                    "Export from the unquantized checkpoint.",
                )
            where[name] = shard, tensor
    if missing := [name for name in specs if name not in where]:
        others = f" (and {len(missing) - 1} others)" if len(missing) > 1 else ""
        raise CheckpointError(
            source,
            missing[0] + others,
            f"a tensor of shape {specs[missing[0]].stored_shape}",
            "no such tensor",
            "Check that config.json belongs to these weights.",
        )
    return where


def revision_of(source: str) -> str:
    """The revision of a checkpoint, a folder or an id. Raises as `resolve` and `Checkpoint.open`."""
    with Checkpoint.open(resolve(source), []) as checkpoint:
        return checkpoint.revision()
