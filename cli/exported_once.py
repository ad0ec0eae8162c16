"""A hub's id or a checkpoint in the place of a bundle: pulled or exported once, into the cache folder.

`run`, `chat` and the other verbs that answer take a bundle. Given a bundle's Hugging Face id, they offer to
pull it; given a checkpoint's folder or id, to export it with the default recipe. They ask at a terminal, do
it with `--yes`, and otherwise say the command that does it. The hub is asked only once somebody agrees.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import mimetypes
import os
import shlex
import sys
from pathlib import Path
from typing import Any

from gemma_edge.cli.pull import pull_shown
from gemma_edge.runtime.artifacts.artifact_formats import FILE_SUFFIXES
from gemma_edge.runtime.artifacts.manifest import MANIFEST
from gemma_edge.runtime.console import tell
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.files.cache_folder import cache_folder
from gemma_edge.runtime.hub.hub_address import HUB_ID
from gemma_edge.runtime.hub.pull_bundle import CheckpointThereError
from gemma_edge.runtime.tuned_settings import tuned_settings

BUNDLES = "bundles"  # in the cache folder; `gemma-edge cache` leaves it alone


def add_yes(parser: argparse.ArgumentParser) -> None:
    """The answer to the question that `ready_bundle` asks."""
    parser.add_argument(
        "--yes", action="store_true", help="pull or export what is named in the bundle's place, once"
    )


def ready_bundle(name: str, yes: bool) -> str:
    """The path of the bundle `name`, or of the one that `name` was pulled or exported to.

    Raises:
        UsageError: it is not here yet, and nobody agrees that it comes.
    """
    if not is_checkpoint(name):
        return name
    out = exported_path(name)
    if (out / MANIFEST).is_file():
        return str(out)
    command = f"gemma-edge export {shlex.quote(name)} {shlex.quote(str(out))}"
    here = Path(name).is_dir()
    if not yes:
        told = f"{name} is a checkpoint, which is exported before it answers"
        if not here:
            told = f"{name}: no bundle here; a Hugging Face id is pulled, or exported if it is a checkpoint's"
            command = f"gemma-edge pull {shlex.quote(name)}, or {command}"
        if not (sys.stdin and sys.stdin.isatty() and sys.stderr.isatty()):
            raise UsageError(f"{told}: add --yes, or run {command}")
        tell(f"{told}, once: into {out}. Do it now? [y/N]", always=True)
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise UsageError(
                f"{name} was not fetched: {command}" if not here else f"{name} was not exported: {command}"
            )
    if not here:
        with contextlib.suppress(CheckpointThereError):
            tell(f"$ gemma-edge pull {shlex.quote(name)} {shlex.quote(str(out))}")
            return str(pull_shown(name, str(out)).path)
    return _exported(name, out)


def _exported(name: str, out: Path) -> str:
    # A board that has bundles needs none of these.
    from gemma_edge.export.checkpoint.checkpoint import revision_of
    from gemma_edge.export.exporter import export_bundle

    tuned = tuned_settings(revision_of(name))
    options: dict[str, Any] = {}
    if tuned and tuned.format and tuned.recipe:
        options = {"format": tuned.format, "recipe": tuned.recipe}
    said = "".join(f" --{option} {value}" for option, value in options.items())
    tell(f"$ gemma-edge export {shlex.quote(name)} {shlex.quote(str(out))}{said}")
    made = export_bundle(name, out, progress=True, **options)
    if made.agreement:
        tell(made.agreement.in_words())
    return str(made.path)


def is_checkpoint(name: str) -> bool:
    """Whether a name is a checkpoint's folder, or a Hugging Face id that is no path here."""
    path = Path(name)
    if path.is_dir():
        return (path / "config.json").is_file() and not (path / MANIFEST).is_file()
    # A dot may belong to a version: owner/model-v1.0.
    is_file = path.suffix in FILE_SUFFIXES or mimetypes.guess_type(name)[0] is not None
    return not path.exists() and not is_file and HUB_ID.fullmatch(name) is not None


def exported_path(name: str) -> Path:
    """Where a checkpoint's bundle is kept: by its id, or by the whole path of its folder."""
    if not Path(name).is_dir():
        return cache_folder() / BUNDLES / name.replace("/", "--")
    whole = os.path.realpath(name)
    return cache_folder() / BUNDLES / f"{Path(whole).name}-{hashlib.sha256(whole.encode()).hexdigest()[:8]}"
