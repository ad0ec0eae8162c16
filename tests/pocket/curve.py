"""Draws what a run learned: losses by kind of step, and exact match on the held-out questions.

python tests/pocket/curve.py RUN/log.jsonl curve.png        (needs matplotlib)
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

SMOOTH = {"text": 20, "image": 20, "speech": 20, "see": 4, "hear": 4}  # points of a running mean


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


def curves(path: Path) -> tuple[dict[str, list[tuple[int, float]]], dict[str, list[tuple[int, float]]]]:
    """Losses by kind of step, and held-out shares by task, each with the decoder's or encoders' step."""
    losses: dict[str, list[tuple[int, float]]] = defaultdict(list)
    right: dict[str, list[tuple[int, float]]] = defaultdict(list)
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
    """The curves of a log as a PNG."""
    losses, right = curves(log)
    figure, (left, middle, last) = pyplot.subplots(1, 3, figsize=(16, 4.5), constrained_layout=True)
    for kind in ("text", "image", "speech"):
        if kind in losses:
            left.plot(*smooth(losses[kind], SMOOTH[kind]), label=kind)
    left.set(
        title="Loss of the answers", xlabel="steps of the decoder", ylabel="nats a token", ylim=(0, None)
    )
    for kind in ("see", "hear"):
        if kind in losses:
            middle.plot(*smooth(losses[kind], SMOOTH[kind]), label=kind)
    middle.set(title="Loss of the encoders' helpers", xlabel="steps of the encoders", ylabel="nats")
    for task, points in right.items():
        steps, shares = zip(*points, strict=True)
        last.plot(steps, shares, marker=".", label=task)
    last.set(title="Held out, exact match", xlabel="steps of the decoder", ylim=(-0.02, 1.02))
    for axes in (left, middle, last):
        axes.grid(alpha=0.3)
    for axes in (left, middle):
        axes.legend(fontsize=8)
    last.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(out, dpi=80)


if __name__ == "__main__":
    draw(*map(Path, sys.argv[1:]))
