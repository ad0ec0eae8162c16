"""Starts behind a prefix measured: in both engines, as a row, as a line of the table; and what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.benchmarks.measure import prefix_times, session
from gemma_edge.benchmarks.measure.workload import Workload
from gemma_edge.benchmarks.output.result_text import render
from gemma_edge.benchmarks.output.table import render_table
from gemma_edge.benchmarks.records.measurement import PrefixRun, PrefixStart
from gemma_edge.benchmarks.records.results_file import parse_record, read_records
from gemma_edge.cli.main import main
from gemma_edge.runtime.errors import DeviceError, UsageError
from gemma_edge.runtime.files.cache_folder import cache_folder
from gemma_edge.runtime.files.typed_json import FieldError, to_json
from support.results import read_rows

SMALL = ["-p", "16", "-n", "0", "-r", "2", "-t", "1", "--requests", "0", "--bandwidth", "0s", "--no-cold"]
RUN = PrefixRun(
    2000,
    24,
    75 << 20,
    PrefixStart(4.0, 41.0),
    (PrefixStart(4.0, 40.0), PrefixStart(5.0, 41.0), PrefixStart(4.0, 36.0)),
    (PrefixStart(3.0, 1.0), PrefixStart(3.5, 0.9), PrefixStart(3.0, 0.8)),
)


def test_a_session_measures_starts_of_both_kinds(
    engine_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "busy_cores", lambda: None)
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "cache"))
    rows, record = tmp_path / "r.jsonl", tmp_path / "table.jsonl"
    argv = ["bench", str(engine_bundle), *SMALL, "--prefix", "300", "-o", str(rows), "--record", str(record)]
    assert main([*argv, "--name", "tiny"]) == 0
    (row,) = (row for row in read_rows(rows) if row["kind"] == "prefix")
    assert (row["prefix_tokens"], row["test"], row["name"]) == (300, "prefix 300", "tiny")
    assert len(row["without"]) == len(row["restored"]) == 2 and row["file_bytes"] > 10_000
    assert all(start["first_token_s"] > 0 and start["load_s"] > 0 for start in row["without"])
    assert not list(cache_folder().glob("*.prefix"))
    (line,) = (line for line in render_table(read_records(record)).splitlines() if "prefix" in line)
    assert "tiny: a prompt behind 300 tokens" in line and ">= 10x sooner" in line


def test_the_ratio_is_of_whole_starts() -> None:
    assert RUN.without_s == 44.0 and RUN.restored_s == 4.0
    assert (RUN.sooner, RUN.sooner_loaded) == (11.0, round(40 / 0.9, 3))
    assert "11.0x sooner" in str(RUN)


def test_a_row_survives_the_file_and_is_shown() -> None:
    row: dict[str, Any] = {**to_json(RUN), "kind": "prefix", "name": "E2B", "time": "2026", "run": "r"}
    row |= {"engine": "ONNX Runtime", "recipe": "int4", "n_threads": 2}
    read = parse_record(json.loads(json.dumps(row)))
    assert to_json(read)["sooner"] == 11.0
    assert "| E2B int4 | ONNX Runtime | 2 | prefix 2000 | 44.00 s | 4.00 s | 11.0x |" in render([read], "md")
    with pytest.raises(FieldError):
        parse_record({**row, "without": []})


def test_a_cache_that_keeps_nothing_is_an_error_and_no_figure(
    engine_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "cache"))  # the limit would empty the usual one
    monkeypatch.setenv("GEMMA_EDGE_CACHE_LIMIT", "1KiB")
    with pytest.raises(DeviceError, match="did not keep the prefix"):
        prefix_times.measure_prefix(engine_bundle, Workload(prefix=200, reps=1, threads=1))


def test_what_does_not_fit_is_refused_before_anything_runs(engine_bundle: Path) -> None:
    with pytest.raises(UsageError, match="do not fit a context of 400"):
        Workload(prefix=400).check(400)
    assert main(["bench", str(engine_bundle), "--prefix", "390"]) == 2
    assert main(["bench", str(engine_bundle), "--prefix", "20"]) == 2
