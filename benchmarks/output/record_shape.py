"""Checks the shape of records when a results file is read.

A shape is written as data: "text", "number" (finite), "size" (a number of 0 or more), "flag"; a list of one
shape; a dict of fields. A shape or a field's name that ends in "?" may be null or absent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

LARGEST = 1e18
Shape = Any  # of the three kinds above; they nest

PERCENTILES = {"p50": "size", "p90": "size", "p99": "size"}
MEMORY = {"rss_anon": "size?", "rss_file": "size?", "pss": "size?", "rss": "size?", "major_faults": "size?"}
HEAD = {
    "run": "text",
    "device": "text",
    "engine": "text?",
    "recipe": "text?",
    "n_threads": "size?",
    "environment?": {
        "cpu": "text?",
        "cores_usable": "size?",
        "memory_bytes": "size?",
        "kernel": "text?",
        "cpu_flags?": ["text"],
        "versions?": {"*": "text?"},
    },
}
SHAPES: Mapping[str, Shape] = {
    "bench": {
        **HEAD,
        "engine": "text",
        "test": "text",
        "n_threads": "size",
        **dict.fromkeys(("n_prompt", "n_gen", "n_depth", "avg_ts", "stddev_ts", "median_ts"), "size"),
        "samples_ts": ["size"],
        "bandwidth_share": "size?",
        "bandwidth_gb_s": "size?",
    },
    "encode": {
        **HEAD,
        "engine": "text",
        "test": "text",
        "encoder": "text",
        **dict.fromkeys(
            ("avg_ns", "stddev_ns", "median_ns", "load_s", "peak_rss_anon", "peak_rss_file"), "size"
        ),
        "real_time": "size?",
        "samples_ns": ["size"],
    },
    "session": {
        **HEAD,
        "workload?": {"threads": "size?"},
        "load?": {"*": "size?"},
        "error": "text?",
        "notes?": ["text"],
        "phases?": [{"name": "text", "start_s": "size", "end_s": "size"}],
        "memory?": {
            "steady?": MEMORY,
            "peak": {**MEMORY, "rss_anon": "size"},
            "timeline?": {"seconds": ["size"], "rss_anon": ["size"], "rss_file": ["size"]},
        },
        "latency?": {
            "prompt_tokens": "size",
            "requests": "size",
            "ttft_ms": PERCENTILES,
            "itl_ms?": PERCENTILES,
            "samples_itl_ms?": ["size"],
        },
        "ceiling?": {"limit_bytes": "size?", "met": "flag", "enforced": "flag", "text": "text"},
        "sustained?": {
            "text": "text",
            "points?": [{"t_s": "size", "tg_ts": "size", "temperature_c": "number?"}],
        },
        "ratios?": [
            {"engine": "text", "test": "text", "ratio": "size", "rounds": "size", "samples": ["size"]}
        ],
        "bars?": [{"what": "text", "value": "size", "bar": "size", "met": "flag"}],
    },
}
NAMES = {"text": "a text", "number": "a number", "size": "a number of 0 or more", "flag": "true or false"}


def misfit(value: Any, shape: Shape, where: str = "") -> tuple[str, str] | None:
    """Where a value departs from its shape, and what belongs there; None where it does not."""
    if isinstance(shape, str):
        kind = shape.removesuffix("?")
        fits = (value is None and shape != kind) or _is(value, kind)
        return None if fits else (where, NAMES[kind])
    if isinstance(shape, list):
        if not isinstance(value, list):
            return where, "a list"
        items = (misfit(item, shape[0], f"{where}[{index}]") for index, item in enumerate(value))
        return next(filter(None, items), None)
    if not isinstance(value, dict):
        return where, "an object"
    for name, part in shape.items():
        key = name.removesuffix("?")
        for own in value if key == "*" else [key]:
            here = value.get(own)
            if here is None and name != key:
                continue
            if found := misfit(here, part, f"{where}.{own}".lstrip(".")):
                return found
    if (
        where.endswith("timeline")
        and len({len(column) for column in value.values() if isinstance(column, list)}) > 1
    ):
        return where, "columns of one length"
    return None


def _is(value: Any, kind: str) -> bool:
    if kind == "text":
        return isinstance(value, str)
    if kind == "flag":
        return isinstance(value, bool)
    number = isinstance(value, (int, float)) and not isinstance(value, bool) and -LARGEST <= value <= LARGEST
    return number and (kind == "number" or value >= 0) and not math.isnan(value)
