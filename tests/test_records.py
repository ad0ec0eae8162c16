"""Results as data: what a bundle says of itself, records, and the tables of the documents."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_edge.benchmarks.output import table
from gemma_edge.benchmarks.records.record import (
    RECORD_SCHEMA,
    RecordError,
    bundle_facts,
    environment,
    read_records,
    readme_row,
    write_record,
)
from gemma_edge.benchmarks.script import run_script
from gemma_edge.runtime.errors import BundleError, UsageError
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig


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


def record(path: Path, *rows: dict[str, Any]) -> dict[str, Any]:
    return write_record(
        path, "load", name="E2B", model="m", recipe="int4", metrics={}, raw={"samples": [1.5]}, readme=rows
    )


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
    first = record(path, readme_row("load", "<= 6 s", "4 s"))
    second = record(path)
    assert read_records(path) == [first, second]
    assert first["schema"] == RECORD_SCHEMA and first["environment"]["versions"]["numpy"] == np.__version__


def test_record_refuses_numbers_that_json_has_not(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_record(
            tmp_path / "x", "load", name="", model="", recipe="", metrics={"s": float("nan")}, raw={}
        )
    assert not (tmp_path / "x").exists()


def test_environment_describes_this_machine() -> None:
    here = environment()
    assert here["cpu"] and here["cores_usable"] >= 1 and here["memory_bytes"] > 2**28
    json.dumps(here, allow_nan=False)


@pytest.mark.parametrize(
    ("line", "field"),
    [
        ("{", "line 2"),
        ("[]", "line 2"),
        ('{"kind": "load"}', "line 2"),
        ('{"schema": 99, "kind": "load", "name": "", "time": ""}', "line 2: schema"),
        ('{"schema": 1, "kind": "load", "name": ""}', "line 2: time"),
        ('{"schema": 1, "kind": "load", "name": "", "time": "", "readme": [{"row": "a"}]}', "line 2: readme"),
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
    record(
        results, readme_row("load", "<= 6 s", "4 s"), readme_row("a|b", "", "1"), readme_row(label, "", "9")
    )
    argv = [str(results), "--readme", str(readme)]
    assert run_script(lambda: table.main([*argv, "--check"])) == 1
    assert "README.md: not made from these results" in capsys.readouterr().err
    assert page.read_text() == PAGE, "--check writes nothing"
    assert table.main(argv) == 0 and table.main([*argv, "--check"]) == 0
    text = page.read_text()
    assert "| load | <= 6 s | 4 s |\n| a\\|b |  | 1 |\n" in text
    assert text.startswith("# Title\n") and text.endswith(f"{END}\nend\n") and "old" not in text
    assert f"Measured on {environment()['cpu']}" in text
    assert f"| {words} |  | 9 |" in readme.read_text() and "load" not in readme.read_text()


def test_committed_records_have_every_highlight() -> None:
    committed = (Path(__file__).parent.parent / "benchmarks" / "results").glob("*.jsonl")
    rows = table.latest_rows([record for path in sorted(committed) for record in read_records(path)])
    assert set(table.HIGHLIGHTS) <= {row["row"] for row in rows}


def test_latest_record_wins_at_the_place_of_the_first() -> None:
    records = [
        {"time": "2026-02", "readme": [readme_row("x", "", "new"), readme_row("y", "", "1")]},
        {"time": "2026-01", "readme": [readme_row("x", "", "stale"), readme_row("z", "", "2")]},
    ]
    for ordered in (records, records[::-1]):
        rendered = table.render_table(ordered)
        assert "| x |  | new |" in rendered and "stale" not in rendered
    assert [line[2] for line in table.render_table(records).splitlines()[2:]] == ["x", "y", "z"]


@pytest.mark.parametrize("text", ["", BEGIN, END + BEGIN, PAGE + PAGE])
def test_page_without_its_markers(text: str) -> None:
    with pytest.raises(UsageError, match=r"results\.md: expected the lines"):
        table.replace_block(text, "results", "t", Path("results.md"))
