"""Records: one JSON object a line, with everything needed to judge a number later.

`gemma-edge bench -o` writes rows (`rows.py`). `--record` writes records for the tables of the documents: each
carries its own lines of the table in `readme`, what follows from the samples in `metrics`, and the samples
in `raw`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from gemma_edge.benchmarks.records.environment import Environment
from gemma_edge.benchmarks.records.run_report import Attempt, Round
from gemma_edge.runtime.files.typed_json import FieldError

RECORD_SCHEMA = 1
PROFILE = "profile"  # the kind of a `Record` with the parts of a decode step
Metrics = dict[str, bool | float | str | None]


@dataclass(frozen=True)
class TableRow:
    """A line of the table: what was measured, the target, and the measured value."""

    row: str
    bar: str
    value: str


@dataclass(frozen=True, kw_only=True)
class Head:
    """The beginning of every line of a results file."""

    kind: str
    name: str
    time: str
    schema: int = RECORD_SCHEMA
    environment: Environment = field(default_factory=Environment)

    def __post_init__(self) -> None:
        if not 1 <= self.schema <= RECORD_SCHEMA:
            expected = f"at most {RECORD_SCHEMA}; update gemma-edge to read it"
            raise FieldError("schema", expected, self.schema)


@dataclass(frozen=True, kw_only=True)
class TableRecord(Head):
    """A record for the tables: its lines, and the model and recipe of the bundle."""

    model: str = ""
    recipe: str = ""
    readme: tuple[TableRow, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Record(TableRecord):
    """A record of any other kind than those below: "answer", "encoders", "export", "load", "parity"."""

    metrics: Metrics = field(default_factory=dict)
    raw: Any = None


@dataclass(frozen=True)
class RoundsRaw:
    """The samples of a comparison."""

    rounds: tuple[Round, ...]


@dataclass(frozen=True, kw_only=True)
class CompareRecord(TableRecord):
    """A bundle's speed and memory, beside peers of the same rounds; `metrics` are medians over the rounds."""

    metrics: Metrics
    raw: RoundsRaw


@dataclass(frozen=True)
class CeilingRaw:
    """A run under a limit, and its control."""

    run: Attempt
    control: Attempt


@dataclass(frozen=True, kw_only=True)
class CeilingRecord(TableRecord):
    """The proof that a bundle fits a limit."""

    metrics: Metrics
    raw: CeilingRaw


@dataclass(frozen=True)
class Score:
    """How many questions were answered correctly."""

    right: int
    total: int

    def __post_init__(self) -> None:
        if not 0 <= self.right <= self.total or not self.total:
            raise FieldError("right", f"at most total, {self.total}, which is above 0", self.right)

    @property
    def share(self) -> float:
        return self.right / self.total


@dataclass(frozen=True)
class Divergence:
    """How far logits are from the checkpoint's, over the answers to text questions or over a text."""

    mean_kl: float
    top1: float
    bundle_perplexity: float
    tokens: int | None = None
    max_kl: float | None = None
    max_abs: float | None = None
    perplexity: float | None = None


@dataclass(frozen=True)
class QualityColumn:
    """One bundle: correct answers by task and by medium, divergence, size and memory in bytes.

    `prose` is the divergence over a text. Where methods of rounding were compared, `method` is "nearest" or
    "calibrated"; a decoding step reads `bytes_per_token` of weights, and `decode_rate` is in tokens a second.
    """

    name: str
    tasks: dict[str, Score]
    kinds: dict[str, Score]
    divergence: Divergence | None = None
    file_bytes: int | None = None
    peak_rss_anon_bytes: int | None = None
    peak_rss_file_bytes: int | None = None
    prose: Divergence | None = None
    recipe: str | None = None
    method: str | None = None
    bytes_per_token: int | None = None
    decode_rate: float | None = None


@dataclass(frozen=True)
class Quality:
    """Bundles side by side, and the share of questions that each two answered alike."""

    columns: tuple[QualityColumn, ...]
    agreement: dict[str, dict[str, float]]

    def __post_init__(self) -> None:
        if not self.columns:
            raise FieldError("columns", "at least one", [])


@dataclass(frozen=True, kw_only=True)
class QualityRecord(TableRecord):
    """What recipes and engines cost in answers."""

    metrics: Quality
    raw: Any = None

    @property
    def compares_methods(self) -> bool:
        """Whether methods of rounding were compared, too."""
        return any(column.method for column in self.metrics.columns)
