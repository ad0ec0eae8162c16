"""`python tests/leaks.py`: thousands of generations and hundreds of loads in each engine: what do they leave?

After a tenth of the rounds as a warm-up, anonymous memory may grow by 1 % at most until the end, and open
files and threads not at all. Memory is the mean of the last tenth against the first.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import NamedTuple

MOST_GROWTH = 0.01
FORMATS = ("onnx", "tflite", "litertlm")


class Left(NamedTuple):
    """What a loop left behind: growth as a fraction, and how many more files and threads."""

    growth: float
    files: int
    threads: int

    @property
    def clean(self) -> bool:
        return self.growth < MOST_GROWTH and self.files <= 0 and self.threads <= 0


def anonymous() -> int:
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("RssAnon:"))


def grow_interned() -> None:
    """Lets CPython's table of interned strings grow now, to 65,536 slots of 961,200 bytes in all.

    Each load interns strings and frees them, which uses slots up; when none is left, some 300 loads later,
    the table grows, once for good: interning alone does the same. That is no leak, and would look like one.
    """
    for number in range(30_000):
        sys.intern(f"interned {number}")


def left_open() -> tuple[int, int]:
    """Open files and threads of this process."""
    return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))


def repeat(action: Callable[[], object], rounds: int) -> Left:
    """Runs it so many times, a tenth more as a warm-up, and measures."""
    tenth = max(1, rounds // 10)
    for _ in range(tenth):
        action()
    grow_interned()
    gc.collect()
    files, threads = left_open()
    sizes = []
    for _ in range(rounds):
        action()
        sizes.append(anonymous())
    gc.collect()
    more = left_open()
    for _ in range(100):  # a thread that was joined is listed for a moment longer
        if more[1] <= threads:
            break
        time.sleep(0.02)
        more = left_open()
    growth = mean(sizes[-tenth:]) / mean(sizes[:tenth]) - 1
    return Left(growth, more[0] - files, more[1] - threads)


def small_bundles(folder: Path) -> dict[str, Path]:
    """A small model in every format."""
    from fuzz.valid_inputs import SMALL

    from gemma_edge.export.exporter import export_bundle
    from gemma_edge.export.synth.synth_checkpoint import synthesize

    checkpoint = synthesize(folder / "checkpoint", config=SMALL, progress=False).path
    names = {"onnx": "onnx", "tflite": "tflite", "litertlm": "model.litertlm"}
    return {
        form: export_bundle(
            checkpoint, folder / name, format=form, context=64, chunk=32, verify=False, calibrate="none"
        ).path
        for form, name in names.items()
    }


def leaks(bundle: Path, generations: int, loads: int) -> dict[str, Left]:
    """Of one bundle: generations with one model, then loads with a generation each."""
    from gemma_edge.runtime.model import Model

    model = Model.load(bundle, threads=1)

    def generate() -> None:
        model.reset()
        model.generate("the thing in", max_tokens=3, temperature=0)

    def load() -> None:
        other = Model.load(bundle, threads=1)
        other.generate("the", max_tokens=1, temperature=0)
        del other
        gc.collect()

    return {"generations": repeat(generate, generations), "loads": repeat(load, loads)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--generations", type=int, default=10_000)
    parser.add_argument("--loads", type=int, default=500)
    parser.add_argument("--format", choices=FORMATS, action="append")
    args = parser.parse_args()
    bad = 0
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GEMMA_EDGE_CACHE"] = f"{folder}/cache"
        for form, bundle in small_bundles(Path(folder)).items():
            if args.format and form not in args.format:
                continue
            for what, left in leaks(bundle, args.generations, args.loads).items():
                count = args.generations if what == "generations" else args.loads
                print(
                    f"{form}: {count:,} {what}: memory {left.growth:+.2%}, open files {left.files:+d}, "
                    f"threads {left.threads:+d}",
                    flush=True,
                )
                bad += not left.clean
    return min(bad, 1)


if __name__ == "__main__":
    sys.exit(main())
