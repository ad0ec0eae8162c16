"""Bars: the figures that a session must reach."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from gemma_edge.benchmarks.records.measurement import EncoderRun, Measurement
from gemma_edge.benchmarks.records.rows import BarResult
from gemma_edge.benchmarks.records.run_report import Latency
from gemma_edge.runtime.errors import UsageError


@dataclass(frozen=True)
class Bars:
    """Bars; None asks nothing. Times are medians, speeds the slowest test's median."""

    ttft_ms: float | None = None
    prefill_tps: float | None = None
    decode_tps: float | None = None
    image_ms: float | None = None
    audio_ms: float | None = None

    def judge(
        self, latency: Latency | None, tests: Sequence[Measurement], encoders: Sequence[EncoderRun] = ()
    ) -> list[BarResult]:
        """One entry a bar.

        Raises:
            UsageError: nothing was measured that a bar could judge.
        """
        judged: list[BarResult] = []
        if self.ttft_ms is not None:
            if latency is None:
                raise UsageError("--assert-ttft-ms needs --requests above 0")
            judged.append(_at_most("time to first token, ms", latency.ttft_ms.p50, self.ttft_ms))
        for what, bar, attribute in (
            ("prefill, tok/s", self.prefill_tps, "n_prompt"),
            ("decode, tok/s", self.decode_tps, "n_gen"),
        ):
            if bar is not None:
                speeds = [test.median_ts for test in tests if getattr(test, attribute)]
                if not speeds:
                    raise UsageError(f"a bar for {what} needs such a test: see -p and -n")
                judged.append(BarResult(what, min(speeds), bar, min(speeds) >= bar))
        for encoder, bar in (("vision", self.image_ms), ("audio", self.audio_ms)):
            times = [1000 * run.median_s for run in encoders if run.encoder == encoder]
            if bar is not None and times:
                judged.append(_at_most(f"{encoder} encoder, ms", times[0], bar))
        return judged


def _at_most(what: str, value: float, bar: float) -> BarResult:
    return BarResult(what, value, bar, value <= bar)
