"""Results as data: what a bundle says of itself, records, and the tables of the documents."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_edge.benchmarks.measure.export_cost import ChildrenPeak
from gemma_edge.benchmarks.output import table
from gemma_edge.benchmarks.records.bundle_facts import bundle_facts
from gemma_edge.benchmarks.records.environment import environment
from gemma_edge.benchmarks.records.record import RECORD_SCHEMA, Record, TableRow
from gemma_edge.benchmarks.records.results_file import RecordError, append_record, read_records
from gemma_edge.cli.main import main
from gemma_edge.runtime.errors import BundleError, UsageError
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.units import format_size
from support.processes import wait_for


def bundle(folder: Path, **changes: Any) -> Path:
    config = Gemma3nConfig.from_dict({"model_type": "gemma3n_text"})
    manifest = {
        "schema_version": 1,
        "config": config.to_dict(),
        "files": {},
        "context": 64,
        "chunk": 8,
        "kv_cache": "fp32",
        "recipe": {"name": "int4"},
        "plan": {"bytes_per_token": 1234},
        **changes,
    }
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def load(time: str = "2026-01-01", *rows: TableRow, **more: Any) -> Record:
    return Record(kind="load", name="E2B", time=time, readme=rows, **more)


def record(path: Path, *rows: TableRow) -> Record:
    written = load("2026-01-01", *rows, raw={"samples": [1.5]}, environment=environment())
    append_record(path, written)
    return written


def test_bundle_facts(tmp_path: Path) -> None:
    facts = bundle_facts(bundle(tmp_path / "out"))
    assert (facts.recipe, facts.bytes_per_token) == ("int4", 1234)
    assert "35 layers, hidden 2048" in facts.model


@pytest.mark.parametrize("plan", [None, {}, {"bytes_per_token": 0}, {"bytes_per_token": "many"}])
def test_bundle_without_bytes_per_token(tmp_path: Path, plan: Any) -> None:
    with pytest.raises(BundleError, match=r"manifest.json: plan.bytes_per_token"):
        bundle_facts(bundle(tmp_path / "out", plan=plan))


def test_record_is_appended_and_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "results" / "x.jsonl"
    first = record(path, TableRow("load", "<= 6 s", "4 s"))
    second = record(path)
    assert read_records(path) == [first, second]
    assert first.schema == RECORD_SCHEMA and first.environment.versions["numpy"] == np.__version__


def test_record_refuses_numbers_that_json_has_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        append_record(tmp_path / "x", load(metrics={"s": float("nan")}))
    assert not (tmp_path / "x").exists()


def test_environment_describes_this_machine() -> None:
    here = environment()
    assert here.cpu and here.cores_usable and here.memory_bytes and here.memory_bytes > 2**28


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("{", "line 2"),
        ('{"kind": 7, "name": "", "time": ""}', "line 2: kind"),
        ('{"kind": "bench", "name": "", "time": ""}', "line 2: n_prompt"),
        (
            '{"kind": "bench", "name": "", "time": "", "n_prompt": 1, "n_gen": 0, "samples_ns": "x"}',
            "line 2: samples_ns",
        ),
        (
            '{"kind": "session", "name": "", "time": "", "ceiling": {"limit_bytes": "2"}}',
            "line 2: ceiling.limit_bytes",
        ),
        ('{"kind": "session", "name": "", "time": "", "environment": []}', "line 2: environment"),
        ('{"kind": "compare", "name": "", "time": "", "metrics": {}, "raw": 1}', "line 2: raw"),
        (
            '{"kind": "quality", "name": "", "time": "", "metrics": {"columns": [], "agreement": {}}}',
            "line 2: metrics.columns",
        ),
        ("[]", "line 2"),
        ('{"kind": "load"}', "line 2"),
        ('{"schema": 99, "kind": "load", "name": "", "time": ""}', "line 2: schema"),
        ('{"schema": 1, "kind": "load", "name": ""}', "line 2: time"),
        (
            '{"schema": 1, "kind": "load", "name": "", "time": "", "readme": [{"row": "a"}]}',
            r"line 2: readme\[0\].bar",
        ),
    ],
)
def test_line_that_is_no_record_is_named(tmp_path: Path, line: str, field: str) -> None:
    path = tmp_path / "x.jsonl"
    record(path)
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(RecordError, match=f"x.jsonl: {field}:"):
        read_records(path)


# The table --------------------------------------------------------------------------------------------

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
PAGE = f"# Title\n{BEGIN}\nold\n{END}\nend\n"


def documents(folder: Path) -> tuple[Path, Path]:
    """A README and a docs/results.md with empty blocks."""
    readme, page = folder / "README.md", folder / "docs" / "results.md"
    page.parent.mkdir()
    readme.write_text("<!-- highlights:begin -->\n<!-- highlights:end -->\n")
    page.write_text(PAGE)
    return readme, page


def test_tables_are_written_and_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results, (readme, page) = tmp_path / "r.jsonl", documents(tmp_path)
    label, words = next(iter(table.HIGHLIGHTS.items()))
    record(results, TableRow("load", "<= 6 s", "4 s"), TableRow("a|b", "", "1"), TableRow(label, "", "9"))
    argv = ["report", str(results), "--readme", str(readme)]
    assert main([*argv, "--check"]) == 1
    assert "README.md: not made from these results" in capsys.readouterr().err
    assert page.read_text() == PAGE, "--check writes nothing"
    assert main(argv) == 0 and main([*argv, "--check"]) == 0
    text = page.read_text()
    assert "| load | <= 6 s | 4 s |\n| a\\|b |  | 1 |\n" in text
    assert text.startswith("# Title\n") and text.endswith(f"{END}\nend\n") and "old" not in text
    assert f"Measured on {environment().cpu}" in text
    assert f"| {words} |  | 9 |" in readme.read_text() and "load" not in readme.read_text()


def test_committed_records_have_every_highlight() -> None:
    committed = (Path(__file__).parent.parent / "benchmarks" / "results").glob("*.jsonl")
    rows = table.latest_rows([record for path in sorted(committed) for record in read_records(path)])
    assert set(table.HIGHLIGHTS) <= {row.row for row in rows}


def test_latest_record_wins_at_the_place_of_the_first() -> None:
    records = [
        load("2026-02", TableRow("x", "", "new"), TableRow("y", "", "1")),
        load("2026-01", TableRow("x", "", "stale"), TableRow("z", "", "2")),
    ]
    for ordered in (records, records[::-1]):
        rendered = table.render_table(ordered)
        assert "| x |  | new |" in rendered and "stale" not in rendered
    assert [line[2] for line in table.render_table(records).splitlines()[2:]] == ["x", "y", "z"]


@pytest.mark.parametrize("text", ["", BEGIN, END + BEGIN, PAGE + PAGE])
def test_page_without_its_markers(text: str) -> None:
    with pytest.raises(UsageError, match=r"results\.md: expected the lines"):
        table.replace_block(text, "results", "t", Path("results.md"))


def test_an_export_is_recorded(tiny_checkpoint: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    argv = ["export", str(tiny_checkpoint), str(tmp_path / "out"), "--no-verify", "--context", "64"]
    argv += ["--recipe", "int8"]
    with subprocess.Popen(["sleep", "3600"]) as other:  # no part of the export
        assert main([*argv, "--record", str(path)]) == 0
        other.kill()
    (record,) = read_records(path)
    assert isinstance(record, Record) and (record.kind, record.name) == ("export", "out")
    assert record.metrics["engine_peak_rss_anon_bytes"] == 0
    assert record.metrics["verified"] is False and record.raw["plan"]["context"] == 64
    (row,) = record.readme
    peak = format_size(record.metrics["peak_rss_anon_bytes"], binary=False)
    assert row.row == "out: export without the gate, peak RssAnon and time"
    assert re.fullmatch(rf"{re.escape(peak)} in \d+ s, \d+ s of CPU time", row.value)


def test_the_memory_of_processes_that_an_export_starts() -> None:
    hold = "import sys; held = b'x' * (64 << 20); print('held', flush=True); sys.stdin.read()"
    with (
        ChildrenPeak() as peak,
        subprocess.Popen([sys.executable, "-c", hold], stdin=-1, stdout=-1) as process,
    ):
        assert process.stdin and process.stdout and process.stdout.readline() == b"held\n"
        wait_for(lambda: peak.rss_anon >= 64 << 20, "its memory was never seen")
