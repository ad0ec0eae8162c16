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
import uuid
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any

from gemma_edge.benchmarks.devices import open_device
from gemma_edge.benchmarks.peers import Peer, find_peers
from gemma_edge.benchmarks.record import BundleFacts, append_record, bundle_facts
from gemma_edge.benchmarks.results import parse_outputs, render, save
from gemma_edge.benchmarks.script import progress
from gemma_edge.benchmarks.session import Bars, Plan, Session, check_problems
from gemma_edge.benchmarks.target import DeviceTarget, LocalTarget, Target
from gemma_edge.benchmarks.workload import Workload
from gemma_edge.runtime.errors import UsageError
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
    where = parser.add_argument_group("where")
    where.add_argument(
        "--device", default="local", metavar="DEVICE", help="local, ssh://[user@]host, adb[:SERIAL]"
    )
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
        "--bandwidth", type=duration, default=2.0, metavar="TIME", help="each probe of it (default: 2s)"
    )
    parser.add_argument("--no-cold", action="store_true", help="leave out the load from a cold page cache")
    parser.add_argument(
        "--timeout", type=duration, default=3600.0, metavar="TIME", help="of one process (default: 1h)"
    )


def run(args: argparse.Namespace) -> int:
    """The verb.

    Raises:
        UsageError, BundleError: it cannot be measured.
        DeviceError, ChildError: a run failed.
        CeilingError: a ceiling is exceeded or a bar missed.
    """
    run_id = uuid.uuid4().hex[:12]
    outputs = parse_outputs(args.output, run_id)
    facts = bundle_facts(args.bundle)
    workloads = _workloads(args, facts)
    peers = _peers(args, facts)
    rows: list[Json] = []

    def emit(row: Json) -> None:
        rows.append(row)
        for kind, path in outputs:
            if kind == "jsonl" and path is not None:
                append_record(path, row)  # at once: nothing that comes later can lose it

    try:
        problems = bench(args, facts, workloads, peers, run_id, emit)
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


def bench(
    args: argparse.Namespace,
    facts: BundleFacts,
    workloads: Sequence[Workload],
    peers: Sequence[Peer],
    run_id: str,
    emit: Any,
) -> list[str]:
    """One session for each number of threads; returns what was exceeded or missed."""
    problems: list[str] = []
    with ExitStack() as stack:
        target: Target
        if args.device == "local":
            target = LocalTarget(args.bundle)
        else:
            device = stack.enter_context(open_device(args.device))
            stack.enter_context(_awake(device))
            target = DeviceTarget(device, args.bundle)
        for index, workload in enumerate(workloads):
            plan = Plan(
                ceiling=args.ceiling,
                control=args.control,
                bars=Bars(args.assert_ttft_ms, args.assert_prefill_tps, args.assert_decode_tps),
                cold_load=index == 0 and not args.no_cold,
                timeout=args.timeout,
                bandwidth_seconds=args.bandwidth,
                peers=peers if index == 0 else (),
                rounds=args.rounds,
            )
            name = args.name or args.bundle.resolve().name
            session = Session(target, args.bundle, facts, workload, plan, run_id, name, emit)
            problems += session.measure()
    return problems


def _awake(device: Any) -> AbstractContextManager[None]:
    return device.awake() if device.kind == "adb" else nullcontext()


def _workloads(args: argparse.Namespace, facts: BundleFacts) -> list[Workload]:
    """One a number of threads, all checked before anything runs."""
    threads = args.threads
    if threads is None:
        from gemma_edge.runtime.backends.cores import physical_cores

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
    if args.device != "local":
        raise UsageError("--peers runs on this machine only: leave out --device")
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
    if not match or not float(match[1]):
        raise UsageError(f"{text!r} is no duration: expected a number and s, m or h, such as 30m")
    return float(match[1]) * _SECONDS[match[2]]
