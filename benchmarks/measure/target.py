"""Where the processes of a benchmark run: this machine, or a device behind `devices.open_device`.

A target runs the same worker everywhere. Under a ceiling it is the kernel's control group that limits it
where the kernel lets us; elsewhere its memory is sampled, and the result says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from gemma_edge.benchmarks.measure.native_runner import NativeRun, bench_native, native_report
from gemma_edge.benchmarks.measure.worker import worker_argv
from gemma_edge.benchmarks.measure.workload import Workload
from gemma_edge.benchmarks.peers.interleaved import TIMEOUT, Peer
from gemma_edge.benchmarks.records.bundle_facts import BundleFacts, bundle_facts, bundle_files
from gemma_edge.benchmarks.records.measurement import OTHER_BUNDLE, PeerRun, TurnSizes
from gemma_edge.benchmarks.records.run_report import Attempt, RunReport
from gemma_edge.devices import Device, DeviceFacts
from gemma_edge.devices.machine.bandwidth import Bandwidth, bandwidth_argv
from gemma_edge.devices.machine.cgroup import LimitedRun, mechanism, run_limited
from gemma_edge.devices.machine.child import ChildRun, run_child
from gemma_edge.devices.machine.limit import LimitProbe, limit_argv, probe_argv
from gemma_edge.devices.machine.memory import drop_page_cache
from gemma_edge.devices.machine.sensors import Sensors
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.version import __version__


@dataclass(frozen=True)
class Outcome:
    """One run of the worker: its report, None if it was killed for its memory, and how it was limited."""

    report: RunReport | None
    mechanism: str | None = None  # of the limit; None: there was none, or nothing enforced it
    peak_bytes: int | None = None  # heap and page cache as the kernel counted them for the limit
    killed: bool = False
    seconds: float | None = None

    def attempt(self, limit: int) -> Attempt:
        """The run as a record has it."""
        cached = self.report.cached_bytes if self.report else None
        return Attempt(limit, self.killed, self.peak_bytes, self.mechanism, self.report, self.seconds, cached)


class Target(Protocol):
    """A place where workers run."""

    name: str
    enforces: bool  # a memory limit can be enforced here
    why_not: str  # when it cannot
    runs_worker: bool  # and not a native program, which knows one prefill and one decode

    def work(self, workload: Workload, limit: int | None, timeout: float) -> Outcome:
        """Runs the worker.

        Raises:
            ChildError: it failed for another reason than a limit that was enforced.
            DeviceError: it cannot be started, hangs, or the device is gone.
        """
        ...

    def place(self, file: Path) -> str:
        """Brings a file that the worker reads there; returns its path there."""
        ...

    def bandwidth(self, threads: int, seconds: float) -> Bandwidth | None:
        """Stream-read bandwidth there; None where it cannot be probed."""
        ...

    def facts(self) -> DeviceFacts | None:
        """The device; None for this machine, whose environment is in every record."""
        ...


class LocalTarget:
    """This machine, each worker a child process."""

    name = "local"
    runs_worker = True

    def __init__(self, bundle: Path) -> None:
        self.bundle = bundle
        found = mechanism()
        self.enforces, self.why_not = found.name != "none", found.reason

    def work(self, workload: Workload, limit: int | None, timeout: float) -> Outcome:
        argv = worker_argv(sys.executable, str(self.bundle), workload)
        if limit is None or not self.enforces:
            run = run_child(argv, timeout=timeout, what="the measured run")
            return Outcome(_report(run), seconds=run.seconds)
        # Out here too: pages of files that the worker's imports read would else be another group's.
        drop_page_cache(bundle_files(self.bundle))
        return _limited_outcome(run_limited(argv, limit, timeout=timeout))

    def place(self, file: Path) -> str:
        return str(file)

    def bandwidth(self, threads: int, seconds: float) -> Bandwidth | None:
        run = run_child(bandwidth_argv(sys.executable, threads, seconds), timeout=seconds + 120)
        return run.parse(Bandwidth, "the bandwidth probe")

    def facts(self) -> DeviceFacts | None:
        return None


class DeviceTarget:
    """A device with Python: the bundle is brought there, and the worker runs there."""

    runs_worker = True

    def __init__(
        self, device: Device, bundle: Path, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self.device, self.name = device, device.spec
        self._facts = device.facts
        self.python = device.python()
        self.path = device.push(bundle, progress=progress)
        probe = device.run(probe_argv(self.python), timeout=120).parse(LimitProbe, "the run under a limit")
        self.enforces, self.why_not = probe.mechanism != "none", f"on {device.spec}: {probe.reason}"

    def work(self, workload: Workload, limit: int | None, timeout: float) -> Outcome:
        argv = worker_argv(self.python, self.path, workload)
        if limit is None or not self.enforces:
            run = self.device.run(argv, timeout=timeout, what="the measured run")
            return Outcome(_report(run), seconds=run.seconds)
        # The limit ends it there first; the device's own time limit is for what hangs around it.
        argv = limit_argv(self.python, limit, timeout, argv)
        run = self.device.run(argv, timeout=timeout + 60, what="the measured run")
        return _limited_outcome(run.parse(LimitedRun, "the run under a limit"))

    def place(self, file: Path) -> str:
        return self.device.push(file)

    def bandwidth(self, threads: int, seconds: float) -> Bandwidth | None:
        run = self.device.run(bandwidth_argv(self.python, threads, seconds), timeout=seconds + 120)
        return run.parse(Bandwidth, "the bandwidth probe")

    def facts(self) -> DeviceFacts | None:
        return self._facts


class NativeTarget:
    """A device without Python, Android above all: a native program measures a .litertlm there."""

    runs_worker = False

    def __init__(self, device: Device, bundle: Path, facts: BundleFacts) -> None:
        self.device, self.name, self.bundle, self.bundle_facts = device, device.spec, bundle, facts
        self._facts = device.facts
        self.enforces, self.why_not = False, f"{device.spec} lets no limit be set"

    def work(self, workload: Workload, limit: int | None, timeout: float) -> Outcome:
        if any(workload.depths):
            raise UsageError(
                f"-d: on {self.name} decode is measured behind the prompt, and at no other depth"
            )
        if workload.sustained_s:
            raise UsageError(f"--sustained: {self.name} runs a native program, which has no such mode")
        sizes = [(prompt, gen) for prompt in workload.prompts for gen in workload.gens]
        before = self._sensors()
        runs: list[NativeRun] = []
        for prompt, gen in sizes:
            size = TurnSizes(
                prompt,
                gen,
                workload.reps,
                workload.threads,
                workload.context or self.bundle_facts.context,
            )
            cores = self._facts.big_cores or None
            runs.append(bench_native(self.device, self.bundle, size, timeout=timeout, cores=cores))
        return Outcome(native_report(runs, self._facts, before, self._sensors()))

    def _sensors(self) -> Sensors:
        return Sensors(temperature_c=self.device.temperature())

    def place(self, file: Path) -> str:
        raise UsageError(f"--answer: {self.name} runs a native program, which takes no attachments")

    def bandwidth(self, threads: int, seconds: float) -> Bandwidth | None:
        return None

    def facts(self) -> DeviceFacts | None:
        return self._facts


def _limited_outcome(run: LimitedRun) -> Outcome:
    """Raises ChildError or DeviceError, unless the kernel killed the run for its memory."""
    report = None if run.killed else _report(run)
    return Outcome(report, run.mechanism, run.peak_bytes, run.killed, run.seconds)


def _report(run: ChildRun) -> RunReport:
    return run.parse(RunReport, "the measured run")


def other_bundle(path: Path) -> Peer:
    """Another bundle of gemma-edge in the place of a peer, with the context that it has.

    Raises:
        BundleError: it is no bundle.
    """
    facts = bundle_facts(path)

    def run(sizes: TurnSizes) -> PeerRun:
        context = min(sizes.context, facts.context)
        workload = Workload((sizes.n_prompt,), (sizes.n_gen,), (0,), sizes.reps, sizes.threads, context)
        report = LocalTarget(path).work(workload, None, TIMEOUT).report
        assert report is not None and report.memory is not None
        return PeerRun(report.tests, report.memory.peak.high_water, f"gemma-edge {__version__}", path.name)

    return Peer(OTHER_BUNDLE, path, run)
