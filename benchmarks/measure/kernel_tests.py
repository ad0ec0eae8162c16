"""Prefill and decode of a bundle as llama-bench measures them: no tokenizer, no sampling.

    python -m gemma_edge.benchmarks.measure.kernel_tests BUNDLE -p 512 -n 64 -r 5 -t 2 --context 4096

loads the bundle in this process and prints one JSON line. `pp512` is the prefill of 512 random tokens into
an empty cache, lookups of their embeddings and per-layer rows included; `tg64` is 64 decode steps of
one random token each, from an empty cache. One unmeasured run of each comes before.

Memory is sampled while loading and during the unmeasured runs, which do all that the measured ones do;
nothing but the kernel runs while the clock does.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from gemma_edge.benchmarks.machine.child import ChildError, ChildRun
from gemma_edge.benchmarks.machine.memory import PeakSampler, read_memory
from gemma_edge.benchmarks.options import KernelOptions, add_kernel_options, kernel_options
from gemma_edge.benchmarks.records.measurement import Measurement, timed
from gemma_edge.benchmarks.script import run_script
from gemma_edge.runtime.errors import DeviceError

if TYPE_CHECKING:  # importing the runtime is part of what is measured
    from gemma_edge.runtime.engines.decoder import Decoder
    from gemma_edge.runtime.generate import Table

Json = dict[str, Any]

_IMPORT_PROBE = """\
import time
start = time.perf_counter()
import gemma_edge.runtime.model, gemma_edge.runtime.engines.{engine}_decoder
print(time.perf_counter() - start)
"""


class KernelModel(Protocol):
    """The part of `runtime.model.Model` that is measured."""

    @property
    def decoder(self) -> Decoder: ...
    @property
    def embeddings(self) -> Table: ...
    @property
    def per_layer(self) -> Table: ...


def bench_prefill(
    model: KernelModel, n_tokens: int, reps: int, vocab_size: int, *, seed: int = 0, depth: int = 0
) -> Measurement:
    """Times `reps` prefills of `n_tokens` random ids below `vocab_size`, each with `depth` in the cache."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(vocab_size, size=n_tokens)

    def prepare() -> None:
        ids[:] = rng.integers(vocab_size, size=n_tokens)
        _fill(model, rng.integers(vocab_size, size=depth))

    return Measurement(n_tokens, 0, timed(lambda: _append(model, ids), reps, prepare), depth)


def bench_decode(
    model: KernelModel, n_tokens: int, reps: int, vocab_size: int, *, seed: int = 0, depth: int = 0
) -> Measurement:
    """Times `reps` runs of `n_tokens` decode steps, each run with `depth` random tokens in the cache."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(vocab_size, size=n_tokens)

    def prepare() -> None:
        ids[:] = rng.integers(vocab_size, size=n_tokens)
        _fill(model, rng.integers(vocab_size, size=depth))

    def step() -> None:
        for i in range(n_tokens):
            _forward(model, ids[i : i + 1], 1)

    return Measurement(0, n_tokens, timed(step, reps, prepare), depth)


def _fill(model: KernelModel, ids: npt.NDArray[np.int64]) -> None:
    """Leaves exactly `ids` in the KV cache."""
    model.decoder.reset()
    _append(model, ids)


def _append(model: KernelModel, ids: npt.NDArray[np.int64]) -> None:
    for start in range(0, len(ids), model.decoder.chunk):
        end = start + model.decoder.chunk
        _forward(model, ids[start:end], int(end >= len(ids)))  # as in a prompt: logits of the end only


def _forward(model: KernelModel, ids: npt.NDArray[np.int64], n_logits: int) -> None:
    model.decoder.forward(model.embeddings.lookup(ids), model.per_layer.lookup(ids), n_logits)


def bench(model: KernelModel, options: KernelOptions, vocab_size: int, reps: int) -> list[Measurement]:
    """The tests that the options ask for, in llama-bench's order."""
    tests = []
    if options.n_prompt:
        tests.append(bench_prefill(model, options.n_prompt, reps, vocab_size))
    if options.n_gen:
        tests.append(bench_decode(model, options.n_gen, reps, vocab_size))
    return tests


