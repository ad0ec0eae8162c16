"""Records of `quality` as markdown: the table of the README, and its lines about bars."""

from __future__ import annotations

from typing import Any

from gemma_edge.benchmarks.records.record import readme_row
from gemma_edge.runtime.units import format_size

Json = dict[str, Any]

# Where the bars of answers apply: to the column whose name begins so.
REFERENCE = "transformers"
BARS = {"text": 95, "image": 90, "audio": 85}  # percent right, by what the questions are about
LOSSES = {"int8": 0.5, "int4": 2.0}  # points that a recipe may lose against fp32 of the same engine
SAME = 99  # percent of equal answers of two engines


def render_quality(metrics: Json) -> str:
    """A column a bundle, a row a measure."""
    columns: list[Json] = metrics["columns"]
    first = columns[0]["name"]
    rows = [["", *(column["name"] for column in columns)]]
    rows += [
        [f"**{kind}**", *(f"**{_share(column['kinds'].get(kind))}**" for column in columns)]
        for kind in columns[0]["kinds"]
    ]
    rows += [
        [task, *(_share(column["tasks"].get(task)) for column in columns)] for task in columns[0]["tasks"]
    ]
    rows += [
        ["KL, nats a token", *(_divergence(column, "mean_kl", ".2g") for column in columns)],
        ["same likeliest token", *(_divergence(column, "top1", ".1%") for column in columns)],
        [
            "perplexity",
            *(_divergence(column, "bundle_perplexity", ".3f") for column in columns),
        ],
        ["files", *(_size(column, "file_bytes") for column in columns)],
        ["peak RssAnon", *(_size(column, "peak_rss_anon_bytes") for column in columns)],
    ]
    same = [metrics["agreement"].get(column["name"], {}).get(first) for column in columns]
    rows.append([f"answers as {first}", *map(_percent, same)])
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def bar_rows(model: str, metrics: Json) -> list[Json]:
    """Rows of the README's table of results: each bar with what was measured."""
    rows, columns = [], {column["name"]: column for column in metrics["columns"]}
    for name, column in columns.items():
        if name.startswith(REFERENCE):
            for kind, bar in BARS.items():
                if counts := column["kinds"].get(kind):
                    rows.append(
                        readme_row(
                            f"{model} in {name}: {kind} questions right", f">= {bar} %", _share(counts)
                        )
                    )
    for recipe, most in LOSSES.items():
        lost = [
            f"{engine} {100 * (_all(columns[fp32]) - _all(columns[name])):+.1f}"
            for name in columns
            if name.startswith(f"{recipe}, ")
            for engine in [name.split(", ")[1]]
            if (fp32 := f"fp32, {engine}") in columns
        ]
        if lost:
            rows.append(
                readme_row(f"{model} {recipe}: points lost against fp32", f"<= {most:g}", "; ".join(lost))
            )
    same = [
        f"{recipe} {_percent(metrics['agreement'][name][other])}"
        for name in columns
        for recipe, _, engine in [name.partition(", ")]
        if engine == "ONNX" and (other := f"{recipe}, LiteRT") in columns
    ]
    if same:
        rows.append(
            readme_row(f"{model}: answers that ONNX and LiteRT give alike", f">= {SAME} %", "; ".join(same))
        )
    return rows


def _all(column: Json) -> float:
    counts = column["kinds"].values()
    return float(sum(c["right"] for c in counts) / sum(c["total"] for c in counts))


def _share(counts: Json | None) -> str:
    return f"{counts['right'] / counts['total']:.1%}" if counts else ""


def _percent(share: float | None) -> str:
    return "" if share is None else f"{share:.1%}"


def _divergence(column: Json, key: str, form: str) -> str:
    return format(column["divergence"][key], form) if column.get("divergence") else ""


def _size(column: Json, key: str) -> str:
    return format_size(column[key]) if key in column else ""
