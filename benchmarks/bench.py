"""Measure a bundle: speed, memory, load, latency, and whether it fits.

    gemma-edge bench out/                                    pp512 and tg128 on this machine
    gemma-edge bench out/ -p 128,512 -d 0,2048 -t 1,2        every combination
    gemma-edge bench out/ --ceiling 2GiB --assert-ttft-ms 4000
    gemma-edge bench out/ --device ssh://pi@raspberrypi
    gemma-edge bench out/ --peers --gguf model.gguf          the same sizes in llama.cpp and others

Prints a table; -o writes JSONL and CSV too. What each figure means: docs/benchmarks.md. Ends with 5 when a
ceiling is exceeded or a bar missed, with 4 when a device fails; results so far are kept either way.
"""

from __future__ import annotations

import argparse
import re
import sys
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gemma_edge.benchmarks.devices import Device, cool_down, open_device
from gemma_edge.benchmarks.devices.fleet import FleetError, Member, read_fleet, run_fleet
from gemma_edge.benchmarks.measure.session import Bars, Emit, Plan, Session, check_problems
from gemma_edge.benchmarks.measure.target import DeviceTarget, LocalTarget, NativeTarget, Target
from gemma_edge.benchmarks.measure.workload import Workload
from gemma_edge.benchmarks.peers.interleaved import Peer, find_peers
from gemma_edge.benchmarks.records.record import BundleFacts, append_record, bundle_facts
from gemma_edge.benchmarks.records.rows import parse_outputs, render, save
from gemma_edge.benchmarks.script import progress
from gemma_edge.runtime.errors import DeviceError, UsageError
from gemma_edge.runtime.units import parse_size

Json = dict[str, Any]
_DURATION = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)\s*(s|m|h)")
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    parser.add_argument("bundle", type=Path, help="what `gemma-edge export` made: a folder or a .litertlm")
    tests = parser.add_argument_group("tests, as llama-bench's (N may be a list: 128,512)")
    for flags, default, text in (
        (("-p", "--n-prompt"), "512", "tokens to prefill; 0 for no such test"),
        (("-n", "--n-gen"), "128", "tokens to decode; 0 for no such test"),
        (("-d", "--n-depth"), "0", "tokens in the KV cache before"),
    ):
        tests.add_argument(
            *flags, type=_numbers, default=_numbers(default), metavar="N", help=f"{text} (default: {default})"
        )
    tests.add_argument("-t", "--threads", type=_numbers, metavar="N", help="threads (default: one a core)")
    tests.add_argument("-r", "--reps", type=int, default=5, metavar="N", help="repetitions (default: 5)")
    tests.add_argument("--context", type=int, metavar="N", help="tokens of KV cache (default: the bundle's)")
    ends = parser.add_argument_group("end to end, with tokenizer and sampling")
    ends.add_argument("--requests", type=int, default=5, metavar="N", help="answers; 0 for none (default: 5)")
    ends.add_argument(
        "--prompt", type=int, default=128, metavar="N", help="tokens of a prompt (default: 128)"
    )
    ends.add_argument("--answer", type=int, default=64, metavar="N", help="tokens of an answer (default: 64)")
    ends.add_argument(
        "--sustained", type=duration, default=0.0, metavar="TIME", help="prefill and decode in turn: 30m"
    )
    bars = parser.add_argument_group("what it must reach (exit code 5)")
    bars.add_argument("--ceiling", type=parse_size, metavar="SIZE", help="run under this limit: 2GiB")
    bars.add_argument(
        "--control", type=parse_size, metavar="SIZE", help="limit that must kill it (default: half)"
    )
    bars.add_argument("--assert-ttft-ms", type=float, metavar="MS", help="median time to first token")
    bars.add_argument("--assert-prefill-tps", type=float, metavar="N", help="median of the slowest prefill")
    bars.add_argument("--assert-decode-tps", type=float, metavar="N", help="median of the slowest decode")
    bars.add_argument("--assert-image-ms", type=float, metavar="MS", help="median time to encode an image")
    bars.add_argument("--assert-audio-ms", type=float, metavar="MS", help="... to encode the longest clip")
    where = parser.add_argument_group("where")
    where.add_argument(
        "--device", default="local", metavar="DEVICE", help="local, ssh://[user@]host, adb[:SERIAL]"
    )
    where.add_argument("--fleet", type=Path, metavar="FILE", help="several devices side by side: a TOML file")
    peers = parser.add_argument_group("peers: other programs, interleaved (this machine only)")
    peers.add_argument("--peers", action="store_true", help="measure those that are installed")
    peers.add_argument("--gguf", type=Path, metavar="FILE", help="the checkpoint for llama.cpp")
    peers.add_argument("--llama-bench", metavar="PATH", help="its program (default: found on the PATH)")
    peers.add_argument("--litertlm", type=Path, metavar="FILE", help="for LiteRT-LM (default: the bundle)")
    peers.add_argument("--genai", type=Path, metavar="FOLDER", help="for onnxruntime-genai")
    peers.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="for transformers")
    peers.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds (default: 3)")
    parser.add_argument(
        "-o", "--output", default="md", metavar="FORMATS", help="md, jsonl, csv, or file names that end so"
    )
    parser.add_argument("--name", help="what the results call it (default: the bundle's file name)")
    parser.add_argument(
        "--bandwidth",
        type=duration,
        default=2.0,
        metavar="TIME",
        help="each probe; 0s for none (default: 2s)",
    )
    parser.add_argument("--no-cold", action="store_true", help="leave out the load from a cold page cache")
    parser.add_argument("--no-encode", action="store_true", help="leave out the encoders of images and audio")
    parser.add_argument(
        "--timeout", type=duration, default=3600.0, metavar="TIME", help="of one process (default: 1h)"
    )


