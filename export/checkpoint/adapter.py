"""PEFT's LoRA adapters: opened, checked against a checkpoint, and added to its weights row by row.

An adapter is a folder with adapter_config.json and adapter_model.safetensors. The headers alone tell its
changes, and whatever cannot be merged is refused then. LoRA adds `scaling * B @ A` to a weight, to an
embedding `scaling * (B @ A).T`; DoRA scales each row of the sum to a trained length; modules_to_save and
biases replace tensors. `scaling` is alpha / rank, with rsLoRA alpha / sqrt(rank).
"""

from __future__ import annotations

import hashlib
import math
import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.checkpoint.shards import (
    FLOAT_DTYPES,
    ShardTensor,
    close_shards,
    open_shard,
    read_into,
)
from gemma_edge.export.model.tensor_spec import TensorSpec
from gemma_edge.runtime.errors import CheckpointError
from gemma_edge.runtime.files.file_digest import sha256
from gemma_edge.runtime.files.text_files import read_json

CONFIG, WEIGHTS, PICKLED = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
BEFORE = "base_model.model."  # the names in a file, before the names of the model's modules
# Tensors of a module, by the ends of their names, and what they are.
ENDS = {
    ".lora_A.weight": "A",
    ".lora_B.weight": "B",
    ".lora_embedding_A": "embedding_A",
    ".lora_embedding_B": "embedding_B",
    ".lora_magnitude_vector": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".base_layer.weight": "base",  # PEFT stores a frozen embedding beside its adapter
}
# Keys of a config that change nothing of a merge. Others must be unset: PEFT gains new ones.
HARMLESS = frozenset(
    """
    alpha_pattern auto_mapping base_model_name_or_path bias corda_config ensure_weight_tying eva_config
    exclude_modules fan_in_fan_out inference_mode init_lora_weights layers_pattern layers_to_transform
    loftq_config lora_alpha lora_dropout lora_ga_config megatron_core modules_to_save peft_type peft_version
    qalora_group_size r rank_pattern revision runtime_config target_modules task_type use_dora use_rslora
    """.split()
)
ORDINARY_STARTS = (True, False, "gaussian", "eva", "orthogonal")  # others change the base model's weights
MAX_PATTERN = 200
# A group that is repeated, or several repetitions, would let a stranger's pattern run for hours.
COSTLY = re.compile(r"\)\s*[*+?{]|(?:[*+?{].*){3}")
OTHER_BASE = "The adapter belongs to another base model."


@dataclass(frozen=True)
class Change:
    """What one adapter does to one tensor, with names of tensors in its file.

    Attributes:
        kind: "linear", "embedding" or "whole".
        a, b: the two factors; `a` alone is the tensor that replaces a whole one.
        magnitude: DoRA's lengths of the rows; "" without.
        scaling: of the product.
    """

    kind: str
    a: str
    b: str = ""
    magnitude: str = ""
    scaling: float = 1.0


