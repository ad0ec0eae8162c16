"""What stands where an export goes: whether it may be replaced, and which of its files are no part of it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from gemma_edge.runtime.artifacts.bundle_list import peek_manifest
from gemma_edge.runtime.errors import GemmaEdgeError, UsageError

Json = dict[str, Any]


def check_replacement(target: Path, source: Json, recipe: str, *, force: bool = False) -> str:
    """What an export to `target` replaces, for people; "" for nothing.

    Args:
        source: the "source" of the new manifest.
        recipe: the new recipe's name.
        force: replace any bundle, not only one of the same checkpoint and recipe.

    Raises:
        UsageError: a bundle of another checkpoint or recipe is there, or one whose manifest cannot be read.
    """
    if (manifest := peek_manifest(target)) is None:
        return ""
    old, precision = (manifest.get(key) for key in ("source", "recipe"))
    old = old if isinstance(old, dict) else {}
    name = precision.get("name") if isinstance(precision, dict) else None
    text = f"a bundle of {old.get('name')} in recipe {name}" if old and name else "a bundle of unknown origin"
    tells = source.keys() - {"name"} if "folder" in source else source.keys()  # folders share names
    same = name == recipe and any(old.get(key) == source[key] for key in tells)
    if not same and not force:
        raise UsageError(f"{target} is {text}: --force replaces it; or name another path")
    return text


def carry_over(old: Path, new: Path, ours: Collection[str], below: str = "") -> None:
    """Links the files in folder `old` that are not `ours` into folder `new`; copies where links fail.

    Raises:
        GemmaEdgeError: `new` has a file of that name.
    """
    for entry in os.scandir(old / below):
        name = f"{below}{entry.name}"
        if name in ours:
            continue
        if entry.is_dir(follow_symlinks=False):
            (new / name).mkdir(exist_ok=True)
            carry_over(old, new, ours, f"{name}/")
            continue
        if os.path.lexists(new / name):
            raise GemmaEdgeError(f"{entry.path}: the new bundle has a file of this name; move yours out")
        try:
            os.link(entry.path, new / name, follow_symlinks=False)
        except OSError:
            shutil.copy2(entry.path, new / name, follow_symlinks=False)
