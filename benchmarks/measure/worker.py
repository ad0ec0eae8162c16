"""The measured process of `gemma-edge bench`: loads a bundle, does what a workload asks, prints one JSON
line.

    python -m gemma_edge.benchmarks.measure.worker BUNDLE '{"prompts": [128], "gens": [64], ...}'

It is the same process on this machine, under a memory limit, and on a device behind ssh. Nothing is imported
or allocated in it that the runtime does not need, but for a thread that looks at its memory 20 times a second
(30 microseconds each).
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_edge.benchmarks.machine.child import ChildError, ChildRun
from gemma_edge.benchmarks.machine.clock import ClockReading
from gemma_edge.benchmarks.machine.memory import (
    MOST_POINTS,
    MemoryTimeline,
    PeakSampler,
    drop_page_cache,
    read_memory,
)
from gemma_edge.benchmarks.machine.sensors import read_sensors
from gemma_edge.benchmarks.measure.encoder_times import EncoderRun, measure_encoders
from gemma_edge.benchmarks.measure.kernel_tests import bench_decode, bench_prefill, runtime_import_seconds
from gemma_edge.benchmarks.measure.latency import measure_latency, summarize
from gemma_edge.benchmarks.measure.workload import Sizes, Workload
from gemma_edge.benchmarks.records.measurement import Measurement
from gemma_edge.benchmarks.records.record import bundle_files, environment
from gemma_edge.benchmarks.script import run_script
from gemma_edge.runtime.errors import DeviceError

if TYPE_CHECKING:  # importing the runtime is part of what is measured
    from gemma_edge.runtime.model import Model

Json = dict[str, Any]
REPORT_SCHEMA = 1
SAMPLE_S = 0.05
WARM_UP_TOKENS = 8


@dataclass
class _Run:
    """One load of a bundle and what is measured with it."""

    model: Model
    workload: Workload
    vocab_size: int
    origin: float
    phases: list[Json] = field(default_factory=list)
    pss: list[int] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Notes when it began and ended, and what it held in memory then."""
        began = time.monotonic()
        yield
        self.note(name, began)

    def note(self, name: str, began: float) -> None:
        spent = {"start_s": round(began - self.origin, 3), "end_s": round(time.monotonic() - self.origin, 3)}
        sample = read_memory()
        if sample.pss is not None:
            self.pss.append(sample.pss)
        self.phases.append({"name": name, **spent, "memory": sample.to_dict()})

    def test(self, test: Sizes, reps: int) -> Measurement:
        measure, tokens = (bench_prefill, test.n_prompt) if test.n_prompt else (bench_decode, test.n_gen)
        return measure(self.model, tokens, reps, self.vocab_size, depth=test.n_depth)

    def measure(self, test: Sizes) -> Json:
        """One test with what it cost beside time; fillings of the cache before it are in `cpu_s`, as in
        llama-bench not in the samples."""
        faults, cpu, wall = read_memory().major_faults, time.process_time(), time.monotonic()
        measurement = self.test(test, self.workload.reps)
        cpu_s, wall_s = time.process_time() - cpu, time.monotonic() - wall
        return {
            **measurement.to_dict(),
            "cpu_s": round(cpu_s, 3),
            "cores_busy": round(cpu_s / wall_s, 3),
            "major_faults": read_memory().major_faults - faults,
            "sensors": read_sensors(),
        }

    def sustain(self) -> list[Json]:
        """Turns of prefill and decode until the time is over: the curve of a device that grows warm."""
        points: list[Json] = []
        start = time.monotonic()
        prompt, gen = max(self.workload.prompts, default=0), max(self.workload.gens)
        while (elapsed := time.monotonic() - start) < self.workload.sustained_s:
            if elapsed < len(points) * self.workload.sustained_s / MOST_POINTS:  # turns of a small model
                self.test(Sizes(0, gen, 0), 1)
                continue
            point: Json = {"t_s": round(elapsed, 2)}
            if prompt:
                point["pp_ts"] = round(self.test(Sizes(prompt, 0, 0), 1).avg_ts, 3)
            point["tg_ts"] = round(self.test(Sizes(0, gen, 0), 1).avg_ts, 3)
            sensors = read_sensors()
            for key in ("temperature_c", "frequency_mhz", "throttle_count", "throttled"):
                if key in sensors:
                    point[key] = sensors[key]
            points.append(point)
        return points