class Adapter:
    """An open adapter. `changes` are by the names that its file gives to the model's tensors.

    Raises:
        CheckpointError: a file is missing or malformed, or asks for what cannot be merged.
    """

    def __init__(self, path: Path, weight: float = 1.0) -> None:
        self.path, self.weight = path, weight
        self.config = _Config.read(path / CONFIG)
        if not (path / WEIGHTS).exists() and (path / PICKLED).exists():
            remedy = "Save it again with safe_serialization=True: pickled weights are not read."
            raise CheckpointError(path, "weights", WEIGHTS, PICKLED, remedy)
        self._shard = open_shard(path / WEIGHTS)
        self._finalizer = weakref.finalize(self, close_shards, [self._shard])
        self._tensors = {tensor.key: tensor for tensor in self._shard.tensors}
        self.changes = self._changes()
        self._cached = lru_cache(maxsize=2)(self._whole)

    def close(self) -> None:
        """Closes the file. Harmless when repeated."""
        self._finalizer()

    def digest(self) -> str:
        """SHA-256 over both files and the weight, as hex."""
        parts = f"{sha256(self.path / CONFIG)} {sha256(self.path / WEIGHTS)} {self.weight!r}"
        return hashlib.sha256(parts.encode()).hexdigest()

    def refuse(self, name: str, expected: object, got: object, remedy: str = "") -> CheckpointError:
        """An error that names a tensor of the file."""
        return CheckpointError(self._shard.path, name, expected, got, remedy)

    def check(self, change: Change, spec: TensorSpec) -> None:
        """Raises CheckpointError unless the shapes are those that `spec`, the model's tensor, needs."""
        shape, stored = spec.shape, self._shape(change.a)
        if change.kind == "whole":
            if stored != spec.stored_shape:
                raise self.refuse(change.a, f"shape {spec.stored_shape}", stored, OTHER_BASE)
            return
        if len(shape) != 2 or spec.stored_shape != shape:
            raise self.refuse(change.a, "a linear layer or an embedding", f"a tensor of shape {shape}")
        rows, columns = (shape[1], shape[0]) if change.kind == "embedding" else shape
        if len(stored) != 2 or stored[1] != columns:
            raise self.refuse(change.a, f"shape (rank, {columns})", stored, OTHER_BASE)
        rank = stored[0]
        if (found := self._shape(change.b)) != (rows, rank):
            raise self.refuse(change.b, f"shape ({rows}, {rank})", found, OTHER_BASE)
        if rank not in self.config.ranks:
            raise self.refuse(change.a, f"a rank of {CONFIG}: {sorted(self.config.ranks)}", rank)
        if change.magnitude and (found := self._shape(change.magnitude)) != (rows,):
            raise self.refuse(change.magnitude, f"shape ({rows},)", found, OTHER_BASE)

    def apply(self, change: Change, rows: NDArray[np.float32], start: int) -> NDArray[np.float32]:
        """Rows of a weight from `start` on, fp32, with the change made."""
        stop = start + len(rows)
        if change.kind == "whole":
            return self._read(change.a, start, stop).reshape(rows.shape)
        factor = np.float32(change.scaling * self.weight)
        if change.kind == "embedding":
            delta = self._cached(change.a)[:, start:stop].T @ self._cached(change.b).T
        else:
            delta = self._read(change.b, start, stop) @ self._cached(change.a)
        merged = rows + delta * factor
        if change.magnitude:
            length = np.sqrt(np.einsum("ij,ij->i", merged, merged))
            merged *= (self._read(change.magnitude, start, stop) / length)[:, None]
        return merged

    def _whole(self, key: str) -> NDArray[np.float32]:
        return self._read(key, 0, self._shape(key)[0])

    def _read(self, key: str, start: int, stop: int) -> NDArray[np.float32]:
        tensor = self._tensors[key]
        row_bytes = (tensor.stop - tensor.start) // tensor.shape[0]
        array = np.empty((stop - start, *tensor.shape[1:]), FLOAT_DTYPES[tensor.dtype])
        read_into(self._shard, array.reshape(-1).view(np.uint8).data, tensor.start + start * row_bytes, key)
        floats = array.astype(np.float32, copy=False)
        if not np.isfinite(floats).all():
            raise self.refuse(key, "finite weights", "a NaN or infinity", "The training diverged.")
        return floats

    def _shape(self, key: str) -> tuple[int, ...]:
        return self._tensors[key].shape

    def _changes(self) -> dict[str, Change]:
        """The change of each tensor that the file names, as far as the file alone can tell."""
        modules: dict[str, dict[str, str]] = {}
        whole: dict[str, Change] = {}
        for key, tensor in self._tensors.items():
            self._check_stored(key, tensor)
            name = key.removeprefix(BEFORE)
            end = next((end for end in ENDS if name.endswith(end)), None)
            if end is not None:
                modules.setdefault(name.removesuffix(end), {})[ENDS[end]] = key
            elif ".lora_" in name:
                raise self.refuse(key, f"one of {', '.join(ENDS)}", "another tensor of an adapter")
            else:
                whole[name] = Change("whole", key)
        return {**whole, **{f"{m}.weight": self._of_module(m, keys) for m, keys in modules.items()}}

    def _check_stored(self, key: str, tensor: ShardTensor) -> None:
        if not key.startswith(BEFORE):
            raise self.refuse(key, f"a name that begins with {BEFORE}", "another", "Save it with PEFT.")
        if tensor.dtype not in FLOAT_DTYPES or 0 in tensor.shape or not tensor.shape:
            raise self.refuse(key, f"weights in {', '.join(FLOAT_DTYPES)}", f"{tensor.dtype} {tensor.shape}")
        scales = ".lora_" in key and not self.config.dora
        if self.weight != 1.0 and not scales and not key.endswith(".base_layer.weight"):
            raise self.refuse(
                key, "a difference, which a weight can scale", "a whole tensor", "Leave out =WEIGHT."
            )

    def _of_module(self, module: str, keys: Mapping[str, str]) -> Change:
        kind, a, b = "linear", keys.get("A"), keys.get("B")
        if "embedding_A" in keys or "embedding_B" in keys:
            kind, a, b = "embedding", keys.get("embedding_A"), keys.get("embedding_B")
        if a is None or b is None:
            raise self.refuse(next(iter(keys.values())), "two factors of a product", "one of them")
        magnitude = keys.get("magnitude", "")
        if bool(magnitude) != self.config.dora or (magnitude and kind == "embedding"):
            got = "DoRA of an embedding" if kind == "embedding" else "DoRA in one file and not in the other"
            raise self.refuse(a, "LoRA, or DoRA of a linear layer", got)
        return Change(kind, a, b, magnitude, self.config.scaling(module, self._shape(a)[0]))


