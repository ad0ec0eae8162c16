"""The peer on a .litertlm: Google's LiteRT-LM, from the package `litert-lm-api`, with its own benchmark.

It runs in a process of its own: it logs a page for every model, and it aborts where others raise.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from gemma_edge.benchmarks.child import ChildError, run_child
from gemma_edge.benchmarks.llama_cpp import PeerRun
from gemma_edge.benchmarks.measurement import Measurement
from gemma_edge.benchmarks.options import KernelOptions
from gemma_edge.runtime.errors import DeviceError, UsageError

PACKAGE = "litert-lm-api"
MARK = "RESULT"  # begins the line that is ours among what the engine prints
CHILD = f"""
import json, os, sys
from litert_lm import Benchmark, interfaces
path, prompt, generated, reps, threads, cache = sys.argv[1:]
results = []
for _ in range(int(reps)):
    run = Benchmark(
        path, backend=interfaces.CPU(thread_count=int(threads)),
        prefill_tokens=int(prompt), decode_tokens=int(generated), cache_dir=cache,
    ).run()
    results.append([run.last_prefill_token_count, run.last_prefill_tokens_per_second,
                    run.last_decode_token_count, run.last_decode_tokens_per_second])
os.write(1, ("\\n{MARK}" + json.dumps(results) + "\\n").encode())
"""


def check_litert_lm() -> str:
    """Its version. Raises UsageError where it is not installed."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        raise UsageError(f"--litertlm needs LiteRT-LM: pip install {PACKAGE}") from None


def run_litert_lm(path: Path, options: KernelOptions, cache: Path, timeout: float | None = None) -> PeerRun:
    """Runs its benchmark `options.reps` times; a first run, not counted, packs the weights and warms up.

    Args:
        cache: folder for the packed weights.

    Raises:
        ChildError: it failed. DeviceError: it hangs, or prints something else.
    """
    release = check_litert_lm()
    numbers = (options.n_prompt, options.n_gen, options.reps + 1, options.threads)
    run = run_child([sys.executable, "-c", CHILD, str(path), *map(str, numbers), str(cache)], timeout=timeout)
    if run.exit_code:
        raise ChildError("LiteRT-LM", run)
    line = next((line for line in run.stdout.splitlines() if line.startswith(MARK)), "")
    try:
        results: list[tuple[int, float, int, float]] = json.loads(line.removeprefix(MARK))[1:]
    except ValueError:
        raise DeviceError(f"LiteRT-LM's benchmark printed no result: {run.stdout[-200:]!r}") from None
    tests = {}
    for n_prompt, n_gen, column in ((options.n_prompt, 0, 0), (0, options.n_gen, 2)):
        counted = {result[column] for result in results}
        if counted != {n_prompt + n_gen}:
            raise DeviceError(f"LiteRT-LM counted {sorted(counted)} tokens instead of {n_prompt + n_gen}")
        samples = [int(1e9 * result[column] / result[column + 1]) for result in results]
        test = Measurement(n_prompt, n_gen, tuple(samples))
        tests[test.name] = test
    return PeerRun(tests, run.peak.high_water, f"{PACKAGE} {release}", path.name)
