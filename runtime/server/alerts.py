"""Alerts: thresholds over a sliding window; a crossing is a log line, a gauge, and perhaps a command."""

from __future__ import annotations

import asyncio
import logging
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from typing import Any

from gemma_edge.runtime.errors import ConfigError
from gemma_edge.runtime.files.text_files import read_text
from gemma_edge.runtime.host.process_memory import resident_memory
from gemma_edge.runtime.host.temperature import hottest
from gemma_edge.runtime.server.server_metrics import Recent, ServerMetrics
from gemma_edge.runtime.units import parse_size

LOG = logging.getLogger("gemma_edge.server")
# Units by name: of thresholds that a value above crosses, and of those that a value below crosses.
ABOVE = {"p95_latency": "s", "rss_anon": "bytes", "temperature": "C"}
BELOW = {"tokens_per_s": "tokens/s", "success_rate": ""}
UNITS = {**ABOVE, **BELOW}
CHECK_S = 5.0
COMMAND_S = 60.0  # a command that takes longer is ended


@dataclass(frozen=True)
class AlertRules:
    """Thresholds by name, the window that they look at, and what to run when one is crossed."""

    thresholds: Mapping[str, float]
    window_s: float = 300.0
    command: tuple[str, ...] = ()


def read_alerts(path: str | Path) -> AlertRules:
    """The rules of a TOML file; see docs/serving.md.

    Raises:
        ConfigError: names the field that is malformed.
    """
    path = Path(path)
    try:
        data = tomllib.loads(read_text(path, ConfigError))
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise ConfigError(path, "file", "TOML", error) from None
    if unknown := data.keys() - {"window_s", "command", "thresholds"}:
        raise ConfigError(path, min(unknown), "window_s, command or [thresholds]", "another field")
    window, command = data.get("window_s", 300), data.get("command", [])
    if not _positive(window) or window > 86_400:
        raise ConfigError(path, "window_s", "a number of seconds, at most 86400", repr(window))
    if not isinstance(command, list) or not all(isinstance(word, str) and word for word in command):
        raise ConfigError(path, "command", 'a list of words such as ["/usr/bin/logger"]', repr(command))
    thresholds = data.get("thresholds")
    if not isinstance(thresholds, dict) or not thresholds:
        raise ConfigError(path, "thresholds", f"a table with one of {', '.join(UNITS)}", repr(thresholds))
    return AlertRules(
        {n: _threshold(path, n, v) for n, v in thresholds.items()}, float(window), tuple(command)
    )


def _threshold(path: Path, name: str, value: Any) -> float:
    if name not in UNITS:
        raise ConfigError(path, f"thresholds.{name}", f"one of {', '.join(UNITS)}", "another name")
    if name == "rss_anon" and isinstance(value, str):
        return float(parse_size(value))
    if not _positive(value):
        raise ConfigError(
            path, f"thresholds.{name}", f"a number above 0 ({UNITS[name] or 'a fraction'})", repr(value)
        )
    return float(value)


def _positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


class Alerts:
    """Compares the last answers with the rules, every few seconds."""

    def __init__(self, rules: AlertRules, metrics: ServerMetrics) -> None:
        self.rules, self.metrics = rules, metrics
        self.crossed: dict[str, float] = {}  # name: value
        for name in rules.thresholds:
            metrics.alerts.labels(name).set(0)

    async def watch(self) -> None:
        """Checks for ever."""
        while True:
            await asyncio.sleep(CHECK_S)
            for words in self.check():
                await self._run(words)

    def check(self, now: float | None = None) -> list[Sequence[str]]:
        """Looks once. Returns the commands to run: one for each threshold that was crossed just now."""
        since = (monotonic() if now is None else now) - self.rules.window_s
        recent = [answer for answer in self.metrics.recent if answer.at >= since]
        commands: list[Sequence[str]] = []
        for name, threshold in self.rules.thresholds.items():
            value = measured(name, recent)
            over = value is not None and (value > threshold if name in ABOVE else value < threshold)
            self.metrics.alerts.labels(name).set(int(over))
            if over and value is not None:
                new = name not in self.crossed
                self.crossed[name] = value
                if new:
                    LOG.warning("alert: %s", self.describe(name))
                    if self.rules.command:
                        commands.append([*self.rules.command, name, f"{value:g}", f"{threshold:g}"])
            elif self.crossed.pop(name, None) is not None:
                LOG.warning("alert over: %s", name)
        return commands

    def describe(self, name: str) -> str:
        """For people: "p95_latency is 7.2 s, above 5 s"."""
        unit, side = UNITS[name], "above" if name in ABOVE else "below"
        value, threshold = self.crossed[name], self.rules.thresholds[name]
        return f"{name} is {value:g} {unit}".rstrip() + f", {side} {threshold:g} {unit}".rstrip()

    async def _run(self, words: Sequence[str]) -> None:
        """Runs a command without a shell; its failure is a line in the log."""
        null = asyncio.subprocess.DEVNULL
        try:
            process = await asyncio.create_subprocess_exec(*words, stdin=null, stdout=null, stderr=null)
        except OSError as error:
            LOG.error("alert command %s: %s", words[0], error.strerror)
            return
        try:
            code = await asyncio.wait_for(process.wait(), COMMAND_S)
        except TimeoutError:
            process.kill()
            code = await process.wait()
        if code:
            LOG.error("alert command %s ended with %d", words[0], code)


def measured(name: str, recent: Sequence[Recent]) -> float | None:
    """The value that a threshold is compared with; None where nothing was measured."""
    if name == "rss_anon":
        return float(resident_memory().anon)
    if name == "temperature":
        return hottest()
    if name == "p95_latency":
        return percentile_95([answer.seconds for answer in recent if answer.outcome == "ok"])
    if name == "success_rate":
        judged = [answer.outcome == "ok" for answer in recent if answer.outcome != "client_left"]
        return sum(judged) / len(judged) if judged else None
    rates = sorted(answer.tokens_per_s for answer in recent if answer.tokens_per_s is not None)
    return rates[len(rates) // 2] if rates else None


def percentile_95(values: Sequence[float]) -> float | None:
    """The smallest value that 95 % do not exceed."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1] if values else None
