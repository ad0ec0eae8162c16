"""What it takes to encode one image and the longest clip, for the README's table.

    python -m gemma_edge.benchmarks.encode BUNDLE --name "E2B int4" -r 5 -t 2 -o results.jsonl

In a process of its own, each encoder loaded after the one before it was released, the decoder not at all, as
for a prompt. `gemma-edge bench` measures the same beside all else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gemma_edge.benchmarks.machine.child import run_child
from gemma_edge.benchmarks.machine.load import QUIET_CORES, busy_cores
from gemma_edge.benchmarks.measure.encoder_times import EncoderRun
from gemma_edge.benchmarks.measure.worker import parse_worker_report, worker_argv
from gemma_edge.benchmarks.measure.workload import Workload
from gemma_edge.benchmarks.records.record import bundle_facts, readme_row, write_record
from gemma_edge.benchmarks.script import progress, run_script
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.units import format_size

Json = dict[str, Any]
TIMEOUT = 3600.0
BARS = {"vision": "recorded", "audio": "faster than real time"}


def measure_encode(
    bundle: Path, reps: int, threads: int, *, name: str, bars: dict[str, str], output: Path | None
) -> list[EncoderRun]:
    """Measures in a child process and appends the record to `output`.

    Args:
        bars: what each encoder should reach, for the table.

    Raises:
        UsageError: the bundle has no encoder.
        ChildError, DeviceError: the process failed.
    """
    facts = bundle_facts(bundle)
    if not facts.encoders:
        raise UsageError(f"{bundle} has no encoders: export the checkpoint with --modalities")
    workload = Workload(reps=reps, threads=threads, encode=True)
    workload.check(facts.context)
    busy = busy_cores()
    if busy is not None and busy > QUIET_CORES:
        progress(f"warning: other processes keep {busy:.1f} cores busy")
    child = run_child(worker_argv(sys.executable, str(bundle), workload), timeout=TIMEOUT, what="encoding")
    report = parse_worker_report(child)
    runs = [EncoderRun.from_dict(run) for run in report["encode"]]
    if output is not None:
        metrics: Json = {"threads": threads, "busy_cores": busy}
        for run in runs:
            metrics |= {
                f"{run.encoder}_s": round(run.median_s, 4),
                f"{run.encoder}_load_s": round(run.load_s, 4),
                f"{run.encoder}_peak_rss_anon_bytes": run.peak_rss_anon,
                f"{run.encoder}_peak_rss_file_bytes": run.peak_rss_file,
            }
            if run.real_time is not None:
                metrics["real_time"] = round(run.real_time, 3)
        write_record(
            output,
            "encoders",
            name=name,
            model=facts.model,
            recipe=facts.recipe,
            metrics=metrics,
            raw={"encode": report["encode"], "notes": report["notes"]},
            readme=[encode_readme_row(name, run, threads, bars[run.encoder]) for run in runs],
        )
    return runs


def encode_readme_row(name: str, run: EncoderRun, threads: int, bar: str) -> Json:
    """One encoder's row of the README's table; the time is the median of its repetitions."""
    what = f"one {run.pixels}x{run.pixels} image" if run.real_time is None else f"{run.seconds:g} s of audio"
    speed = "" if run.real_time is None else f" ({run.real_time:.1f}x real time)"
    memory = format_size(run.peak_rss_anon, binary=False)
    label = f"{name}: encode {what}, {threads} thread{'s' if threads > 1 else ''}"
    return readme_row(label, bar, f"{run.median_s:.1f} s{speed}, peak RssAnon {memory}")


def main(argv: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m gemma_edge.benchmarks.encode", description=summary)
    parser.add_argument("bundle", type=Path, help="what `gemma-edge export` made, with encoders")
    parser.add_argument("-r", "--reps", type=int, default=5, metavar="N", help="repetitions (default: 5)")
    parser.add_argument("-t", "--threads", type=int, default=2, metavar="N", help="threads (default: 2)")
    parser.add_argument("--name", help="what the results call it (default: the bundle's folder)")
    for encoder, bar in BARS.items():
        flag = "--image-bar" if encoder == "vision" else "--audio-bar"
        parser.add_argument(
            flag, dest=encoder, default=bar, metavar="TEXT", help=f"what it should reach (default: {bar})"
        )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="JSONL file to append the record to"
    )
    args = parser.parse_args(argv)
    runs = measure_encode(
        args.bundle,
        args.reps,
        args.threads,
        name=args.name or args.bundle.resolve().name,
        bars={encoder: getattr(args, encoder) for encoder in BARS},
        output=args.output,
    )
    for run in runs:
        print(f"{run}; load {run.load_s:.2f} s; peak RssAnon {format_size(run.peak_rss_anon)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
