"""The same tests in other programs: llama-bench, LiteRT-LM, onnxruntime-genai, transformers.

Each peer is found or left out with its reason. A peer's model is another file of the same checkpoint; this
module does not make it. Python libraries run in a process of their own (`peer_child`).
"""

from __future__ import annotations

import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from gemma_edge.benchmarks.peers.llama_cpp import (
    ENVIRONMENT_VARIABLE,
    find_llama_bench,
    run_llama_bench,
)
from gemma_edge.benchmarks.records.measurement import Measurement, PeerRun, TurnSizes, by_test
from gemma_edge.benchmarks.records.rows import Ratio
from gemma_edge.benchmarks.records.run_report import Round, RunReport
from gemma_edge.devices.machine.bandwidth import Bandwidth
from gemma_edge.devices.machine.child import run_child
from gemma_edge.devices.machine.cpu_features import LITERT_LM, check_engine
from gemma_edge.devices.machine.load import QUIET_CORES, busy_cores
from gemma_edge.devices.script import progress
from gemma_edge.runtime.errors import GemmaEdgeError, UsageError
from gemma_edge.runtime.files.abandoned import temporary_folder
from gemma_edge.runtime.files.typed_json import to_json

T = TypeVar("T")

TIMEOUT = 3600.0
# Peer: the module it needs, what its model is, and the option that names it.
LIBRARIES = {
    LITERT_LM: ("litert_lm", "a .litertlm file", "--litertlm FILE"),
    "onnxruntime-genai": ("onnxruntime_genai", "a folder made by its model builder", "--genai FOLDER"),
    "transformers": ("transformers", "the checkpoint's folder", "--checkpoint FOLDER"),
}


@dataclass(frozen=True)
class Peer:
    """A program that can be measured: `run` does the tests of some sizes once."""

    name: str
    model: Path
    run: Callable[[TurnSizes], PeerRun]


def find_peers(models: Mapping[str, Path | None], llama_bench: str | None) -> tuple[list[Peer], list[str]]:
    """The peers that are installed and have a model, and why the others are left out.

    Args:
        models: "llama.cpp", "litert-lm", "onnxruntime-genai", "transformers": their files, None for not
        given. llama_bench: the program; None for GEMMA_EDGE_LLAMA_BENCH or the PATH.

    Raises:
        UsageError: a model or a program that was asked for is not there.
    """
    for name, model in models.items():
        if model is not None and not model.exists():
            raise UsageError(f"the model for {name}, {model}: no such file or folder")
    peers, skipped = [], []
    binary, gguf = find_llama_bench(llama_bench), models.get("llama.cpp")
    if binary is None:
        skipped.append(f"llama.cpp: no llama-bench; set --llama-bench or {ENVIRONMENT_VARIABLE}")
    elif gguf is None:
        skipped.append("llama.cpp: no model; give the same checkpoint with --gguf FILE")
    else:
        peers.append(Peer("llama.cpp", gguf, partial(run_llama_bench, binary, gguf, timeout=TIMEOUT)))
    for name, (module, what, option) in LIBRARIES.items():
        path = models.get(name)
        if importlib.util.find_spec(module) is None:
            skipped.append(f"{name}: the package {module} is not installed")
        elif path is None:
            skipped.append(f"{name}: no model; give {what} with {option}")
        else:
            runner = partial(run_litert_lm, path) if name == LITERT_LM else partial(run_library, name, path)
            peers.append(Peer(name, path, runner))
    return peers, skipped


def run_litert_lm(
    model: Path, sizes: TurnSizes, cache: Path | None = None, timeout: float = TIMEOUT
) -> PeerRun:
    """Measures with LiteRT-LM; what it takes to pack the weights is not in the figures.

    Args:
        cache: the folder for the packed weights, filled when it is empty; None for one of this run's own.

    Raises:
        ChildError: it failed. DeviceError: it hangs, prints no result, or would abort on this CPU.
    """
    check_engine(LITERT_LM)
    with temporary_folder("peer") as own:
        folder = cache or own
        if not any(folder.iterdir()):
            run_library(LITERT_LM, model, replace(sizes, n_prompt=0, n_gen=1, reps=1), timeout, folder)
        return run_library(LITERT_LM, model, sizes, timeout, folder)


