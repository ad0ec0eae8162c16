"""What one measured process reports, as typed data that crosses a process or a network."""

from __future__ import annotations

from dataclasses import dataclass, field

from gemma_edge.benchmarks.records.environment import Environment
from gemma_edge.benchmarks.records.measurement import (
    EncoderRun,
    KernelTest,
    PeerRun,
    PrefixRun,
    SpeculationRun,
)
from gemma_edge.devices.machine.bandwidth import Bandwidth
from gemma_edge.devices.machine.memory import MemoryPoints, MemorySample, PeakMemory
from gemma_edge.devices.machine.sensors import Sensors
from gemma_edge.runtime.files.typed_json import FieldError

REPORT_SCHEMA = 1


@dataclass(frozen=True)
class Phase:
    """A part of a run: its begin and end in seconds and its memory at the end, or its peak."""

    name: str
    start_s: float | None = None
    end_s: float | None = None
    memory: MemorySample | None = None
    seconds: float | None = None
    peak: PeakMemory | None = None


@dataclass(frozen=True)
class MemoryReport:
    """Memory of a run; `peak` of each kind of pages, which need not be of one moment."""

    steady: MemorySample
    peak: PeakMemory
    loaded: MemorySample | None = None
    timeline: MemoryPoints | None = None


@dataclass(frozen=True)
class Percentiles:
    """Milliseconds."""

    p50: float
    p90: float
    p99: float


@dataclass(frozen=True)
class Latency:
    """Answers end to end, in milliseconds: time to first token, gaps between tokens, every sample."""

    prompt_tokens: int
    answer_tokens: int
    requests: int
    ttft_ms: Percentiles
    itl_ms: Percentiles | None = None
    samples_ttft_ms: list[float] = field(default_factory=list)
    samples_itl_ms: list[float] = field(default_factory=list)
    decode_tps: float | None = None


@dataclass(frozen=True)
class SustainedPoint:
    """One turn of a sustained run: seconds since its start, tokens per second, the state of the machine."""

    t_s: float
    tg_ts: float
    pp_ts: float | None = None
    temperature_c: float | None = None
    frequency_mhz: list[int] | None = None
    throttle_count: int | None = None
    throttled: list[str] | None = None


@dataclass(frozen=True)
class SensorsAround:
    """Sensors before and after a run."""

    before: Sensors = field(default_factory=Sensors)
    after: Sensors = field(default_factory=Sensors)


@dataclass(frozen=True)
class RunReport:
    """One measured process. Seconds and bytes; None, or empty, for what was not asked for.

    Attributes:
        engine: for a native program, which has none of our environment.
        cached_bytes: bytes of the bundle in the page cache before a cold load.
        encode: of a run of the encoders, which loads no decoder.
        prefix: of a run that measures the prefix cache, and nothing else.
        speculation: of a run that measures what drafts gain, and nothing else.
        soft_tokens: of the attachments of an answer.
        phases: with `start_s` and `end_s`, or of an answer with `seconds` and `peak`.
    """

    schema: int = REPORT_SCHEMA
    environment: Environment = field(default_factory=Environment)
    engine: str | None = None
    import_s: float | None = None
    load_s: float | None = None
    cached_bytes: int | None = None
    context: int | None = None
    tests: tuple[KernelTest, ...] = ()
    latency: Latency | None = None
    sustained: tuple[SustainedPoint, ...] | None = None
    encode: tuple[EncoderRun, ...] = ()
    prefix: PrefixRun | None = None
    speculation: tuple[SpeculationRun, ...] = ()
    soft_tokens: int | None = None
    phases: tuple[Phase, ...] = ()
    memory: MemoryReport | None = None
    sensors: SensorsAround = field(default_factory=SensorsAround)
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.schema != REPORT_SCHEMA:
            raise FieldError("schema", f"{REPORT_SCHEMA}", self.schema)


@dataclass(frozen=True)
class Round:
    """One round of a comparison: gemma-edge, every peer that did not fail, and the machine's bandwidth."""

    kernel: RunReport = field(default_factory=RunReport)
    peers: dict[str, PeerRun] = field(default_factory=dict)
    bandwidth: Bandwidth | None = None
    busy_cores: float | None = None  # that other processes kept busy just before


@dataclass(frozen=True)
class Attempt:
    """One run under a memory limit; `kernel` is None if the kernel killed the run."""

    limit_bytes: int
    killed: bool
    peak_bytes: int | None = None
    mechanism: str | None = None
    kernel: RunReport | None = None
    seconds: float | None = None
    cached_bytes: int | None = None
