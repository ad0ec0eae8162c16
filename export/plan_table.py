"""A plan as a table for people, as `gemma-edge inspect` prints it."""

from __future__ import annotations

from typing import Any

from gemma_edge.runtime.units import format_size

ON_DEMAND = "on demand"  # residency of encoders
TITLES = {
    "decoder": "decoder layers",
    "head": "output head",
    "small": "small projections",
    "vector": "norms and scales",
    "ple": "per-layer embeddings",
    "embedding": "token embeddings",
    "vision": "image encoder",
    "audio": "audio encoder",
}
# What of a manifest's plan the table shows.
PLAN_SHAPE = {
    **dict.fromkeys(
        ("context", "chunk", "kv_cache_bytes", "activation_bytes", "base_bytes", "peak_bytes"), "size"
    ),
    **dict.fromkeys(("file_bytes", "bytes_per_token"), "size"),
    **dict.fromkeys(("beside_bytes", "needed_bytes", "snapshot_bytes"), "size?"),
    "recipe": "text",
    "parts": [
        {
            **dict.fromkeys(("part", "residency"), "text"),
            **dict.fromkeys(("elements", "bits", "file_bytes", "memory_bytes"), "size"),
        }
    ],
}
NAMES = {"vision": "images", "audio": "audio"}


def format_plan(plan: dict[str, Any]) -> str:
    """The plan as a table for people."""
    rows = [("part", "weights", "bits", "on disk", "in memory", "residency")]
    for part in plan["parts"]:
        rows.append(
            (
                TITLES.get(part["part"], part["part"]),
                format_count(part["elements"]),
                f"{part['bits']:.2f}",
                format_size(part["file_bytes"]),
                format_size(part["memory_bytes"]) if part["memory_bytes"] else "-",
                part["residency"],
            )
        )
    for title, key in (
        (f"KV cache, {plan['context']} tokens", "kv_cache_bytes"),
        *([("KV snapshots", "snapshot_bytes")] if plan.get("snapshot_bytes") else []),
        (f"activations, {plan['chunk']} tokens", "activation_bytes"),
        ("engine and tokenizer", "base_bytes"),
    ):
        rows.append((title, "", "", "", format_size(plan[key]), "resident"))
    total = format_size(plan["peak_bytes"])
    rows.append(("predicted", "", "", format_size(plan["file_bytes"]), total, "peak"))
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 5)), row[5]]
        lines.append("  ".join(cells).rstrip())
    lines.insert(1, "  ".join("-" * width for width in widths))
    lines.insert(len(lines) - 1, lines[1])
    if any(part["residency"] == ON_DEMAND for part in plan["parts"]):
        both = format_size(plan["beside_bytes"])
        lines.append(
            f"encoders run before the decoder is loaded; with both, in a later turn, the peak is {both}"
        )
    if (needed := plan.get("needed_bytes")) is not None:
        room = format_size(needed - plan["peak_bytes"])
        lines.append(
            f"the smallest --ceiling is {needed_size(needed)}: the peak and {room} for file pages in use"
        )
    lines.append(
        f"recipe {plan['recipe']}; a decode step reads {format_size(plan['bytes_per_token'])} of weights"
    )
    return "\n".join(lines)


def needed_size(size: int) -> str:
    """Bytes in MiB, rounded up: a ceiling of what is shown is enough."""
    return f"{-(-size // 2**20)} MiB"


def format_count(count: int) -> str:
    """1905000000 -> "1.91 B"."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("K", 10**3)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)