@dataclass(frozen=True)
class Job:
    """What is measured, wherever that is."""

    bundle: Path
    facts: BundleFacts
    workloads: Sequence[Workload]  # one a number of threads
    plan: Plan
    name: str
    run: str  # id of this run
    emit: Emit
    threads_given: bool  # otherwise a device's fast cores decide


def run(args: argparse.Namespace) -> int:
    """The verb.

    Raises:
        UsageError, BundleError: it cannot be measured.
        DeviceError, ChildError: a run failed.
        CeilingError: a ceiling is exceeded or a bar missed.
    """
    run_id = uuid.uuid4().hex[:12]
    outputs = parse_outputs(args.output, run_id)
    rows: list[Json] = []
    lock = threading.Lock()

    def emit(row: Json) -> None:
        with lock:  # devices of a fleet emit side by side
            rows.append(row)
            for kind, path in outputs:
                if kind == "jsonl" and path is not None:
                    append_record(path, row)  # at once: nothing that comes later can lose it

    job = _job(args, run_id, emit)
    try:
        problems = bench_fleet(args.fleet, job) if args.fleet else bench_device(args.device, job)
    finally:
        for kind, path in outputs:
            if path is None:
                sys.stdout.write(render(rows, kind))
            else:
                if kind != "jsonl":
                    save(rows, kind, path)
                progress(f"written: {path}")
        sys.stdout.flush()
    check_problems(problems)
    return 0


def bench_device(spec: str, job: Job) -> list[str]:
    """Measures on one device, "local" being this machine; returns what was exceeded or missed."""
    if spec == "local":
        return _measure_on(LocalTarget(job.bundle), job, None)
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
        if device.kind == "local":
            target = LocalTarget(job.bundle)
        elif device.kind == "adb":
            target = NativeTarget(device, job.bundle, job.facts)
        else:
            progress(f"{device.spec}: bringing the bundle there")
            target = DeviceTarget(device, job.bundle)
        target.name = name or target.name
        return _measure_on(target, job, len(facts.big_cores) or None)


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


