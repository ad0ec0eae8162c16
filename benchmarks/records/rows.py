"""Results of `gemma-edge bench` as rows: JSONL that programs for llama-bench read too, CSV, and markdown.

Three kinds of rows, all of them records of `record.read_records`:

- `bench`: one test. It has every field that llama-bench's own JSONL has, with its names and units, and ours.
- `encode`: one encoder: an image, or the longest clip.
- `session`: a bundle with one number of threads, and all that is not the speed of a test: memory over time,
  load, latency, ceiling.

Rows of one run have the same `run`.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gemma_edge.benchmarks.records.measurement import Measurement
from gemma_edge.benchmarks.records.record import RECORD_SCHEMA, BundleFacts, append_record
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.units import format_size
from gemma_edge.runtime.version import __version__

Json = dict[str, Any]
FORMATS = ("md", "jsonl", "csv")

# llama-bench's fields in its order; what does not exist here has the value that says so there.
LLAMA_BENCH_FIELDS: Json = {
    "build_commit": None, "build_number": 0, "cpu_info": None, "gpu_info": "", "backends": "CPU",
    "model_filename": None, "model_type": None, "model_size": None, "model_n_params": None, "n_batch": None,
    "n_ubatch": None, "n_threads": None, "cpu_mask": "0x0", "cpu_strict": False, "poll": 0,
    "type_k": None, "type_v": None, "n_gpu_layers": 0, "n_cpu_moe": 0, "split_mode": "none",
    "main_gpu": 0, "no_kv_offload": False, "flash_attn": 0, "devices": "none", "tensor_split": "0.00",
    "tensor_buft_overrides": "none", "load_mode": "mmap", "lazy_mode": "off", "embeddings": False,
    "no_op_offload": 0, "no_host": False, "repack": True, "fit_target": 0, "fit_min_ctx": 0,
    "n_prompt": None, "n_gen": None, "n_depth": None,
    "test_time": None, "avg_ns": None, "stddev_ns": None, "avg_ts": None, "stddev_ts": None,
    "samples_ns": None, "samples_ts": None,
}  # fmt: skip
# What a spreadsheet wants: numbers and names, no lists.
CSV_FIELDS = (
    "run", "time", "device", "name", "engine", "recipe", "model_filename", "model_type", "model_size",
    "model_n_params", "n_threads", "test", "n_prompt", "n_gen", "n_depth", "avg_ns", "stddev_ns", "avg_ts",
    "stddev_ts", "median_ts", "bandwidth_gb_s", "bandwidth_share", "cpu_s", "cores_busy", "major_faults",
    "peak_rss_anon", "peak_rss", "temperature_c", "frequency_mhz", "cpu_info",
    "median_ns", "real_time", "load_s", "soft_tokens", "peak_rss_file",
)  # fmt: skip


def header(kind: str, run: str, name: str, device: str, time: str, environment: Json) -> Json:
    """What every row begins with."""
    return {
        "schema": RECORD_SCHEMA,
        "kind": kind,
        "run": run,
        "name": name,
        "device": device,
        "time": time,
        "environment": environment,
    }


def kernel_row(
    head: Json,
    test: Json,
    facts: BundleFacts,
    filename: str,
    threads: int,
    engine: str,
    *,
    bandwidth_gb_s: float | None = None,
    memory_peak: Json | None = None,
) -> Json:
    """A `bench` row.

    Args:
        head: of `header`.
        test: one of a worker's report's "tests".
        engine: what computed it, with its version.
        bandwidth_gb_s: stream-read bandwidth of the same run; decode tests get their share of it.
        memory_peak: "rss_anon" and "rss" of the process, in bytes.
    """
    speed = Measurement.from_dict(test)
    sensors = test.get("sensors") or {}
    kv = {"fp32": "f32", "int8": "i8"}.get(facts.kv_cache, facts.kv_cache)
    row = {
        **LLAMA_BENCH_FIELDS,
        **speed.to_dict(),
        "build_commit": __version__,
        "cpu_info": head["environment"].get("cpu"),
        "model_filename": filename,
        "model_type": f"{facts.model} {facts.recipe}",
        "model_size": facts.file_bytes,
        "model_n_params": facts.parameters,
        "n_batch": facts.chunk,
        "n_ubatch": facts.chunk,
        "n_threads": threads,
        "type_k": kv,
        "type_v": kv,
        "test_time": head["time"],
    }
    share = None
    if bandwidth_gb_s and speed.n_gen:
        share = round(facts.bytes_per_token * speed.median_ts / (bandwidth_gb_s * 1e9), 4)
    ours = {
        "engine": engine,
        "model": facts.model,
        "recipe": facts.recipe,
        "format": facts.format,
        "bytes_per_token": facts.bytes_per_token,
        "bandwidth_gb_s": bandwidth_gb_s,
        "bandwidth_share": share,
        "cpu_s": test.get("cpu_s"),
        "cores_busy": test.get("cores_busy"),
        "major_faults": test.get("major_faults"),
        "peak_rss_anon": (memory_peak or {}).get("rss_anon"),
        "peak_rss": (memory_peak or {}).get("rss"),
        "temperature_c": sensors.get("temperature_c"),
        "frequency_mhz": max(sensors.get("frequency_mhz") or [0]) or None,
        "sensors": sensors,
    }
    return {**head, **row, **ours}


def encode_row(
    head: Json, run: Json, facts: BundleFacts, filename: str, threads: int, engine: str, limit: int | None
) -> Json:
    """An `encode` row of one of a worker's report's "encode"; `limit` is the ceiling that was enforced."""
    return {
        **head,
        **run,
        "model_filename": filename,
        "n_threads": threads,
        "engine": engine,
        "model": facts.model,
        "recipe": facts.recipe,
        "format": facts.format,
        "limit_bytes": limit,
        "test_time": head["time"],
    }


def peer_row(head: Json, test: Measurement, engine: str, filename: str, threads: int, peak_rss: int) -> Json:
    """A `bench` row of another program; what it does not tell is null."""
    row = {
        **LLAMA_BENCH_FIELDS,
        **test.to_dict(),
        "cpu_info": head["environment"].get("cpu"),
        "model_filename": filename,
        "n_threads": threads,
        "test_time": head["time"],
    }
    return {**head, **row, "engine": engine, "peak_rss": peak_rss}


# Writing ----------------------------------------------------------------------------------------------


def parse_outputs(text: str, run: str) -> list[tuple[str, Path | None]]:
    """`-o`: formats and files, with commas between: the first bare format goes to stdout (None), others to
    files.

    Raises:
        UsageError: neither a format nor a file name that ends in one.
    """
    outputs: list[tuple[str, Path | None]] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        kind = part if part in FORMATS else Path(part).suffix[1:]
        if kind not in FORMATS:
            names = ", ".join(FORMATS)
            raise UsageError(f"-o {part}: expected {names}, or a file name that ends in one of them")
        on_stdout = part == kind and not any(path is None for _, path in outputs)
        outputs.append((kind, None if on_stdout else Path(part if part != kind else f"bench-{run}.{kind}")))
    if not outputs:
        raise UsageError(f"-o: expected {', '.join(FORMATS)}, or file names")
    return outputs


def render(rows: Sequence[Json], kind: str) -> str:
    """All rows in one format; CSV holds tests and encoders only, markdown is for people."""
    if kind == "jsonl":
        return "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)
    return to_csv(rows) if kind == "csv" else to_markdown(rows)


def save(rows: Sequence[Json], kind: str, path: Path) -> None:
    """Appends to a JSONL file, replaces any other."""
    if kind == "jsonl":
        for row in rows:
            append_record(path, row)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(render(rows, kind), encoding="utf-8")


def to_csv(rows: Iterable[Json]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, CSV_FIELDS, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(row for row in rows if row["kind"] in ("bench", "encode"))
    return text.getvalue()


def to_markdown(rows: Sequence[Json]) -> str:
    """The tests as a table, and what each session adds below it."""
    tests = [row for row in rows if row["kind"] == "bench"]
    lines = []
    if tests:
        several = len({row["device"] for row in tests}) > 1
        head = ["model", "engine", "threads", "test", "tok/s", "median", "of bandwidth"]
        lines += _table(["device", *head] if several else head, [_test_cells(r, several) for r in tests])
    if encoders := [row for row in rows if row["kind"] == "encode"]:
        several = len({row["device"] for row in encoders}) > 1
        head = ["device", *ENCODE_HEAD] if several else ENCODE_HEAD
        cells = [[row["device"], *encode_cells(row)] if several else encode_cells(row) for row in encoders]
        lines += ["", *_table(head, cells)]
    for session in (row for row in rows if row["kind"] == "session"):
        title = ", ".join(filter(None, (f"{session['name']} on {session['device']}", threads_of(session))))
        lines += ["", *_table([title, ""], session_lines(session))]
    return "\n".join(lines).strip() + "\n"


def _test_cells(row: Json, device: bool) -> list[str]:
    share = row.get("bandwidth_share") if row.get("bandwidth_gb_s") else None
    cells = [
        " ".join(filter(None, (row["name"], row.get("recipe")))),
        row["engine"],
        str(row["n_threads"]),
        row["test"],
        f"{row['avg_ts']:.2f} ± {row['stddev_ts']:.2f}",
        f"{row['median_ts']:.2f}",
        f"{share:.0%} of {row['bandwidth_gb_s']:.1f} GB/s" if share else "",
    ]
    return [row["device"], *cells] if device else cells


ENCODE_HEAD = ["model", "engine", "threads", "encode", "seconds", "median", "load", "RssAnon", "RssFile"]


def encode_cells(row: Json) -> list[str]:
    """An `encode` row for people, below ENCODE_HEAD; sizes are peaks."""
    speed = f", {row['real_time']:.1f}x real time" if row.get("real_time") else ""
    return [
        " ".join(filter(None, (row["name"], row.get("recipe")))),
        row["engine"],
        str(row["n_threads"]),
        row["test"],
        f"{row['avg_ns'] / 1e9:.2f} ± {row['stddev_ns'] / 1e9:.2f}",
        f"{row['median_ns'] / 1e9:.2f}{speed}",
        f"{row['load_s']:.2f} s",
        format_size(row["peak_rss_anon"]),
        format_size(row["peak_rss_file"]),
    ]


def threads_of(row: Json) -> str:
    """ "1 thread", "2 threads", or nothing where a row does not say."""
    count = row.get("n_threads") or (row.get("workload") or {}).get("threads")
    return f"{count} thread{'s' if count > 1 else ''}" if count else ""


def session_lines(session: Json) -> list[list[str]]:
    """Label and text of all that a session measured, for people."""
    lines: list[list[str]] = []

    def add(label: str, text: str | None) -> None:
        if text:
            lines.append([label, text])

    load, memory, latency = session.get("load") or {}, session.get("memory"), session.get("latency")
    times = [f"{load[key]:.2f} s {label}" for key, label in _LOADS if load.get(key) is not None]
    add("load", ", ".join(times))
    if memory:
        steady, peak = memory.get("steady") or {}, memory["peak"]
        for label, sample in (("memory, steady", steady), ("memory, peak", peak)):
            sizes = [
                f"{name} {format_size(sample[key])}" for key, name in _SIZES if sample.get(key) is not None
            ]
            add(label, ", ".join(sizes))
        if steady.get("major_faults") is not None:
            add("major page faults", str(steady["major_faults"]))
    if latency:
        first, gaps = latency["ttft_ms"], latency["itl_ms"]
        prompt = f"prompt of {latency['prompt_tokens']}"
        add("time to first token", f"{_percentiles(first)}; {prompt}, {latency['requests']} requests")
        add("between tokens", _percentiles(gaps) if gaps else None)
    add("ceiling", (session.get("ceiling") or {}).get("text"))
    add("sustained", (session.get("sustained") or {}).get("text"))
    for ratio in session.get("ratios") or ():
        add(
            f"against {ratio['engine']}",
            f"{ratio['test']}: {ratio['ratio']:.2f}x, median of {ratio['rounds']}",
        )
    for bar in session.get("bars") or ():
        add(bar["what"], f"{bar['value']:.2f}, asked for {bar['bar']:g}: {'met' if bar['met'] else 'MISSED'}")
    for note in session.get("notes") or ():
        add("note", note)
    add("failed", session.get("error"))
    return lines


_LOADS = (
    ("first_s", "first, packing weights"),
    ("cold_s", "cold"),
    ("warm_s", "warm"),
    ("limited_s", "under the limit"),
    ("import_s", "import"),
)
_SIZES = (("rss_anon", "RssAnon"), ("rss_file", "RssFile"), ("pss", "Pss"), ("rss", "RSS"))


def _percentiles(values: Json) -> str:
    return ", ".join(f"{key.upper()} {values[key]:.1f} ms" for key in ("p50", "p90", "p99"))


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [list(head), ["---"] * len(head), *map(list, rows)]
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
