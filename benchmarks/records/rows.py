"""Rows of `gemma-edge bench -o`: a test, an encoder, a session.

- `bench`: one test. It has every field of llama-bench's own JSONL, with its names and units, and ours.
- `encode`: one encoder with an image, or with the longest clip.
- `prefix`: starts behind a long prefix, without the prefix cache and with it.
- `speculation`: a forced answer, decoded one token at a time and with drafts.
- `session`: a bundle with one number of threads, and everything but the speed of a test: memory over time,
  load, latency, ceiling.

Rows of one run have the same `run`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gemma_edge.benchmarks.records.measurement import EncoderRun, KernelTest, PrefixRun, SpeculationRun
from gemma_edge.benchmarks.records.record import Head
from gemma_edge.benchmarks.records.run_report import (
    Latency,
    MemoryReport,
    Phase,
    Round,
    SensorsAround,
    SustainedPoint,
)

CLIP_SECONDS = 30  # of a recording that is attached to a measured answer


@dataclass(frozen=True, kw_only=True)
class Row(Head):
    """The beginning of every row."""

    run: str = ""
    device: str = "local"


@dataclass(frozen=True, kw_only=True)
class LlamaBenchFields:
    """llama-bench's fields beside those of a measurement; defaults say "not so here", as there."""

    build_commit: str | None = None
    build_number: int = 0
    cpu_info: str | None = None
    gpu_info: str = ""
    backends: str = "CPU"
    model_filename: str | None = None
    model_type: str | None = None
    model_size: int | None = None
    model_n_params: int | None = None
    n_batch: int | None = None
    n_ubatch: int | None = None
    n_threads: int = 0
    cpu_mask: str = "0x0"
    cpu_strict: bool = False
    poll: int = 0
    type_k: str | None = None
    type_v: str | None = None
    n_gpu_layers: int = 0
    n_cpu_moe: int = 0
    split_mode: str = "none"
    main_gpu: int = 0
    no_kv_offload: bool = False
    flash_attn: int = 0
    devices: str = "none"
    tensor_split: str = "0.00"
    tensor_buft_overrides: str = "none"
    load_mode: str = "mmap"
    lazy_mode: str = "off"
    embeddings: bool = False
    no_op_offload: int = 0
    no_host: bool = False
    repack: bool = True
    fit_target: int = 0
    fit_min_ctx: int = 0
    test_time: str | None = None


@dataclass(frozen=True, kw_only=True)
class BenchRow(Row, LlamaBenchFields, KernelTest):
    """A test, of gemma-edge or of a peer; None for what a peer does not tell."""

    kind: str = "bench"
    engine: str = ""
    model: str | None = None
    recipe: str | None = None
    format: str | None = None
    bytes_per_token: int | None = None
    bandwidth_gb_s: float | None = None  # stream-read bandwidth of the same run
    bandwidth_share: float | None = None  # of decode tests: weights read, of that bandwidth
    peak_rss_anon: int | None = None
    peak_rss: int | None = None
    temperature_c: float | None = None
    frequency_mhz: int | None = None

    def __post_init__(self) -> None:
        Row.__post_init__(self)
        KernelTest.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class BundleRow(Row):
    """What a row of a bundle says of the bundle."""

    model_filename: str | None = None
    n_threads: int = 0
    engine: str = ""
    model: str | None = None
    recipe: str | None = None
    format: str | None = None
    test_time: str | None = None


@dataclass(frozen=True, kw_only=True)
class EncodeRow(BundleRow, EncoderRun):
    """An encoder; `limit_bytes` is the ceiling that was enforced."""

    kind: str = "encode"
    limit_bytes: int | None = None

    def __post_init__(self) -> None:
        Row.__post_init__(self)
        EncoderRun.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class PrefixRow(BundleRow, PrefixRun):
    """Starts behind a prefix, without the prefix cache and with it."""

    kind: str = "prefix"

    def __post_init__(self) -> None:
        Row.__post_init__(self)
        PrefixRun.__post_init__(self)


