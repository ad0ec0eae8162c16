"""Measure a bundle: speed, memory, load, latency, and whether it fits.

    gemma-edge bench out/                                    pp512 and tg128 on this machine
    gemma-edge bench int4/ int8/                             several bundles, one after the other
    gemma-edge bench out/ -p 128,512 -d 0,2048 -t 1,2        every combination
    gemma-edge bench out/ --ceiling 2GiB --assert-ttft-ms 4000
    gemma-edge bench out/ --answer --ceiling 2GiB            one answer about a photo and a recording
    gemma-edge bench out/ --device ssh://pi@raspberrypi
    gemma-edge bench out/ --peers --gguf model.gguf          the same sizes in llama.cpp and others
    gemma-edge bench out/ --serve                            the HTTP server, compared and under load
    gemma-edge bench out/ --profile                          where the time of a decode step goes
    gemma-edge bench out/ --record benchmarks/results/mine.jsonl

Prints a table; -o writes JSONL and CSV too. docs/benchmarks.md defines every figure. Ends with 5 when a
ceiling is exceeded or a bar missed, with 4 when a device fails; results so far are kept either way.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import threading
import uuid
from pathlib import Path

from gemma_edge.benchmarks.measure.answer_phases import MOST
from gemma_edge.benchmarks.measure.bars import Bars
from gemma_edge.benchmarks.measure.bench_job import Job, bench_device, bench_fleet
from gemma_edge.benchmarks.measure.session import Emit, Plan, check_problems
from gemma_edge.benchmarks.measure.table_records import parse_targets
from gemma_edge.benchmarks.measure.target import other_bundle
from gemma_edge.benchmarks.measure.workload import Workload
from gemma_edge.benchmarks.output.result_text import parse_outputs, render, save
from gemma_edge.benchmarks.peers.interleaved import Peer, find_peers
from gemma_edge.benchmarks.records.bundle_facts import BundleFacts, bundle_facts
from gemma_edge.benchmarks.records.record import Head
from gemma_edge.benchmarks.records.results_file import append_record
from gemma_edge.cli.bundle_options import add_words, take_bundles
from gemma_edge.devices.machine.cpu_features import LITERT_LM
from gemma_edge.devices.script import progress
from gemma_edge.runtime.errors import DeviceError, UsageError
from gemma_edge.runtime.files.typed_json import to_json
from gemma_edge.runtime.reuse.prefix_files import LEAST_TOKENS
from gemma_edge.runtime.units import parse_size

LOCAL = "local"
_DURATION = re.compile(r"([0-9]{1,6}(?:\.[0-9]{1,3})?)\s*(s|m|h)")
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the verb's arguments."""
    add_words(parser, "[BUNDLE...]", "further ones are measured after it")
    tests = parser.add_argument_group("tests, as llama-bench's (N may be a list: 128,512)")
    for flags, default, text in (
        (("-p", "--n-prompt"), "512", "tokens to prefill; 0 for no such test"),
        (("-n", "--n-gen"), "128", "tokens to decode; 0 for no such test"),
        (("-d", "--n-depth"), "0", "tokens in the KV cache before"),
    ):
        tests.add_argument(
            *flags, type=_numbers, default=_numbers(default), metavar="N", help=f"{text} (default: {default})"
        )
    tests.add_argument(
        "-t", "--threads", type=_numbers, metavar="N", help="threads (default: tuned, or one a core)"
    )
    tests.add_argument("-r", "--reps", type=int, default=5, metavar="N", help="repetitions (default: 5)")
    tests.add_argument("--context", type=int, metavar="N", help="tokens of KV cache (default: the bundle's)")
    ends = parser.add_argument_group("end to end, with tokenizer and sampling")
    ends.add_argument("--requests", type=int, default=5, metavar="N", help="answers; 0 for none (default: 5)")
    ends.add_argument(
        "--prompt", type=int, default=128, metavar="N", help="tokens of a prompt (default: 128)"
    )
    ends.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens of an answer (default: 64)")
    ends.add_argument(
        "--sustained", type=duration, default=0.0, metavar="TIME", help="prefill and decode in turn: 30m"
    )
    answer = parser.add_argument_group("one answer with attachments, of -p and -n tokens")
    answer.add_argument(
        "--answer",
        action="store_true",
        help="measure one answer phase by phase, from reading files to decoding",
    )
    for flag, what in (("--image", "photos of 12 megapixels"), ("--audio", "recordings of 30 s")):
        answer.add_argument(flag, type=int, metavar="N", help=f"{what} (default: 1 if the bundle takes them)")
    parser.add_argument(
        "--prefix",
        type=int,
        default=0,
        metavar="N",
        help="start prompts behind N tokens, without the prefix cache and with it; N + 25 tokens of context",
    )
    parser.add_argument(
        "--speculate",
        type=int,
        default=0,
        metavar="N",
        help="decode N tokens that repeat the prompt, with drafts and without; 2 N + 1 tokens of context",
    )
    parser.add_argument(
        "--profile",
        action="store_true",
        help="instead: the parts of a decode step, of -n steps behind -d tokens (this machine only)",
    )
    bars = parser.add_argument_group("bars (exit code 5 if the bundle misses one)")
    bars.add_argument("--ceiling", type=parse_size, metavar="SIZE", help="run under this memory limit: 2GiB")
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
        "--device", metavar="DEVICE", help=f"{LOCAL} (default), ssh://[user@]host, adb[:SERIAL]"
    )
    where.add_argument("--fleet", type=Path, metavar="FILE", help="several devices side by side: a TOML file")
    serve = parser.add_argument_group("serve: the HTTP server on loopback, instead of all else")
    serve.add_argument(
        "--serve", action="store_true", help="compare it with the library, and put it under load"
    )
    serve.add_argument(
        "--load",
        type=int,
        default=10_000,
        metavar="N",
        help="requests of the load; 0 for none (default: 10000)",
    )
    serve.add_argument("--clients", type=int, default=32, metavar="N", help="at a time (default: 32)")
    serve.add_argument(
        "--peer-port",
        type=int,
        metavar="N",
        help="instead: eight chats, also with an OpenAI server on this port",
    )
    serve.add_argument("--peer-name", metavar="NAME", help="its name in results: llama-server, Q4_0")
    peers = parser.add_argument_group("peers: other programs, interleaved (this machine only)")
    peers.add_argument("--peers", action="store_true", help="measure the installed peers")
    peers.add_argument("--gguf", type=Path, metavar="FILE", help="the checkpoint for llama.cpp")
    peers.add_argument("--llama-bench", metavar="PATH", help="its program (default: found on the PATH)")
    peers.add_argument("--litertlm", type=Path, metavar="FILE", help="for LiteRT-LM (default: the bundle)")
    peers.add_argument("--genai", type=Path, metavar="FOLDER", help="for onnxruntime-genai")
    peers.add_argument("--checkpoint", type=Path, metavar="FOLDER", help="for transformers")
    peers.add_argument("--against", type=Path, metavar="BUNDLE", help="another bundle of gemma-edge")
    peers.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds (default: 3)")
    parser.add_argument(
        "-o",
        "--output",
        default="md",
        metavar="FORMATS",
        help="md, json, jsonl, csv, or file names that end so",
    )
    parser.add_argument(
        "--record", type=Path, metavar="FILE", help="append records for the tables of docs/results.md"
    )
    parser.add_argument(
        "--target",
        action="append",
        default=[],
        metavar="FIGURE=TEXT",
        help="the target that such a record names for a figure: decode_ratio, load_s, ...",
    )
    parser.add_argument("--name", help="the bundle's name in results (default: its file name)")
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