@dataclass(frozen=True)
class _Config:
    """What adapter_config.json says of a merge; `ranks` are all that it allows."""

    base: str
    dora: bool
    rslora: bool
    alpha: float
    ranks: frozenset[int]
    alphas: dict[str, float] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> _Config:
        data = read_json(path, CheckpointError, remedy="PEFT's save_pretrained writes it.")

        def fail(key: str, expected: object) -> CheckpointError:
            return CheckpointError(path, key, expected, repr(data.get(key)), "gemma-edge cannot merge it.")

        if data.get("peft_type") != "LORA":
            raise fail("peft_type", "LORA")
        for key, value in data.items():
            if key not in HARMLESS and value:
                raise fail(key, "no such option")
        if data.get("init_lora_weights", True) not in ORDINARY_STARTS:
            remedy = "Save it with path_initial_model_for_weight_conversion, which makes it plain LoRA."
            got = repr(data["init_lora_weights"])
            raise CheckpointError(path, "init_lora_weights", "a start that keeps the base model", got, remedy)
        alphas, ranks = data.get("alpha_pattern") or {}, data.get("rank_pattern") or {}
        for key, patterns, kinds in (
            ("alpha_pattern", alphas, (int, float)),
            ("rank_pattern", ranks, (int,)),
        ):
            if not isinstance(patterns, dict) or not all(_is_number(v, kinds) for v in patterns.values()):
                raise fail(key, "positive numbers by patterns of modules")
        for pattern in alphas:
            _check_pattern(path, pattern)
        if not _is_number(data.get("r"), (int,)):
            raise fail("r", "a positive integer")
        if not _is_number(data.get("lora_alpha"), (int, float)):
            raise fail("lora_alpha", "a positive number")
        return cls(
            str(data.get("base_model_name_or_path") or ""),
            bool(data.get("use_dora")),
            bool(data.get("use_rslora")),
            float(data["lora_alpha"]),
            frozenset((data["r"], *ranks.values())),
            {pattern: float(alpha) for pattern, alpha in alphas.items()},
        )

    def scaling(self, module: str, rank: int) -> float:
        """The factor of a module's product. Patterns match as PEFT's: the module's name, or its end."""
        found = next((p for p in self.alphas if re.match(rf"(.*\.)?({p})$", module)), None)
        alpha = self.alpha if found is None else self.alphas[found]
        return alpha / (math.sqrt(rank) if self.rslora else rank)


def _is_number(value: Any, kinds: tuple[type, ...]) -> bool:
    return type(value) in kinds and bool(0 < value < 1e9)


def _check_pattern(path: Path, pattern: str) -> None:
    try:
        if len(pattern) > MAX_PATTERN or COSTLY.search(pattern):
            raise re.error("too many repetitions")
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(path, "alpha_pattern", "simple expressions", f"{pattern!r}: {error}") from None
