"""Where the processes of a benchmark run: this machine, or a device behind `devices.open_device`.

A target runs the same worker everywhere. Under a ceiling it is the kernel's control group that limits it
where the kernel lets us; elsewhere its memory is sampled, and the result says so.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from gemma_edge.benchmarks.bandwidth import Bandwidth
from gemma_edge.benchmarks.cgroup import mechanism, run_limited
from gemma_edge.benchmarks.child import ChildError, ChildRun, run_child
from gemma_edge.benchmarks.memory import drop_page_cache
from gemma_edge.benchmarks.record import bundle_files
from gemma_edge.benchmarks.worker import parse_worker_report, worker_argv
from gemma_edge.benchmarks.workload import Workload
from gemma_edge.runtime.errors import DeviceError
from gemma_edge.runtime.units import format_size

if TYPE_CHECKING:
    from gemma_edge.benchmarks.devices import Device

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

    def work(self, workload: Workload, limit: int | None, timeout: float) -> Outcome:
        """Runs the worker.

        Raises:
            ChildError: it failed for another reason than a limit that was enforced.
            DeviceError: it cannot be started, hangs, or the device is gone.
        """
        ...

    def bandwidth(self, threads: int, seconds: float) -> Bandwidth: ...

    def facts(self) -> Json | None:
        """What the device says of itself; None for this machine, whose environment is in every record."""
        ...


class LocalTarget:
    """This machine, each worker a child process."""

    name = "local"

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
        limited = run_limited(argv, limit, timeout=timeout)
        if limited.killed:
            return Outcome(None, limited.mechanism, limited.peak_bytes, killed=True)
        report = parse_worker_report(limited)
        return Outcome(report, limited.mechanism, limited.peak_bytes)

    def bandwidth(self, threads: int, seconds: float) -> Bandwidth:
        run = run_child(_bandwidth_argv(sys.executable, threads, seconds), timeout=seconds + 120)
        return _parse_bandwidth(run)

    def facts(self) -> Json | None:
        return None


class DeviceTarget:
    """A device with Python: the bundle is brought there, and the worker runs there."""

    def __init__(
        self, device: Device, bundle: Path, progress: Callable[[int, int], None] | None = None
    ) -> None:
        self.device, self.name = device, device.spec
        self._facts = device.probe()
        self.python = device.python()
        self.path = device.push(bundle, progress=progress)
        self.enforces, self.why_not = False, f"no limit is enforced on {device.spec}"

    def work(self, workload: Workload, limit: int | None, timeout: float) -> Outcome:
        argv = worker_argv(self.python, self.path, workload)
        run = self.device.run(argv, timeout=timeout, what="the measured run")
        return Outcome(parse_worker_report(run), None, None)

    def bandwidth(self, threads: int, seconds: float) -> Bandwidth:
        return _parse_bandwidth(
            self.device.run(_bandwidth_argv(self.python, threads, seconds), timeout=seconds + 120)
        )

    def facts(self) -> Json | None:
        return self._facts.to_dict()


def _bandwidth_argv(python: str, threads: int, seconds: float) -> list[str]:
    return [python, "-m", "gemma_edge.benchmarks.bandwidth", "-t", str(threads), "--seconds", str(seconds)]


def _parse_bandwidth(run: ChildRun) -> Bandwidth:
    if run.exit_code:
        raise ChildError("the bandwidth probe", run)
    try:
        data = json.loads(run.stdout.strip().splitlines()[-1])
        return Bandwidth(data["threads"], data["buffer_bytes"], tuple(map(float, data["samples_gb_s"])))
    except (IndexError, KeyError, TypeError, ValueError):
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
