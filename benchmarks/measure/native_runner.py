"""A .litertlm measured by the native runner, where there is no Python: Android above all.

The runner is a small C program on LiteRT-LM, built by `android_demo/bench/build.sh` into the cache folder.
Prompt and decode are timed by the engine in one go, so decoding is measured behind the prompt:
`n_depth` of the decode test is the prompt's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_edge.benchmarks.measure.latency import percentiles
from gemma_edge.benchmarks.records.environment import Environment
from gemma_edge.benchmarks.records.measurement import KernelTest, TurnSizes
from gemma_edge.benchmarks.records.run_report import Latency, MemoryReport, RunReport, SensorsAround
from gemma_edge.devices.base import Device, DeviceFacts, DeviceRun
from gemma_edge.devices.machine.memory import MemoryPoints, MemorySample, PeakMemory
from gemma_edge.devices.machine.sensors import Sensors
from gemma_edge.devices.runner_files import BENCH, checked_runner, send_runner
from gemma_edge.runtime.errors import DeviceError, UsageError
from gemma_edge.runtime.files.typed_json import FieldError


@dataclass(frozen=True)
class NativeRun:
    """One run of the runner: a prefill and a decode behind it, `ttft_ms` of each repetition, memory."""

    sizes: TurnSizes
    load_s: float
    tests: tuple[KernelTest, KernelTest]
    ttft_ms: tuple[float, ...]
    memory: MemoryReport
    cores: tuple[int, ...] | None = None  # that it was bound to


def bench_native(
    device: Device,
    model: Path,
    sizes: TurnSizes,
    *,
    timeout: float,
    runner: Path | None = None,
    cores: tuple[int, ...] | None = None,
) -> NativeRun:
    """Pushes runner and model, measures.

    Args:
        model: a .litertlm file.
        timeout: seconds for load, warm-up and all repetitions.
        runner: the folder that build.sh made, instead of the one in the cache.
        cores: to bind to, such as `DeviceFacts.big_cores`.

    Raises:
        UsageError: not a .litertlm, or no prompt or no decode asked for.
        DeviceError: no runner built, none for this device, killed, hung, or the device is gone.
        ChildError: the engine refused the model.
    """
    sizes.check()
    if min(sizes.n_prompt, sizes.n_gen) < 1:
        raise UsageError(f"-p and -n: on {device.spec} both are measured in one go; give each at least 1")
    folder = checked_runner(device, BENCH, model, runner)
    numbers = (sizes.n_prompt, sizes.n_gen, sizes.reps, sizes.threads, sizes.context)
    argv = [*send_runner(device, folder, BENCH, model), *map(str, numbers)]
    run = device.run(argv, timeout=timeout, cores=cores, what="the native runner")
    return parse_runner(run.check("the native runner"), sizes)


@dataclass(frozen=True)
class _Repetition:
    prefill_ns: float
    decode_ns: float
    ttft_ns: float


@dataclass(frozen=True)
class _Memory:
    """Bytes at the end; below 0 for what the system does not tell."""

    rss_anon: int
    rss_file: int
    rss_shmem: int = 0
    pss: int = -1
    high_water: int = -1


@dataclass(frozen=True)
class _Printed:
    """The runner's JSON line."""

    load_s: float
    samples: tuple[_Repetition, ...]
    memory: _Memory


def parse_runner(run: DeviceRun, sizes: TurnSizes) -> NativeRun:
    """The figures that the runner printed.

    Raises:
        DeviceError: the runner printed something else.
    """
    what = "the native runner"
    said = run.parse(_Printed, what)
    if len(said.samples) != sizes.reps:
        got = f"{len(said.samples)} samples instead of {sizes.reps}"
        raise DeviceError(f"{what} printed no report ({got}): {run.stdout[-200:]!r}")
    prefill, decode, first = (
        tuple(round(getattr(sample, key)) for sample in said.samples)
        for key in ("prefill_ns", "decode_ns", "ttft_ns")
    )
    memory = said.memory
    anon, file, shmem = (max(0, size) for size in (memory.rss_anon, memory.rss_file, memory.rss_shmem))
    steady = MemorySample(anon, file, shmem, None if memory.pss < 0 else memory.pss)
    # Samples from outside may miss the short time in which a small model is measured.
    peak = PeakMemory(
        rss_anon=max(run.peak.rss_anon, anon),
        rss_file=max(run.peak.rss_file, file),
        rss=max(run.peak.rss, steady.rss),
        high_water=max(run.peak.high_water, memory.high_water),
        samples=run.peak.samples,
    )
    points = MemoryPoints(
        [point.seconds for point in run.samples],
        [point.rss_anon for point in run.samples],
        [point.rss_file for point in run.samples],
    )
    try:
        tests = (
            KernelTest(sizes.n_prompt, 0, prefill),
            KernelTest(0, sizes.n_gen, decode, sizes.n_prompt),
        )
    except FieldError as error:
        raise DeviceError(f"{what} printed no report ({error})") from None
    return NativeRun(
        sizes=sizes,
        load_s=said.load_s,
        tests=tests,
        ttft_ms=tuple(wait / 1e6 for wait in first),
        memory=MemoryReport(steady, peak, timeline=points),
        cores=run.cores,
    )


def native_report(
    runs: Sequence[NativeRun], facts: DeviceFacts, before: Sensors, after: Sensors
) -> RunReport:
    """Runs of the native program as one report of a worker; None, or empty, for what it does not measure.

    The memory is that of the run that needed most.
    """
    tests: dict[str, KernelTest] = {}
    for run in runs:
        for test in run.tests:
            tests.setdefault(test.test, replace(test, sensors=after))
    largest = max(runs, key=lambda run: run.memory.steady.rss_anon)
    sizes, waits, cores = runs[0].sizes, runs[0].ttft_ms, largest.cores
    return RunReport(
        environment=Environment(
            cpu=facts.cpu,
            cpu_flags=list(facts.cpu_flags),
            cores=facts.cores,
            cores_usable=len(cores or range(facts.cores)),
            memory_bytes=facts.memory_bytes,
            machine=facts.arch,
            kernel=facts.kernel,
        ),
        engine="LiteRT-LM, native",
        load_s=runs[0].load_s,
        context=sizes.context,
        tests=tuple(tests.values()),
        latency=Latency(
            prompt_tokens=sizes.n_prompt,
            answer_tokens=sizes.n_gen,
            requests=len(waits),
            ttft_ms=percentiles(waits),
            samples_ttft_ms=[round(wait, 3) for wait in waits],
        ),
        memory=largest.memory,
        sensors=SensorsAround(before, after),
        notes=(f"bound to cores {', '.join(map(str, cores))}",) if cores else (),
    )
