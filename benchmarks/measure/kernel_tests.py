"""Prefill and decode of a bundle as llama-bench measures them: no tokenizer, no sampling.

`pp512` is the prefill of 512 random tokens into an empty cache, including the lookups of their embeddings and
per-layer rows. `tg64` is 64 decode steps of one random token each, from an empty cache.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from typing import TYPE_CHECKING, Protocol

import numpy as np
import numpy.typing as npt

from gemma_edge.benchmarks.records.measurement import Measurement, timed
from gemma_edge.runtime.errors import DeviceError

if TYPE_CHECKING:  # importing the runtime is part of what is measured
    from gemma_edge.runtime.engines.decoder import Decoder
    from gemma_edge.runtime.engines.engine import Engine
    from gemma_edge.runtime.generate import Table

_IMPORT_PROBE = """\
import time
start = time.perf_counter()
import gemma_edge.runtime.model, {module}
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


def runtime_import_seconds(engine: Engine, reps: int = 3) -> float:
    """Median seconds that fresh interpreters take to import the runtime and its engine.

    Raises:
        DeviceError: the import fails.
    """
    samples = []
    for _ in range(reps):
        try:
            probe = subprocess.run(
                [sys.executable, "-c", _IMPORT_PROBE.format(module=engine.module)],
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
