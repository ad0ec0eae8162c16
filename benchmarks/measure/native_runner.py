"""A .litertlm measured by the native runner, where there is no Python: Android above all.

The runner is a small C program on LiteRT-LM, built by `android_demo/bench/build.sh` into the cache folder.
Prompt and decode are timed by the engine in one go, so decoding is measured behind the prompt:
`n_depth` of the decode test is the prompt's length.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gemma_edge.benchmarks.devices.base import Device, DeviceFacts, DeviceRun
from gemma_edge.benchmarks.machine.cpu_features import LITERT_LM, missing_feature
from gemma_edge.benchmarks.options import KernelOptions
from gemma_edge.benchmarks.records.measurement import Measurement
from gemma_edge.runtime.cache_folder import cache_folder
from gemma_edge.runtime.errors import DeviceError, UsageError

Json = dict[str, Any]

_RUNNER = "gemma-bench"
_ENGINE = "liblitert-lm.so"


def runner_folder(facts: DeviceFacts) -> Path:
    """Where the runner for a device is, or belongs: android-aarch64, linux-x86_64, ..."""
    return cache_folder() / "runner" / f"{facts.system.lower()}-{facts.arch}"


def bench_native(
    device: Device,
    model: Path,
    options: KernelOptions,
    *,
    timeout: float,
    runner: Path | None = None,
    cores: tuple[int, ...] | None = None,
) -> Json:
    """Pushes runner and model, measures.

    Args:
        model: a .litertlm file.
        timeout: seconds for load, warm-up and all repetitions.
        runner: the folder that build.sh made, instead of the one in the cache.
        cores: to bind to, such as `DeviceFacts.big_cores`.

    Returns:
        What `kernel.measure` returns, and "ttft_s" (one of each repetition), "samples" (of memory), "cores".

    Raises:
        UsageError: not a .litertlm, or no prompt or no decode asked for.
        DeviceError: no runner built, none for this device, killed, hung, or the device is gone.
        ChildError: the engine refused the model.
    """
    options.check()
    if model.suffix != ".litertlm":
        raise UsageError(f"{model}: {device.spec} takes a .litertlm; gemma-edge export --format litertlm")
    if min(options.n_prompt, options.n_gen) < 1:
        raise UsageError(f"-p and -n: on {device.spec} both are measured in one go; give each at least 1")
    facts = device.facts
    runner = runner or runner_folder(facts)
    if missing := [name for name in (_RUNNER, _ENGINE) if not (runner / name).is_file()]:
        target = "android" if facts.system == "Android" else "linux"
        remedy = f"build it: android_demo/bench/build.sh {target}"
        raise DeviceError(f"{device.spec}: there is no {missing[0]} in {runner}; {remedy}")
    if feature := missing_feature(LITERT_LM, facts.arch, f"Features: {' '.join(facts.cpu_flags)}"):
        raise DeviceError(f"{device.spec}: LiteRT-LM needs {feature}: a processor newer than a Cortex-A72")
    there, path = device.push(runner), device.push(model)
    numbers = (options.n_prompt, options.n_gen, options.reps, options.threads, options.context)
    # Packed weights lie beside the model, and are found there by the next run. A push loses the mode.
    script = 'chmod 755 "$0" && mkdir -p "$2" && exec "$0" "$@"'
    argv = ["sh", "-c", script, f"{there}/{_RUNNER}", path, f"{path}.cache", *map(str, numbers)]
    run = device.run(argv, timeout=timeout, cores=cores, what="the native runner")
    return parse_runner(run.check("the native runner"), options, device.spec)


def parse_runner(run: DeviceRun, options: KernelOptions, spec: str = "the device") -> Json:
    """What the runner printed, as `kernel.measure` returns it.

    Raises:
        DeviceError: it printed something else.
    """
    try:
        said = run.answer()
        samples = said["samples"]
        prefill, decode, first = (
            [float(sample[key]) for sample in samples] for key in ("prefill_ns", "decode_ns", "ttft_ns")
        )
        if len(samples) != options.reps or min([*prefill, *decode, *first]) <= 0:
            raise ValueError("other samples than were asked for")
        tests = [
            Measurement(options.n_prompt, 0, tuple(map(round, prefill))).to_dict(),
            Measurement(0, options.n_gen, tuple(map(round, decode))).to_dict()
            | {"n_depth": options.n_prompt},
        ]
        memory = {key: None if value < 0 else int(value) for key, value in said["memory"].items()}
        high_water = memory.pop("high_water") or run.peak.high_water
        load_s = float(said["load_s"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise DeviceError(f"{spec}: the native runner printed no report: {run.stdout[-200:]!r}") from None
    parts = [memory.get(key) or 0 for key in ("rss_anon", "rss_file", "rss_shmem")]
    return {
        "options": vars(options).copy(),
        "import_s": None,
        "load_s": load_s,
        "tests": tests,
        "ttft_s": [value / 1e9 for value in first],
        "memory": {
            "steady": memory | {"rss": sum(parts)},
            "peak": run.peak.to_dict() | {"high_water": max(high_water, run.peak.high_water)},
        },
        "samples": [vars(point) for point in run.samples],
        "cores": run.cores,
    }
