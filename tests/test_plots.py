"""The plots of results: what they show, that they are the same every time, and that the check notices."""

import xml.etree.ElementTree as ElementTree
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import pytest

from gemma_edge.benchmarks.output import table
from gemma_edge.benchmarks.output.plots import render_plots
from gemma_edge.benchmarks.records.record import CeilingRecord, CompareRecord, Record
from gemma_edge.benchmarks.records.results_file import append_record, parse_record
from gemma_edge.benchmarks.serving.chat_race import RaceFigures
from gemma_edge.runtime.errors import GemmaEdgeError, UsageError

Json = dict[str, Any]
T = TypeVar("T")
GB = 10**9


def speed_of(tokens: str, speed: float) -> Json:
    n_prompt, n_gen = (int(tokens[2:]), 0) if tokens.startswith("pp") else (0, int(tokens[2:]))
    return {"n_prompt": n_prompt, "n_gen": n_gen, "samples_ns": [round((n_prompt + n_gen) * 1e9 / speed)]}


def comparison(name: str, time: str, prefill: float = 90.0, peer: str | None = "llama_cpp") -> CompareRecord:
    """A comparison of one round, as old records have it: `prefill`, a tenth of it, the peer half of both."""
    metrics = {"prefill_ts": prefill, "decode_ts": prefill / 10, "peak_rss_anon_bytes": 1.5 * GB}
    metrics["peak_rss_bytes"] = 1.75 * GB
    round_: Json = {"kernel": {"tests": [speed_of("pp512", prefill), speed_of("tg64", prefill / 10)]}}
    if peer:
        metrics |= {f"{peer}_prefill_ts": prefill / 2, f"{peer}_decode_ts": prefill / 20}
        metrics[f"{peer}_peak_rss_bytes"] = 4.5 * GB
        round_[peer] = {
            "model": "Q4_0",
            "build": "b",
            "peak_rss": 1,
            "tests": [speed_of("pp512", prefill / 2), speed_of("tg64", prefill / 20)],
        }
    common = {"schema": 1, "kind": "compare", "name": name, "time": time, "readme": []}
    return from_old(CompareRecord, common | {"metrics": metrics, "raw": {"rounds": [round_]}})


def ceiling(name: str) -> CeilingRecord:
    peak = {"rss_anon": 3 * GB, "high_water": 3_200_000_000}
    steady = {"rss_anon": 1, "rss_file": 1}
    common = {"schema": 1, "kind": "ceiling", "name": name, "time": "2026-01-03", "readme": []}
    control = {"limit_bytes": 1, "killed": True}
    run = {"limit_bytes": 3 << 30, "killed": False, "kernel": {"memory": {"peak": peak, "steady": steady}}}
    more = {"metrics": {"limit_bytes": 3 << 30}, "raw": {"run": run, "control": control}}
    return from_old(CeilingRecord, common | more)


def from_old(kind: type[T], data: Json) -> T:
    record = parse_record(data)
    assert isinstance(record, kind)
    return record


RECORDS = [comparison("E2B", "2026-01-02"), comparison("E2B <int4>", "2026-01-01"), ceiling("E4B")]


def texts(svg: str) -> list[str]:
    """Labels and values, and the tips of the bars, as an XML reader sees them."""
    return [
        (node.text or "").strip() for node in ElementTree.fromstring(svg).iter() if node.tag.endswith("text")
    ]


def test_what_they_show() -> None:
    plots = {name: texts(svg) for name, (_, svg) in render_plots(RECORDS).items()}
    assert list(plots) == ["prefill.svg", "decode.svg", "memory.svg"]
    group = ["90", "llama.cpp, Q4_0", "45"]
    assert plots["prefill.svg"][2:] == ["E2B", *group, "E2B <int4>", *group]
    assert plots["decode.svg"][2:5] == ["E2B", "9", "llama.cpp, Q4_0"]
    assert plots["memory.svg"][2:] == [
        "3 GiB", "E2B", "1.5 + 0.25", "E2B <int4>", "1.5 + 0.25", "E4B, under 3 GiB", "3 + 0.2",
        "llama.cpp, Q4_0", "4.5",
    ]  # fmt: skip


def test_races_of_servers() -> None:
    figures = {
        "gemma-edge": RaceFigures([1000.0, 2000.0, 3000.0], [4.0, 5.0, 6.0], [64, 64, 64]),
        "other": RaceFigures([4000.0], [8.0], [64]),
    }
    metrics: Json = {"peer": "other", "ttft_s": 2.0, "total_s": 5.0, "peer_ttft_s": 4.0, "peer_total_s": 8.0}
    raw = {name: asdict(found) for name, found in figures.items()}
    race = Record(kind="serve", name="8 chats", time="2026-01-01", metrics=metrics, raw=raw)
    load = Record(kind="serve", name="load", time="2026-01-01", metrics={"growth": 0.1}, raw={})
    plots = {name: texts(svg)[2:] for name, (_, svg) in render_plots([load, race]).items()}
    assert plots == {
        "serve-ttft.svg": ["8 chats", "2", "other", "4"],
        "serve-total.svg": ["8 chats", "5", "other", "8"],
    }


def test_the_latest_comparison_of_a_name_is_shown() -> None:
    records = [comparison("E2B", "2026-01-02", 80.0), comparison("E2B", "2026-01-01", 10.0)]
    assert "80" in texts(render_plots(records)["prefill.svg"][1])
    assert render_plots(records) == render_plots(records[::-1])


def test_nothing_to_show() -> None:
    assert render_plots([]) == {}
    assert list(render_plots([comparison("alone", "2026-01-01", peer=None)])) == ["memory.svg"]


def test_a_record_that_is_not_complete() -> None:
    record = comparison("E2B", "2026-01-01")
    del record.metrics["peak_rss_bytes"]
    with pytest.raises(UsageError, match="compare record of E2B, 2026-01-01, has no metric peak_rss_bytes"):
        render_plots([record])


def test_they_are_written_beside_the_page_and_checked(tmp_path: Path) -> None:
    readme, results, folder = tmp_path / "README.md", tmp_path / "r.jsonl", tmp_path / "docs" / "img"
    page = tmp_path / "docs" / "results.md"
    page.parent.mkdir()
    readme.write_text("<!-- highlights:begin -->\n<!-- highlights:end -->\n")
    page.write_text("<!-- results:begin -->\n<!-- results:end -->\n")
    for record in RECORDS:
        append_record(results, record)
    assert table.update_documents(readme, [results])
    assert "\n![Prefill](img/prefill.svg)\n" in page.read_text()
    before = {path: path.read_bytes() for path in folder.iterdir()}
    assert len(before) == 3 and not table.update_documents(readme, [results], check=True)

    changed = folder / "memory.svg"
    changed.write_text("other")
    with pytest.raises(GemmaEdgeError, match=f"{changed.name}: not made from these results"):
        table.update_documents(readme, [results], check=True)
    stale = folder / "stale.svg"
    stale.write_text("old")
    assert table.update_documents(readme, [results])
    assert {path: path.read_bytes() for path in folder.iterdir()} == before, "the stale one is removed"
