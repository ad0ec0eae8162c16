"""The verdict on a memory limit, from a run under the limit and a control under a lower one."""

from __future__ import annotations

from dataclasses import replace

from gemma_edge.benchmarks.measure.target import Outcome
from gemma_edge.benchmarks.records.rows import Ceiling
from gemma_edge.runtime.units import format_limit, format_size


def with_encoders(ceiling: Ceiling, encoders: Outcome) -> Ceiling:
    """The verdict with the encoders in it: they are loaded while the decoder is not, under the same limit."""
    size = format_limit(ceiling.limit_bytes)
    if encoders.report is None:
        text = f"exceeded: killed by the kernel under {size} while encoding images and audio"
        return replace(ceiling, met=False, enforced=True, text=text, mechanism=encoders.mechanism)
    anon = max(run.peak_rss_anon for run in encoders.report.encode)
    text = f"{ceiling.text}; encoders: peak RssAnon {format_size(anon)}"
    if encoders.mechanism is not None or anon <= ceiling.limit_bytes:
        return replace(ceiling, text=text)
    return replace(ceiling, met=False, text=f"exceeded by the encoders: {text}")


def judge_ceiling(limit: int, run: Outcome, control: Outcome | None, control_limit: int, why: str) -> Ceiling:
    """The verdict.

    Args:
        limit, control_limit: bytes.
        control: None if no limit is enforced, or if the kernel killed the run itself. A control must be
            killed, or the limit proves nothing.
        why: the reason for no limit.
    """
    size = format_limit(limit)
    if run.report is None or run.report.memory is None:
        text = f"exceeded: killed by the kernel under {size} ({run.mechanism}, no swap, cold page cache)"
        return Ceiling(limit, False, True, text, run.mechanism, run.peak_bytes)
    peak = run.report.memory.peak
    if control is None:
        met = peak.rss_anon <= limit
        verdict = "not exceeded" if met else "exceeded"
        if met and peak.highest_rss > limit:
            verdict += " by memory that cannot be dropped"
        sizes = f"peak RssAnon {format_size(peak.rss_anon)}, RSS {format_size(peak.highest_rss)}, of {size}"
        return Ceiling(limit, met, False, f"{verdict}, sampled, not enforced: {sizes} ({why})")
    anon, lower = format_size(peak.rss_anon), format_limit(control_limit)
    text = f"runs under {size} ({run.mechanism}, no swap, cold page cache), peak RssAnon {anon}"
    if control.killed:
        text += f"; control under {lower} was killed"
    else:
        remedy = f"give --control below {anon}, or a lower --ceiling"
        text = f"not proved: {text}, but the control under {lower} was not killed either; {remedy}"
    killed = control.killed
    return Ceiling(limit, killed, True, text, run.mechanism, run.peak_bytes, control_limit, killed)
