"""Sessions of ONNX Runtime on the CPU."""

from __future__ import annotations

from pathlib import Path

import onnxruntime as ort

from gemma_edge.runtime.engines.cores import physical_cores


def session_options(threads: int | None) -> ort.SessionOptions:
    """Options for a session that gives memory back; a thread a physical core if `threads` is None."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or physical_cores()
    options.inter_op_num_threads = 1
    # The arena keeps what a long prefill, or an encoder, needed once.
    options.enable_cpu_mem_arena = False
    # A pattern is one block for a whole pass: 30 MB more at the peak of 30 s of audio, and no faster.
    options.enable_mem_pattern = False
    # Threads pack weights side by side. It takes no more anonymous memory; the file stays mapped meanwhile.
    options.add_session_config_entry("session.prepack.enable_parallel", "1")
    options.log_severity_level = 4  # errors are raised; its log would not escape names
    return options


def open_session(graph: Path | bytes, options: ort.SessionOptions) -> ort.InferenceSession:
    """A session over a graph's file, or its bytes. ONNX Runtime raises many types of its own."""
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