def run(args: argparse.Namespace) -> int:
    """The verb.

    Raises:
        UsageError, BundleError: it cannot be measured.
        DeviceError, ChildError: a run failed.
        CeilingError: a ceiling is exceeded or a bar missed.
    """
    bundles = take_bundles(args)
    if args.name and len(bundles) > 1:
        raise UsageError("--name is for one bundle")
    if args.fleet and args.device:
        raise UsageError("--device and --fleet: give one of them")
    if args.serve or args.profile:
        if len(bundles) > 1:
            raise UsageError(f"--{'serve' if args.serve else 'profile'} takes one bundle")
        args.bundle = bundles[0]
        return _serve(args) if args.serve else _profile(args)
    args.device = args.device or LOCAL
    run_id = uuid.uuid4().hex[:12]
    outputs = parse_outputs(args.output, run_id)
    rows: list[Head] = []
    lock = threading.Lock()

    def emit(row: Head) -> None:
        with lock:  # devices of a fleet emit side by side
            rows.append(row)
            for kind, path in outputs:
                if kind == "jsonl" and path is not None:
                    append_record(path, row)  # at once: nothing that comes later can lose it

    def record(row: Head) -> None:
        with lock:
            append_record(args.record, row)

    jobs = []
    for args.bundle in bundles:
        jobs.append(_job(args, run_id, emit, record if args.record else None))
    problems = []
    try:
        for job in jobs:
            problems += bench_fleet(args.fleet, job) if args.fleet else bench_device(args.device, job)
    finally:
        for kind, path in outputs:
            if path is None:
                sys.stdout.write(render(rows, kind) if rows else "")
            else:
                if kind != "jsonl":
                    save(rows, kind, path)
                progress(f"written: {path}")
        sys.stdout.flush()
    if args.record:
        progress(f"records for the tables: {args.record}")
    check_problems(problems)
    return 0


