"""The same tests in other programs: llama-bench, LiteRT-LM, onnxruntime-genai, transformers.

Each peer is found or left out with its reason. A peer's model is another file of the same checkpoint; this
module does not make it. Python libraries run in a process of their own (`peer_child`).
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from gemma_edge.benchmarks.machine.child import ChildError, run_child
from gemma_edge.benchmarks.machine.cpu_features import LITERT_LM, check_engine
from gemma_edge.benchmarks.options import KernelOptions
from gemma_edge.benchmarks.peers.llama_cpp import (
    ENVIRONMENT_VARIABLE,
    PeerRun,
    find_llama_bench,
    run_llama_bench,
)
from gemma_edge.benchmarks.records.measurement import Measurement
from gemma_edge.benchmarks.script import progress
from gemma_edge.runtime.errors import DeviceError, GemmaEdgeError, UsageError

T = TypeVar("T")

Json = dict[str, Any]
TIMEOUT = 3600.0
# Peer: the module it needs, what its model is, and the option that names it.
LIBRARIES = {
    LITERT_LM: ("litert_lm", "a .litertlm file", "--litertlm FILE"),
    "onnxruntime-genai": ("onnxruntime_genai", "a folder made by its model builder", "--genai FOLDER"),
    "transformers": ("transformers", "the checkpoint's folder", "--checkpoint FOLDER"),
}


@dataclass(frozen=True)
class Peer:
    """A program that can be measured: `run` does the tests of some options once."""

    name: str
    model: Path
    run: Callable[[KernelOptions], PeerRun]


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
        program, file = binary, gguf  # as they are now, for the function below
        peers.append(Peer("llama.cpp", gguf, lambda o: run_llama_bench(program, file, o, timeout=TIMEOUT)))
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
    model: Path, options: KernelOptions, cache: Path | None = None, timeout: float = TIMEOUT
) -> PeerRun:
    """Measures with LiteRT-LM; what it takes to pack the weights is not in the figures.

    Args:
        cache: the folder for the packed weights, filled when it is empty; None for one of this run's own.

    Raises:
        ChildError: it failed. DeviceError: it hangs, prints no result, or would abort on this CPU.
    """
    check_engine(LITERT_LM)
    with tempfile.TemporaryDirectory(prefix="gemma-edge-peer-") as own:
        folder = cache or Path(own)
        more = ("--cache", str(folder))
        if not any(folder.iterdir()):
            run_library(LITERT_LM, model, replace(options, n_prompt=0, n_gen=1, reps=1), timeout, more)
        return run_library(LITERT_LM, model, options, timeout, more)


def run_library(
    name: str, model: Path, options: KernelOptions, timeout: float = TIMEOUT, more: Sequence[str] = ()
) -> PeerRun:
    """Measures with a Python library in a process of its own, with `more` arguments for it.

    Raises:
        ChildError: it failed. DeviceError: it hangs, or prints no result.
    """
    argv = [sys.executable, "-m", "gemma_edge.benchmarks.peers.peer_child", name, str(model)]
    argv += ["-p", str(options.n_prompt), "-n", str(options.n_gen), "-r", str(options.reps)]
    argv += ["-t", str(options.threads), "--context", str(options.context), *more]
    run = run_child(argv, timeout=timeout, what=name)
    if run.exit_code:
        raise ChildError(name, run)
    try:
        answer: Json = run.answer()
        tests = [Measurement.from_dict(test) for test in answer["tests"]]
        return PeerRun(
            {t.name: t for t in tests}, run.peak.high_water, str(answer["build"]), str(answer["model"])
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DeviceError(f"{name} printed no result ({error!r}): {run.stdout[-200:]!r}") from None


@dataclass(frozen=True)
class PeerRound:
    """What one round measured: us, and every peer that did not fail, by name."""

    ours: dict[str, Measurement]
    peers: dict[str, PeerRun]


def in_turn(contestants: Sequence[T], index: int) -> Sequence[T]:
    """Their order in round `index`: every other one is the opposite, so that a steady drift cancels."""
    return contestants[::-1] if index % 2 else contestants


def interleave(
    ours: Callable[[], dict[str, Measurement]], peers: Sequence[Peer], options: KernelOptions, rounds: int
) -> tuple[list[PeerRound], list[str]]:
    """`rounds` times everything, one after the other, `in_turn`.

    A machine's speed drifts; ratios within a round do not. A peer that fails is left out from then on.

    Returns:
        The rounds, and why peers were left out.
    """
    failed: dict[str, str] = {}
    results = []
    for index in range(rounds):
        runs: dict[str, PeerRun] = {}
        mine: dict[str, Measurement] = {}
        order: list[Peer | None] = [None, *peers]
        for peer in in_turn(order, index):
            if peer is None:
                mine = ours()
                progress(f"round {index + 1}/{rounds}: gemma-edge: " + ", ".join(map(str, mine.values())))
            elif peer.name not in failed:
                try:
                    runs[peer.name] = peer.run(options)
                except GemmaEdgeError as error:
                    failed[peer.name] = f"{peer.name}: {error}"
                    continue
                shown = ", ".join(map(str, runs[peer.name].tests.values()))
                progress(f"round {index + 1}/{rounds}: {peer.name}: {shown}")
        results.append(PeerRound(mine, runs))
    return results, list(failed.values())


def ratios(rounds: Sequence[PeerRound]) -> list[Json]:
    """Our speed over each peer's, test by test: the median over the rounds of ratios within a round."""
    samples: dict[tuple[str, str], list[float]] = {}
    for round_ in rounds:
        for name, run in round_.peers.items():
            for test, measurement in round_.ours.items():
                if test in run.tests:
                    ratio = measurement.avg_ts / run.tests[test].avg_ts
                    samples.setdefault((name, test), []).append(ratio)
    return [
        {
            "engine": name,
            "test": test,
            "ratio": round(statistics.median(values), 4),
            "samples": [round(value, 4) for value in values],
            "rounds": len(values),
        }
        for (name, test), values in samples.items()
    ]


def merged(rounds: Sequence[PeerRound]) -> dict[str, list[Measurement]]:
    """All rounds' samples of each peer's tests, as one measurement each."""
    samples: dict[tuple[str, str], list[Measurement]] = {}
    for round_ in rounds:
        for name, run in round_.peers.items():
            for test in run.tests.values():
                samples.setdefault((name, test.name), []).append(test)
    result: dict[str, list[Measurement]] = {}
    for (name, _), tests in samples.items():
        all_ns = tuple(ns for test in tests for ns in test.samples_ns)
        result.setdefault(name, []).append(Measurement(tests[0].n_prompt, tests[0].n_gen, all_ns))
    return result
