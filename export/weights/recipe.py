"""Recipes: the number of bits of each part of a model, as data.

A recipe is a JSON file, ours (`export/recipes/`) or the user's:

    {"name": "int4", "description": "...",
     "parts": {"decoder": {"bits": 4, "group": 64}, "head": ..., "small": ..., "ple": ..., "embedding": ...},
     "tensors": [{"bits": 8, "group": 128, "names": ["layers.0.mlp", "layers.3.self_attn"]}],
     "clip": "mse", "kv_cache": "fp32",
     "bounds": {"mean_kl": 0.3, "top1": 0.7, "encoder": 0.3}}

`bits` is 4, 8 or 32; `group`, for 4 and 8, the weights that share a scale: a power of two, or "channelwise"
for a whole row (an output channel), which only the LiteRT formats take. Every part
of `tensors.Part` is named but `vector`, which is always fp32. `embedding` matters to untied models only.
At 32 bits the mapped tables (`ple`, `embedding`) keep the checkpoint's own dtype. `tensors`, if there, is for
weights that differ from their part, by their names or their modules', as `export --budget` chooses them.

Names are a grammar: int4_g128 is 4 bits in groups of 128. An alias, {"alias": "int4", "description": "..."},
loads as the recipe that it names.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeGuard, cast

from gemma_edge.export.model.tensor_spec import Part, TensorSpec
from gemma_edge.export.weights.quantize import Clip
from gemma_edge.runtime.errors import ConfigError, UsageError
from gemma_edge.runtime.files.text_files import read_json

RECIPES = Path(__file__).parent / "recipes"
# What `export` takes where no recipe is named, in every format: docs/recipes.md says why.
DEFAULT_RECIPE = "int4_g128"
PARTS = tuple(part for part in Part if part != Part.VECTOR)
MIN_GROUP, MAX_GROUP = 16, 256  # what ONNX Runtime's kernels take

CHANNELWISE = "channelwise"
OPTIONAL = ("clip", "kv_cache", "tensors")

KvCache = Literal["fp32", "int8"]
KV_CACHES: tuple[KvCache, ...] = ("fp32", "int8")


@dataclass(frozen=True)
class Precision:
    """How one tensor is stored: 4 or 8 bits with a scale for every `group` weights, or 32.

    Group 0 at 4 or 8 bits is channel-wise: one scale a row.
    """

    bits: int
    group: int = 0

    @property
    def channelwise(self) -> bool:
        return self.bits < 32 and self.group == 0

    def blocks(self, columns: int) -> int:
        """Scales in a row of `columns`."""
        return math.ceil(columns / self.group) if self.group else 1

    def to_dict(self) -> dict[str, Any]:
        """As a recipe has it."""
        return {"bits": 32} if self.bits == 32 else {"bits": self.bits, "group": self.group or CHANNELWISE}


FP32 = Precision(32)


@dataclass(frozen=True)
class Bounds:
    """How near the checkpoint in fp32 an export usually is, on the built-in prompts; only `encoder` refuses.

    mean_kl: mean Kullback-Leibler divergence of the next-token distributions, in nats a token.
    top1: smallest fraction of positions whose most likely token agrees.
    max_abs: largest absolute difference of a logit, if bounded.
    encoder: largest error of an encoder's soft tokens relative to their size that the gate accepts, if any.
    """

    mean_kl: float
    top1: float
    max_abs: float | None = None
    encoder: float | None = None


@dataclass(frozen=True)
class Recipe:
    """A validated recipe."""

    name: str
    description: str
    parts: Mapping[Part, Precision]
    bounds: Bounds
    clip: Clip = "mse"
    kv_cache: KvCache = "fp32"
    tensors: Mapping[str, Precision] = field(default_factory=dict)  # or modules, that differ from their part

    @property
    def channelwise(self) -> Part | None:
        """The first part that is channel-wise, if one is: ONNX Runtime takes none."""
        return next((part for part, precision in self.parts.items() if precision.channelwise), None)

    def precision(self, spec: TensorSpec) -> Precision:
        """How `spec` is stored under this recipe.

        The group never exceeds the tensor's columns: it falls to the largest power of two that fits
        them (Laurel's right factor has as few as its rank). Below 16 columns a tensor stays fp32.
        """
        wanted = self.parts.get(spec.part, FP32)
        if self.tensors and spec.part in self.parts:
            names = itertools.accumulate(spec.name.split("."), "{}.{}".format)
            wanted = next((self.tensors[name] for name in names if name in self.tensors), wanted)
        columns = spec.shape[-1]
        if wanted.bits == 32 or columns < MIN_GROUP:
            return FP32
        return Precision(wanted.bits, min(wanted.group, 1 << (columns.bit_length() - 1)))

    def to_dict(self) -> dict[str, Any]:
        """JSON values that a recipe file may hold; loading them gives an equal recipe."""
        return {
            "name": self.name,
            "description": self.description,
            "parts": {str(part): precision.to_dict() for part, precision in self.parts.items()},
            **({"tensors": self._tensors()} if self.tensors else {}),
            "clip": self.clip,
            "kv_cache": self.kv_cache,
            "bounds": {key: value for key, value in asdict(self.bounds).items() if value is not None},
        }

    def _tensors(self) -> list[dict[str, Any]]:
        """One object for each precision: the header of a .litertlm has little room."""
        names: dict[Precision, list[str]] = {}
        for name, precision in self.tensors.items():
            names.setdefault(precision, []).append(name)
        return [{**precision.to_dict(), "names": found} for precision, found in names.items()]


def list_recipes() -> dict[str, str]:
    """Names of our recipes, aliases included, with their descriptions."""
    return {path.stem: _read(path)["description"] for path in sorted(RECIPES.glob("*.json"))}


def load_recipe(name_or_path: str | Path) -> Recipe:
    """One of our recipes by name, or a user's by the path of its .json file.

    Raises:
        UsageError: no such recipe; the message has the names, and the nearest one.
        ConfigError: the file is not a recipe; the message names the field.
    """
    path = Path(name_or_path)
    if path.suffix == ".json" or len(path.parts) != 1:
        if not path.is_file():
            raise UsageError(f"{path}: no such recipe file")
    else:
        names = sorted(file.stem for file in RECIPES.glob("*.json"))
        if str(name_or_path) not in names:
            close = difflib.get_close_matches(str(name_or_path), names, 1)
            hint = f" Did you mean {close[0]}?" if close else ""
            raise UsageError(
                f"unknown recipe {str(name_or_path)!r}.{hint} Choose from {', '.join(names)}, "
                "or give the path of a .json file."
            )
        path = RECIPES / f"{name_or_path}.json"
    return _Parser(path, _read(path)).recipe()


def _read(path: Path) -> dict[str, Any]:
    return read_json(path, ConfigError, what="a readable recipe")


class _Parser:
    """Takes a recipe file apart, checking every field by its name."""

    def __init__(self, path: Path, data: dict[str, Any]) -> None:
        self.path, self.data = path, data

    def fail(self, field: str, expected: object, got: object) -> NoReturn:
        raise ConfigError(self.path, field, expected, got)

    def record(
        self, field: str, value: object, required: Collection[str], optional: Collection[str] = ()
    ) -> dict[str, Any]:
        if not isinstance(value, dict):
            self.fail(field, "an object", repr(value))
        prefix = "" if field == "file" else f"{field}."
        for key in value:
            if key not in required and key not in optional:
                self.fail(f"{prefix}{key}", f"one of {', '.join([*required, *optional])}", "an unknown key")
        for key in required:
            if key not in value:
                self.fail(f"{prefix}{key}", "a value", "nothing")
        return value

    def text(self, field: str) -> str:
        value = self.data[field]
        if not isinstance(value, str) or not value:
            self.fail(field, "a text", repr(value))
        return value

    def choice(self, field: str, default: str, choices: tuple[str, ...]) -> str:
        value = self.data.get(field, default)
        if value not in choices:
            self.fail(field, " or ".join(choices), repr(value))
        return str(value)

    def recipe(self) -> Recipe:
        if "alias" in self.data:
            self.record("file", self.data, ("alias", "description"))
            target = RECIPES / f"{self.text('alias')}.json"
            data = _read(target) if target.parent == RECIPES and target.is_file() else {"alias": ""}
            if "alias" in data:
                self.fail("alias", "one of our recipes that is no alias", repr(self.data["alias"]))
            return _Parser(target, data).recipe()
        self.record("file", self.data, ("name", "description", "parts", "bounds"), OPTIONAL)
        parts = self.record("parts", self.data["parts"], [str(part) for part in PARTS])
        return Recipe(
            name=self.text("name"),
            description=self.text("description"),
            parts={part: self.precision(f"parts.{part}", parts[part]) for part in PARTS},
            bounds=self.bounds(),
            clip=cast(Clip, self.choice("clip", "mse", ("mse", "none"))),
            kv_cache=cast(KvCache, self.choice("kv_cache", "fp32", KV_CACHES)),
            tensors=self.tensors(),
        )

    def tensors(self) -> dict[str, Precision]:
        listed, found = self.data.get("tensors", []), dict[str, Precision]()
        if not isinstance(listed, list):
            self.fail("tensors", "a list", repr(listed))
        for at, value in enumerate(listed):
            field = f"tensors[{at}]"
            names = value.get("names") if isinstance(value, dict) else None
            if not isinstance(names, list) or not names or not all(isinstance(name, str) for name in names):
                self.fail(f"{field}.names", "names of weights or modules", repr(names))
            rest = {key: item for key, item in value.items() if key != "names"}
            found |= dict.fromkeys(names, self.precision(field, rest))
        return found

    def precision(self, field: str, value: object) -> Precision:
        part = self.record(field, value, ("bits",), ("group",))
        bits, group = part["bits"], part.get("group")
        if not _is_int(bits) or bits not in (4, 8, 32):
            self.fail(f"{field}.bits", "4, 8 or 32", repr(bits))
        if bits == 32:
            if "group" in part:
                self.fail(f"{field}.group", "no group at 32 bits", repr(group))
            return FP32
        if group == CHANNELWISE:
            return Precision(bits)
        if not _is_int(group) or not MIN_GROUP <= group <= MAX_GROUP or group & (group - 1):
            expected = f'a power of two from {MIN_GROUP} to {MAX_GROUP}, or "{CHANNELWISE}"'
            self.fail(f"{field}.group", expected, repr(group))
        return Precision(bits, group)

    def bounds(self) -> Bounds:
        value = self.record("bounds", self.data["bounds"], ("mean_kl", "top1"), ("max_abs", "encoder"))
        for key, number in value.items():
            limit = 1.0 if key == "top1" else math.inf
            ok = isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
            if not ok or not 0 <= number <= limit:
                expected = "a fraction from 0 to 1" if limit == 1 else "a number of 0 or more"
                self.fail(f"bounds.{key}", expected, repr(number))
        return Bounds(**{key: float(number) for key, number in value.items()})


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