def measure(path: Path, workload: Workload) -> Json:
    """Does a workload in this process.

    Returns:
        The report: "schema", "environment", "import_s", "load_s", "cached_bytes" (of the bundle, in the page
        cache before a cold load), "tests" (Measurement.to_dict() with "cpu_s", "cores_busy", "major_faults",
        "sensors"), "latency" (`latency.summarize`), "sustained", "phases", "memory" ("loaded", "steady",
        "peak", "timeline"), "sensors" ("before", "after"), "notes". Seconds and bytes; null for what was not
        asked for.

    Raises:
        UsageError: the workload does not fit the context.
        BundleError, TokenizerError: the bundle is damaged.
    """
    began, before = ClockReading.now(), read_sensors()
    engine = "onnx" if (path / "decoder.onnx").is_file() else "litert"
    import_s = runtime_import_seconds(engine) if workload.import_time else None
    cached = drop_page_cache(bundle_files(path)) if workload.cold else None
    # Only now, so that this import is no part of what is measured next.
    from gemma_edge.runtime.artifacts.bundle import Bundle
    from gemma_edge.runtime.model import Model

    origin = time.monotonic()
    timeline = MemoryTimeline(origin)
    with PeakSampler(interval=SAMPLE_S, timeline=timeline) as sampler:
        start = time.perf_counter()
        model = Model.load(path, threads=workload.threads, context=workload.context)
        load_s = time.perf_counter() - start
        workload.check(model.decoder.context)
        run = _Run(model, workload, Bundle.open(path).config.vocab_size_per_layer_input, origin)
        run.note("load", origin)
        loaded = read_memory()
        tests: list[Json] = []
        for test in workload.tests():
            name = Measurement(test.n_prompt, test.n_gen, (1,), test.n_depth).name
            with run.phase(f"{name}, warm-up"):
                # Without the depth, and not at full length: it brings pages and code in, no more.
                run.test(
                    Sizes(min(test.n_prompt, model.decoder.chunk), min(test.n_gen, WARM_UP_TOKENS), 0), 1
                )
            with run.phase(name):
                tests.append(run.measure(test))
        latency = None
        if workload.requests:
            with run.phase("end to end"):
                latency = summarize(
                    measure_latency(model, workload.prompt, workload.answer, workload.requests)
                )
        sustained = None
        if workload.sustained_s:
            with run.phase("sustained"):
                sustained = run.sustain()
    steady = read_memory()
    return {
        "schema": REPORT_SCHEMA,
        "environment": environment(),
        "import_s": import_s,
        "load_s": load_s,
        "cached_bytes": cached,
        "context": model.decoder.context,
        "tests": tests,
        "latency": latency,
        "sustained": sustained,
        "phases": run.phases,
        "memory": {
            "loaded": loaded.to_dict(),
            "steady": steady.to_dict(),
            "peak": {**sampler.peak.to_dict(), "pss": max(run.pss, default=steady.pss)},
            "timeline": timeline.to_dict(),
        },
        "sensors": {"before": before, "after": read_sensors()},
        "notes": began.notes(ClockReading.now()),
    }


def encode(path: Path, workload: Workload) -> Json:
    """Measures the encoders of a bundle in this process, without its decoder.

    Returns:
        A report as `measure` does, with "schema", "environment", "cached_bytes", "tests" (none), "encode"
        (EncoderRun.to_dict() of each encoder) and "notes".

    Raises:
        UsageError: the workload is none.
        BundleError: the bundle is damaged.
    """
    began = ClockReading.now()
    cached = drop_page_cache(bundle_files(path)) if workload.cold else None
    from gemma_edge.runtime.artifacts.bundle import Bundle

    bundle = Bundle.open(path)
    workload.check(bundle.context)
    runs = measure_encoders(bundle, workload.reps, workload.threads)
    return {
        "schema": REPORT_SCHEMA,
        "environment": environment(),
        "cached_bytes": cached,
        "tests": [],
        "encode": [run.to_dict() for run in runs],
        "notes": began.notes(ClockReading.now()),
    }


def worker_argv(python: str, bundle: str, workload: Workload) -> list[str]:
    """The command line that measures in a process of its own, here or on a device."""
    return [python, "-m", "gemma_edge.benchmarks.measure.worker", bundle, workload.to_json()]


def parse_worker_report(run: ChildRun) -> Json:
    """What `measure` returned in a process.

    Raises:
        ChildError: the process failed; its exit code is kept.
        DeviceError: it succeeded without a report of this schema.
    """
    if run.exit_code:
        raise ChildError("the measured run", run)
    try:
        report: Json = run.answer()
        if report["schema"] != REPORT_SCHEMA:
            raise ValueError(f"a report of schema {report['schema']}, not {REPORT_SCHEMA}")
        for test in report["tests"]:
            Measurement.from_dict(test)
        for test in report.get("encode", ()):
            EncoderRun.from_dict(test)
        return report
    except (KeyError, TypeError, ValueError) as error:
        raise DeviceError(f"the measured run printed no report ({error}): {run.stdout[-200:]!r}") from None


def main(argv: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(
        prog="python -m gemma_edge.benchmarks.measure.worker", description=summary
    )
    parser.add_argument("bundle", type=Path)
    parser.add_argument("workload", type=Workload.from_json, help="JSON of `workload.Workload`")
    args = parser.parse_args(argv)
    workload: Workload = args.workload
    work = encode if workload.encode else measure
    print(json.dumps(work(args.bundle, workload)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
