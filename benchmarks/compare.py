"""A bundle against llama.cpp, LiteRT-LM and the machine's bandwidth, interleaved in one run.

    python -m gemma_edge.benchmarks.compare BUNDLE --llama-bench PATH --gguf FILE --rounds 3 -o results.jsonl
    python -m gemma_edge.benchmarks.compare MODEL.litertlm --litertlm MODEL.litertlm

A machine's speed drifts, by half within minutes on a shared one. So every round measures all of it, one
after the other, and what is reported are medians over the rounds of ratios within a round. Every other round
runs in the opposite order, so that a steady drift cancels.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from gemma_edge.benchmarks.machine.bandwidth import Bandwidth, stream_read_bandwidth
from gemma_edge.benchmarks.machine.child import run_child
from gemma_edge.benchmarks.machine.load import QUIET_CORES, busy_cores
from gemma_edge.benchmarks.measure.kernel_tests import kernel_argv, measurements, parse_report
from gemma_edge.benchmarks.options import KernelOptions, add_kernel_options, kernel_options
from gemma_edge.benchmarks.peers.interleaved import TIMEOUT, in_turn, run_litert_lm
from gemma_edge.benchmarks.peers.llama_cpp import (
    ENVIRONMENT_VARIABLE,
    PeerRun,
    find_llama_bench,
    run_llama_bench,
)
from gemma_edge.benchmarks.records.measurement import Measurement
from gemma_edge.benchmarks.records.record import BundleFacts, bundle_facts, readme_row, write_record
from gemma_edge.benchmarks.script import progress, run_script
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.units import format_size, parse_size
from gemma_edge.runtime.version import __version__

Json = dict[str, Any]


@dataclass(frozen=True)
class Round:
    """What one round measured; `peers` by their names in PEERS."""

    bandwidth: Bandwidth
    report: Json  # of kernel.measure
    peers: dict[str, PeerRun]
    busy_cores: float | None = None  # that other processes kept busy just before

    @property
    def tests(self) -> dict[str, Measurement]:
        return measurements(self.report)

    def to_dict(self) -> Json:
        return {
            "busy_cores": self.busy_cores,
            "bandwidth": self.bandwidth.to_dict(),
            "kernel": self.report,
            **{name: peer.to_dict() for name, peer in self.peers.items()},
        }


class Metric(NamedTuple):
    """A figure with a bar: how it is labelled, on which side of the bar it should be, how it is printed."""

    label: str
    at_least: bool
    show: Callable[[float], str]
    parse: Callable[[str], float] = float

    def meets(self, value: float, bar: float) -> bool:
        return value >= bar if self.at_least else value <= bar


def _gigabytes(size: float) -> str:
    return format_size(int(size), binary=False)


def _ratio(value: float) -> str:
    return f"{value:.2f}x"


# Peers by what they are called in records: how people call them, and what their metrics begin with.
PEERS = {
    "llama_cpp": ("llama.cpp", ""),
    "litert_lm": ("LiteRT-LM", "litert_lm_"),
    "against": ("the other bundle", "against_"),
}
METRICS = {
    **{
        f"{prefix}{what}_ratio": Metric(f"{what} against {title}", True, _ratio)
        for title, prefix in PEERS.values()
        for what in ("prefill", "decode")
    },
    "bandwidth_share": Metric(
        "weights read while decoding, of stream-read bandwidth", True, lambda v: f"{v:.2f}"
    ),
    "rss_anon_bytes": Metric("RssAnon in steady state", False, _gigabytes, parse_size),
    "load_s": Metric("load from a warm page cache", False, lambda v: f"{v:.1f} s"),
    "import_s": Metric("import of the runtime", False, lambda v: f"{v:.2f} s"),
}


def run_rounds(
    bundle: Path,
    options: KernelOptions,
    rounds: int,
    peers: Mapping[str, Callable[[], PeerRun]] | None = None,
    bandwidth_seconds: float = 2.0,
) -> list[Round]:
    """Measures `rounds` times: bandwidth, the bundle, and each of the peers."""
    peers = peers or {}
    results = []
    for index in range(rounds):
        busy = busy_cores()
        if busy is not None and busy > QUIET_CORES:
            progress(
                f"warning: other processes keep {busy:.1f} cores busy; the ratios of this round are not fair"
            )
        bandwidth = stream_read_bandwidth(options.threads, bandwidth_seconds)
        progress(f"round {index + 1}/{rounds}: stream read {bandwidth.median:.1f} GB/s")
        runs: dict[str, PeerRun] = {}
        report: Json = {}
        turns = ["", *peers]
        for name in in_turn(turns, index):
            if name:
                runs[name] = peers[name]()
                progress(f"  {PEERS[name][0] + ':':10} " + ", ".join(map(str, runs[name].tests.values())))
            else:
                report = _ours(bundle, options)
        results.append(Round(bandwidth, report, runs, busy))
    return results


def _ours(bundle: Path, options: KernelOptions) -> Json:
    report = parse_report(run_child(kernel_argv(bundle, options), timeout=TIMEOUT, what="the measured run"))
    progress("  bundle:    " + ", ".join(map(str, measurements(report).values())))
    return report


def _other_bundle(path: Path, options: KernelOptions) -> PeerRun:
    """A bundle of ours in the place of a peer, with the context that it has."""
    options = replace(options, context=min(options.context, Bundle.open(path).context))
    argv = kernel_argv(path, options, import_time=False)
    report = parse_report(run_child(argv, timeout=TIMEOUT, what="the other bundle's run"))
    high_water = report["memory"]["peak"]["high_water"]
    return PeerRun(measurements(report), high_water, f"gemma-edge {__version__}", path.name)


def summarize(rounds: Sequence[Round], bytes_per_token: int) -> dict[str, float]:
    """Medians over the rounds, by the names of METRICS, and the speeds they come from in tokens per second.

    The load of the first round counts only if it is the only one: the page cache may have been cold.
    """
    columns: dict[str, list[float]] = {}

    def add(name: str, value: float | None) -> None:
        if value is not None:
            columns.setdefault(name, []).append(value)

    for index, round_ in enumerate(rounds):
        for test in round_.tests.values():
            what = "prefill" if test.n_prompt else "decode"
            add(f"{what}_ts", test.avg_ts)
            for name, peer in round_.peers.items():
                theirs = peer.tests[test.name].avg_ts
                add(f"{name}_{what}_ts", theirs)
                add(f"{PEERS[name][1]}{what}_ratio", test.avg_ts / theirs)
            if test.n_gen:
                add("bandwidth_share", bytes_per_token * test.avg_ts / (round_.bandwidth.median * 1e9))
        for name, peer in round_.peers.items():
            add(f"{name}_peak_rss_bytes", peer.peak_rss)
        add("busy_cores", round_.busy_cores)
        add("bandwidth_gb_s", round_.bandwidth.median)
        add("rss_anon_bytes", round_.report["memory"]["steady"]["rss_anon"])
        add("peak_rss_anon_bytes", round_.report["memory"]["peak"]["rss_anon"])
        add("peak_rss_bytes", round_.report["memory"]["peak"]["high_water"])
        add("import_s", round_.report["import_s"])
        if index or len(rounds) == 1:
            add("load_s", round_.report["load_s"])
    return {name: round(statistics.median(values), 4) for name, values in columns.items()}


def readme_rows(name: str, metrics: dict[str, float], bars: dict[str, float]) -> list[Json]:
    """Rows of the README's table: the metrics that have a bar, and every comparison with a peer."""
    rows = []
    for key, metric in METRICS.items():
        if key in metrics and (key in bars or key.endswith("_ratio")):
            bar = f"{'>=' if metric.at_least else '<='} {metric.show(bars[key])}" if key in bars else ""
            value = metric.show(metrics[key]) + _detail(key, metrics)
            rows.append(readme_row(f"{name}: {metric.label}", bar, value))
    return rows


