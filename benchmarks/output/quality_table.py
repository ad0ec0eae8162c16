"""Records of quality as a markdown table."""

from __future__ import annotations

from collections.abc import Iterable

from gemma_edge.benchmarks.records.record import Quality, QualityRecord, Score
from gemma_edge.runtime.units import format_size


def render_quality(metrics: Quality) -> str:
    """A column a bundle, a row a measure."""
    columns = metrics.columns
    first = columns[0]
    rows = [["", *(column.name for column in columns)]]
    rows += [
        [f"**{kind}**", *(f"**{_share(column.kinds.get(kind))}**" for column in columns)]
        for kind in first.kinds
    ]
    rows += [[task, *(_share(column.tasks.get(task)) for column in columns)] for task in first.tasks]
    same = [metrics.agreement.get(column.name, {}).get(first.name) for column in columns]
    for where, apart in (
        ("answers", [column.divergence for column in columns]),
        ("prose", [column.prose for column in columns]),
    ):
        if where == "prose" and not any(apart):
            continue
        rows += [
            [f"{where}: KL, nats a token", *(f"{each.mean_kl:.2g}" if each else "" for each in apart)],
            [f"{where}: same likeliest token", *(f"{each.top1:.1%}" if each else "" for each in apart)],
            [f"{where}: perplexity", *(f"{each.bundle_perplexity:.3f}" if each else "" for each in apart)],
        ]
    rows += [
        ["files", *(_size(column.file_bytes) for column in columns)],
        ["peak RssAnon", *(_size(column.peak_rss_anon_bytes) for column in columns)],
        [f"answers as {first.name}", *("" if share is None else f"{share:.1%}" for share in same)],
    ]
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def render_methods(records: Iterable[QualityRecord]) -> str:
    """A row a bundle, of records that compare methods of rounding."""
    head = ["recipe", "weights rounded", "engine", "KL, nats a token", "same likeliest token", "perplexity"]
    rows = [[*head, "weights read a token", "tok/s"]]
    for column in (column for record in records for column in record.metrics.columns):
        prose, rate = column.prose, column.decode_rate
        rows.append(
            [
                f"`{column.recipe}`",
                {"nearest": "to the nearest"}.get(column.method or "", column.method or ""),
                column.name.rpartition(", ")[2],
                *(
                    [f"{prose.mean_kl:.3g}", f"{prose.top1:.1%}", f"{prose.bundle_perplexity:.3f}"]
                    if prose
                    else [""] * 3
                ),
                _size(column.bytes_per_token),
                "" if rate is None else f"{rate:.0f}",
            ]
        )
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def _share(score: Score | None) -> str:
    return f"{score.share:.1%}" if score else ""


def _size(size: int | None) -> str:
    return "" if size is None else format_size(size)