def run_library(
    name: str, model: Path, sizes: TurnSizes, timeout: float = TIMEOUT, cache: Path | None = None
) -> PeerRun:
    """Measures with a Python library in a process of its own.

    Args:
        cache: the folder for packed weights, for libraries that keep some.

    Raises:
        ChildError: the library failed. DeviceError: it hangs, or prints no result.
    """
    argv = [sys.executable, "-m", "gemma_edge.benchmarks.peers.peer_child", name, str(model)]
    argv += [json.dumps(to_json(sizes)), *([str(cache)] if cache else [])]
    run = run_child(argv, timeout=timeout, what=name)
    return replace(run.parse(PeerRun, name), peak_rss=run.peak.high_water)


def in_turn(contestants: Sequence[T], index: int) -> Sequence[T]:
    """Their order in round `index`: every other one is the opposite, so that a steady drift cancels."""
    return contestants[::-1] if index % 2 else contestants


def interleave(
    ours: Callable[[], RunReport],
    peers: Sequence[Peer],
    sizes: TurnSizes,
    rounds: int,
    bandwidth: Callable[[], Bandwidth | None] = lambda: None,
    name: str = "gemma-edge",
) -> tuple[list[Round], list[str]]:
    """Runs `rounds` times the bandwidth probe and then everything in turn (`in_turn`).

    A machine's speed drifts; ratios within a round do not. A peer that fails is left out from then on.

    Returns:
        The rounds, and why peers were left out.
    """
    failed: dict[str, str] = {}
    results = []
    for index in range(rounds):
        label = f"round {index + 1}/{rounds}"
        busy = busy_cores()
        if busy is not None and busy > QUIET_CORES:
            progress(f"{label}: other processes keep {busy:.1f} cores busy; its ratios are not fair")
        stream = bandwidth()
        runs: dict[str, PeerRun] = {}
        mine = RunReport()
        order: list[Peer | None] = [None, *peers]
        for peer in in_turn(order, index):
            if peer is None:
                mine = ours()
                progress(f"{label}: {name}: {', '.join(map(str, mine.tests))}")
            elif peer.name not in failed:
                try:
                    runs[peer.name] = peer.run(sizes)
                except GemmaEdgeError as error:
                    failed[peer.name] = f"{peer.name}: {error}"
                    progress(f"{label}: left out: {failed[peer.name]}")
                    continue
                progress(f"{label}: {peer.name}: {', '.join(map(str, runs[peer.name].tests))}")
        results.append(Round(mine, runs, stream, busy))
    return results, list(failed.values())


def ratios(rounds: Sequence[Round]) -> list[Ratio]:
    """Our speed over each peer's, test by test: the median over the rounds of ratios within a round."""
    samples: dict[tuple[str, str], list[float]] = {}
    for round_ in rounds:
        for name, run in round_.peers.items():
            theirs = by_test(run.tests)
            for test in round_.kernel.tests:
                if test.test in theirs:
                    ratio = test.avg_ts / theirs[test.test].avg_ts
                    samples.setdefault((name, test.test), []).append(ratio)
    return [
        Ratio(
            engine=name,
            test=test,
            ratio=round(statistics.median(values), 4),
            samples=[round(value, 4) for value in values],
            rounds=len(values),
        )
        for (name, test), values in samples.items()
    ]


def merged(rounds: Sequence[Round]) -> dict[str, list[Measurement]]:
    """All rounds' samples of each peer's tests, as one measurement each."""
    found: dict[str, dict[str, Measurement]] = {}
    for round_ in rounds:
        for name, run in round_.peers.items():
            tests = found.setdefault(name, {})
            for test in run.tests:
                before = tests[test.test].samples_ns if test.test in tests else ()
                tests[test.test] = replace(test, samples_ns=(*before, *test.samples_ns))
    return {name: list(tests.values()) for name, tests in found.items()}
