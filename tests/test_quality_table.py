"""The table of what recipes cost in answers, and the rows about bars."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.benchmarks.measure import recipe_quality as quality
from gemma_edge.benchmarks.measure.quality_targets import target_rows
from gemma_edge.benchmarks.measure.questions import Answered, Question
from gemma_edge.benchmarks.output import table
from gemma_edge.benchmarks.output.quality_table import render_methods, render_quality
from gemma_edge.benchmarks.records.record import Divergence, Quality, QualityColumn, QualityRecord, Score
from gemma_edge.benchmarks.records.results_file import append_record
from gemma_edge.runtime.errors import UsageError


def column(name: str, right: int, **more: Any) -> QualityColumn:
    score = Score(right, 200)
    return QualityColumn(name, {"tools": score}, {"text": score}, **more)


COSTS: dict[str, Any] = {
    "divergence": Divergence(mean_kl=0.0123, top1=0.987, bundle_perplexity=1.2345),
    "file_bytes": 10_000_000,
    "peak_rss_anon_bytes": 50_000_000,
}
COLUMNS = (
    column("transformers", 196),
    column("fp32, ONNX", 196, **COSTS),
    column("fp32, LiteRT", 194, **COSTS),
    column("int8, ONNX", 195, **COSTS),
    column("int8, LiteRT", 195, **COSTS),
)
NAMES = [one.name for one in COLUMNS]
METRICS = Quality(COLUMNS, {name: {other: 0.995 for other in NAMES if other != name} for name in NAMES})


def test_a_column_a_bundle_and_blanks_where_nothing_was_measured() -> None:
    lines = render_quality(METRICS).splitlines()
    assert lines[0].startswith("|  | transformers | fp32, ONNX |")
    assert all(line.count("|") == 7 for line in lines)
    assert "| **text** | **98.0%** | **98.0%** | **97.0%** | **97.5%** | **97.5%** |" in lines
    assert "| answers: KL, nats a token |  | 0.012 | 0.012 | 0.012 | 0.012 |" in lines
    assert not any(line.startswith("| prose") for line in lines)
    assert "| answers as transformers |  | 99.5% | 99.5% | 99.5% | 99.5% |" in lines


def test_divergence_over_a_text_has_rows_of_its_own() -> None:
    prose = Divergence(mean_kl=0.25, top1=0.75, bundle_perplexity=12.5)
    lines = render_quality(
        replace(METRICS, columns=(COLUMNS[0], replace(COLUMNS[1], prose=prose)))
    ).splitlines()
    assert "| prose: KL, nats a token |  | 0.25 |" in lines
    assert "| prose: perplexity |  | 12.500 |" in lines


def test_methods_of_rounding_have_a_table_of_their_own(tmp_path: Path) -> None:
    """Their records do not replace the table of recipes."""
    prose = Divergence(mean_kl=0.03125, top1=0.875, bundle_perplexity=17.0)
    more: dict[str, Any] = {"prose": prose, "recipe": "int4", "bytes_per_token": 3 << 20, "decode_rate": 99.6}
    columns = tuple(
        replace(COLUMNS[1], name=f"int4 {method}, ONNX", method=method, **more)
        for method in ("nearest", "calibrated")
    )
    records = [
        QualityRecord(kind="quality", name="Pocket", time="2026", metrics=METRICS),
        QualityRecord(kind="quality", name="methods", time="2027", metrics=replace(METRICS, columns=columns)),
    ]
    lines = render_methods(records[1:]).splitlines()
    assert lines[2] == "| `int4` | to the nearest | ONNX | 0.0312 | 87.5% | 17.000 | 3 MiB | 100 |"
    assert lines[3].startswith("| `int4` | calibrated | ONNX |") and len(lines) == 4
    readme, page, results = tmp_path / "README.md", tmp_path / "docs" / "results.md", tmp_path / "7.jsonl"
    page.parent.mkdir()
    readme.write_text("<!-- highlights:begin -->\n<!-- highlights:end -->\n")
    page.write_text(
        "".join(f"<!-- {n}:begin -->\n<!-- {n}:end -->\n" for n in ("results", "quality", "methods"))
    )
    for record in records:
        append_record(results, record)
    assert table.update_documents(readme, [results])
    made = page.read_text()
    assert f"<!-- quality:begin -->\n{render_quality(METRICS)}\n" in made
    assert "\n".join(lines) in made


def test_bars_with_what_was_measured() -> None:
    rows = {row.row: (row.bar, row.value) for row in target_rows("Pocket", METRICS)}
    assert rows == {
        "Pocket in transformers: text questions right": (">= 95 %", "98.0%"),
        "Pocket int8: points lost against fp32": ("<= 0.5", "ONNX +0.5; LiteRT -0.5"),
        "Pocket: answers that ONNX and LiteRT give alike": (">= 99 %", "fp32 99.5%; int8 99.5%"),
    }


def test_the_page_of_results_has_the_latest(tmp_path: Path) -> None:
    readme, page, results = tmp_path / "README.md", tmp_path / "docs" / "results.md", tmp_path / "5.jsonl"
    page.parent.mkdir()
    readme.write_text("<!-- highlights:begin -->\n<!-- highlights:end -->\n")
    page.write_text(
        "".join(f"<!-- {name}:begin -->\n<!-- {name}:end -->\n" for name in ("results", "quality"))
    )
    for count in (1, 2):
        metrics = replace(METRICS, columns=COLUMNS[-count:])
        record = QualityRecord(kind="quality", name="Pocket", time=f"202{9 - count}", metrics=metrics)
        append_record(results, record)
    assert table.update_documents(readme, [results])
    newest = render_quality(replace(METRICS, columns=COLUMNS[-1:]))
    assert f"<!-- quality:begin -->\n{newest}\n<!-- quality:end -->" in page.read_text()
    assert not table.update_documents(readme, [results], check=True)


def test_counts_are_by_task_and_by_what_is_asked_about() -> None:
    content = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "?"}]
    picture, words = ([{"role": "user", "content": c}] for c in (content, "?"))
    tasks = (("colour", picture, "red"), ("sums", words, "4"), ("sums", words, "5"))
    questions = [Question(*task, place="") for task in tasks]
    given = [Answered("colour", "red", "red"), Answered("sums", "4", "4"), Answered("sums", "5", "4")]
    assert quality.counts(questions, given) == (
        {"colour": Score(1, 1), "sums": Score(1, 2)},
        {"image": Score(1, 1), "text": Score(1, 2)},
    )
    assert quality.raw_answers(given) == {"colour": "1", "sums": "10"}


@pytest.mark.parametrize("content", [None, "{", "[]", '{"answers": [{"got": "a"}]}'])
def test_answers_that_are_none(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "answers.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UsageError, match="expected NAME=FILE"):
        quality.read_answers(f"transformers={path}")
