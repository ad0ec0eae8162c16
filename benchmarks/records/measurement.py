"""One test of llama-bench's kind: its name, its raw samples and what follows from them.

`to_dict` uses llama-bench's own field names, so that its JSON and ours can be read by one program.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any


@dataclass(frozen=True)
class Measurement:
    """Repetitions of one test: `pp512` prefills 512 tokens, `tg64 @ d4096` generates 64 after 4096.

    Exactly one of n_prompt and n_gen is not zero; samples_ns is the time of each repetition, and n_depth the
    tokens that the KV cache held before.
    """

    n_prompt: int
    n_gen: int
    samples_ns: tuple[int, ...]
    n_depth: int = 0

    @property
    def name(self) -> str:
        return name_of_test(self.n_prompt, self.n_gen, self.n_depth)

    @property
    def avg_ns(self) -> int:
        return round(statistics.fmean(self.samples_ns))

    @property
    def stddev_ns(self) -> int:
        return round(statistics.stdev(self.samples_ns)) if len(self.samples_ns) > 1 else 0

    @property
    def samples_ts(self) -> list[float]:
        """Tokens per second of each repetition."""
        return [(self.n_prompt + self.n_gen) * 1e9 / ns for ns in self.samples_ns]

    @property
    def avg_ts(self) -> float:
        return statistics.fmean(self.samples_ts)

    @property
    def stddev_ts(self) -> float:
        return statistics.stdev(self.samples_ts) if len(self.samples_ns) > 1 else 0.0

    @property
    def median_ts(self) -> float:
        return statistics.median(self.samples_ts)

    def to_dict(self) -> dict[str, Any]:
        return {
            "test": self.name,
            "n_prompt": self.n_prompt,
            "n_gen": self.n_gen,
            "n_depth": self.n_depth,
            "avg_ns": self.avg_ns,
            "stddev_ns": self.stddev_ns,
            "samples_ns": list(self.samples_ns),
            "samples_ts": [round(ts, 4) for ts in self.samples_ts],
            "avg_ts": round(self.avg_ts, 4),
            "stddev_ts": round(self.stddev_ts, 4),
            "median_ts": round(self.median_ts, 4),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Measurement:
        """Reads our own form or llama-bench's.

        Raises:
            KeyError, TypeError, ValueError: it is neither, or has no samples.
        """
        samples = tuple(int(ns) for ns in data["samples_ns"])
        if not samples or min(samples) <= 0:
            raise ValueError("samples_ns holds no positive times")
        return cls(int(data["n_prompt"]), int(data["n_gen"]), samples, int(data.get("n_depth", 0)))

    def __str__(self) -> str:
        return f"{self.name} {self.avg_ts:.2f} ± {self.stddev_ts:.2f} tok/s"


def name_of_test(n_prompt: int, n_gen: int, n_depth: int = 0) -> str:
    """llama-bench's name of a test: "pp512", "tg64 @ d4096"."""
    name = f"pp{n_prompt}" if n_prompt else f"tg{n_gen}"
    return f"{name} @ d{n_depth}" if n_depth else name


def timed(
    step: Callable[[], object], reps: int, prepare: Callable[[], object] = lambda: None
) -> tuple[int, ...]:
    """Nanoseconds of each of `reps` calls of `step`; `prepare` is called before each and not measured."""
    samples = []
    for _ in range(reps):
        prepare()
        start = perf_counter_ns()
        step()
        samples.append(perf_counter_ns() - start)
    return tuple(samples)
