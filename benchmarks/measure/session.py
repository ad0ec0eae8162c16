"""One bundle measured on one target with one number of threads: the rows and records that come of it.

Order matters. Bandwidth is probed right before and right after the tests, so that a share of it is of the
same minutes. Every step is a process of its own; a step that fails ends the session, and the rows of the
steps before it are kept.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from gemma_edge.benchmarks.measure.answer_phases import write_media
from gemma_edge.benchmarks.measure.bars import Bars
from gemma_edge.benchmarks.measure.ceiling_verdict import judge_ceiling, with_encoders
from gemma_edge.benchmarks.measure.row_builder import RowBuilder
from gemma_edge.benchmarks.measure.sustained import sensor_notes, summarize_sustained
from gemma_edge.benchmarks.measure.table_records import TableRecords
from gemma_edge.benchmarks.measure.target import Outcome, Target
from gemma_edge.benchmarks.measure.workload import Workload
from gemma_edge.benchmarks.peers.interleaved import Peer, interleave, merged, ratios
from gemma_edge.benchmarks.records.bundle_facts import BundleFacts
from gemma_edge.benchmarks.records.environment import environment, now
from gemma_edge.benchmarks.records.measurement import Measurement, TurnSizes
from gemma_edge.benchmarks.records.record import Head
from gemma_edge.benchmarks.records.rows import (
    AnswerRun,
    BandwidthAround,
    BenchRow,
    Ceiling,
    EncodeRow,
    SessionRow,
    attached,
    threads_of,
)
from gemma_edge.benchmarks.records.run_report import Round, RunReport
from gemma_edge.devices.machine.bandwidth import Bandwidth
from gemma_edge.devices.machine.load import QUIET_CORES, busy_cores
from gemma_edge.devices.script import progress
from gemma_edge.runtime.errors import CeilingError
from gemma_edge.runtime.files.abandoned import temporary_folder
from gemma_edge.runtime.units import format_limit, format_size

Emit = Callable[[Head], None]
CONTROL_TOKENS = 8
PREFIX_REPS = 3  # each computes a long prefix


@dataclass(frozen=True)
class Plan:
    """The steps of a session beside its workload.

    Attributes:
        ceiling, control: bytes; the limit that everything runs under, and the limit that must kill a run.
        images, clips: attachments of one answer that is measured phase by phase; none for no such step.
        prefix: tokens of a prefix that is restored from the prefix cache; 0 for no such step.
        speculate: tokens of answers that are decoded with drafts; 0 for no such step.
        peers: programs to measure in turn with us, `rounds` times.
        record: takes the records for the tables; None for none.
        targets: of the tables: the text for a figure, by the figure's name.
    """

    ceiling: int | None = None
    control: int | None = None
    bars: Bars = field(default_factory=Bars)
    cold_load: bool = True
    encode: bool = True  # where the bundle has encoders
    images: int = 0
    clips: int = 0
    prefix: int = 0
    speculate: int = 0
    bandwidth_seconds: float = 2.0
    timeout: float = 3600.0
    peers: Sequence[Peer] = ()
    rounds: int = 3
    record: Emit | None = None
    targets: dict[str, str] = field(default_factory=dict)


class Session:
    """A session under way: `row` is filled as it goes, and emitted at its end however it ends."""

    def __init__(
        self,
        target: Target,
        bundle: Path,
        facts: BundleFacts,
        workload: Workload,
        plan: Plan,
        run: str,
        name: str,
        emit: Emit,
    ) -> None:
        self.target, self.facts, self.workload, self.plan, self.emit = target, facts, workload, plan, emit
        self.build = RowBuilder(run, name, target.name, bundle.resolve().name, facts, workload.threads)
        self.tables = TableRecords(name, facts, workload, plan.targets)
        self.problems: list[str] = []
        self.row = SessionRow(name=name, time=now())

    def measure(self) -> list[str]:
        """Does it all and emits the rows.

        Returns:
            What was exceeded or missed, in words; empty when all is well.

        Raises:
            GemmaEdgeError: a step failed; what was measured before it is emitted, the error with it.
        """
        device = self.target.facts()
        self._set(
            **self.build.head(self.row.time),
            environment=environment() if device is None else self.row.environment,
            model=self.facts.model,
            recipe=self.facts.recipe,
            format=self.facts.format,
            bundle_bytes=self.facts.file_bytes,
            workload=dataclasses.asdict(self.workload),
            device_facts=None if device is None else dataclasses.asdict(device),
        )
        try:
            self._steps()
        except BaseException as error:
            self._set(error=str(error) or type(error).__name__)
            raise
        finally:
            self._set(problems=tuple(self.problems))
            self.emit(self.row)
            if self.plan.record:
                for record in self.tables.records:
                    self.plan.record(record)
        return self.problems

    def _steps(self) -> None:
        plan = self.plan
        if self.target.name == "local":
            busy = busy_cores()
            self._set(busy_cores=busy)
            if busy is not None and busy > QUIET_CORES:
                self._note(f"other processes kept {busy:.1f} cores busy before the run")
        if plan.cold_load and self.target.runs_worker:
            self._cold_load()
        limited = plan.ceiling is not None and self.target.enforces
        encoded = None
        if plan.encode and self.facts.encoders and self.target.runs_worker:
            encoded = self._encode(limited)
        outcome, tests = self._tests(limited)
        if plan.ceiling is not None:
            self._judge(outcome, encoded, plan.ceiling)
        if outcome.report is not None:
            encoders = encoded.report.encode if encoded and encoded.report else ()
            bars = plan.bars.judge(outcome.report.latency, tests, encoders)
            self._set(bars=tuple(bars))
            self.problems += [
                f"missed: {bar.what}: {bar.value:.2f}, asked for {bar.bar:g}" for bar in bars if not bar.met
            ]
        if plan.images or plan.clips:
            self._answer(limited)
        if plan.prefix and self.target.runs_worker:
            self._prefix()
        if plan.speculate and self.target.runs_worker:
            self._speculation()
        if plan.peers:
            self._peers()

    def _tests(self, limited: bool) -> tuple[Outcome, list[BenchRow]]:
        """The workload itself, between two probes of the bandwidth."""
        before = self._bandwidth()
        ceiling = self.plan.ceiling
        self._say("measuring" + (f" under {format_limit(ceiling)}" if limited and ceiling else ""))
        main = replace(self.workload, cold=limited)
        outcome = self.target.work(main, ceiling, self.plan.timeout + self.workload.sustained_s)
        if outcome.report is None:
            return outcome, []
        after, gb_s = self._bandwidth(), None
        if before is not None and after is not None:
            gb_s = round(statistics.fmean((before.median_gb_s, after.median_gb_s)), 3)
            self._set(bandwidth_gb_s=BandwidthAround(before.median_gb_s, after.median_gb_s, gb_s))
        tests = self._report(outcome.report, gb_s)
        self._load(**{"limited_s" if limited else "warm_s": outcome.report.load_s})
        if not self.plan.peers:
            largest = tuple(test for test in outcome.report.tests if self._is_largest(test))
            # Under a limit the page cache was cold: that is no load from a warm one.
            load_s = None if limited else outcome.report.load_s
            report = replace(outcome.report, tests=largest, load_s=load_s)
            self.tables.compared([Round(report, {}, after, self.row.busy_cores)])
        return outcome, tests

    def _is_largest(self, test: Measurement) -> bool:
        sizes, depth = self._sizes(), min(self.workload.depths)
        return (test.n_prompt, test.n_gen, test.n_depth) in (
            (sizes.n_prompt, 0, depth),
            (0, sizes.n_gen, depth),
        )

    def _cold_load(self) -> None:
        workload = self.workload
        nothing = Workload(threads=workload.threads, context=workload.context, cold=True, import_time=True)
        if self.facts.packs_weights:
            self._say(f"loading once: {self.facts.engine} packs the weights into a file where it has not yet")
            self._load(first_s=self._work(replace(nothing, cold=False, import_time=False)).load_s)
        self._say("loading from a cold page cache")
        report = self._work(nothing)
        self._set(environment=report.environment)
        self._load(import_s=report.import_s, cold_s=report.load_s, cached_bytes=report.cached_bytes)
        if report.cached_bytes:
            left = format_size(report.cached_bytes)
            self._note(f"the cold load was not quite cold: the kernel kept {left} of the bundle cached")

    def _encode(self, limited: bool) -> Outcome:
        """Measures the encoders without the decoder: that is how a prompt is answered."""
        workload = Workload(
            reps=self.workload.reps,
            threads=self.workload.threads,
            context=self.workload.context,
            cold=limited,
            encode=True,
        )
        if limited and self.facts.packs_weights:
            self._say("encoding once: the engine packs the weights of encoders where it has not yet")
            self._work(replace(workload, reps=1, cold=False))
        self._say("encoding " + " and ".join(self.facts.encoders))
        outcome = self.target.work(workload, self.plan.ceiling, self.plan.timeout)
        if outcome.report is None:
            return outcome
        self.tables.environment = outcome.report.environment
        limit = self.plan.ceiling if limited else None
        rows: list[EncodeRow] = self.build.encoders(outcome.report, limit)
        for row in rows:
            self.emit(row)
            self._say(str(row))
        self.tables.encoded(outcome.report, self.row.busy_cores)
        for note in outcome.report.notes:
            self._note(note)
        return outcome

    def _bandwidth(self) -> Bandwidth | None:
        if not self.plan.bandwidth_seconds:
            return None
        bandwidth = self.target.bandwidth(self.workload.threads, self.plan.bandwidth_seconds)
        if bandwidth is not None:
            self._say(f"stream read {bandwidth.median_gb_s:.1f} GB/s")
        return bandwidth

    def _report(self, report: RunReport, gb_s: float | None) -> list[BenchRow]:
        """Emits the tests of a worker's report and takes the rest into the session's row."""
        self.tables.environment = report.environment
        rows = self.build.tests(report, gb_s)
        for row in rows:
            self.emit(row)
            self._say(str(row))
        self._set(
            environment=report.environment,
            engine=self.build.engine(report),
            context=report.context,
            latency=report.latency,
            phases=report.phases,
            memory=report.memory,
            sensors=report.sensors,
            sustained=summarize_sustained(report.sustained),
        )
        for note in [*report.notes, *sensor_notes(report.sensors)]:
            self._note(note)
        return rows

    def _judge(self, outcome: Outcome, encoded: Outcome | None, limit: int) -> None:
        short = replace(
            self.workload,
            prompts=(self.workload.n_prompt,),
            gens=(CONTROL_TOKENS,),
            depths=(0,),
            reps=1,
            requests=0,
            sustained_s=0.0,
            cold=True,
        )
        ceiling = self._verdict(outcome, short, limit, self.tables.limited)
        if encoded is not None:
            ceiling = with_encoders(ceiling, encoded)
        self._set(ceiling=ceiling)
        if not ceiling.met:
            self.problems.append(f"the ceiling of {format_limit(limit)}: {ceiling.text}")
        self._say(f"ceiling: {ceiling.text}")

    def _verdict(self, outcome: Outcome, short: Workload, limit: int, record: Callable[..., None]) -> Ceiling:
        """The verdict on a run, after a control: `short` under the lower limit."""
        control_limit = self.plan.control or limit // 2
        control = None
        if outcome.mechanism is not None and not outcome.killed:
            self._say(f"control under {format_limit(control_limit)}")
            control = self.target.work(short, control_limit, self.plan.timeout)
        if outcome.mechanism is not None:
            record(outcome.attempt(limit), control.attempt(control_limit) if control else None, control_limit)
        return judge_ceiling(limit, outcome, control, control_limit, self.target.why_not)

    def _answer(self, limited: bool) -> None:
        """One answer to a prompt with attachments, phase by phase, under the ceiling if there is one."""
        plan, limit = self.plan, self.plan.ceiling
        with temporary_folder("media") as folder:
            files = write_media(folder, plan.images, plan.clips)
            sizes = self._sizes()
            workload = Workload(
                (sizes.n_prompt,),
                (sizes.n_gen,),
                threads=sizes.threads,
                context=self.workload.context,
                attach=tuple(map(self.target.place, files)),
            )
            if limited and self.facts.packs_weights:
                self._say("answering once: the engine packs weights where it has not yet")
                self._work(workload)
            self._say(f"answering about {attached(plan.images, plan.clips)}")
            outcome = self.target.work(replace(workload, cold=limited), limit, plan.timeout)
            ceiling = None
            if limit is not None:
                ceiling = self._verdict(outcome, replace(workload, cold=True), limit, self._limited_answer)
                if not ceiling.met:
                    self.problems.append(f"an answer under {format_limit(limit)}: {ceiling.text}")
                self._say(f"an answer: {ceiling.text}")
        if (report := outcome.report) is not None and report.memory is not None:
            answer = AnswerRun(plan.images, plan.clips, report.phases, report.tests, report.memory, ceiling)
            self._set(answer=answer)
            for test in report.tests:
                self._say(f"an answer: {test}")
            if limit is None:
                self.tables.answered(report, plan.images, plan.clips)

    def _prefix(self) -> None:
        """Starts behind a long prefix, without the prefix cache and with it."""
        workload = self.workload
        reps = min(PREFIX_REPS, workload.reps)
        self._say(f"starting {reps} prompts behind {self.plan.prefix} tokens, and as many restored ones")
        report = self._work(
            Workload(reps=reps, threads=workload.threads, context=workload.context, prefix=self.plan.prefix)
        )
        if report.prefix is not None:
            row = self.build.prefix(report, report.prefix)
            self.emit(row)
            self._say(str(row))
            self.tables.environment = report.environment
            self.tables.restored(report.prefix, self.row.busy_cores)

    def _speculation(self) -> None:
        """Forced answers, without drafts and with them."""
        workload = self.workload
        self._say(f"decoding {workload.reps} answers of {self.plan.speculate} tokens each way")
        report = self._work(
            Workload(
                reps=workload.reps,
                threads=workload.threads,
                context=workload.context,
                speculate=self.plan.speculate,
            )
        )
        for row in self.build.speculation(report):
            self.emit(row)
            self._say(str(row))
        self.tables.environment = report.environment
        self.tables.speculated(report.speculation, self.row.busy_cores)

    def _limited_answer(self, *attempts: Any) -> None:
        self.tables.limited(*attempts, images=self.plan.images, clips=self.plan.clips)

    def _sizes(self) -> TurnSizes:
        """The largest prefill and decode of the workload."""
        workload = self.workload
        return TurnSizes(
            workload.n_prompt,
            workload.n_gen,
            workload.reps,
            workload.threads,
            workload.context or self.facts.context,
        )

    def _peers(self) -> None:
        plan, sizes = self.plan, self._sizes()
        ours = Workload(
            (sizes.n_prompt,),
            (sizes.n_gen,),
            reps=sizes.reps,
            threads=sizes.threads,
            context=self.workload.context,
            import_time=plan.record is not None,
        )
        rounds, failed = interleave(lambda: self._work(ours), plan.peers, sizes, plan.rounds, self._bandwidth)
        for reason in failed:
            self._note(f"left out: {reason}")
        self._set(ratios=tuple(ratios(rounds)), rounds=tuple(rounds))
        self.tables.compared(rounds)
        models = {peer.name: peer.model for peer in plan.peers}
        for name, tests in merged(rounds).items():
            rss = max(round_.peers[name].peak_rss for round_ in rounds if name in round_.peers)
            for test in tests:
                file = models[name].resolve().name
                self.emit(self.build.peer(test, name, file, rss, self.row.environment))

    def _work(self, workload: Workload) -> RunReport:
        """A run without a limit, which nothing kills."""
        report = self.target.work(workload, None, self.plan.timeout).report
        assert report is not None
        return report

    def _set(self, **changes: Any) -> None:
        self.row = replace(self.row, **changes)

    def _load(self, **times: Any) -> None:
        self._set(load=replace(self.row.load, **times))

    def _note(self, text: str) -> None:
        if text not in self.row.notes:
            self._set(notes=(*self.row.notes, text))
            progress(f"note: {text}")

    def _say(self, text: str) -> None:
        progress(f"{self.target.name}, {threads_of(self.row)}: {text}")


def check_problems(problems: Sequence[str]) -> None:
    """Raises CeilingError, exit code 5, if a ceiling is exceeded or not proved, or a bar is missed."""
    if problems:
        raise CeilingError("; ".join(problems))
