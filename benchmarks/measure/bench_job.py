"""One benchmark wherever it runs: on this machine, on a device, on a fleet of devices side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from gemma_edge.benchmarks.measure.session import Emit, Plan, Session
from gemma_edge.benchmarks.measure.target import DeviceTarget, LocalTarget, NativeTarget, Target
from gemma_edge.benchmarks.measure.workload import Workload
from gemma_edge.benchmarks.records.bundle_facts import BundleFacts, bundle_facts
from gemma_edge.devices import Device, cool_down, open_device
from gemma_edge.devices.fleet import FleetError, Member, read_fleet, run_fleet
from gemma_edge.devices.script import progress
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import DeviceError
from gemma_edge.runtime.tuned_settings import tuned_settings


@dataclass(frozen=True)
class Job:
    """A bundle and everything to measure with it."""

    bundle: Path
    facts: BundleFacts
    workloads: Sequence[Workload]  # one a number of threads
    plan: Plan
    name: str
    run: str  # id of this run
    emit: Emit
    threads_given: bool  # otherwise a device's fast cores decide


def bench_device(spec: str, job: Job) -> list[str]:
    """Measures on one device, "local" being this machine; returns what was exceeded or missed."""
    if spec == "local":
        return _measure_on(LocalTarget(job.bundle), _as_tuned(job, None), None)
    with open_device(spec) as device:
        return _bench_on(device, job)


def bench_fleet(path: Path, job: Job) -> list[str]:
    """Measures on all devices of a fleet file side by side; returns what was exceeded or missed.

    A device's table may have `bundle` (a path from the fleet file), `threads` and `cool_to_c`.

    Raises:
        FleetError: not such a file.
        DeviceError: some device failed, after all have ended.
    """
    members = read_fleet(path)
    jobs = {member.name: _member_job(path, member, job) for member in members}

    def work(device: Device, member: Member) -> list[str]:
        if (wanted := member.options.get("cool_to_c")) is not None:
            cool_down(device, float(wanted))
        return _bench_on(device, jobs[member.name], member.name)

    outcomes = run_fleet(members, work)
    if failed := [f"{outcome.member.name}: {outcome.error}" for outcome in outcomes if outcome.error]:
        raise DeviceError(f"{len(failed)} of {len(members)} devices failed: {'; '.join(failed)}")
    return [f"{o.member.name}: {problem}" for o in outcomes for problem in o.result or ()]


def _member_job(path: Path, member: Member, job: Job) -> Job:
    options = dict(member.options)
    bundle, threads = options.pop("bundle", None), options.pop("threads", None)
    if not isinstance(cool := options.pop("cool_to_c", 0), int | float):
        raise FleetError(path, f"{member.name}: cool_to_c", "degrees Celsius", cool)
    if options:
        raise FleetError(path, member.name, "name, spec, bundle, threads and cool_to_c", ", ".join(options))
    if bundle is not None:
        if not isinstance(bundle, str):
            raise FleetError(path, f"{member.name}: bundle", "a path", bundle)
        there = path.parent / bundle
        job = replace(job, bundle=there, facts=bundle_facts(there), name=there.resolve().name)
    if threads is not None:
        if not isinstance(threads, int) or threads < 1:
            raise FleetError(path, f"{member.name}: threads", "a number of threads", threads)
        workloads = [replace(job.workloads[0], threads=threads)]
        job = replace(job, workloads=workloads, threads_given=True)
    return job


def _bench_on(device: Device, job: Job, name: str | None = None) -> list[str]:
    with device.awake():
        facts = device.facts
        target: Target
        if device.spec == "local":
            target = LocalTarget(job.bundle)
        elif device.kind == "adb":
            target = NativeTarget(device, job.bundle, job.facts)
        else:
            progress(f"{device.spec}: bringing the bundle there")
            target = DeviceTarget(device, job.bundle)
        target.name = name or target.name
        tuned = _as_tuned(job, None if device.spec == "local" else device.spec)
        return _measure_on(target, tuned, len(facts.big_cores) or None)


def _as_tuned(job: Job, device: str | None) -> Job:
    """The job with what `gemma-edge tune` found on a device; None is this machine. Options win."""
    found = tuned_settings(Bundle.open(job.bundle).identity, device)
    if job.threads_given or found is None:
        return job
    progress(f"{job.name}: {found.threads} threads, chunk {found.chunk}: tuned, {found.time}")
    workloads = [replace(each, threads=found.threads, chunk=found.chunk) for each in job.workloads]
    return replace(job, workloads=workloads, threads_given=True)


def _measure_on(target: Target, job: Job, cores: int | None) -> list[str]:
    """One session for each number of threads; returns what was exceeded or missed."""
    problems: list[str] = []
    for index, workload in enumerate(job.workloads):
        if cores and not job.threads_given:
            workload = replace(workload, threads=cores)
        plan = job.plan if index == 0 else replace(job.plan, cold_load=False, peers=())
        session = Session(target, job.bundle, job.facts, workload, plan, job.run, job.name, job.emit)
        problems += session.measure()
    return problems