def _job(args: argparse.Namespace, run_id: str, emit: Emit) -> Job:
    """The command line as a job, checked before anything runs."""
    facts = bundle_facts(args.bundle)
    workloads = _workloads(args, facts)
    plan = Plan(
        ceiling=args.ceiling,
        control=args.control,
        bars=Bars(
            args.assert_ttft_ms,
            args.assert_prefill_tps,
            args.assert_decode_tps,
            args.assert_image_ms,
            args.assert_audio_ms,
        ),
        cold_load=not args.no_cold,
        encode=not args.no_encode,
        bandwidth_seconds=args.bandwidth,
        timeout=args.timeout,
        peers=_peers(args, facts),
        rounds=args.rounds,
    )
    name = args.name or args.bundle.resolve().name
    given = args.threads is not None
    return Job(args.bundle, facts, workloads, plan, name, run_id, emit, given)


def _workloads(args: argparse.Namespace, facts: BundleFacts) -> list[Workload]:
    """One a number of threads, all checked before anything runs."""
    threads = args.threads
    if threads is None:
        from gemma_edge.runtime.engines.cores import physical_cores

        threads = (physical_cores(),)
    if args.control is not None and (args.ceiling is None or args.control >= args.ceiling):
        raise UsageError("--control needs a --ceiling above it")
    if args.assert_ttft_ms is not None and not args.requests:
        raise UsageError("--assert-ttft-ms needs --requests above 0")
    for flag, bar, sizes in (
        ("--assert-prefill-tps", args.assert_prefill_tps, args.n_prompt),
        ("--assert-decode-tps", args.assert_decode_tps, args.n_gen),
    ):
        if bar is not None and not any(sizes):
            raise UsageError(f"{flag} needs such a test: see -p and -n")
    for flag, bar, encoder in (
        ("--assert-image-ms", args.assert_image_ms, "vision"),
        ("--assert-audio-ms", args.assert_audio_ms, "audio"),
    ):
        if bar is not None and (args.no_encode or encoder not in facts.encoders):
            raise UsageError(f"{flag} needs a bundle with an encoder of {encoder}, and no --no-encode")
    if args.fleet and args.device != "local":
        raise UsageError("--device and --fleet: give one of them")
    if args.rounds < 1:
        raise UsageError("--rounds: expected at least 1")
    workloads = [
        Workload(
            prompts=args.n_prompt,
            gens=args.n_gen,
            depths=args.n_depth,
            reps=args.reps,
            threads=count,
            context=args.context,
            requests=args.requests,
            prompt=args.prompt,
            answer=args.answer,
            sustained_s=args.sustained,
        )
        for count in threads
    ]
    for workload in workloads:
        workload.check(args.context or facts.context)
    return workloads


def _peers(args: argparse.Namespace, facts: BundleFacts) -> list[Peer]:
    models: dict[str, Path | None] = {
        "llama.cpp": args.gguf,
        "litert-lm": args.litertlm or (args.bundle if facts.format == "litertlm" else None),
        "onnxruntime-genai": args.genai,
        "transformers": args.checkpoint,
    }
    if not args.peers:
        given = [flag for flag in ("gguf", "litertlm", "genai", "checkpoint") if getattr(args, flag)]
        if given:
            raise UsageError(f"--{given[0]} is for --peers")
        return []
    if args.device != "local" or args.fleet:
        raise UsageError("--peers runs on this machine only: leave out --device and --fleet")
    found, skipped = find_peers(models, args.llama_bench)
    for reason in skipped:
        progress(f"left out: {reason}")
    return found


def _numbers(text: str) -> tuple[int, ...]:
    """A list of llama-bench's kind: "128,512". Raises ValueError."""
    numbers = tuple(int(part) for part in text.split(","))
    if min(numbers) < 0:
        raise ValueError(text)
    return numbers


def duration(text: str) -> float:
    """Seconds of "90s", "30m" or "1.5h". Raises UsageError."""
    match = _DURATION.fullmatch(text.strip())
    if not match:
        raise UsageError(f"{text!r} is no duration: expected a number and s, m or h, such as 30m")
    return float(match[1]) * _SECONDS[match[2]]
