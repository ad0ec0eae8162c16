"""Reports of measured processes as rows of `gemma-edge bench -o`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from gemma_edge.benchmarks.records.bundle_facts import BundleFacts
from gemma_edge.benchmarks.records.environment import Environment, now
from gemma_edge.benchmarks.records.measurement import Measurement, PrefixRun
from gemma_edge.benchmarks.records.rows import BenchRow, EncodeRow, PrefixRow, SpeculationRow
from gemma_edge.benchmarks.records.run_report import RunReport
from gemma_edge.runtime.version import __version__


class RowHead(TypedDict):
    """The fields that rows of one session share."""

    name: str
    run: str
    device: str
    time: str


class BundleFields(RowHead):
    """The fields that a row of a bundle has of it and of its process."""

    environment: Environment
    model_filename: str
    n_threads: int
    engine: str
    model: str
    recipe: str
    format: str
    test_time: str


@dataclass(frozen=True)
class RowBuilder:
    """Makes the rows of one session."""

    run: str
    name: str
    device: str
    file: str  # name of the bundle's file or folder
    facts: BundleFacts
    threads: int

    def head(self, time: str, name: str = "") -> RowHead:
        return {"name": name or self.name, "run": self.run, "device": self.device, "time": time}

    def engine(self, report: RunReport) -> str:
        """The engine that computed a report, with its version."""
        version = report.environment.versions.get(self.facts.distribution)
        return report.engine or f"{self.facts.engine} {version or ''}".strip()

    def tests(self, report: RunReport, bandwidth_gb_s: float | None) -> list[BenchRow]:
        """A row a test.

        Args:
            bandwidth_gb_s: stream-read bandwidth of the same minutes; decode tests get their share of it.
        """
        facts = self.facts
        kv = {"fp32": "f32", "int8": "i8"}.get(facts.kv_cache, facts.kv_cache)
        peak = report.memory.peak if report.memory else None
        rows = []
        for test in report.tests:
            share = None
            if bandwidth_gb_s and test.n_gen:
                share = round(facts.bytes_per_token * test.median_ts / (bandwidth_gb_s * 1e9), 4)
            sensors = test.sensors
            row = BenchRow(
                **self._of_bundle(report),
                **vars(test),
                build_commit=__version__,
                cpu_info=report.environment.cpu,
                model_type=f"{facts.model} {facts.recipe}",
                model_size=facts.file_bytes,
                model_n_params=facts.parameters,
                n_batch=facts.chunk,
                n_ubatch=facts.chunk,
                type_k=kv,
                type_v=kv,
                bytes_per_token=facts.bytes_per_token,
                bandwidth_gb_s=bandwidth_gb_s,
                bandwidth_share=share,
                peak_rss_anon=peak.rss_anon if peak else None,
                peak_rss=peak.highest_rss if peak else None,
                temperature_c=sensors.temperature_c if sensors else None,
                frequency_mhz=max(sensors.frequency_mhz) if sensors and sensors.frequency_mhz else None,
            )
            rows.append(row)
        return rows

    def encoders(self, report: RunReport, limit: int | None) -> list[EncodeRow]:
        """A row an encoder; `limit` is the ceiling that was enforced, in bytes."""
        return [EncodeRow(**self._of_bundle(report), **vars(run), limit_bytes=limit) for run in report.encode]

    def prefix(self, report: RunReport, run: PrefixRun) -> PrefixRow:
        """The row of a run that measured the prefix cache."""
        return PrefixRow(**self._of_bundle(report), **vars(run))

    def speculation(self, report: RunReport) -> list[SpeculationRow]:
        """A row for each text that was decoded with drafts."""
        return [SpeculationRow(**self._of_bundle(report), **vars(run)) for run in report.speculation]

    def _of_bundle(self, report: RunReport) -> BundleFields:
        facts, time = self.facts, now()
        return {
            **self.head(time),
            "environment": report.environment,
            "model_filename": self.file,
            "n_threads": self.threads,
            "engine": self.engine(report),
            "model": facts.model,
            "recipe": facts.recipe,
            "format": facts.format,
            "test_time": time,
        }

    def peer(
        self, test: Measurement, engine: str, file: str, peak_rss: int, environment: Environment
    ) -> BenchRow:
        """A row of another program; None for what the program does not tell."""
        time = now()
        return BenchRow(
            **self.head(time, name=file),
            **vars(test),
            environment=environment,
            cpu_info=environment.cpu,
            model_filename=file,
            n_threads=self.threads,
            test_time=time,
            engine=engine,
            peak_rss=peak_rss,
        )
