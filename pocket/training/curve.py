"""Draws what a run learned: losses by kind of step, and exact match on the held-out questions.

python pocket/training/curve.py RUN/log.jsonl curve.png        (needs matplotlib)
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

SPOKEN = ("speech", "translated")  # how the names of these tasks begin
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
    """The curves of a log as a PNG: losses, and below them exact match of text, images and speech."""
    losses, right = curves(log)
    figure, ((answers, helpers, empty), kinds) = pyplot.subplots(
        2, 3, figsize=(16, 8), constrained_layout=True
    )
    empty.set_axis_off()
    for axes, title, steps_of, names in (
        (answers, "Loss of the answers, nats a token", "decoder", ("text", "image", "speech")),
        (helpers, "Loss of the encoders' helpers, nats", "encoders", ("see", "hear")),
    ):
        for name in names:
            if name in losses:
                axes.plot(*smooth(losses[name], SMOOTH[name]), label=name)
        axes.set(title=title, xlabel=f"steps of the {steps_of}", yscale="log")
    groups: dict[str, list[str]] = {"text and tools": [], "images": [], "speech": []}
    for task in right:
        topic = task.partition(" ")[0]
        group = "images" if topic == "image" else "speech" if topic in SPOKEN else "text and tools"
        groups[group].append(task)
    for axes, (group, tasks) in zip(kinds, groups.items(), strict=True):
        for task in tasks:
            steps, shares = zip(*right[task], strict=True)
            axes.plot(steps, shares, marker=".", label=task)
        axes.set(title=f"Held out, {group}: exact match", xlabel="steps of the decoder", ylim=(-0.02, 1.02))
    for axes in (answers, helpers, *kinds):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(out, dpi=70)


if __name__ == "__main__":
    draw(*map(Path, sys.argv[1:]))