def _detail(key: str, metrics: dict[str, float]) -> str:
    if key.endswith("_ratio"):
        name = next((n for n, (_, prefix) in PEERS.items() if prefix and key.startswith(prefix)), "llama_cpp")
        what = key.removesuffix("_ratio").removeprefix(PEERS[name][1])
        return f" ({metrics[f'{what}_ts']:.1f} against {metrics[f'{name}_{what}_ts']:.1f} tok/s)"
    if key == "bandwidth_share":
        return f" (of {metrics['bandwidth_gb_s']:.1f} GB/s)"
    return ""


def parse_bars(texts: Sequence[str]) -> dict[str, float]:
    """Bars from `METRIC=VALUE` options. Raises UsageError for an unknown metric or no number."""
    bars = {}
    for text in texts:
        key, _, value = text.partition("=")
        if key not in METRICS:
            raise UsageError(f"--bar {text}: expected METRIC=VALUE with METRIC one of {', '.join(METRICS)}")
        try:
            bars[key] = METRICS[key].parse(value)
        except ValueError:
            raise UsageError(f"--bar {text}: {value!r} is not a number") from None
    return bars


def compare(
    bundle: Path,
    options: KernelOptions,
    rounds: int,
    *,
    peers: Mapping[str, Callable[[], PeerRun]],
    name: str,
    bars: dict[str, float],
    output: Path | None,
) -> dict[str, float]:
    """Runs the rounds, appends the record to `output` and returns the metrics (`summarize`)."""
    options.check()
    if rounds < 1:
        raise UsageError("--rounds: expected at least 1")
    facts: BundleFacts = bundle_facts(bundle)
    results = run_rounds(bundle, options, rounds, peers)
    metrics = summarize(results, facts.bytes_per_token)
    metrics["bytes_per_token"] = facts.bytes_per_token
    if output is not None:
        write_record(
            output,
            "compare",
            name=name,
            model=facts.model,
            recipe=facts.recipe,
            metrics=metrics,
            raw={"rounds": [result.to_dict() for result in results]},
            readme=readme_rows(name, metrics, bars),
        )
    return metrics


