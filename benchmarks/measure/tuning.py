"""Which settings are the quickest: bundles, threads and prefill chunks, measured in turn.

The time of a turn decides: a prompt, then an answer. Ratios are taken within a round, as everywhere, so that
a machine whose speed drifts favours nobody. The default stays unless another is quicker by more than the
spread of its own ratios. A setting that is clearly slower is left out of later rounds.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from gemma_edge.benchmarks.measure.tuning_place import Processor
from gemma_edge.benchmarks.measure.workload import Workload
from gemma_edge.benchmarks.peers.interleaved import Peer, interleave
from gemma_edge.benchmarks.records.measurement import Measurement, PeerRun, TurnSizes
from gemma_edge.benchmarks.records.run_report import RunReport
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.engines.engine_registry import engine_of
from gemma_edge.runtime.errors import GemmaEdgeError

LEAST_GAIN = 0.02  # below which a change is not worth a setting of its own
# A setting below these speeds, of the default's, in each of one round, of two and more, is clearly slower.
CLEARLY_SLOWER = (0.75, 0.92)
LEAST_CHUNK = 32


@dataclass(frozen=True)
class Candidate:
    """A way to load a bundle.

    Attributes:
        label: the bundle's name in tables.
    """

    path: Path
    bundle: Bundle
    label: str
    threads: int
    chunk: int

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' * (self.threads > 1)}"
        return f"{self.label}: {threads}, chunk {self.chunk}"

    def workload(self, sizes: TurnSizes) -> Workload:
        """What one process measures."""
        return Workload(
            (sizes.n_prompt,),
            (sizes.n_gen,),
            reps=sizes.reps,
            threads=self.threads,
            context=self.bundle.context,
            chunk=self.chunk,
        )


@dataclass
class Trial:
    """What was measured of a candidate.

    Attributes:
        tests: of each round.
        ratios: its speed over the default's of the same round.
        left_out: why it was not measured to the end.
    """

    candidate: Candidate
    tests: list[tuple[Measurement, ...]] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    left_out: str = ""

    @property
    def ratio(self) -> float:
        """The median ratio; 0 of nothing."""
        return statistics.median(self.ratios) if self.ratios else 0.0

    @property
    def is_quicker(self) -> bool:
        """Whether it beats the default by more than the noise that was seen."""
        noise = max(self.ratios) - min(self.ratios) if len(self.ratios) > 1 else math.inf
        return not self.left_out and self.ratio - 1 > max(noise, LEAST_GAIN)

    def speed(self, prompt: bool) -> float | None:
        """Tokens a second of its prefill or decode, the median over the rounds."""
        found = [test.median_ts for tests in self.tests for test in tests if bool(test.n_prompt) == prompt]
        return statistics.median(found) if found else None


Work = Callable[[Candidate, Workload], RunReport]


def turn_seconds(tests: Sequence[Measurement]) -> float:
    """What a turn takes: the medians of its prefill and decode."""
    return sum((test.n_prompt + test.n_gen) / test.median_ts for test in tests)


def thread_counts(processor: Processor) -> list[int]:
    """Numbers of threads to try, the default first."""
    cores = processor.cores
    tried = (processor.threads, processor.fast, cores, cores * 3 // 4, cores // 2, 1)
    return [n for n in dict.fromkeys(tried) if n > 0]


def chunks(bundle: Bundle, prompt: int) -> list[int]:
    """Prefill chunks to try below the bundle's own: those that cut a prompt differently.

    None for an engine whose calls have fixed sizes.
    """
    sizes = (bundle.chunk // 2, bundle.chunk // 4)
    return [n for n in sizes if LEAST_CHUNK <= n < prompt and engine_of(bundle.format).any_chunk]


def compare(candidates: Sequence[Candidate], sizes: TurnSizes, rounds: int, work: Work) -> list[Trial]:
    """Measures candidates in turn; the first is the default.

    Args:
        work: does a workload with a candidate's bundle, in a process of its own.

    Raises:
        GemmaEdgeError: the default cannot be measured. Others that cannot are left out.
    """
    trials = [Trial(candidate) for candidate in candidates]
    first, *others = trials

    def ours() -> RunReport:
        report = work(first.candidate, first.candidate.workload(sizes))
        first.tests.append(report.tests)
        return report

    def peer(trial: Trial) -> Peer:
        def run(sizes: TurnSizes) -> PeerRun:
            _check_worth(_ratios(first, trial))
            tests = work(trial.candidate, trial.candidate.workload(sizes)).tests
            trial.tests.append(tests)
            return PeerRun(tests, 0, "gemma-edge", trial.candidate.label)

        return Peer(str(trial.candidate), trial.candidate.path, run)

    _, failed = interleave(ours, [peer(t) for t in others], sizes, rounds, name=str(first.candidate))
    for trial in trials:
        trial.ratios = _ratios(first, trial)
        start = f"{trial.candidate}: "
        trial.left_out = next((each.removeprefix(start) for each in failed if each.startswith(start)), "")
    return trials


def _ratios(first: Trial, trial: Trial) -> list[float]:
    """A trial's speed over the default's, in the rounds that both have ended."""
    pairs = zip(first.tests, trial.tests, strict=False)
    return [turn_seconds(default) / turn_seconds(own) for default, own in pairs]


def _check_worth(ratios: Sequence[float]) -> None:
    """Raises GemmaEdgeError for a candidate that is clearly slower than the default."""
    bar = CLEARLY_SLOWER[min(len(ratios), len(CLEARLY_SLOWER)) - 1]
    if ratios and max(ratios) < bar:
        raise GemmaEdgeError("clearly slower")


@dataclass(frozen=True)
class Pick:
    """What to load a bundle with, and its speed over that with the bundle's default settings."""

    candidate: Candidate
    gain: float