def measure(path: Path, options: KernelOptions, *, import_time: bool = True) -> Json:
    """Loads a bundle here and measures it.

    Returns:
        {"options", "import_s" (null without `import_time`), "load_s", "tests": [Measurement.to_dict()],
        "memory": {"steady": MemorySample, "peak": PeakMemory}}; seconds and bytes.
    """
    options.check()
    engine = "onnx" if (path / "decoder.onnx").is_file() else "litert"
    import_s = runtime_import_seconds(engine) if import_time else None
    # Only now, so that this import is no part of what is measured next.
    from gemma_edge.runtime.artifacts.bundle import Bundle
    from gemma_edge.runtime.model import Model

    with PeakSampler() as sampler:
        start = time.perf_counter()
        model = Model.load(path, threads=options.threads, context=options.context)
        load_s = time.perf_counter() - start
        vocab_size = Bundle.open(path).config.vocab_size_per_layer_input
        bench(model, options, vocab_size, reps=1)
    tests = bench(model, options, vocab_size, options.reps)
    return {
        "options": dataclasses.asdict(options),
        "import_s": import_s,
        "load_s": load_s,
        "tests": [test.to_dict() for test in tests],
        "memory": {"steady": read_memory().to_dict(), "peak": sampler.peak.to_dict()},
    }


def runtime_import_seconds(engine: str = "onnx", reps: int = 3) -> float:
    """Median seconds that fresh interpreters take to import the runtime and its engine, "onnx" or "litert".

    Raises:
        DeviceError: the import fails.
    """
    samples = []
    for _ in range(reps):
        try:
            probe = subprocess.run(
                [sys.executable, "-c", _IMPORT_PROBE.format(engine=engine)],
                check=True,
                capture_output=True,
                encoding="utf-8",
            )
        except subprocess.CalledProcessError as error:
            raise DeviceError(
                f"the runtime cannot be imported: {error.stderr.strip().splitlines()[-1][:300]}"
            ) from None
        samples.append(float(probe.stdout))
    return statistics.median(samples)


def kernel_argv(path: Path, options: KernelOptions, *, import_time: bool = True) -> list[str]:
    """The command line that runs `measure` in a process of its own."""
    argv = [sys.executable, "-m", "gemma_edge.benchmarks.measure.kernel_tests", str(path)]
    argv += ["-p", str(options.n_prompt), "-n", str(options.n_gen), "-r", str(options.reps)]
    argv += ["-t", str(options.threads), "--context", str(options.context)]
    return argv if import_time else [*argv, "--no-import-time"]


def parse_report(run: ChildRun) -> Json:
    """What `measure` returned in a child.

    Raises:
        ChildError: the child failed; its exit code is kept.
        DeviceError: it succeeded without a report.
    """
    if run.exit_code:
        raise ChildError("the measured run", run)
    try:
        report: Json = run.answer()
        measurements(report)
        return report
    except (KeyError, TypeError, ValueError):
        raise DeviceError(f"the measured run printed no report: {run.stdout[-200:]!r}") from None


def measurements(report: Json) -> dict[str, Measurement]:
    """The tests of a report by name: pp512, tg64."""
    tests = [Measurement.from_dict(test) for test in report["tests"]]
    return {test.name: test for test in tests}


def main(argv: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").split("\n")[0]
    parser = argparse.ArgumentParser(
        prog="python -m gemma_edge.benchmarks.measure.kernel_tests", description=summary
    )
    add_kernel_options(parser, KernelOptions())
    parser.add_argument("--no-import-time", dest="import_time", action="store_false", help="skip that probe")
    args = parser.parse_args(argv)
    print(json.dumps(measure(args.bundle, kernel_options(args), import_time=args.import_time)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(run_script(main))