def main(argv: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m gemma_edge.benchmarks.compare", description=summary)
    add_kernel_options(parser, KernelOptions())
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="rounds (default: 3)")
    parser.add_argument(
        "--llama-bench", metavar="PATH", help=f"the program (or {ENVIRONMENT_VARIABLE}, or PATH)"
    )
    parser.add_argument("--gguf", type=Path, metavar="FILE", help="the same checkpoint for llama.cpp")
    parser.add_argument("--litertlm", type=Path, metavar="FILE", help="the same checkpoint for LiteRT-LM")
    parser.add_argument("--against", type=Path, metavar="BUNDLE", help="another bundle of ours")
    parser.add_argument("--name", help="what the results call it (default: the bundle's folder)")
    parser.add_argument(
        "--bar", action="append", default=[], metavar="METRIC=VALUE", help="what it should reach"
    )
    parser.add_argument(
        "-o", "--output", type=Path, metavar="FILE", help="JSONL file to append the record to"
    )
    args = parser.parse_args(argv)
    bars, options = parse_bars(args.bar), kernel_options(args)
    peers: dict[str, Callable[[], PeerRun]] = {}
    if binary := _llama_bench(args.llama_bench, args.gguf):
        peers["llama_cpp"] = partial(run_llama_bench, binary, args.gguf, options, timeout=TIMEOUT)
    with tempfile.TemporaryDirectory() as cache:
        if args.litertlm:
            if importlib.util.find_spec("litert_lm") is None:
                raise UsageError("--litertlm needs LiteRT-LM: pip install litert-lm-api")
            peers["litert_lm"] = partial(run_litert_lm, args.litertlm, options, Path(cache))
        if args.against:
            peers["against"] = partial(_other_bundle, args.against, options)
        metrics = compare(
            args.bundle,
            options,
            args.rounds,
            peers=peers,
            name=args.name or args.bundle.resolve().name,
            bars=bars,
            output=args.output,
        )
    for key, metric in METRICS.items():
        if key in metrics:
            verdict = ""
            if key in bars:
                met = "met" if metric.meets(metrics[key], bars[key]) else "missed"
                verdict = f"  {metric.show(bars[key])} {met}"
            print(f"{metric.label:55} {metric.show(metrics[key])}{_detail(key, metrics)}{verdict}")
    return 0


def _llama_bench(given: str | None, gguf: Path | None) -> Path | None:
    """The peer's program, or None, said on stderr, where llama.cpp or its file is not there."""
    if gguf is None:
        if given:
            raise UsageError("--llama-bench needs --gguf: the same checkpoint as a GGUF file")
        progress("llama.cpp is left out: no --gguf")
        return None
    if not gguf.is_file():
        raise UsageError(f"--gguf {gguf}: no such file")
    binary = find_llama_bench(given)
    if binary is None:
        raise UsageError(f"--gguf needs llama-bench: give --llama-bench or set {ENVIRONMENT_VARIABLE}")
    return binary


if __name__ == "__main__":
    sys.exit(run_script(main))
