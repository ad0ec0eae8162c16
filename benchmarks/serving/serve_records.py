"""Records of `bench --serve`, with their rows for the tables of docs/results.md."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path

from gemma_edge.benchmarks.records.bundle_facts import bundle_facts
from gemma_edge.benchmarks.records.environment import environment, now
from gemma_edge.benchmarks.records.record import Metrics, Record, TableRow
from gemma_edge.benchmarks.serving.chat_race import CHATS, TURNS, RaceFigures
from gemma_edge.benchmarks.serving.serve_bench import SETTLED, ServeFigures

KIND = "serve"


def serve_records(
    bundle: Path, name: str, figures: ServeFigures, *, clients: int, threads: int | None
) -> Iterator[Record]:
    """What `bench_serve` found: one record of the comparison with the library, one of the load.

    Raises:
        BundleError: not a bundle.
    """
    if figures.library_token_ms:
        added = figures.serve_ttft_ms - figures.library_ttft_ms
        share = figures.serve_token_ms / figures.library_token_ms - 1
        metrics: Metrics = {"threads": threads, "added_ttft_ms": added, "added_token_share": share}
        rows = (
            TableRow(f"{name}, server: first token, added to the library's", "<= 5 ms", f"{added:+.1f} ms"),
            TableRow(f"{name}, server: a token, added to the library's", "<= 2 %", f"{share:+.1%}"),
        )
        yield _record(bundle, f"{name}: server and library in turn", metrics, rows, figures.times_ms)
    if count := sum(figures.sent.values()) + figures.lost:
        wrong = sum(figures.wrong.values())
        metrics = {
            "requests": count,
            "lost": figures.lost,
            "wrong": wrong,
            "growth": figures.growth,
            "descriptors_first": figures.descriptors[0],
            "descriptors_last": figures.descriptors[-1],
        }
        what = f"{count:,} mixed requests of {clients} clients"
        rows = (
            TableRow(f"{name}, server: {what}", "0 lost, 0 wrong", f"{figures.lost} lost, {wrong} wrong"),
            TableRow(
                f"{name}, server: growth of RssAnon after the first {SETTLED} of them",
                "< 1 %",
                f"{figures.growth:+.1%} of {figures.rss_anon[0] / 1e6:.1f} MB",
            ),
        )
        yield _record(bundle, f"{name}: {what}", metrics, rows, figures.to_dict())


def race_record(
    bundle: Path, figures: Mapping[str, RaceFigures], *, tokens: int, threads: int | None
) -> Record:
    """What `bench_race` found: ours first, then the other server.

    Raises:
        BundleError: not a bundle.
    """
    (ours, peer), peer_name = figures.values(), list(figures)[1]
    median = statistics.median
    metrics: Metrics = {
        "tokens": tokens,
        "threads": threads,
        "peer": peer_name,
        "ttft_s": median(ours.ttft_ms) / 1000,
        "total_s": median(ours.total_s),
        "peer_ttft_s": median(peer.ttft_ms) / 1000,
        "peer_total_s": median(peer.total_s),
    }
    name = f"{CHATS} chats, {TURNS} answers of {tokens} tokens each"
    rows = tuple(
        TableRow(f"{name}: {words} against {peer_name}", "<= 1.00x", _against(metrics, key))
        for key, words in (("ttft_s", "first token"), ("total_s", "total time"))
    )
    return _record(bundle, name, metrics, rows, {name: asdict(found) for name, found in figures.items()})


def _against(metrics: Metrics, key: str) -> str:
    ours, peer = metrics[key], metrics[f"peer_{key}"]
    assert isinstance(ours, float) and isinstance(peer, float)
    return f"{ours / peer:.2f}x ({ours:.1f} against {peer:.1f} s)"


def _record(bundle: Path, name: str, metrics: Metrics, rows: tuple[TableRow, ...], raw: object) -> Record:
    facts = bundle_facts(bundle)
    return Record(
        kind=KIND,
        name=name,
        time=now(),
        environment=environment(),
        model=facts.model,
        recipe=facts.recipe,
        readme=rows,
        metrics=metrics,
        raw=raw,
    )
