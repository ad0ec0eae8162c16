"""Where the time of a decode step goes: `profile_steps`, part by part.

Both engines tell the time of every operator. The rest of a step is measured around them: rows of the tables,
what the engine and our decoder do around the operators, and sampling. Telling times takes time, too: a
profiled step of ONNX Runtime, which has more operators, is some per cent slower than others.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib import import_module
from pathlib import Path
from typing import Protocol

import numpy as np

from gemma_edge.benchmarks.records.bundle_facts import BundleFacts
from gemma_edge.benchmarks.records.environment import environment, now
from gemma_edge.benchmarks.records.record import PROFILE, Metrics, Record
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.engines.decoder import Decoder
from gemma_edge.runtime.engines.engine_registry import engine_of
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.model_parts import bundle_tables
from gemma_edge.runtime.sampling import Sampler, Sampling

HEAD = "head"
QUANTIZED, FLOATS = "layers: products with 4 or 8-bit weights", "layers: products with fp32 weights"
ATTENTION = "attention and KV cache"
ELEMENTWISE = "norms and elementwise"
BETWEEN = "engine, between operators"
DECODER = "decoder in Python: inputs, caches, logits"
ROWS = "rows of the tables"
SAMPLING = "sampling"
WARM_UP = 8
PROFILERS = {
    "ONNX Runtime": "onnx_profile",
    "LiteRT": "litert_profile",
}  # by engine, a module beside this one

Seconds = Mapping[str, float]


class StepProfiler(Protocol):
    """A decoder whose engine tells what its operators took."""

    decoder: Decoder

    def steps(self) -> list[Seconds]:
        """Of each call of one token so far: seconds by part, which make up the engine's call."""


@dataclass(frozen=True)
class StepProfile:
    """Seconds of each part, step by step.

    Attributes:
        parts: by name; together they are the step.
        depth: tokens in the cache before.
    """

    engine: str
    threads: int | None
    context: int
    depth: int
    parts: dict[str, tuple[float, ...]]

    @property
    def parts_ms(self) -> dict[str, float]:
        """Mean milliseconds of each part in the quickest tenth of the steps, the least disturbed; sorted."""
        steps = sorted(zip(*self.parts.values(), strict=True), key=sum)
        quick = steps[: max(1, len(steps) // 10)]
        means = (1000 * statistics.mean(times) for times in zip(*quick, strict=True))
        return dict(sorted(zip(self.parts, means, strict=True), key=lambda item: -item[1]))

    def lines(self) -> list[str]:
        """A table for people."""
        parts = self.parts_ms
        whole = sum(parts.values())
        head = f"{self.engine}, context {self.context}, {self.depth} tokens in the cache"
        rows = [f"| {name} | {ms:.2f} | {ms / whole:.1%} |" for name, ms in parts.items()]
        return [f"| {head} | ms | share |", "|---|---:|---:|", *rows, f"| **a step** | {whole:.2f} | |"]


def profile_steps(
    path: Path, *, steps: int, depth: int = 0, threads: int | None = None, context: int | None = None
) -> StepProfile:
    """Decodes `steps` random tokens behind `depth` others.

    Raises:
        BundleError: the bundle is damaged, or its engine tells no times.
        UsageError: the tokens do not fit the context.
    """
    bundle = Bundle.open(path)
    engine = engine_of(bundle.format).name
    module = import_module(f"{__package__}.{PROFILERS[engine]}")
    profiler: StepProfiler = module.profiler(bundle, threads, context)
    decoder = profiler.decoder
    if depth + WARM_UP + steps > decoder.context:
        needed = f"{depth} + {WARM_UP} + {steps} tokens"
        raise UsageError(f"{needed} do not fit the context of {decoder.context}: lower -d or -n")
    embeddings, per_layer = bundle_tables(bundle)
    sampler, rng = Sampler(Sampling()), np.random.default_rng(0)
    ids = rng.integers(bundle.config.vocab_size_per_layer_input, size=depth + WARM_UP + steps)
    for start in range(0, depth, decoder.chunk):
        part = ids[start : min(start + decoder.chunk, depth)]
        decoder.forward(embeddings.lookup(part), per_layer.lookup(part), 0)
    around: list[list[float]] = []  # rows, forward, sampling
    for token in ids[depth:]:
        moments = [time.perf_counter()]
        rows = embeddings.lookup(token[None]), per_layer.lookup(token[None])
        moments.append(time.perf_counter())
        logits = decoder.forward(*rows, 1)
        moments.append(time.perf_counter())
        sampler.pick(logits[0])
        moments.append(time.perf_counter())
        around.append(np.diff(moments).tolist())
    inside = profiler.steps()[-steps:]
    samples: dict[str, list[float]] = {}
    names = sorted({name for found in inside for name in found})
    for (read, forward, picked), found in zip(around[-steps:], inside, strict=True):
        outside = {DECODER: max(0.0, forward - sum(found.values())), ROWS: read, SAMPLING: picked}
        step = dict.fromkeys(names, 0.0) | dict(found) | outside
        for name, seconds in step.items():
            samples.setdefault(name, []).append(round(seconds, 7))
    parts = {name: tuple(times) for name, times in samples.items()}
    return StepProfile(engine, threads, decoder.context, depth, parts)


def profile_record(facts: BundleFacts, name: str, profile: StepProfile) -> Record:
    """What a plot of docs/img shows: `parts_ms`, and the samples in seconds."""
    metrics: Metrics = {part: round(ms, 4) for part, ms in profile.parts_ms.items()}
    return Record(
        kind=PROFILE,
        name=f"{name}, {profile.engine}, context {profile.context}",
        time=now(),
        environment=environment(),
        model=facts.model,
        recipe=facts.recipe,
        metrics=metrics,
        raw=asdict(profile),
    )
