"""Drafts measured: in both engines, as rows, as a line of the table; and what cannot be."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.benchmarks.measure import session
from gemma_edge.benchmarks.measure.speculation_times import measure_speculation
from gemma_edge.benchmarks.measure.workload import Workload
from gemma_edge.benchmarks.output.result_text import render
from gemma_edge.benchmarks.output.table import render_table
from gemma_edge.benchmarks.records.measurement import SpeculationRun
from gemma_edge.benchmarks.records.results_file import parse_record, read_records
from gemma_edge.cli.main import main
from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.files.typed_json import FieldError, to_json
from support.results import read_rows

SMALL = ["-p", "16", "-n", "0", "-r", "2", "-t", "1", "--requests", "0", "--bandwidth", "0s", "--no-cold"]
RUN = SpeculationRun("copied", 65, (8.0, 6.0, 7.0), (2.0, 1.0, 1.75), 60, 56, {"2": 1.2})


def test_a_session_measures_each_text_both_ways(
    engine_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "busy_cores", lambda: None)
    rows, record = tmp_path / "r.jsonl", tmp_path / "table.jsonl"
    argv = [
        "bench",
        str(engine_bundle),
        *SMALL,
        "--speculate",
        "64",
        "-o",
        str(rows),
        "--record",
        str(record),
    ]
    assert main([*argv, "--name", "tiny"]) == 0
    measured = {row["text"]: row for row in read_rows(rows) if row["kind"] == "speculation"}
    assert set(measured) == {"copied", "edited", "shuffled"}
    for row in measured.values():
        assert row["tokens"] == 64 and len(row["plain_s"]) == len(row["speculated_s"]) == 2
    copied = measured["copied"]
    assert copied["drafted"] == copied["accepted"] > 0 and copied["costs"]
    (line,) = (line for line in render_table(read_records(record)).splitlines() if "drafts" in line)
    assert "tiny: 64 tokens decoded with drafts" in line and "copied" in line and "shuffled" in line


def test_the_gain_is_of_medians() -> None:
    assert (RUN.plain_tps, RUN.speculated_tps) == (64 / 7, 64 / 1.75)
    assert RUN.speedup == 4.0 and "4.00x" in str(RUN) and "56 of 60" in str(RUN)


def test_a_row_survives_the_file_and_is_shown() -> None:
    row: dict[str, Any] = {**to_json(RUN), "kind": "speculation", "name": "E2B", "time": "2026", "run": "r"}
    row |= {"engine": "ONNX Runtime", "recipe": "int4", "n_threads": 2}
    read = parse_record(json.loads(json.dumps(row)))
    assert to_json(read)["speedup"] == 4.0
    shown = "| E2B int4 | ONNX Runtime | 2 | copied 65 | 9.14 tok/s | 36.57 tok/s | 4.00x | 56 of 60 |"
    assert shown in render([read], "md")
    with pytest.raises(FieldError):
        parse_record({**row, "plain_s": []})


def test_what_cannot_be_measured_is_refused(
    engine_bundle: Path, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UsageError, match="do not fit a context of 256"):
        Workload(speculate=128).check(256)
    assert main(["bench", str(engine_bundle), *SMALL, "--speculate", "200"]) == 2
    assert "401 tokens do not fit a context of 400" in capsys.readouterr().err
    assert main(["bench", str(engine_bundle), *SMALL, "--speculate", "1"]) == 2
    options: dict[str, Any] = {"recipe": "int8", "context": 64, "chunk": 1, "verify": False}
    plain = export_bundle(tiny_checkpoint, tmp_path / "plain", **options).path
    with pytest.raises(UsageError, match="verifies no drafts"):
        measure_speculation(plain, Workload(speculate=16, reps=1, threads=1))
