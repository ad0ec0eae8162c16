"""Checks the shape of records when a results file is read.

Shapes are those of `gemma_edge.runtime.json_shape`.
"""

from __future__ import annotations

from collections.abc import Mapping

from gemma_edge.runtime.json_shape import Shape

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
ANY_RECORD: Shape = {"device": "text?", "environment?": HEAD["environment?"]}
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
        "n_threads": "size",
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