def _serve(args: argparse.Namespace) -> int:
    """Prints the figures of the server. Raises DeviceError if a response is lost or wrong."""
    from gemma_edge.benchmarks.serving.chat_race import race_lines
    from gemma_edge.benchmarks.serving.serve_bench import bench_race, bench_serve
    from gemma_edge.benchmarks.serving.serve_records import race_record, serve_records

    if args.device or args.fleet or args.load < 0 or args.clients < 1:
        raise UsageError("--serve runs on this machine only, with --load 0 or more and --clients 1 or more")
    threads = args.threads[0] if args.threads else None
    if args.peer_port is not None:
        raced = bench_race(
            args.bundle,
            args.peer_port,
            peer_name=args.peer_name,
            rounds=args.rounds,
            tokens=args.tokens,
            threads=threads,
        )
        print("\n".join(race_lines(raced)))
        if args.record:
            append_record(args.record, race_record(args.bundle, raced, tokens=args.tokens, threads=threads))
        return 0
    figures = bench_serve(
        args.bundle,
        requests=args.load,
        clients=args.clients,
        pairs=args.requests * 8,
        tokens=args.tokens,
        threads=threads,
        log=progress,
    )
    print(json.dumps(figures.to_dict()) if args.output == "jsonl" else "\n".join(figures.lines()))
    if args.record:
        name = args.name or args.bundle.resolve().name
        for row in serve_records(args.bundle, name, figures, clients=args.clients, threads=threads):
            append_record(args.record, row)
    if figures.lost or figures.wrong:
        wrong = sum(figures.wrong.values())
        raise DeviceError(f"{figures.lost} requests were lost, {wrong} got another response than expected")
    return 0


def _profile(args: argparse.Namespace) -> int:
    """Prints the parts of a decode step."""
    from gemma_edge.benchmarks.measure.step_profile import profile_record, profile_steps

    steps, depth = args.n_gen[0], args.n_depth[0]
    if args.device or args.fleet or len(args.n_gen) > 1 or len(args.n_depth) > 1 or not steps:
        raise UsageError("--profile runs on this machine only, with one -n above 0 and one -d")
    threads = args.threads[0] if args.threads else None
    found = profile_steps(args.bundle, steps=steps, depth=depth, threads=threads, context=args.context)
    print(json.dumps(to_json(found)) if args.output == "jsonl" else "\n".join(found.lines()))
    if args.record:
        name = args.name or args.bundle.resolve().name
        append_record(args.record, profile_record(bundle_facts(args.bundle), name, found))
    return 0


def _job(args: argparse.Namespace, run_id: str, emit: Emit, record: Emit | None) -> Job:
    """The command line as a job, checked before anything runs."""
    facts = bundle_facts(args.bundle)
    images, clips = _attachments(args, facts)
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
        images=images,
        clips=clips,
        prefix=args.prefix,
        speculate=args.speculate,
        bandwidth_seconds=args.bandwidth,
        timeout=args.timeout,
        peers=_peers(args, facts),
        rounds=args.rounds,
        record=record,
        targets=parse_targets(args.target),
    )
    name = args.name or args.bundle.resolve().name
    given = args.threads is not None
    return Job(args.bundle, facts, workloads, plan, name, run_id, emit, given)


def _attachments(args: argparse.Namespace, facts: BundleFacts) -> tuple[int, int]:
    """Images and clips of the answer that is measured; none without --answer."""
    if not args.answer:
        if args.image is not None or args.audio is not None:
            raise UsageError("--image and --audio are for --answer")
        return 0, 0
    images, clips = (
        int(encoder in facts.encoders) if given is None else given
        for given, encoder in ((args.image, "vision"), (args.audio, "audio"))
    )
    if min(images, clips) < 0 or not 1 <= images + clips <= MOST:
        expected = f"expected numbers from 0, 1 to {MOST} in all"
        raise UsageError(f"--answer with {images} images and {clips} recordings: {expected}")
    for flag, number, encoder in (("--image", images, "vision"), ("--audio", clips, "audio")):
        if number and encoder not in facts.encoders:
            raise UsageError(
                f"{flag} needs a bundle with an encoder of {encoder}: export it with --modalities"
            )
    if not any(args.n_gen):
        raise UsageError("--answer needs -n: the tokens to decode")
    return images, clips


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
            answer=args.tokens,
            sustained_s=args.sustained,
        )
        for count in threads
    ]
    if args.prefix and args.prefix < LEAST_TOKENS:
        raise UsageError(f"--prefix {args.prefix}: the prefix cache keeps {LEAST_TOKENS} tokens or more")
    if args.speculate < 0 or args.speculate == 1:
        raise UsageError(f"--speculate {args.speculate}: an answer of 2 tokens or more")
    alone = Workload(context=args.context, prefix=args.prefix, speculate=args.speculate)
    for workload in (*workloads, alone):
        workload.check(args.context or facts.context)
    return workloads


def _peers(args: argparse.Namespace, facts: BundleFacts) -> list[Peer]:
    flags = ("gguf", "litertlm", "genai", "checkpoint", "against", "llama_bench")
    if not args.peers:
        if given := next((flag for flag in flags if getattr(args, flag)), None):
            raise UsageError(f"--{given.replace('_', '-')} is for --peers")
        return []
    if args.device != LOCAL or args.fleet:
        raise UsageError("--peers runs on this machine only: leave out --device and --fleet")
    models: dict[str, Path | None] = {
        "llama.cpp": args.gguf,
        LITERT_LM: args.litertlm or (args.bundle if args.bundle.is_file() else None),
        "onnxruntime-genai": args.genai,
        "transformers": args.checkpoint,
    }
    found, skipped = find_peers(models, args.llama_bench)
    for reason in skipped:
        progress(f"left out: {reason}")
    if args.against:
        found.append(other_bundle(args.against))
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
