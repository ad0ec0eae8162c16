"""What the operators of a decode step take in ONNX Runtime, by its own profiler."""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_right
from collections import defaultdict
from pathlib import Path
from typing import Any

import onnxruntime as ort

from gemma_edge.benchmarks.measure.step_profile import (
    ATTENTION,
    BETWEEN,
    ELEMENTWISE,
    FLOATS,
    HEAD,
    QUANTIZED,
    Seconds,
)
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.engines.onnx_decoder import OnnxDecoder

SUFFIX = "_kernel_time"  # of the name of an operator's event
PARTS = {
    "MatMulNBits": QUANTIZED,
    "FusedMatMul": FLOATS,
    "GroupQueryAttention": ATTENTION,
    "RotaryEmbedding": ATTENTION,
}


class ProfiledOnnxDecoder(OnnxDecoder):
    """An `OnnxDecoder` whose session writes its times into a folder."""

    folder: tempfile.TemporaryDirectory[str]

    def _options(self, threads: int | None) -> ort.SessionOptions:
        self.folder = tempfile.TemporaryDirectory()
        options = super()._options(threads)
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(self.folder.name) / "times")
        return options


class OnnxProfiler:
    """See `StepProfiler`."""

    def __init__(self, bundle: Bundle, threads: int | None, context: int | None) -> None:
        self.decoder = ProfiledOnnxDecoder(bundle, threads=threads, context=context)

    def steps(self) -> list[Seconds]:
        with self.decoder.folder:
            events = json.loads(Path(self.decoder.session.end_profiling()).read_text(encoding="utf-8"))
        runs = sorted((e for e in events if e["name"] == "model_run"), key=lambda event: event["ts"])
        starts = [run["ts"] for run in runs]
        nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith(SUFFIX)]
        last = max((e for e in nodes if _part(e) in (QUANTIZED, FLOATS)), key=lambda event: event["ts"])
        steps: list[dict[str, float]] = [defaultdict(float) for _ in runs]
        for event in nodes:
            part = HEAD if event["name"] == last["name"] else _part(event)
            steps[bisect_right(starts, event["ts"]) - 1][part] += event["dur"] / 1e6
        for step, run in zip(steps, runs, strict=True):
            step[BETWEEN] = max(0.0, run["dur"] / 1e6 - sum(step.values()))
        return list(steps)


def _part(event: dict[str, Any]) -> str:
    return PARTS.get(event["args"]["op_name"], ELEMENTWISE)


def profiler(bundle: Bundle, threads: int | None, context: int | None) -> OnnxProfiler:
    """Raises BundleError as `OnnxDecoder` does."""
    return OnnxProfiler(bundle, threads, context)
