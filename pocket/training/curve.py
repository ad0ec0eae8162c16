"""Draws what a run learned: losses by kind of step, exact match on the held-out questions, and prose.

python pocket/training/curve.py RUN/log.jsonl curve.png        (needs matplotlib)
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

SPOKEN = ("speech", "translated")  # how the names of these tasks begin
# Kinds of steps, of the decoder and of the encoders alone, and how many points a running mean has.
ANSWERS = {"text": 20, "image": 20, "speech": 20, "lesson": 10}
HELPERS = {"see": 4, "hear": 4}
PROSE = "prose "  # how the names of nats a token by width begin

Curves = dict[str, list[tuple[int, float]]]  # points by name


def entries(path: Path) -> list[dict[str, Any]]:
    """The lines of a log that led to its end: none of a copy that was finished, of steps made again."""
    kept: list[dict[str, Any]] = []
    lowest: dict[str, int] = {}
    for line in reversed(path.read_text().splitlines()):
        entry = json.loads(line)
        if entry["step"] <= lowest.get(entry["part"], entry["step"]):
            lowest[entry["part"]] = entry["step"]
            kept.append(entry)
    return kept[::-1]


def curves(path: Path) -> tuple[Curves, Curves]:
    """Losses by kind of step, and held-out shares by task, each with the decoder's or encoders' step."""
    losses: Curves = defaultdict(list)
    right: Curves = defaultdict(list)
    for entry in entries(path):
        if entry["part"] == "test":
            for task, share in entry.items():
                if task not in ("part", "time", "step"):
                    right[task].append((entry["step"], share))
        else:
            losses[entry["kind"]].append((entry["step"], entry["loss"]))
    return losses, right


def smooth(points: list[tuple[int, float]], count: int) -> tuple[list[int], list[float]]:
    """Steps, and running means of the last `count` values."""
    values = [value for _, value in points]
    means = [sum(values[max(0, i - count + 1) : i + 1]) / min(i + 1, count) for i in range(len(values))]
    return [step for step, _ in points], means


def draw(log: Path, out: Path) -> None:
    """The curves of a log as a PNG: losses, prose or helpers, and exact match by kind of task."""
    losses, tested = curves(log)
    figure, panels = pyplot.subplots(2, 3, figsize=(16, 8), constrained_layout=True)
    answers, second, *kinds = panels.ravel()
    helpers = any(kind in losses for kind in HELPERS)
    _draw_losses(answers, losses, ANSWERS, "Loss of what is learned, nats a token")
    if helpers:
        _draw_losses(second, losses, HELPERS, "Loss of the encoders' helpers, nats")
    else:
        widths = {f"FFN of {n.removeprefix(PROSE)}": tested[n] for n in tested if n.startswith(PROSE)}
        _draw_tested(second, widths, "Held-out prose, nats a token")
        second.set_yscale("log")
    for axes, (group, tasks) in zip(kinds, group_tasks(tested).items(), strict=True):
        _draw_tested(axes, {task: tested[task] for task in tasks}, f"Held out, {group}: exact match")
        axes.set_ylim(-0.02, 1.02)
    for axes in (answers, second, *kinds):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(out, dpi=70)


def _draw_losses(axes: Any, losses: Curves, smoothing: dict[str, int], title: str) -> None:
    for name in [name for name in smoothing if name in losses]:
        axes.plot(*smooth(losses[name], smoothing[name]), label=name)
    axes.set(title=title, xlabel="steps", yscale="log")


def _draw_tested(axes: Any, tested: Curves, title: str) -> None:
    for name, points in tested.items():
        axes.plot(*zip(*points, strict=True), marker=".", label=name)
    axes.set(title=title, xlabel="steps of the decoder")


def group_tasks(tested: Iterable[str]) -> dict[str, list[str]]:
    """Tasks by what they are about."""
    groups: dict[str, list[str]] = {"text": [], "tools": [], "images": [], "speech": []}
    for task in tested:
        topic = task.partition(" ")[0]
        group = {"image": "images", "tools": "tools", **dict.fromkeys(SPOKEN, "speech")}.get(topic, "text")
        if not task.startswith(PROSE):
            groups[group].append(task)
    return groups


if __name__ == "__main__":
    draw(*map(Path, sys.argv[1:]))
