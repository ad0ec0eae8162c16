"""Measured times: of one test of llama-bench's kind, and of one encoder.

Both are written with llama-bench's field names, so that one program reads its JSON and ours.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter_ns
from typing import ClassVar

from gemma_edge.devices.machine.sensors import Sensors
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.files.typed_json import FieldError


class Timed:
    """The mean and deviation of `samples_ns`, the time of each repetition."""

    samples_ns: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.samples_ns or not 0 < min(self.samples_ns) <= max(self.samples_ns) < 2**63:
            raise FieldError("samples_ns", "times above 0", list(self.samples_ns))

    @property
    def avg_ns(self) -> int:
        return round(statistics.fmean(self.samples_ns))

    @property
    def stddev_ns(self) -> int:
        return round(statistics.stdev(self.samples_ns)) if len(self.samples_ns) > 1 else 0


@dataclass(frozen=True)
class Measurement(Timed):
    """Repetitions of one test: `pp512` prefills 512 tokens, `tg64 @ d4096` generates 64 after 4096.

    Exactly one of `n_prompt` and `n_gen` is not zero. `samples_ns` has the time of each repetition, and
    `n_depth` is the number of tokens in the KV cache before the test.

    Raises:
        FieldError: no samples, or a sample that is no time.
    """

    DERIVED: ClassVar = ("test", "avg_ns", "stddev_ns", "samples_ts", "avg_ts", "stddev_ts", "median_ts")

    n_prompt: int
    n_gen: int
    samples_ns: tuple[int, ...]
    n_depth: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.n_prompt > 0) == (self.n_gen > 0) or min(self.n_prompt, self.n_gen, self.n_depth) < 0:
            raise FieldError("n_prompt", "a number of tokens, or one in n_gen", self.n_prompt)

    @property
    def test(self) -> str:
        return name_of_test(self.n_prompt, self.n_gen, self.n_depth)

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

    def __str__(self) -> str:
        return f"{self.test} {self.avg_ts:.2f} ± {self.stddev_ts:.2f} tok/s"


@dataclass(frozen=True)
class KernelTest(Measurement):
    """A test with its cost beside time: CPU seconds, cores kept busy, pages read from the disk, sensors."""

    cpu_s: float | None = None
    cores_busy: float | None = None
    major_faults: int | None = None
    sensors: Sensors | None = None


@dataclass(frozen=True)
class PrefixStart:
    """One start: seconds of loading the bundle, and from there to the first token."""

    load_s: float
    first_token_s: float

    @property
    def seconds(self) -> float:
        return self.load_s + self.first_token_s


@dataclass(frozen=True)
class PrefixRun:
    """Prompts behind a prefix, without the prefix cache and with it.

    Attributes:
        prefix_tokens, question_tokens: of each prompt.
        file_bytes: of the stored prefix.
        stored: the start that stored it.
        without, restored: in turn.

    Raises:
        FieldError: no starts.
    """

    DERIVED: ClassVar = ("test", "sooner", "sooner_loaded")

    prefix_tokens: int
    question_tokens: int
    file_bytes: int
    stored: PrefixStart
    without: tuple[PrefixStart, ...]
    restored: tuple[PrefixStart, ...]

    def __post_init__(self) -> None:
        if not self.without or not self.restored:
            raise FieldError("without, restored", "at least one start each", [])

    @property
    def test(self) -> str:
        return f"prefix {self.prefix_tokens}"

    @property
    def without_s(self) -> float:
        """The median start without the cache, loading included."""
        return statistics.median(start.seconds for start in self.without)

    @property
    def restored_s(self) -> float:
        """The median start with it, loading included."""
        return statistics.median(start.seconds for start in self.restored)

    @property
    def sooner(self) -> float:
        """How many times sooner a prompt starts with the cache, loading of the bundle included."""
        return round(self.without_s / max(1e-9, self.restored_s), 3)

    @property
    def sooner_loaded(self) -> float:
        """The same with the bundle loaded already; reading the prefix is included."""
        without, restored = (
            statistics.median(start.first_token_s for start in starts)
            for starts in (self.without, self.restored)
        )
        return round(without / max(1e-9, restored), 3)

    def __str__(self) -> str:
        return (
            f"{self.test}: {self.sooner:.1f}x sooner ({self.without_s:.2f} s, restored "
            f"{self.restored_s:.2f} s, loading included); {self.sooner_loaded:.1f}x when loaded"
        )


@dataclass(frozen=True)
class SpeculationRun:
    """A forced answer, decoded one token at a time and with drafts, in turn.

    Attributes:
        text: what the answer repeats: "copied", "edited" or "shuffled"; see `measure.speculation_times`.
        tokens: of the answer.
        plain_s, speculated_s: of each repetition, from the first token to the last.
        drafted, accepted: tokens of the last repetition.
        costs: of a call of so many rows, in decode steps of this machine; {} if nothing was drafted.

    Raises:
        FieldError: no repetitions, or a time that is none.
    """

    DERIVED: ClassVar = ("test", "speedup")

    text: str
    tokens: int
    plain_s: tuple[float, ...]
    speculated_s: tuple[float, ...]
    drafted: int
    accepted: int
    costs: dict[str, float]

    def __post_init__(self) -> None:
        for name in ("plain_s", "speculated_s"):
            times = getattr(self, name)
            if not times or min(times) <= 0:
                raise FieldError(name, "seconds above 0", list(times))

    @property
    def test(self) -> str:
        return f"{self.text} {self.tokens}"

    @property
    def plain_tps(self) -> float:
        """Tokens per second of the median repetition, without drafts."""
        return (self.tokens - 1) / statistics.median(self.plain_s)

    @property
    def speculated_tps(self) -> float:
        """The same with drafts."""
        return (self.tokens - 1) / statistics.median(self.speculated_s)

    @property
    def speedup(self) -> float:
        """How many times as fast drafts make it; below 1 if they cost time."""
        return round(self.speculated_tps / self.plain_tps, 3)

    def __str__(self) -> str:
        return (
            f"{self.test}: {self.speedup:.2f}x ({self.plain_tps:.1f} to {self.speculated_tps:.1f} tok/s), "
            f"{self.accepted} of {self.drafted} drafted tokens accepted"
        )


@dataclass(frozen=True)
class EncoderRun(Timed):
    """One encoder: its loads, its times, its memory.

    Attributes:
        encoder: "vision" or "audio".
        pixels: height and width of the image; 0 for audio.
        seconds: length of the clip; 0 for an image.
        soft_tokens: rows that the encoder returns.
        first_load_s: the first load in this process, with the page cache as it was; LiteRT packs weights
            during its very first load.
        load_s: the second load, after the first encoder was released.
        samples_ns: of each repetition.
        peak_rss_anon, peak_rss_file, peak_rss: bytes of the process, from the first load to the last
            repetition.

    Raises:
        FieldError: no samples, or a sample that is no time.
    """

    DERIVED: ClassVar = ("test", "avg_ns", "stddev_ns", "median_ns", "real_time")

    encoder: str
    pixels: int
    seconds: float
    soft_tokens: int
    first_load_s: float
    load_s: float
    samples_ns: tuple[int, ...]
    peak_rss_anon: int
    peak_rss_file: int
    peak_rss: int

    @property
    def test(self) -> str:
        """ "image 768x768", "audio 30 s"."""
        return f"audio {self.seconds:g} s" if self.seconds else f"image {self.pixels}x{self.pixels}"

    @property
    def median_ns(self) -> int:
        return round(statistics.median(self.samples_ns))

    @property
    def median_s(self) -> float:
        return statistics.median(self.samples_ns) / 1e9

    @property
    def real_time(self) -> float | None:
        """Seconds of sound for each second of encoding; None for an image."""
        return round(self.seconds / self.median_s, 3) if self.seconds else None

    def __str__(self) -> str:
        times = "" if self.real_time is None else f", {self.real_time:.1f}x real time"
        return f"{self.test}: {self.median_s:.2f} s{times}, {self.soft_tokens} tokens"


@dataclass(frozen=True)
class TurnSizes:
    """One prefill and one decode: what every peer can do, with llama-bench's parameters."""

    n_prompt: int = 512
    n_gen: int = 64
    reps: int = 5
    threads: int = 2
    context: int = 4096

    def check(self) -> None:
        """Raises UsageError for sizes that cannot be measured."""
        if min(self.n_prompt, self.n_gen) < 0 or self.n_prompt + self.n_gen == 0:
            raise UsageError("-p and -n: expected numbers of tokens, at least one of them above 0")
        if min(self.reps, self.threads, self.context) < 1:
            raise UsageError("-r, -t and --context: expected at least 1")
        longest = max(self.n_prompt, self.n_gen)
        if longest > self.context:
            raise UsageError(f"{longest} tokens do not fit a context of {self.context}: raise --context")


OTHER_BUNDLE = "the other bundle"
# Peers by their names in results, and by the names that people know them by.
PEER_TITLES = {
    "llama.cpp": "llama.cpp",
    "litert-lm": "LiteRT-LM",
    "onnxruntime-genai": "onnxruntime-genai",
    "transformers": "transformers",
    OTHER_BUNDLE: OTHER_BUNDLE,
}


def peer_key(name: str) -> str:
    """A peer's name in the names of metrics."""
    return "against" if name == OTHER_BUNDLE else name.replace(".", "_").replace("-", "_")


@dataclass(frozen=True)
class PeerRun:
    """One run of another program: its tests, its peak RSS in bytes, and its own name for build and model."""

    tests: tuple[Measurement, ...]
    peak_rss: int
    build: str
    model: str


def by_test(tests: Iterable[Measurement]) -> dict[str, Measurement]:
    """Measurements by the names of their tests."""
    return {test.test: test for test in tests}


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