@dataclass(frozen=True, kw_only=True)
class SpeculationRow(BundleRow, SpeculationRun):
    """A forced answer, decoded one token at a time and with drafts."""

    kind: str = "speculation"

    def __post_init__(self) -> None:
        Row.__post_init__(self)
        SpeculationRun.__post_init__(self)


@dataclass(frozen=True)
class LoadTimes:
    """Seconds of each load that was measured, and of importing the runtime."""

    first_s: float | None = None  # the engine packs weights
    cold_s: float | None = None
    warm_s: float | None = None
    limited_s: float | None = None  # under the ceiling
    import_s: float | None = None
    cached_bytes: int | None = None  # of the bundle, before the cold load


@dataclass(frozen=True)
class BandwidthAround:
    """Stream-read bandwidth in GB/s before and after the tests."""

    before: float
    after: float
    mean: float


@dataclass(frozen=True)
class Ceiling:
    """The verdict on a memory limit: `met`, whether the kernel enforced it, and the same in words."""

    limit_bytes: int
    met: bool
    enforced: bool
    text: str
    mechanism: str | None = None
    peak_bytes: int | None = None
    control_limit_bytes: int | None = None
    control_killed: bool | None = None


@dataclass(frozen=True)
class BarResult:
    """A figure and the bar it was held to."""

    what: str
    value: float
    bar: float
    met: bool


@dataclass(frozen=True)
class Ratio:
    """Our speed over a peer's in one test: the median over the rounds of ratios within a round."""

    engine: str
    test: str
    ratio: float
    samples: list[float]
    rounds: int


@dataclass(frozen=True)
class Sustained:
    """A sustained run: its curve, and the medians of its first and last tenth."""

    points: tuple[SustainedPoint, ...]
    decode_first_tps: float
    decode_last_tps: float
    decode_kept: float
    text: str


@dataclass(frozen=True)
class AnswerRun:
    """One answer with attachments, phase by phase; its tests are prefill and decode, once each."""

    images: int
    clips: int
    phases: tuple[Phase, ...]
    tests: tuple[KernelTest, ...]
    memory: MemoryReport
    ceiling: Ceiling | None = None


@dataclass(frozen=True, kw_only=True)
class SessionRow(Row):
    """A session with one number of threads."""

    kind: str = "session"
    model: str | None = None
    recipe: str | None = None
    format: str | None = None
    engine: str | None = None
    bundle_bytes: int | None = None
    workload: dict[str, Any] = field(default_factory=dict)  # of `measure.workload.Workload`
    device_facts: dict[str, Any] | None = None  # of `devices.DeviceFacts`; None for this machine
    load: LoadTimes = field(default_factory=LoadTimes)
    busy_cores: float | None = None  # kept busy by other processes before the run
    bandwidth_gb_s: BandwidthAround | None = None
    context: int | None = None
    latency: Latency | None = None
    phases: tuple[Phase, ...] = ()
    memory: MemoryReport | None = None
    sensors: SensorsAround | None = None
    sustained: Sustained | None = None
    answer: AnswerRun | None = None
    ceiling: Ceiling | None = None
    bars: tuple[BarResult, ...] = ()
    ratios: tuple[Ratio, ...] = ()
    rounds: tuple[Round, ...] = ()
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    error: str | None = None

    @property
    def n_threads(self) -> int | None:
        threads = self.workload.get("threads")
        return threads if isinstance(threads, int) else None


def attached(images: int, clips: int) -> str:
    """ "1 image and 30 s of audio"."""
    parts = [f"{images} image{'s' if images > 1 else ''}"] if images else []
    parts += [f"{clips * CLIP_SECONDS} s of audio"] if clips else []
    return " and ".join(parts) or "text"


def threads_of(row: BenchRow | EncodeRow | PrefixRow | SpeculationRow | SessionRow) -> str:
    """ "1 thread", "2 threads", or nothing where a row does not say."""
    count = row.n_threads
    return f"{count} thread{'s' if count > 1 else ''}" if count else ""
