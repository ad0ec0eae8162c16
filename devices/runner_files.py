"""The native runner on a device: two small C programs on LiteRT-LM, for Android, which has no Python.

`android_demo/bench/build.sh` builds `gemma-bench`, which measures, and `gemma-answer`, which answers, into
the cache folder.
"""

from __future__ import annotations

from pathlib import Path

from gemma_edge.devices.base import Device, DeviceFacts, Progress
from gemma_edge.devices.machine.cpu_features import LITERT_LM, missing_feature
from gemma_edge.runtime.artifacts.artifact_formats import FILE_SUFFIXES
from gemma_edge.runtime.errors import DeviceError, UsageError
from gemma_edge.runtime.files.cache_folder import cache_folder

BENCH, ANSWER = "gemma-bench", "gemma-answer"
_ENGINE = "liblitert-lm.so"
# Packed weights lie beside the model, and are found there by the next run. A push loses the mode.
_SCRIPT = 'chmod 755 "$0" && mkdir -p "$2" && exec "$0" "$@"'


def runner_folder(facts: DeviceFacts) -> Path:
    """Where the runner for a device is, or belongs: android-aarch64, linux-x86_64, ..."""
    return cache_folder() / "runner" / f"{facts.system.lower()}-{facts.arch}"


def checked_runner(device: Device, program: str, model: Path, runner: Path | None = None) -> Path:
    """The folder with a program for a device that can run a model.

    Args:
        model: a .litertlm file.
        runner: the folder that build.sh made, instead of the one in the cache.

    Raises:
        UsageError: not a .litertlm.
        DeviceError: no runner is built, or none runs on this device.
    """
    if model.suffix not in FILE_SUFFIXES:
        raise UsageError(f"{model}: {device.spec} takes a .litertlm; gemma-edge export --format litertlm")
    facts = device.facts
    folder = runner or runner_folder(facts)
    if missing := [name for name in (program, _ENGINE) if not (folder / name).is_file()]:
        target = "android" if facts.system == "Android" else "linux"
        remedy = f"build it: android_demo/bench/build.sh {target}"
        raise DeviceError(f"{device.spec}: there is no {missing[0]} in {folder}; {remedy}")
    if feature := missing_feature(LITERT_LM, facts.arch, f"Features: {' '.join(facts.cpu_flags)}"):
        raise DeviceError(f"{device.spec}: LiteRT-LM needs {feature}: a processor newer than a Cortex-A72")
    return folder


def send_runner(
    device: Device, folder: Path, program: str, model: Path, progress: Progress | None = None
) -> list[str]:
    """Sends a program and a model; returns the words that start it, up to what follows the cache folder.

    Raises:
        DeviceError: the device is gone, or full.
    """
    there, path = device.push(folder, progress=progress), device.push(model, progress=progress)
    return ["sh", "-c", _SCRIPT, f"{there}/{program}", path, f"{path}.cache"]
