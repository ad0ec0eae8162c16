"""One bundle measured on one target with one number of threads: the rows that come of it.

Order matters. Bandwidth is probed right before and right after, so that a share of it is of the same minutes.
Every step is a process of its own; a step that fails ends the session, with the rows of those before it kept.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gemma_edge.benchmarks.machine.load import QUIET_CORES, busy_cores
from gemma_edge.benchmarks.measure.encoder_times import EncoderRun
from gemma_edge.benchmarks.measure.target import Ceiling, Outcome, Target, judge_ceiling, with_encoders
from gemma_edge.benchmarks.measure.workload import Workload
from gemma_edge.benchmarks.options import KernelOptions
from gemma_edge.benchmarks.peers.interleaved import Peer, interleave, merged, ratios
from gemma_edge.benchmarks.records.measurement import Measurement
from gemma_edge.benchmarks.records.record import BundleFacts, environment, now
from gemma_edge.benchmarks.records.rows import encode_row, header, kernel_row, peer_row, threads_of
from gemma_edge.benchmarks.script import progress
from gemma_edge.runtime.errors import CeilingError, UsageError
from gemma_edge.runtime.units import format_size

Json = dict[str, Any]
Emit = Callable[[Json], None]
CONTROL_TOKENS = 8


@dataclass(frozen=True)
class Bars:
    """What the figures should reach; None asks nothing. Times are medians, speeds the slowest
    test's median.
    """

    ttft_ms: float | None = None
    prefill_tps: float | None = None
    decode_tps: float | None = None
    image_ms: float | None = None
    audio_ms: float | None = None

    def judge(self, latency: Json | None, tests: Sequence[Json], encoders: Sequence[Json] = ()) -> list[Json]:
        """One entry a bar: "what", "value", "bar", "met"."""
        judged: list[Json] = []
        if self.ttft_ms is not None:
            if latency is None:
                raise UsageError("--assert-ttft-ms needs --requests above 0")
            judged.append(_bar("time to first token, ms", latency["ttft_ms"]["p50"], self.ttft_ms, False))
        for what, bar, key in (
            ("prefill, tok/s", self.prefill_tps, "n_prompt"),
            ("decode, tok/s", self.decode_tps, "n_gen"),
        ):
            if bar is not None:
                speeds = [test["median_ts"] for test in tests if test[key]]
                if not speeds:
                    raise UsageError(f"a bar for {what} needs such a test: see -p and -n")
                judged.append(_bar(what, min(speeds), bar, True))
        for encoder, bar in (("vision", self.image_ms), ("audio", self.audio_ms)):
            times = [row["median_ns"] / 1e6 for row in encoders if row["encoder"] == encoder]
            if bar is not None and times:
                judged.append(_bar(f"{encoder} encoder, ms", times[0], bar, False))
        return judged


def _bar(what: str, value: float, bar: float, at_least: bool) -> Json:
    return {"what": what, "value": value, "bar": bar, "met": value >= bar if at_least else value <= bar}


@dataclass(frozen=True)
class Plan:
    """What a session does beside its workload; `peers` only where they are to be measured too."""

    ceiling: int | None = None
    control: int | None = None
    bars: Bars = Bars()
    cold_load: bool = True
    encode: bool = True  # where the bundle has encoders
    bandwidth_seconds: float = 2.0
    timeout: float = 3600.0
    peers: Sequence[Peer] = ()
    rounds: int = 3


@dataclass
class Session:
    """A session under way: `row` is filled as it goes, and emitted at its end however it ends."""

    target: Target
    bundle: Path
    facts: BundleFacts
    workload: Workload
    plan: Plan
    run: str
    name: str
    emit: Emit
    row: Json = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def measure(self) -> list[str]:
        """Does it all and emits the rows.

        Returns:
            What was exceeded or missed, in words; empty when all is well.

        Raises:
            GemmaEdgeError: a step failed; what was measured before it is emitted, the error with it.
        """
        device = self.target.facts()
        here = environment() if device is None else {}
        self.row = {
            **header("session", self.run, self.name, self.target.name, now(), here),
            "model": self.facts.model,
            "recipe": self.facts.recipe,
            "format": self.facts.format,
            "bundle_bytes": self.facts.file_bytes,
            "workload": dataclasses.asdict(self.workload),
            "device_facts": device,
            "load": {},
            "notes": [],
        }
        try:
            self._steps()
        except BaseException as error:
            self.row["error"] = str(error) or type(error).__name__
            raise
        finally:
            self.row["problems"] = self.problems
            self.emit(self.row)
        return self.problems

    def _steps(self) -> None:
        plan, workload, row = self.plan, self.workload, self.row
        if self.target.name == "local":
            row["busy_cores"] = busy = busy_cores()
            if busy is not None and busy > QUIET_CORES:
                self._note(f"other processes kept {busy:.1f} cores busy before the run")
        if plan.cold_load and self.target.runs_worker:
            self._cold_load()
        limited = plan.ceiling is not None and self.target.enforces
        encoded = None
        if plan.encode and self.facts.encoders and self.target.runs_worker:
            encoded = self._encode(plan.ceiling, limited)
        encoders = (encoded.report or {}).get("encode", ()) if encoded else ()
        before = self._bandwidth()
        main = dataclasses.replace(workload, cold=limited)
        self._say("measuring" + (f" under {format_size(plan.ceiling)}" if limited and plan.ceiling else ""))
        outcome = self.target.work(main, plan.ceiling, self._timeout())
        tests: list[Json] = []
        if outcome.report is not None:
            after = self._bandwidth()
            gb_s = None
            if before is not None and after is not None:
                gb_s = round(statistics.fmean((before, after)), 3)
                row["bandwidth_gb_s"] = {"before": before, "after": after, "mean": gb_s}
            tests = self._report(outcome.report, gb_s)
            self.row["load"]["limited_s" if limited else "warm_s"] = outcome.report["load_s"]
        if plan.ceiling is not None:
            self._judge(outcome, encoded, plan.ceiling)
        if outcome.report is not None:
            row["bars"] = plan.bars.judge(outcome.report["latency"], tests, encoders)
            self.problems += [
                f"{bar['what']}: {bar['value']:.2f}, asked for {bar['bar']:g}"
                for bar in row["bars"]
                if not bar["met"]
            ]
        if plan.peers:
            self._peers()

    def _cold_load(self) -> None:
        nothing = Workload(
            threads=self.workload.threads, context=self.workload.context, cold=True, import_time=True
        )
        if self.facts.format != "onnx":
            self._say("loading once: LiteRT packs the weights into a file where it has not yet")
            first = dataclasses.replace(nothing, cold=False, import_time=False)
            report = self.target.work(first, None, self.plan.timeout).report
            assert report is not None
            self.row["load"]["first_s"] = report["load_s"]
        self._say("loading from a cold page cache")
        report = self.target.work(nothing, None, self.plan.timeout).report
        assert report is not None
        self._environment(report)
        self.row["load"] |= {
            "import_s": report["import_s"],
            "cold_s": report["load_s"],
            "cached_bytes": report["cached_bytes"],
        }
        if report["cached_bytes"]:
            left = format_size(report["cached_bytes"])
            self._note(f"the cold load was not quite cold: the kernel kept {left} of the bundle cached")

    def _encode(self, ceiling: int | None, limited: bool) -> Outcome:
        """Measures the encoders without the decoder: that is how a prompt is answered."""
        workload = Workload(
            reps=self.workload.reps,
            threads=self.workload.threads,
            context=self.workload.context,
            cold=limited,
            encode=True,
        )
        if limited and self.facts.format != "onnx":
            self._say("encoding once: LiteRT packs the weights of encoders into files where it has not yet")
            self.target.work(dataclasses.replace(workload, reps=1, cold=False), None, self.plan.timeout)
        self._say("encoding " + " and ".join(self.facts.encoders))
        outcome = self.target.work(workload, ceiling, self.plan.timeout)
        if outcome.report is None:
            return outcome
        head = self._head("encode", outcome.report)
        file, threads = self.bundle.resolve().name, self.workload.threads
        engine = _engine(self.facts.format, outcome.report["environment"])
        for run in outcome.report["encode"]:
            self.emit(encode_row(head, run, self.facts, file, threads, engine, ceiling if limited else None))
            self._say(str(EncoderRun.from_dict(run)))
        for note in outcome.report["notes"]:
            self._note(note)
        return outcome

    def _head(self, kind: str, report: Json) -> Json:
        return header(kind, self.run, self.name, self.target.name, self.row["time"], report["environment"])

    def _bandwidth(self) -> float | None:
        if not self.plan.bandwidth_seconds:
            return None
        bandwidth = self.target.bandwidth(self.workload.threads, self.plan.bandwidth_seconds)
        if bandwidth is None:
            return None
        self._say(f"stream read {bandwidth.median:.1f} GB/s")
        return round(bandwidth.median, 3)

    def _report(self, report: Json, gb_s: float | None) -> list[Json]:
        """Emits the tests of a worker's report and takes the rest into the session's row."""
        self._environment(report)
        engine = report.get("engine") or _engine(self.facts.format, report["environment"])
        head = self._head("bench", report)
        peak = report["memory"]["peak"]
        rows = [
            kernel_row(
                head,
                test,
                self.facts,
                str(self.bundle.resolve().name),
                self.workload.threads,
                engine,
                bandwidth_gb_s=gb_s,
                memory_peak={"rss_anon": peak["rss_anon"], "rss": max(peak["rss"], peak["high_water"])},
            )
            for test in report["tests"]
        ]
        for row in rows:
            self.emit(row)
            self._say(str(Measurement.from_dict(row)))
        for key in ("context", "latency", "phases", "memory", "sensors"):
            self.row[key] = report[key]
        self.row["engine"] = engine
        self.row["sustained"] = summarize_sustained(report["sustained"])
        for note in [*report["notes"], *_sensor_notes(report["sensors"])]:
            self._note(note)
        return rows

    def _judge(self, outcome: Outcome, encoded: Outcome | None, limit: int) -> None:
        control_limit = self.plan.control or limit // 2
        control = None
        if outcome.mechanism is not None and not outcome.killed:
            short = dataclasses.replace(
                self.workload,
                prompts=(max(self.workload.prompts, default=0),),
                gens=(CONTROL_TOKENS,),
                depths=(0,),
                reps=1,
                requests=0,
                sustained_s=0.0,
                cold=True,
            )
            self._say(f"control under {format_size(control_limit)}")
            control = self.target.work(short, control_limit, self.plan.timeout)
        ceiling: Ceiling = judge_ceiling(limit, outcome, control, control_limit, self.target.why_not)
        if encoded is not None:
            ceiling = with_encoders(ceiling, encoded)
        self.row["ceiling"] = ceiling.to_dict()
        if not ceiling.met:
            self.problems.append(f"the ceiling of {format_size(limit)}: {ceiling.text}")
        self._say(f"ceiling: {ceiling.text}")

    def _peers(self) -> None:
        plan, workload = self.plan, self.workload
        size = KernelOptions(
            max(workload.prompts, default=0),
            max(workload.gens, default=0),
            workload.reps,
            workload.threads,
            workload.context or self.facts.context,
        )
        ours = Workload(
            (size.n_prompt,), (size.n_gen,), reps=size.reps, threads=size.threads, context=workload.context
        )

        def measure_ours() -> dict[str, Measurement]:
            report = self.target.work(ours, None, plan.timeout).report
            assert report is not None
            tests = (Measurement.from_dict(test) for test in report["tests"])
            return {test.name: test for test in tests}

        rounds, failed = interleave(measure_ours, plan.peers, size, plan.rounds)
        for reason in failed:
            self._note(f"left out: {reason}")
        self.row["ratios"] = ratios(rounds)
        self.row["rounds"] = [
            {
                "ours": [test.to_dict() for test in round_.ours.values()],
                "peers": {name: run.to_dict() for name, run in round_.peers.items()},
            }
            for round_ in rounds
        ]
        models = {peer.name: peer.model for peer in plan.peers}
        for name, tests in merged(rounds).items():
            file = models[name].resolve().name
            head = header("bench", self.run, file, self.target.name, now(), self.row["environment"])
            rss = max(round_.peers[name].peak_rss for round_ in rounds if name in round_.peers)
            for test in tests:
                self.emit(peer_row(head, test, name, file, workload.threads, rss))

    def _timeout(self) -> float:
        return self.plan.timeout + self.workload.sustained_s

    def _environment(self, report: Json) -> None:
        self.row["environment"] = report["environment"]

    def _note(self, text: str) -> None:
        if text not in self.row["notes"]:
            self.row["notes"].append(text)
            progress(f"note: {text}")

    def _say(self, text: str) -> None:
        progress(f"{self.target.name}, {threads_of(self.row)}: {text}")


def check_problems(problems: Sequence[str]) -> None:
    """Raises CeilingError, exit code 5, for what was exceeded or missed."""
    if problems:
        raise CeilingError("exceeded: " + "; ".join(problems))


def summarize_sustained(points: list[Json] | None) -> Json | None:
    """The curve, and its first tenth against its last: what is left when the device is warm."""
    if not points:
        return None
    tenth = max(1, len(points) // 10)

    def median(key: str, part: Sequence[Json]) -> float | None:
        values = [point[key] for point in part if key in point]
        return round(statistics.median(values), 3) if values else None

    first, last = points[:tenth], points[-tenth:]
    begin, end = median("tg_ts", first), median("tg_ts", last)
    assert begin is not None and end is not None
    text = f"decode {begin:.2f} at the beginning, {end:.2f} tok/s at the end ({end / begin:.0%})"
    hot = [median("temperature_c", part) for part in (first, last)]
    if hot[0] is not None and hot[1] is not None:
        text += f", {hot[0]:.0f} to {hot[1]:.0f} °C"
    return {
        "points": points,
        "decode_first_tps": begin,
        "decode_last_tps": end,
        "decode_kept": round(end / begin, 4),
        "text": text,
    }


def _sensor_notes(sensors: Json) -> list[str]:
    before, after = sensors["before"], sensors["after"]
    notes = []
    if slow := sorted(set(after.get("governors") or ()) - {"performance"}):
        notes.append(f"the frequency governor is {', '.join(slow)}, not performance")
    throttled = after.get("throttle_count", 0) - before.get("throttle_count", 0)
    if throttled > 0:
        notes.append(f"the processor was throttled for its heat {throttled} times during the run")
    if reasons := sorted({*before.get("throttled", ()), *after.get("throttled", ())}):
        notes.append(f"the board reports: {', '.join(reasons)}")
    return notes


def _engine(format: str, environment: Json) -> str:
    name, package = ("ONNX Runtime", "onnxruntime") if format == "onnx" else ("LiteRT", "ai-edge-litert")
    return f"{name} {environment['versions'].get(package) or ''}".strip()
