"""The measured process of `gemma-edge bench`: loads a bundle, does its workload, prints one JSON line.

    python -m gemma_edge.benchmarks.measure.worker BUNDLE '{"prompts": [128], "gens": [64], ...}'

The process is the same on this machine, under a memory limit, and on a device behind ssh. It imports and
allocates nothing that the runtime does not need, except for a thread that reads its memory 20 times a second
(30 microseconds each).
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_edge.benchmarks.measure.answer_phases import measure_answer
from gemma_edge.benchmarks.measure.encoder_times import measure_encoders
from gemma_edge.benchmarks.measure.kernel_tests import bench_decode, bench_prefill, runtime_import_seconds
from gemma_edge.benchmarks.measure.latency import measure_latency, summarize
from gemma_edge.benchmarks.measure.prefix_times import measure_prefix
from gemma_edge.benchmarks.measure.speculation_times import measure_speculation
from gemma_edge.benchmarks.measure.workload import Sizes, Workload
from gemma_edge.benchmarks.records.bundle_facts import bundle_files, packing_notes
from gemma_edge.benchmarks.records.environment import environment
from gemma_edge.benchmarks.records.measurement import KernelTest, Measurement, name_of_test
from gemma_edge.benchmarks.records.run_report import (
    MemoryReport,
    Phase,
    RunReport,
    SensorsAround,
    SustainedPoint,
)
from gemma_edge.devices.machine.clock import ClockReading
from gemma_edge.devices.machine.memory import (
    MOST_POINTS,
    MemoryTimeline,
    PeakSampler,
    drop_page_cache,
    read_memory,
)
from gemma_edge.devices.machine.sensors import read_sensors
from gemma_edge.devices.script import run_script
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.engines.engine_registry import engine_of
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.files.typed_json import to_json

if TYPE_CHECKING:  # importing the runtime is part of what is measured
    from gemma_edge.runtime.model import Model

SAMPLE_S = 0.05
WARM_UP_TOKENS = 8


@dataclass
class _Run:
    """One load of a bundle and what is measured with it."""

    model: Model
    workload: Workload
    vocab_size: int
    origin: float
    phases: list[Phase] = field(default_factory=list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Notes begin and end of a phase, and the memory at its end."""
        began = time.monotonic()
        yield
        self.note(name, began)

    def note(self, name: str, began: float) -> None:
        start_s, end_s = (round(moment - self.origin, 3) for moment in (began, time.monotonic()))
        self.phases.append(Phase(name, start_s, end_s, read_memory()))

    def test(self, test: Sizes, reps: int) -> Measurement:
        measure, tokens = (bench_prefill, test.n_prompt) if test.n_prompt else (bench_decode, test.n_gen)
        return measure(self.model, tokens, reps, self.vocab_size, depth=test.n_depth)

    def measure(self, test: Sizes) -> KernelTest:
        """One test with its cost beside time. Filling the cache before the test counts in `cpu_s` only."""
        faults, cpu, wall = read_memory().major_faults or 0, time.process_time(), time.monotonic()
        speed = self.test(test, self.workload.reps)
        cpu_s, wall_s = time.process_time() - cpu, time.monotonic() - wall
        return KernelTest(
            *(speed.n_prompt, speed.n_gen, speed.samples_ns, speed.n_depth),
            cpu_s=round(cpu_s, 3),
            cores_busy=round(cpu_s / wall_s, 3),
            major_faults=(read_memory().major_faults or 0) - faults,
            sensors=read_sensors(),
        )

    def sustain(self) -> tuple[SustainedPoint, ...]:
        """Turns of prefill and decode until the time is over: the curve of a device that grows warm."""
        points: list[SustainedPoint] = []
        start = time.monotonic()
        prompt, gen = self.workload.n_prompt, self.workload.n_gen
        while (elapsed := time.monotonic() - start) < self.workload.sustained_s:
            if elapsed < len(points) * self.workload.sustained_s / MOST_POINTS:  # turns of a small model
                self.test(Sizes(0, gen, 0), 1)
                continue
            prefill = round(self.test(Sizes(prompt, 0, 0), 1).avg_ts, 3) if prompt else None
            decode = round(self.test(Sizes(0, gen, 0), 1).avg_ts, 3)
            now = read_sensors()
            points.append(
                SustainedPoint(
                    *(round(elapsed, 2), decode, prefill, now.temperature_c, now.frequency_mhz),
                    *(now.throttle_count, now.throttled),
                )
            )
        return tuple(points)