@dataclass(frozen=True)
class Tuned:
    """What came of tuning.

    Attributes:
        trials: all that was measured, the default first, with ratios to it.
        best: the quickest, and `gain`, its speed over the default's.
        picks: of each bundle that could be measured; the best one's is among them.
    """

    trials: tuple[Trial, ...]
    best: Candidate
    gain: float
    picks: tuple[Pick, ...]


def first_candidates(bundles: Sequence[tuple[Path, str]], processor: Processor) -> list[Candidate]:
    """Every bundle with every number of threads, and its own chunk; the default of the first comes first.

    Args:
        bundles: each with its label.

    Raises:
        BundleError: a bundle cannot be opened.
    """
    opened = [(path, Bundle.open(path), label) for path, label in bundles]
    counts = thread_counts(processor)
    return [Candidate(*each, threads, each[1].chunk) for threads in counts for each in opened]


def tune(candidates: Sequence[Candidate], sizes: TurnSizes, rounds: int, work: Work) -> Tuned:
    """Measures bundles with numbers of threads, then the best of them with smaller chunks.

    Args:
        candidates: of `first_candidates`.

    Raises:
        GemmaEdgeError: as `compare`.
    """
    trials = compare(candidates, sizes, rounds, work)
    own: dict[Path, list[Trial]] = {}
    for trial in trials:
        own.setdefault(trial.candidate.path, []).append(trial)
    picks = {}
    for path, (default, *others) in own.items():  # the first of a bundle has its default settings
        if default.tests:
            found = _best([_beside(default, trial) for trial in (default, *others)])
            picks[path] = Pick(found.candidate, found.ratio)
    chosen = [pick.candidate for pick in picks.values()]
    best = _best([trials[0], *(trial for trial in trials if trial.candidate in chosen)])
    gain, path = best.ratio, best.candidate.path
    if smaller := chunks(best.candidate.bundle, sizes.n_prompt):
        again = [best.candidate, *(replace(best.candidate, chunk=chunk) for chunk in smaller)]
        later = compare(again, sizes, rounds, work)
        best = _best(later)
        picks[path] = Pick(best.candidate, picks[path].gain * best.ratio)
        trials += [replace(trial, ratios=[ratio * gain for ratio in trial.ratios]) for trial in later[1:]]
        gain *= best.ratio
    return Tuned(tuple(trials), best.candidate, gain, tuple(picks.values()))


def _best(trials: Sequence[Trial]) -> Trial:
    """The quickest that is quicker than the first beyond doubt; otherwise the first."""
    return max((t for t in trials[1:] if t.is_quicker), key=lambda trial: trial.ratio, default=trials[0])


def _beside(default: Trial, trial: Trial) -> Trial:
    """A trial with ratios to another default."""
    return replace(trial, ratios=_ratios(default, trial))
