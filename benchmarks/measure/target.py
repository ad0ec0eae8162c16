"""Where the processes of a benchmark run: this machine, or a device behind `devices.open_device`.

A target runs the same worker everywhere. Under a ceiling it is the kernel's control group that limits it
where the kernel lets us; elsewhere its memory is sampled, and the result says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gemma_edge.benchmarks.machine.bandwidth import Bandwidth
from gemma_edge.benchmarks.machine.cgroup import LimitedRun, mechanism, run_limited
from gemma_edge.benchmarks.machine.child import ChildError, ChildRun, run_child
from gemma_edge.benchmarks.machine.limit import limit_argv, parse_limited, parse_probe, probe_argv
from gemma_edge.benchmarks.machine.memory import drop_page_cache
from gemma_edge.benchmarks.measure.latency import percentiles
from gemma_edge.benchmarks.measure.native_runner import bench_native
from gemma_edge.benchmarks.measure.worker import parse_worker_report, worker_argv
from gemma_edge.benchmarks.measure.workload import Workload
from gemma_edge.benchmarks.options import KernelOptions
from gemma_edge.benchmarks.records.measurement import Measurement
from gemma_edge.benchmarks.records.record import BundleFacts, bundle_files
from gemma_edge.runtime.errors import DeviceError, UsageError
from gemma_edge.runtime.units import format_size

if TYPE_CHECKING:
    from gemma_edge.benchmarks.devices import Device, DeviceFacts

Json = dict[str, Any]


@dataclass(frozen=True)
class Outcome:
    """One run of the worker: its report, None when it was killed for its memory, and how it was limited."""

    report: Json | None
    mechanism: str | None  # of the limit; None: there was none, or nothing enforced it
    peak_bytes: int | None  # heap and page cache as the kernel counted them for the limit
    killed: bool = False


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

    def bandwidth(self, threads: int, seconds: float) -> Bandwidth | None:
        """Stream-read bandwidth there; None where it cannot be probed."""
        ...

    def facts(self) -> Json | None:
        """What the device says of itself; None for this machine, whose environment is in every record."""
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
            return Outcome(parse_worker_report(run), None, None)
        # Out here too: pages of files that the worker's imports read would else be another group's.
        drop_page_cache(bundle_files(self.bundle))
        return _limited_outcome(run_limited(argv, limit, timeout=timeout))

    def bandwidth(self, threads: int, seconds: float) -> Bandwidth | None:
        run = run_child(_bandwidth_argv(sys.executable, threads, seconds), timeout=seconds + 120)
        return _parse_bandwidth(run)

    def facts(self) -> Json | None:
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
        self.enforces, reason = parse_probe(device.run(probe_argv(self.python), timeout=120))
        self.why_not = f"on {device.spec}: {reason}"

    def work(self, workload: Workload, limit: int | None, timeout: float) -> Outcome:
        argv = worker_argv(self.python, self.path, workload)
        if limit is None or not self.enforces:
            run = self.device.run(argv, timeout=timeout, what="the measured run")
            return Outcome(parse_worker_report(run), None, None)
        # The limit ends it there first; the device's own time limit is for what hangs around it.
        argv = limit_argv(self.python, limit, timeout, argv)
        run = self.device.run(argv, timeout=timeout + 60, what="the measured run")
        return _limited_outcome(parse_limited(run))

    def bandwidth(self, threads: int, seconds: float) -> Bandwidth | None:
        return _parse_bandwidth(
            self.device.run(_bandwidth_argv(self.python, threads, seconds), timeout=seconds + 120)
        )

    def facts(self) -> Json | None:
        return self._facts.to_dict()


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
        reports: list[Json] = []
        for prompt, gen in sizes:
            options = KernelOptions(
                prompt,
                gen,
                workload.reps,
                workload.threads,
                workload.context or self.bundle_facts.context,
            )
            cores = self._facts.big_cores or None
            reports.append(bench_native(self.device, self.bundle, options, timeout=timeout, cores=cores))
        return Outcome(native_report(reports, self._facts, before, self._sensors()), None, None)

    def _sensors(self) -> Json:
        temperature = self.device.temperature()
        return {} if temperature is None else {"temperature_c": temperature}

    def bandwidth(self, threads: int, seconds: float) -> Bandwidth | None:
        return None

    def facts(self) -> Json | None:
        return self._facts.to_dict()


def native_report(reports: Sequence[Json], facts: DeviceFacts, before: Json, after: Json) -> Json:
    """Runs of the native program as one report of a worker; what it does not measure is None, or missing.

    Its memory is that of the run that needed most.
    """
    tests: dict[str, Json] = {}
    for report in reports:
        for test in report["tests"]:
            tests.setdefault(Measurement.from_dict(test).name, {**test, "sensors": after})
    largest = max(reports, key=lambda report: report["memory"]["steady"]["rss_anon"])
    waits = [1000 * wait for wait in reports[0]["ttft_s"]]
    sizes = reports[0]["options"]
    points, steady = largest["samples"], largest["memory"]["steady"]
    # Samples from outside may miss the short time in which a small model is measured.
    peak = {key: max(value, steady.get(key) or 0) for key, value in largest["memory"]["peak"].items()}
    return {
        "environment": {
            "cpu": facts.cpu,
            "cpu_flags": list(facts.cpu_flags),
            "cores": facts.cores,
            "cores_usable": len(largest["cores"] or range(facts.cores)),
            "memory_bytes": facts.memory_bytes,
            "machine": facts.arch,
            "kernel": facts.kernel,
            "python": None,
            "versions": {},
        },
        "engine": "LiteRT-LM, native",
        "import_s": None,
        "load_s": reports[0]["load_s"],
        "cached_bytes": None,
        "context": sizes["context"],
        "tests": list(tests.values()),
        "latency": {
            "prompt_tokens": sizes["n_prompt"],
            "answer_tokens": sizes["n_gen"],
            "requests": len(waits),
            "ttft_ms": percentiles(waits),
            "itl_ms": None,
            "samples_ttft_ms": [round(wait, 3) for wait in waits],
            "samples_itl_ms": [],
        },
        "sustained": None,
        "phases": [],
        "memory": {
            "steady": steady,
            "peak": peak,
            "timeline": {
                "seconds": [point["seconds"] for point in points],
                "rss_anon": [point["rss_anon"] for point in points],
                "rss_file": [point["rss_file"] for point in points],
            },
        },
        "sensors": {"before": before, "after": after},
        "notes": [f"bound to cores {', '.join(map(str, largest['cores']))}"] if largest["cores"] else [],
    }


def _limited_outcome(run: LimitedRun) -> Outcome:
    """Raises what `parse_worker_report` raises, unless the kernel killed it for its memory."""
    if run.killed:
        return Outcome(None, run.mechanism, run.peak_bytes, killed=True)
    return Outcome(parse_worker_report(run), run.mechanism, run.peak_bytes)


def _bandwidth_argv(python: str, threads: int, seconds: float) -> list[str]:
    return [
        python,
        "-m",
        "gemma_edge.benchmarks.machine.bandwidth",
        "-t",
        str(threads),
        "--seconds",
        str(seconds),
    ]


def _parse_bandwidth(run: ChildRun) -> Bandwidth:
    if run.exit_code:
        raise ChildError("the bandwidth probe", run)
    try:
        data = run.answer()
        return Bandwidth(data["threads"], data["buffer_bytes"], tuple(map(float, data["samples_gb_s"])))
    except (KeyError, TypeError, ValueError):
        raise DeviceError(f"the bandwidth probe printed no result: {run.stdout[-200:]!r}") from None


# The ceiling ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ceiling:
    """The verdict on a limit: `met`, whether the kernel enforced it, and that in words."""

    limit_bytes: int
    met: bool
    enforced: bool
    text: str
    mechanism: str | None
    peak_bytes: int | None
    control_limit_bytes: int | None
    control_killed: bool | None

    def to_dict(self) -> Json:
        return dict(vars(self))


def with_encoders(ceiling: Ceiling, encoders: Outcome) -> Ceiling:
    """The verdict with the encoders in it: they are loaded while the decoder is not, under the same limit."""
    size = format_size(ceiling.limit_bytes)
    if encoders.killed:
        text = f"exceeded: killed by the kernel under {size} while encoding images and audio"
        return replace(ceiling, met=False, enforced=True, text=text, mechanism=encoders.mechanism)
    assert encoders.report is not None
    anon = max(run["peak_rss_anon"] for run in encoders.report["encode"])
    text = f"{ceiling.text}; encoders: peak RssAnon {format_size(anon)}"
    fits = encoders.mechanism is not None or anon <= ceiling.limit_bytes
    return replace(
        ceiling, met=ceiling.met and fits, text=text if fits else f"exceeded by the encoders: {text}"
    )


def judge_ceiling(limit: int, run: Outcome, control: Outcome | None, control_limit: int, why: str) -> Ceiling:
    """What one run under a limit, and a control under a lower one that must be killed, say.

    Args:
        control: None where nothing is enforced, or when the run itself was killed.
        why: no limit is enforced, where that is so.
    """
    size = format_size(limit)
    if run.killed:
        text = f"exceeded: killed by the kernel under {size} ({run.mechanism}, no swap, cold page cache)"
        return Ceiling(limit, False, True, text, run.mechanism, run.peak_bytes, None, None)
    assert run.report is not None
    peak = run.report["memory"]["peak"]
    anon, rss = peak["rss_anon"], max(peak["rss"], peak["high_water"])
    if run.mechanism is None:
        what = f"peak RssAnon {format_size(anon)}, RSS {format_size(rss)}, of {size}"
        met = anon <= limit
        verdict = "exceeded" if not met else "not exceeded"
        if met and rss > limit:
            verdict += " by memory that cannot be dropped"
        text = f"{verdict}, sampled, not enforced: {what} ({why})"
        return Ceiling(limit, met, False, text, None, None, None, None)
    assert control is not None
    half = format_size(control_limit)
    text = (
        f"runs under {size} ({run.mechanism}, no swap, cold page cache), peak RssAnon {format_size(anon)}; "
    )
    text += f"control under {half} {'was killed' if control.killed else 'completed: lower --control'}"
    return Ceiling(
        limit, control.killed, True, text, run.mechanism, run.peak_bytes, control_limit, control.killed
    )
