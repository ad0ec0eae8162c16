"""What the operators of a decode step take in LiteRT, by the profiler of the C library in its wheel.

The Python package does not offer that profiler, so the model is compiled a second time, through the library's
C functions. Tensor buffers are the same to both.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ai_edge_litert
from ai_edge_litert.compiled_model import CompiledModel, TensorBuffer

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
from gemma_edge.runtime.engines.litert_decoder import LitertDecoder
from gemma_edge.runtime.engines.litert_model import compile_model, engine_log, handle_of
from gemma_edge.runtime.engines.packed_weights import packed_weights
from gemma_edge.runtime.errors import UsageError

KNOWN = "2.3."  # versions whose library has the functions and the structure below
CPU = 1  # kLiteRtHwAcceleratorCpu
OPERATOR, IN_DELEGATE = 2, 8  # TFLite's own operators, and XNNPACK's
DELEGATE = "XNNPACK"  # in the name of the operator that stands for a part of the graph
PRODUCT = "Fully Connected"
OF_ATTENTION = ("Batch Matrix Multiply", "Softmax", "DYNAMIC_UPDATE_SLICE", "GATHER")


class Event(ctypes.Structure):
    """ProfiledEventData."""

    _fields_ = (
        ("tag", ctypes.c_char_p),
        ("kind", ctypes.c_int),
        ("start_us", ctypes.c_uint64),
        ("elapsed_us", ctypes.c_uint64),
        ("memory", ctypes.c_int64 * 6),
        ("metadata", ctypes.c_uint64 * 2),
        ("source", ctypes.c_int),
    )


class ProfiledModel:
    """Stands for a `CompiledModel` and runs its twin, whose operators are timed.

    Attributes:
        calls: of each call its signature, its seconds, and every operator with its microseconds.
    """

    def __init__(self, path: Path, packed: Path | None, threads: int) -> None:
        self.model = compile_model(path, packed, threads)
        self.library = ctypes.CDLL(os.path.join(ai_edge_litert.__path__[0], "libLiteRt.so"))
        libc = ctypes.CDLL(None)
        libc.strdup.restype = ctypes.c_void_p
        free = ctypes.cast(libc.free, ctypes.c_void_p)
        environment, file, options, self.twin, self.profiler = (ctypes.c_void_p() for _ in range(5))
        self.call("LiteRtCreateEnvironment", 0, None, ctypes.byref(environment))
        self.call("LiteRtCreateModelFromFile", environment, str(path).encode(), ctypes.byref(file))
        self.call("LiteRtCreateOptions", ctypes.byref(options))
        self.call("LiteRtSetOptionsHardwareAccelerators", options, CPU)
        cache = f'weight_cache_file_path = "{packed}"\n' if packed else ""
        for name, text in (
            (b"xnnpack", f"num_threads = {threads}\n{cache}"),
            (b"runtime_options_string", "enable_profiling = true\n"),
        ):
            option, owned = ctypes.c_void_p(), ctypes.c_void_p(libc.strdup(text.encode()))
            self.call("LiteRtCreateOpaqueOptions", name, owned, free, ctypes.byref(option))
            self.call("LiteRtAddOpaqueOptions", options, option)
        self.call("LiteRtCreateCompiledModel", environment, file, options, ctypes.byref(self.twin))
        self.call("LiteRtCompiledModelGetProfiler", self.twin, ctypes.byref(self.profiler))
        self.calls: list[tuple[int, float, list[tuple[str, int]]]] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def call(self, name: str, *args: Any) -> None:
        """Calls a function of the C library. Raises RuntimeError if it fails."""
        if status := getattr(self.library, name)(*args):
            raise RuntimeError(f"{name} failed: {status}")

    def run_by_index(self, index: int, inputs: list[TensorBuffer], outputs: list[TensorBuffer]) -> None:
        """As `CompiledModel.run_by_index`."""
        self.call("LiteRtResetProfiler", self.profiler)
        self.call("LiteRtStartProfiler", self.profiler)
        sides: list[Any] = []
        for buffers in (inputs, outputs):
            handles = (ctypes.c_void_p * len(buffers))(*(handle_of(buffer) for buffer in buffers))
            sides += [ctypes.c_size_t(len(buffers)), handles]
        start = time.perf_counter()
        self.call("LiteRtRunCompiledModel", self.twin, ctypes.c_size_t(index), *sides)
        seconds = time.perf_counter() - start
        self.call("LiteRtStopProfiler", self.profiler)
        count = ctypes.c_int()
        self.call("LiteRtGetNumProfilerEvents", self.profiler, ctypes.byref(count))
        events = (Event * count.value)()
        self.call("LiteRtGetProfilerEvents", self.profiler, count, events)
        operators = [
            (event.tag.decode(), event.elapsed_us)
            for event in events
            if event.kind in (OPERATOR, IN_DELEGATE) and DELEGATE not in event.tag.decode().upper()
        ]
        self.calls.append((index, seconds, operators))


class ProfiledLitertDecoder(LitertDecoder):
    """A `LitertDecoder` of a `ProfiledModel`."""

    profiled: ProfiledModel

    def _load(self, path: Path, recorded: str, threads: int) -> CompiledModel:
        with engine_log():
            self.profiled = ProfiledModel(path, packed_weights(path, recorded, threads), threads)
        model: Any = self.profiled
        return model


class LitertProfiler:
    """See `StepProfiler`."""

    def __init__(self, bundle: Bundle, threads: int | None, context: int | None) -> None:
        self.decoder = ProfiledLitertDecoder(bundle, threads=threads, context=context)

    def steps(self) -> list[Seconds]:
        decode = self.decoder.calls[1].index
        steps: list[Seconds] = []
        for index, seconds, operators in self.decoder.profiled.calls:
            if index != decode:
                continue
            last = max(i for i, (tag, _) in enumerate(operators) if tag.startswith(PRODUCT))
            step: dict[str, float] = defaultdict(float)
            for i, (tag, elapsed_us) in enumerate(operators):
                step[HEAD if i == last else _part(tag)] += elapsed_us / 1e6
            step[BETWEEN] = max(0.0, seconds - sum(step.values()))
            steps.append(step)
        return steps


def _part(tag: str) -> str:
    if tag.startswith(PRODUCT):
        return FLOATS if "(NC, F32)" in tag else QUANTIZED
    return ATTENTION if tag.startswith(OF_ATTENTION) else ELEMENTWISE


def profiler(bundle: Bundle, threads: int | None, context: int | None) -> LitertProfiler:
    """Raises UsageError for a LiteRT with unknown structures, and BundleError as `LitertDecoder` does."""
    if not (found := version("ai-edge-litert")).startswith(KNOWN):
        raise UsageError(f"a profile needs ai-edge-litert {KNOWN}*, not {found}, whose times nobody can read")
    return LitertProfiler(bundle, threads, context)
