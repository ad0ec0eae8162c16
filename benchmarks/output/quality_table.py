"""Records of quality as a markdown table."""

from __future__ import annotations

from gemma_edge.benchmarks.records.record import Quality, Score
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


def _share(score: Score | None) -> str:
    return f"{score.share:.1%}" if score else ""


def _size(size: int | None) -> str:
    return "" if size is None else format_size(size)
