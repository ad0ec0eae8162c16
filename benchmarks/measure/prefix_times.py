"""A prompt behind a long prefix: how much sooner it starts when the prefix is in the cache on disk.

The prefix is of random tokens, new each time. One answer stores it. Then prompts of the prefix and a question
of their own are answered in turn without the cache and with it, each by a model loaded for it. A start
is the load, the prefix and the first token.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from gemma_edge.benchmarks.measure.workload import QUESTION_TOKENS, Workload
from gemma_edge.benchmarks.records.measurement import PrefixRun, PrefixStart
from gemma_edge.benchmarks.records.run_report import RunReport
from gemma_edge.runtime.errors import DeviceError

if TYPE_CHECKING:
    from gemma_edge.runtime.prompt.prompt_builder import Prompt
    from gemma_edge.runtime.usage import GenerationProgress

LIMIT = "64GiB"  # nothing goes for the file that is measured


def measure_prefix(path: Path, workload: Workload) -> RunReport:
    """Measures `reps` starts of each kind, after one that stores the prefix; the stored file goes at the end.

    Raises:
        UsageError: prefix and question do not fit the context.
        DeviceError: the cache folder did not take the prefix.
    """
    from gemma_edge.runtime.artifacts.bundle import Bundle
    from gemma_edge.runtime.model_parts import bundle_prefixes
    from gemma_edge.runtime.prompt.prompt_builder import Prompt

    bundle = Bundle.open(path)
    workload.check(workload.context or bundle.context)
    rng = np.random.default_rng()

    def ids(count: int) -> list[int]:
        return [int(i) for i in rng.integers(bundle.config.vocab_size_per_layer_input, size=count)]

    prefix = ids(workload.prefix)

    def start(kept: bool) -> tuple[PrefixStart, GenerationProgress]:
        prompt = Prompt([*prefix, *ids(QUESTION_TOKENS)], boundaries=(len(prefix),))
        return _start(path, workload, prompt, LIMIT if kept else None)

    stored, _ = start(kept=True)
    files = bundle_prefixes(bundle, LIMIT)
    assert files is not None
    size = files.bytes_of(prefix)
    without, restored = [], []
    try:
        for _ in range(workload.reps):
            without.append(start(kept=False)[0])
            measured, progress = start(kept=True)
            if progress.restored_from is None:
                raise DeviceError("the cache folder did not keep the prefix: is its disk full, or in use?")
            restored.append(measured)
    finally:
        files.forget(prefix)
    run = PrefixRun(len(prefix), QUESTION_TOKENS, size, stored, tuple(without), tuple(restored))
    return RunReport(context=workload.context or bundle.context, prefix=run)


def _start(
    path: Path, workload: Workload, prompt: Prompt, limit: str | None
) -> tuple[PrefixStart, GenerationProgress]:
    """Loads the bundle and answers a prompt with one token."""
    from gemma_edge.runtime.model import Model
    from gemma_edge.runtime.usage import GenerationProgress

    progress = GenerationProgress()
    begin = time.perf_counter()
    with Model.load(
        path, threads=workload.threads, context=workload.context, snapshots=0, prefix_cache=limit
    ) as model:
        loaded = time.perf_counter()
        list(model.stream_tokens(prompt, max_tokens=1, progress=progress))
        end = time.perf_counter()
    return PrefixStart(round(loaded - begin, 4), round(end - loaded, 4)), progress
