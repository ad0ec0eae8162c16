"""What an export costs: its time, and the anonymous memory of the exporting process, at true size.

    python -m gemma_edge.benchmarks.export CKPT OUT --recipe int4 --name "E2B int4" -o results.jsonl

The parity gate loads the bundle in a process of its own, so the exporter is measured alone; the engine's own
memory is what the ceiling benchmark proves. The bundle stays in OUT for the other benchmarks.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from gemma_edge.benchmarks.machine.child import ChildError, run_child
from gemma_edge.benchmarks.records.record import bundle_facts, readme_row, write_record
from gemma_edge.benchmarks.script import run_script
from gemma_edge.runtime.artifacts.bundle import FORMATS
from gemma_edge.runtime.units import format_size

TIMEOUT = 3600.0
INTERVAL = 0.02  # seconds between samples: a chunk of weights lives for about as long


def measure_export(
    source: str,
    out: Path,
    recipe: str,
    format: str,
    *,
    verify: bool,
    name: str,
    bar: str,
    output: Path | None,
) -> str:
    """Exports in a child process and appends the record to `output`; returns the row's value.

    Raises:
        ChildError: the export failed.
    """
    argv = [
        sys.executable,
        "-m",
        "gemma_edge.cli.main",
        "export",
        source,
        str(out),
        "--recipe",
        recipe,
        "--format",
        format,
        "--json",
    ]
    run = run_child(argv if verify else [*argv, "--no-verify"], timeout=TIMEOUT, interval=INTERVAL)
    if run.exit_code:
        raise ChildError("the export", run)
    result = json.loads(run.stdout)
    facts = bundle_facts(out)
    files = sum(file.stat().st_size for file in ([out] if out.is_file() else out.iterdir()))
    agreement = result["agreement"]
    value = f"{format_size(run.peak.rss_anon, binary=False)} in {run.seconds:.0f} s"
    rows = [readme_row(f"{name}: export, peak RssAnon and time", bar, value)]
    if agreement:
        text = f"KL {agreement['mean_kl']:.3g} nats, top-1 {agreement['top1']:.1%} (random weights)"
        rows.append(readme_row(f"{name}: agreement with its checkpoint", "within the recipe's bounds", text))
    if output is not None:
        write_record(
            output,
            "export",
            name=name,
            model=facts.model,
            recipe=facts.recipe,
            metrics={
                "seconds": round(run.seconds, 1),
                "peak_rss_anon_bytes": run.peak.rss_anon,
                "peak_rss_bytes": run.peak.rss,
                "bundle_bytes": files,
                "predicted_peak_bytes": result["plan"]["peak_bytes"],
                "verified": agreement is not None,
            },
            raw={"agreement": agreement, "plan": result["plan"]},
            readme=rows,
        )
    return value


def main(argv: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m gemma_edge.benchmarks.export", description=summary)
    parser.add_argument("source", help="checkpoint folder")
    parser.add_argument("out", type=Path, help="folder of the bundle, or a .litertlm; it stays")
    parser.add_argument("--recipe", default="int4")
    parser.add_argument("--format", default="onnx", choices=FORMATS)
    parser.add_argument("--no-verify", action="store_true", help="without the parity gate")
    parser.add_argument("--name", help="what the results call it (default: the bundle's folder)")
    parser.add_argument("--bar", default="recorded", help="what the figure should reach, for the table")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="JSONL file to append the record to"
    )
    args = parser.parse_args(argv)
    name = args.name or args.out.resolve().name
    verify = not args.no_verify
    print(
        measure_export(
            args.source,
            args.out,
            args.recipe,
            args.format,
            verify=verify,
            name=name,
            bar=args.bar,
            output=args.output,
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