def measure(path: Path, workload: Workload) -> RunReport:
    """Does a workload in this process.

    Raises:
        UsageError: the workload does not fit the context.
        BundleError, TokenizerError: the bundle is damaged.
    """
    before = read_sensors()
    bundle = Bundle.open(path)
    import_s = runtime_import_seconds(engine_of(bundle.format)) if workload.import_time else None
    cached = drop_page_cache(bundle_files(path)) if workload.cold else None
    # Imported here, so that the load that is timed next does not include the import.
    from gemma_edge.runtime.model import Model

    origin = time.monotonic()
    timeline = MemoryTimeline(origin)
    with PeakSampler(interval=SAMPLE_S, timeline=timeline) as sampler:
        start = time.perf_counter()
        model = Model.load(
            path, threads=workload.threads, context=workload.context, chunk=workload.chunk, snapshots=0
        )
        load_s = time.perf_counter() - start
        workload.check(model.decoder.context)
        run = _Run(model, workload, bundle.config.vocab_size_per_layer_input, origin)
        run.note("load", origin)
        loaded = read_memory()
        tests = tuple(_test(run, test) for test in workload.tests())
        latency = sustained = None
        if workload.requests:
            with run.phase("end to end"):
                answers = measure_latency(model, workload.prompt, workload.answer, workload.requests)
                latency = summarize(answers)
        if workload.sustained_s:
            with run.phase("sustained"):
                sustained = run.sustain()
    steady = read_memory()
    sizes = [phase.memory.pss for phase in run.phases if phase.memory and phase.memory.pss is not None]
    peak = replace(sampler.peak, pss=max(sizes, default=steady.pss))
    return RunReport(
        import_s=import_s,
        load_s=load_s,
        cached_bytes=cached,
        context=model.decoder.context,
        tests=tests,
        latency=latency,
        sustained=sustained,
        phases=tuple(run.phases),
        memory=MemoryReport(steady, peak, loaded, timeline.points),
        sensors=SensorsAround(before, read_sensors()),
    )


def _test(run: _Run, test: Sizes) -> KernelTest:
    name = name_of_test(*test)
    with run.phase(f"{name}, warm-up"):
        # Without the depth, and not at full length: it brings pages and code in, no more.
        chunk = run.model.decoder.chunk
        run.test(Sizes(min(test.n_prompt, chunk), min(test.n_gen, WARM_UP_TOKENS), 0), 1)
    with run.phase(name):
        return run.measure(test)


def encode(path: Path, workload: Workload) -> RunReport:
    """Measures the encoders of a bundle in this process, without its decoder.

    Raises:
        UsageError: the workload does not fit the context.
        BundleError: the bundle is damaged.
    """
    cached = drop_page_cache(bundle_files(path)) if workload.cold else None
    bundle = Bundle.open(path)
    workload.check(bundle.context)
    runs = measure_encoders(bundle, workload.reps, workload.threads)
    return RunReport(cached_bytes=cached, encode=tuple(runs))


def worker_argv(python: str, bundle: str, workload: Workload) -> list[str]:
    """The command line that measures in a process of its own, here or on a device."""
    return [python, "-m", "gemma_edge.benchmarks.measure.worker", bundle, workload.to_json()]


def main() -> int:
    if len(sys.argv) != 3:
        raise UsageError("expected a bundle and the JSON of a workload")
    path, workload = Path(sys.argv[1]), Workload.from_json(sys.argv[2])
    began = ClockReading.now()
    work = encode if workload.encode else measure_answer if workload.attach else measure
    work = measure_prefix if workload.prefix else measure_speculation if workload.speculate else work
    report = work(path, workload)
    notes = (*began.notes(ClockReading.now()), *packing_notes(path))
    print(json.dumps(to_json(replace(report, environment=environment(), notes=notes))), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
