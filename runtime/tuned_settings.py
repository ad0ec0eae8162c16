"""Tuned settings: what `gemma-edge tune` found quickest for a bundle or a checkpoint, on a machine.

    CACHE/tuned/SUBJECT-PLACE.json

SUBJECT begins the identity of a bundle or the revision of a checkpoint, so a bundle that changes has none.
PLACE stands for this machine, by its CPU and its cores, or for a device, by its address.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from gemma_edge.runtime.engines.cores import physical_cores
from gemma_edge.runtime.errors import GemmaEdgeError
from gemma_edge.runtime.files.cache_folder import CACHE_VARIABLE, cache_folder
from gemma_edge.runtime.files.typed_json import from_json, to_json
from gemma_edge.runtime.files.whole_file import write_whole
from gemma_edge.runtime.host.cpu_fingerprint import cpu_fingerprint, cpu_name

_FOLDER = "tuned"
_SUBJECT = 32  # digits of a SHA-256
_MOST_BYTES = 4096
_MOST_THREADS = 1024


@dataclass(frozen=True)
class TunedSettings:
    """How to load a bundle; for a checkpoint, also what to export.

    Attributes:
        threads: worker threads.
        chunk: tokens of one prefill call.
        gain: speed of a turn, over that with the default settings.
        machine: where it was measured, for people.
        time: when, as ISO 8601.
        format, recipe: of a checkpoint's quickest export.
    """

    threads: int
    chunk: int
    gain: float
    machine: str
    time: str
    format: str | None = None
    recipe: str | None = None


def tuned_settings(subject: str, device: str | None = None) -> TunedSettings | None:
    """The settings of a bundle or a checkpoint; None where there are none, or their file is damaged.

    Args:
        subject: `Bundle.identity`, or the revision of a checkpoint.
        device: the address that was given to `tune --device`; None for this machine.
    """
    try:
        with open(_file(subject, device), "rb") as file:
            found = from_json(TunedSettings, json.loads(file.read(_MOST_BYTES)))
    except (OSError, ValueError, RecursionError):
        return None
    return found if 1 <= found.threads <= _MOST_THREADS and found.chunk >= 1 else None


def tuned_for_another_machine(subject: str) -> bool:
    """Whether the cache folder has settings of a subject, but none for this CPU with these cores."""
    files = list((cache_folder() / _FOLDER).glob(f"{subject[:_SUBJECT]}-*.json"))
    return bool(files) and _file(subject, None) not in files


def keep_tuned(subject: str, settings: TunedSettings, device: str | None = None) -> Path:
    """Keeps settings in the place of earlier ones; returns their file. Raises OSError where it cannot."""
    path = _file(subject, device)
    write_whole(path, json.dumps(to_json(settings)) + "\n")
    return path


def forget_tuned(subject: str, device: str | None = None) -> bool:
    """Removes settings. Returns whether there were any."""
    path = _file(subject, device)
    found = path.exists()
    path.unlink(missing_ok=True)
    return found


def check_keeping() -> None:
    """Raises GemmaEdgeError if the cache folder takes no settings: before anything is measured."""
    trial = cache_folder() / _FOLDER / ".trial"
    try:
        write_whole(trial, "")
        trial.unlink()
    except OSError as error:
        raise GemmaEdgeError(
            f"{cache_folder()} takes no tuned settings: {error.strerror}. "
            f"Set {CACHE_VARIABLE} to a folder that can be written"
        ) from None


def _file(subject: str, device: str | None) -> Path:
    of = f"{cpu_fingerprint()} {cpu_name()} {physical_cores()}" if device is None else f"device {device}"
    place = hashlib.sha256(of.encode(errors="surrogateescape")).hexdigest()[:8]
    return cache_folder() / _FOLDER / f"{subject[:_SUBJECT]}-{place}.json"
