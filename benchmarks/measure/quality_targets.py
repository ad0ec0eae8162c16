"""Targets for answers, as lines of the table of results."""

from __future__ import annotations

from gemma_edge.benchmarks.records.record import Quality, QualityColumn, TableRow
from gemma_edge.export.weights.recipe import DEFAULT_RECIPE

# Where the targets of answers apply: to the column whose name begins so.
REFERENCE = "transformers"
TARGETS = {"text": 95, "image": 90, "audio": 85}  # percent correct, by medium
# Points that a recipe may lose against fp32 of the same engine.
LOSSES = {"int8": 0.5, "int4": 2.0, DEFAULT_RECIPE: 2.0}
SAME = 99  # percent of equal answers of two engines


def target_rows(model: str, metrics: Quality) -> list[TableRow]:
    """Each target with the measured value."""
    columns = {column.name: column for column in metrics.columns}
    rows = [
        TableRow(f"{model} in {name}: {kind} questions right", f">= {bar} %", f"{score.share:.1%}")
        for name, column in columns.items()
        if name.startswith(REFERENCE)
        for kind, bar in TARGETS.items()
        if (score := column.kinds.get(kind))
    ]
    for recipe, most in LOSSES.items():
        lost = [
            f"{engine} {100 * (_all(columns[fp32]) - _all(columns[name])):+.1f}"
            for name in columns
            if name.startswith(f"{recipe}, ")
            for engine in [name.split(", ")[1]]
            if (fp32 := f"fp32, {engine}") in columns
        ]
        if lost:
            label = f"{model} {recipe}: points lost against fp32"
            rows.append(TableRow(label, f"<= {most:g}", "; ".join(lost)))
    same = [
        f"{recipe} {metrics.agreement[name][other]:.1%}"
        for name in columns
        for recipe, _, engine in [name.partition(", ")]
        if engine == "ONNX" and (other := f"{recipe}, LiteRT") in columns
    ]
    if same:
        label = f"{model}: answers that ONNX and LiteRT give alike"
        rows.append(TableRow(label, f">= {SAME} %", "; ".join(same)))
    return rows


def _all(column: QualityColumn) -> float:
    scores = column.kinds.values()
    return sum(score.right for score in scores) / sum(score.total for score in scores)
