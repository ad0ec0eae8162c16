"""The proof that a bundle fits: it runs under a memory limit of the kernel's, and a control does not.

    python -m gemma_edge.benchmarks.ceiling BUNDLE --limit 2GiB --context 4096 -p 512 -n 64 -o results.jsonl
    python -m gemma_edge.benchmarks.ceiling BUNDLE --limit 2GiB --image 1 --audio 1 -o results.jsonl

With --image and --audio, what runs is one answer to a prompt with so many photos and recordings of 30 s
(`answer.py`), as `gemma-edge run -a` gives it; the peak of each phase is recorded.

The page cache of the bundle is dropped before each run, so that every page is read, and counted, under the
limit. LiteRT packs weights into a file on the first load: load the bundle, and its encoders, once before.
The control is the same run under half of the limit: it must be killed, or the limit proves nothing. Ends with
0 when both hold, with 5 when one does not.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_edge.benchmarks.machine.cgroup import LimitedRun, run_limited
from gemma_edge.benchmarks.machine.child import ChildError
from gemma_edge.benchmarks.machine.memory import drop_page_cache
from gemma_edge.benchmarks.measure.answer_phases import CLIP_SECONDS, FIRST, answer_argv, write_media
from gemma_edge.benchmarks.measure.kernel_tests import kernel_argv, measurements, parse_report
from gemma_edge.benchmarks.options import KernelOptions, add_kernel_options, kernel_options
from gemma_edge.benchmarks.records.record import bundle_facts, bundle_files, readme_row, write_record
from gemma_edge.benchmarks.script import progress, run_script
from gemma_edge.runtime.errors import CeilingError, UsageError
from gemma_edge.runtime.units import format_size, parse_size

Json = dict[str, Any]
TIMEOUT = 3600.0  # seconds; a run that only just fits reads its weights from the disk again and again


@dataclass(frozen=True)
class Attempt:
    """One run under one limit; `report` (of kernel.measure) is None when the kernel killed it."""

    run: LimitedRun
    report: Json | None
    cached_bytes: int  # of the bundle, still cached when the run began: 0 is a cold start

    def to_dict(self) -> Json:
        return {
            "limit_bytes": self.run.limit_bytes,
            "killed": self.run.killed,
            "peak_bytes": self.run.peak_bytes,
            "seconds": round(self.run.seconds, 3),
            "cached_bytes": self.cached_bytes,
            "mechanism": self.run.mechanism,
            "kernel": self.report,
        }

    @property
    def phases(self) -> dict[str, int]:
        """Peak RssAnon of each phase in bytes, where the run has phases."""
        phases = (self.report or {}).get("phases", ())
        return {phase["name"]: phase["peak"]["rss_anon"] for phase in phases}

    def __str__(self) -> str:
        limit = format_size(self.run.limit_bytes)
        if self.report is None:
            return f"under {limit}: killed by the kernel after {self.run.seconds:.1f} s"
        tests = ", ".join(map(str, measurements(self.report).values()))
        anon = format_size(self.report["memory"]["peak"]["rss_anon"])
        phases = "".join(f"; {name} {format_size(size)}" for name, size in self.phases.items())
        return f"under {limit}: completed, peak RssAnon {anon}, {tests}{phases}"


def attempt(bundle: Path, limit: int, argv: Sequence[str]) -> Attempt:
    """Runs `argv` (of `kernel_argv` or `answer_argv`) under `limit` bytes, the bundle's page cache cold.

    Raises:
        DeviceError: no limit can be enforced here, or the run hung.
        ChildError: the run failed for another reason than memory.
    """
    cached = drop_page_cache(bundle_files(bundle))
    run = run_limited(argv, limit, timeout=TIMEOUT)
    if not run.killed and run.exit_code:
        raise ChildError(f"the run under {format_size(limit)}", run)
    result = Attempt(run, None if run.killed else parse_report(run), cached)
    progress(str(result))
    return result


def verdict(run: Attempt, control: Attempt) -> str | None:
    """None when the ceiling is proved, else what is wrong."""
    if run.report is None:
        return f"the bundle does not fit {format_size(run.run.limit_bytes)}"
    if control.report is not None:
        size = format_size(control.run.limit_bytes)
        return f"the control completed under {size}: it proves nothing; lower --control until it is killed"
    return None


def prove(
    bundle: Path,
    limit: int,
    control_limit: int,
    options: KernelOptions,
    *,
    images: int = 0,
    clips: int = 0,
    name: str,
    output: Path | None,
) -> None:
    """Both runs, and the record appended to `output`.

    Args:
        images, clips: of the prompt that is answered; without any, the tests of `kernel` run.

    Raises:
        CeilingError: the ceiling is not proved, after the record of it is written.
    """
    options.check()
    if control_limit >= limit:
        raise UsageError("--control must be below --limit")
    facts = bundle_facts(bundle)
    with tempfile.TemporaryDirectory(prefix="gemma-edge-media-") as folder:
        argv = kernel_argv(bundle, options, import_time=False)
        if images or clips:
            argv = answer_argv(bundle, write_media(Path(folder), images, clips), options)
        run = attempt(bundle, limit, argv)
        control = attempt(bundle, control_limit, argv)
    problem = verdict(run, control)
    if output is not None:
        metrics: Json = {
            "limit_bytes": limit,
            "control_limit_bytes": control_limit,
            "completed": run.report is not None,
            "control_killed": control.run.killed,
            "peak_bytes": run.run.peak_bytes,
            "context": options.context,
        }
        if images or clips:
            metrics |= {"images": images, "clips": clips}
        if run.report:
            metrics["peak_rss_anon_bytes"] = run.report["memory"]["peak"]["rss_anon"]
            metrics |= {
                f"{phase.replace(' ', '_')}_peak_rss_anon_bytes": n for phase, n in run.phases.items()
            }
            metrics |= {f"{test}_ts": round(m.avg_ts, 3) for test, m in measurements(run.report).items()}
        write_record(
            output,
            "ceiling",
            name=name,
            model=facts.model,
            recipe=facts.recipe,
            metrics=metrics,
            raw={"run": run.to_dict(), "control": control.to_dict()},
            readme=[_row(name, run, control, options, images, clips)],
        )
    if problem:
        raise CeilingError(problem)


def _row(name: str, run: Attempt, control: Attempt, options: KernelOptions, images: int, clips: int) -> Json:
    limit, half = format_size(run.run.limit_bytes), format_size(control.run.limit_bytes)
    what = f"prefill {options.n_prompt}, decode {options.n_gen}, context {options.context}"
    if images or clips:
        attached = [
            *([f"{images} image{'s' if images > 1 else ''}"] if images else []),
            *([f"{clips * CLIP_SECONDS} s of audio"] if clips else []),
        ]
        what = f"{' and '.join(attached)}, {what.replace('prefill', 'prefill at least')}"
    if run.report is None:
        value = "killed"
    else:
        anon = format_size(run.report["memory"]["peak"]["rss_anon"], binary=False)
        shown = [(phase, size) for phase, size in run.phases.items() if phase != FIRST]
        phases = ", ".join(f"{phase} {format_size(size, binary=False)}" for phase, size in shown)
        anon += f" ({phases})" if phases else ""
        value = f"completes, peak RssAnon {anon}; control {'killed' if control.run.killed else 'NOT killed'}"
    return readme_row(
        f"{name}: {what} under a kernel limit of {limit}", f"completes; control at {half} is killed", value
    )


def main(argv: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m gemma_edge.benchmarks.ceiling", description=summary)
    add_kernel_options(parser, KernelOptions(reps=1))
    for flag, text in (("--image", "photos"), ("--audio", "recordings of 30 s")):
        parser.add_argument(
            flag, type=int, default=0, metavar="N", help=f"answer a prompt with N {text}, once (default: 0)"
        )
    parser.add_argument("--limit", required=True, metavar="SIZE", help="such as 2GiB")
    parser.add_argument("--control", metavar="SIZE", help="limit of the control (default: half)")
    parser.add_argument("--name", help="what the results call it (default: the bundle's folder)")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="JSONL file to append the record to"
    )
    args = parser.parse_args(argv)
    limit = parse_size(args.limit)
    control = parse_size(args.control) if args.control else limit // 2
    name = args.name or args.bundle.resolve().name
    prove(
        args.bundle,
        limit,
        control,
        kernel_options(args),
        images=args.image,
        clips=args.audio,
        name=name,
        output=args.output,
    )
    print(f"proved: it runs under {format_size(limit)}, and under {format_size(control)} it is killed")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
