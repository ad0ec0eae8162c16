"""What encoding an image and a clip costs: seconds, and anonymous memory of a process that does just that.

    python -m gemma_edge.benchmarks.encode OUT -t 2 -r 5 --name "E2B int4" -o results.jsonl

Each encoder of the bundle OUT is loaded in a process of its own and run on noise: an image of its own size,
and the longest clip that it takes. The first run also reads the weights from the disk, and is not counted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from gemma_edge.benchmarks.child import ChildError, run_child
from gemma_edge.benchmarks.load import busy_cores
from gemma_edge.benchmarks.memory import PeakSampler, read_memory
from gemma_edge.benchmarks.record import bundle_facts, readme_row, write_record
from gemma_edge.benchmarks.script import run_script
from gemma_edge.runtime.audio_encoder import AudioEncoder
from gemma_edge.runtime.bundle import Bundle
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.modalities import AudioModality
from gemma_edge.runtime.units import format_size
from gemma_edge.runtime.vision import VisionEncoder

TIMEOUT = 900.0
Json = dict[str, Any]


def encode_once_loaded(bundle: Path, kind: str, threads: int | None, repetitions: int) -> Json:
    """Loads one encoder in this process and runs it.

    Returns:
        `seconds` of each run but the first, `clip_seconds` of sound (0 for an image), and bytes of RssAnon:
        `base` before it was loaded, `loaded`, and `peak`.
    """
    modality = Bundle.open(bundle).modalities[kind]
    random = np.random.default_rng(0)
    base = read_memory().rss_anon
    encoder: AudioEncoder | VisionEncoder
    with PeakSampler() as sampler:
        if isinstance(modality, AudioModality):
            encoder = AudioEncoder(modality.graph, threads=threads)
            shape: tuple[int, ...] = (modality.config.max_frames, encoder.bins)
            clip = modality.config.max_frames * modality.log_mel.hop_length_ms / 1000
        else:
            encoder, clip = VisionEncoder(modality.graph, threads=threads), 0.0
            shape = (3, encoder.image_size, encoder.image_size)
        loaded = read_memory().rss_anon
        given = random.random(shape, dtype=np.float32)
        seconds = []
        for _ in range(repetitions + 1):
            started = time.perf_counter()
            encoder.encode(given)
            seconds.append(time.perf_counter() - started)
    peak = sampler.peak.rss_anon
    return {"seconds": seconds[1:], "clip_seconds": clip, "base": base, "loaded": loaded, "peak": peak}


def measure(
    bundle: Path, threads: int | None, repetitions: int, *, name: str, output: Path | None
) -> list[str]:
    """Measures every encoder of a bundle and appends a record of each to `output`; returns the rows' values.

    Raises:
        UsageError: the bundle has no encoder.
        ChildError: an encoder failed.
    """
    facts, kinds = bundle_facts(bundle), list(Bundle.open(bundle).modalities)
    if not kinds:
        raise UsageError(f"{bundle}: has no encoder: export a checkpoint that has one")
    values = []
    for kind in kinds:
        busy = busy_cores()
        argv = [sys.executable, "-m", "gemma_edge.benchmarks.encode", str(bundle), "-r", str(repetitions)]
        argv += ["--only", kind] + (["-t", str(threads)] if threads else [])
        run = run_child(argv, timeout=TIMEOUT)
        if run.exit_code:
            raise ChildError(f"the {kind} encoder", run)
        found: Json = json.loads(run.stdout)
        deviation = stdev(found["seconds"]) if len(found["seconds"]) > 1 else 0.0
        value = f"{mean(found['seconds']):.1f} ± {deviation:.1f} s, "
        value += f"{format_size(found['peak'], binary=False)} RssAnon"
        bar = f"below {found['clip_seconds']:.0f} s" if found["clip_seconds"] else "recorded"
        what = f"{found['clip_seconds']:.0f} s of audio" if found["clip_seconds"] else "an image"
        values.append(f"{what}: {value}")
        if output is not None:
            write_record(
                output,
                "encode",
                name=name,
                model=facts.model,
                recipe=facts.recipe,
                metrics={
                    "encoder": kind,
                    "threads": threads,
                    "seconds": round(mean(found["seconds"]), 3),
                    "seconds_sd": round(deviation, 3),
                    "clip_seconds": found["clip_seconds"],
                    "base_rss_anon_bytes": found["base"],
                    "loaded_rss_anon_bytes": found["loaded"],
                    "peak_rss_anon_bytes": found["peak"],
                },
                raw={"seconds": found["seconds"], "busy_cores": busy},
                readme=[readme_row(f"{name}: encoding {what}, {threads or 'all'} threads", bar, value)],
            )
    return values


def main(argv: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m gemma_edge.benchmarks.encode", description=summary)
    parser.add_argument("bundle", type=Path, help="folder of a bundle that has encoders")
    parser.add_argument("-t", "--threads", type=int, help="of the engine (default: one a physical core)")
    parser.add_argument("-r", "--repetitions", type=int, default=5, help="runs that count (5)")
    parser.add_argument("--only", metavar="KIND", help="one encoder, in this process: its account as JSON")
    parser.add_argument("--name", help="what the results call it (default: the bundle's folder)")
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="JSONL file to append records to")
    args = parser.parse_args(argv)
    if args.repetitions < 1:
        raise UsageError(f"--repetitions must be 1 or more, not {args.repetitions}")
    if args.only:
        print(json.dumps(encode_once_loaded(args.bundle, args.only, args.threads, args.repetitions)))
        return 0
    name = args.name or args.bundle.resolve().name
    for line in measure(args.bundle, args.threads, args.repetitions, name=name, output=args.output):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
