"""Runs cases in a pool of forked workers and judges each by an oracle.

A case is a seed: it draws a subject, damages its valid files, and reads them. A finding is anything but
success or one of our errors, in time, in memory, and on one line:

| finding | what it means |
|---|---|
| untyped | an exception that is no `GemmaEdgeError` |
| message | an error of several lines, with control characters, or longer than `MESSAGE_CHARACTERS` |
| slow | more than 2 s of CPU beyond the valid input's |
| memory | a peak of more than 64 MiB beyond the valid input's, and 10 bytes for each byte that was added |
| descriptor | files left open |
| crash | the worker died of a signal |
| hang | the worker was killed after 10 s of CPU, or after 120 s in which it had nothing to compute |

Workers are forked once and read thousands of cases each; one that dies is replaced: its case is the finding.
Time is the worker's own CPU time and memory its own peak, so that a busy machine is no finding.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import mmap
import os
import resource
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

from gemma_edge.runtime.errors import GemmaEdgeError

from .readers import MODELS
from .subjects import Files, Subject, make_valid, subjects

CPU_SECONDS, MEMORY = 2.0, 64 << 20
MEMORY_A_BYTE = 10  # of a file that damage made longer: of text, Python's JSON makes objects of that size
HANG_CPU, HANG_IDLE = 10.0, 120.0
CACHE_CASES = 64  # after so many the cache is emptied
MESSAGE_CHARACTERS = 700  # 300 of foreign text, and our own words; the path is not counted
ADDRESS_SPACE = 6 << 30  # what a bomb gets before MemoryError
SLOT = struct.Struct("<q")  # seed of the running case
WORKERS = 2
PASS = 0.05  # seconds between two looks at the workers
BLOCK = 20_000  # cases between two lines of a ledger
REPOSITORY = str(Path(__file__).parents[2])


@dataclass(frozen=True)
class Finding:
    seed: int
    subject: str
    kind: str
    detail: str
    where: str = ""


@dataclass
class Outcome:
    """What a campaign found, and how many cases it read."""

    findings: list[Finding] = field(default_factory=list)
    cases: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    cpu_seconds: float = 0.0

    def add(self, other: Outcome) -> None:
        self.findings += other.findings
        self.cases += other.cases
        self.accepted += other.accepted
        self.seconds += other.seconds
        self.cpu_seconds += other.cpu_seconds

    def summary(self) -> str:
        """A line for each subject, and one for all."""
        found = Counter(finding.subject for finding in self.findings)
        lines = [
            f"{name:18} {self.cases[name]:9,} read, {self.accepted[name]:9,} accepted, {found[name]} findings"
            for name in sorted(self.cases | found)
        ]
        total = f"{self.cases.total():,} cases in {self.seconds:,.0f} s ({self.cpu_seconds:,.0f} s of CPU)"
        return "\n".join([*lines, f"{total}: {len(self.findings)} findings"])


@contextlib.contextmanager
def valid_files() -> Iterator[Path]:
    """A folder of valid inputs in memory, gone afterwards; later forks find it."""
    base = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    folder = Path(tempfile.mkdtemp(prefix="gemma-edge-fuzz-", dir=base))
    try:
        (folder / "valid").mkdir()
        make_valid(folder / "valid")
        os.environ[MODELS] = str(folder / "valid")
        yield folder
    finally:
        os.environ.pop(MODELS, None)
        shutil.rmtree(folder, ignore_errors=True)


def draw(seed: int, only: Sequence[str] = ()) -> tuple[Subject, Random]:
    """The subject of a seed, and the generator that its damage is drawn from."""
    every = subjects()
    rng = Random(seed)
    chosen = rng.choices(list(every.values()), [subject.weight for subject in every.values()])[0]
    if only:
        chosen = every[only[seed % len(only)]]
    return chosen, rng


class Reader:
    """Runs cases in this process, within a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        os.environ["GEMMA_EDGE_CACHE"] = str(folder / "cache")
        os.environ["TMPDIR"] = tempfile.tempdir = str(folder)
        self.valid: dict[str, Files] = {}
        self.costs: dict[str, tuple[float, int]] = {}
        self.judged = 0
        warnings.simplefilter("ignore")

    def place(self, subject: Subject) -> tuple[Path, Files]:
        """The folder of a subject's valid files, and these."""
        here = self.folder / subject.name.replace(" ", "-").replace(",", "")
        if subject.name not in self.valid:
            self.valid[subject.name] = subject.valid()
            here.mkdir()
            for name, data in self.valid[subject.name].items():
                (here / name).write_bytes(data)
            subject.read(here)  # imports, caches
            began = time.process_time()
            peak = peak_of(lambda: subject.read(here))
            self.costs[subject.name] = time.process_time() - began, peak
            gc.freeze()  # modules and valid files: no collection looks at them again
        return here, self.valid[subject.name]

    def case(self, seed: int, only: Sequence[str] = ()) -> tuple[str, Finding | None, bool]:
        """Subject, finding, and whether the damaged files were accepted."""
        subject, rng = draw(seed, only)
        here, valid = self.place(subject)
        changed = subject.damage(rng, valid)
        return subject.name, *self.judge(seed, subject, here, valid, changed)

    def judge(
        self, seed: int, subject: Subject, here: Path, valid: Files, changed: Files
    ) -> tuple[Finding | None, bool]:
        for name, data in changed.items():
            (here / name).write_bytes(data)
        usual, usual_peak = self.costs[subject.name]
        descriptors = len(os.listdir("/proc/self/fd"))
        found: tuple[str, str, str] | None = None
        accepted = False
        began, peak = time.process_time(), 0
        try:
            peak = peak_of(lambda: subject.read(here))
            accepted = True
        except GemmaEdgeError as error:
            found = judged_message(str(error), here)
            peak = PEAK[0]
        except (Exception, SystemExit) as error:
            place = location(error)
            found = "untyped", f"{type(error).__name__}: {str(error)[:200]}", place
            peak = PEAK[0]
        spent = time.process_time() - began
        if found is None and spent > usual + CPU_SECONDS:
            found = "slow", f"{spent:.1f} s of CPU, usually {usual:.2f}", ""
        longer = sum(len(data) - len(valid.get(name, b"")) for name, data in changed.items())
        if found is None and peak > usual_peak + MEMORY + MEMORY_A_BYTE * max(0, longer):
            found = "memory", f"{peak >> 20} MiB, usually {usual_peak >> 20}", ""
        for name in changed:
            (here / name).unlink(missing_ok=True)
            if name in valid:
                (here / name).write_bytes(valid[name])
        self.judged += 1
        if self.judged % CACHE_CASES == 0:
            shutil.rmtree(self.folder / "cache", ignore_errors=True)
        if len(os.listdir("/proc/self/fd")) > descriptors:
            gc.collect()
            if (
                (more := len(os.listdir("/proc/self/fd")) - descriptors) > 0
                and found is None
                and not engine(subject)
            ):
                found = "descriptor", f"{more} more open files", ""
        return (Finding(seed, subject.name, *found) if found else None), accepted


def engine(subject: Subject) -> bool:
    """Engines keep files of their own for a while."""
    return "answer" in subject.name or "LiteRT" in subject.name or subject.name in ("graph", "external data")


PEAK = [0]


def peak_of(action: Callable[[], object]) -> int:
    """Bytes that the peak of resident memory rose by during `action`; in PEAK too, if it raises."""
    with open("/proc/self/clear_refs", "wb", buffering=0) as file:
        file.write(b"5")  # the peak is now what is resident
    before = peak_memory()
    try:
        action()
    finally:
        PEAK[0] = max(0, peak_memory() - before)
    return PEAK[0]


def peak_memory() -> int:
    with open("/proc/self/status", "rb", buffering=0) as file:
        return int(file.read(4096).partition(b"VmHWM:")[2].split(None, 1)[0]) << 10


def judged_message(text: str, here: Path) -> tuple[str, str, str] | None:
    """The finding that a message is, if it is one."""
    text = text.replace(str(here.parent), "")
    shape = "".join(c for c in text if c.isalpha())[:40]
    if not text.isprintable():
        return "message", f"not on one printable line: {text[:200]!r}", shape
    if len(text) > MESSAGE_CHARACTERS:
        return "message", f"{len(text)} characters: {text[:200]!r}", shape
    return None


def location(error: BaseException) -> str:
    """The innermost line of ours that raised."""
    frames = [
        frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(REPOSITORY)
    ]
    ours = [frame for frame in frames if "/tests/" not in frame.filename] or frames
    return f"{ours[-1].filename.removeprefix(REPOSITORY + '/')}:{ours[-1].lineno}" if ours else ""


# Workers. -------------------------------------------------------------------------------------------


class Pool:
    """Workers, each with a slot of shared memory that says which case it reads."""

    def __init__(self, folder: Path, workers: int, only: Sequence[str], log: Callable[[str], None]) -> None:
        self.folder, self.workers, self.only, self.log = folder, workers, only, log
        self.shared = mmap.mmap(-1, SLOT.size * workers)
        self.pids: dict[int, int] = {}
        self.notes = folder / "findings.jsonl"
        self.notes.touch()
        self.generation = 0

    def start(self, worker: int, seeds: range) -> None:
        self.generation += 1
        SLOT.pack_into(self.shared, SLOT.size * worker, -1)
        pid = os.fork()
        if pid == 0:
            try:
                self.work(worker, seeds)
            except BaseException as error:
                text = f"the campaign itself: {type(error).__name__}: {error}"
                note = Finding(-1, "campaign", "broken", text, location(error))
                with self.notes.open("a", encoding="utf-8") as notes:
                    notes.write(json.dumps(asdict(note)) + "\n")
                os._exit(70)
            os._exit(0)
        self.pids[worker] = pid

    def work(self, worker: int, seeds: range) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 1)
        os.dup2(quiet, 2)
        reader = Reader(self.folder / f"worker-{worker}-{self.generation}")
        counts: Counter[str] = Counter()
        accepted: Counter[str] = Counter()
        with self.notes.open("a", encoding="utf-8", buffering=1) as notes:
            for done, seed in enumerate(seeds, start=1):
                SLOT.pack_into(self.shared, SLOT.size * worker, seed)
                name, finding, taken = reader.case(seed, self.only)
                counts[name] += 1
                accepted[name] += taken
                if finding:
                    notes.write(json.dumps(asdict(finding)) + "\n")
                if done % 64 == 0:
                    notes.write(json.dumps({"counts": counts, "accepted": accepted}) + "\n")
                    counts.clear()
                    accepted.clear()
            notes.write(json.dumps({"counts": counts, "accepted": accepted}) + "\n")

    def run(self, seeds: range, outcome: Outcome, minutes: float) -> None:
        began, used = time.monotonic(), children_seconds()
        shares = [seeds[worker :: self.workers] for worker in range(self.workers)]
        for worker, share in enumerate(shares):
            self.start(worker, share)
        read = 0
        watched: dict[int, Watch] = {}
        while self.pids:
            time.sleep(PASS)
            read = self.collect(read, outcome)
            for worker, pid in list(self.pids.items()):
                (seed,) = SLOT.unpack_from(self.shared, SLOT.size * worker)
                ended, code = os.waitpid(pid, os.WNOHANG)
                hung = False
                if not ended and seed in shares[worker]:  # it may be read while it is written
                    if worker not in watched or watched[worker].seed != seed:
                        watched[worker] = Watch(pid, seed)
                    hung = watched[worker].hangs()
                    if hung:
                        os.kill(pid, signal.SIGKILL)
                        ended, code = os.waitpid(pid, 0)
                over = time.monotonic() - began > 60 * minutes
                if not ended and over:
                    os.kill(pid, signal.SIGKILL)
                    os.waitpid(pid, 0)
                    del self.pids[worker]
                if not ended:
                    continue
                del self.pids[worker]
                seed = SLOT.unpack_from(self.shared, SLOT.size * worker)[
                    0
                ]  # whole, now that nobody writes it
                if code and not over:
                    kind = "hang" if hung else "crash"
                    subject = draw(seed, self.only)[0].name if seed in shares[worker] else "valid"
                    name = signal.Signals(code & 127).name if code & 127 else f"exit {code >> 8}"
                    self.report(outcome, Finding(seed, subject, kind, "killed" if hung else name))
                    left = (
                        shares[worker][shares[worker].index(seed) + 1 :]
                        if seed in shares[worker]
                        else range(0)
                    )
                    if left:
                        self.start(worker, left)
        self.collect(read, outcome)
        outcome.seconds = time.monotonic() - began
        outcome.cpu_seconds = children_seconds() - used

    def collect(self, read: int, outcome: Outcome) -> int:
        with self.notes.open(encoding="utf-8") as notes:
            notes.seek(read)
            while line := notes.readline():
                if not line.endswith("\n"):
                    break
                read += len(line.encode())
                note = json.loads(line)
                if "counts" in note:
                    outcome.cases.update(note["counts"])
                    outcome.accepted.update(note["accepted"])
                else:
                    self.report(outcome, Finding(**note))
        return read

    def report(self, outcome: Outcome, finding: Finding) -> None:
        """Tells the first of each kind at each place; keeps all."""
        key = finding.subject, finding.kind, finding.where
        if not any((f.subject, f.kind, f.where) == key for f in outcome.findings):
            self.log(
                f"seed {finding.seed}: {finding.subject}: {finding.kind}: {finding.detail} {finding.where}"
            )
        outcome.findings.append(finding)


class Watch:
    """How long a worker has computed, and waited without computing, at one case."""

    def __init__(self, pid: int, seed: int) -> None:
        self.pid, self.seed, self.idle = pid, seed, 0.0
        self.first, _ = process_clock(pid)

    def hangs(self) -> bool:
        cpu, sleeps = process_clock(self.pid)
        self.idle += PASS if sleeps else 0  # one that waits for a CPU does not sleep
        return cpu - self.first > HANG_CPU or self.idle > HANG_IDLE


def process_clock(pid: int) -> tuple[float, bool]:
    """Seconds of CPU that a process took, and whether it sleeps."""
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return 0.0, False
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"), fields[0] != "R"


def children_seconds() -> float:
    """CPU of the children that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def print_error(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def campaign(
    seeds: range,
    *,
    only: Sequence[str] = (),
    workers: int = WORKERS,
    minutes: float = 60.0,
    log: Callable[[str], None] = print_error,
) -> Outcome:
    """Reads one case a seed; ends after `minutes` at the latest."""
    outcome = Outcome()
    with valid_files() as folder:
        Pool(folder, workers, only, log).run(seeds, outcome, minutes)
    return outcome


def campaign_in_parts(
    seeds: range, ledger: Path, *, workers: int = WORKERS, log: Callable[[str], None] = print_error
) -> Outcome:
    """Reads the cases in blocks and appends each block's counts to `ledger`; goes on where that file ends."""
    total, first = Outcome(), seeds.start
    for line in ledger.read_text(encoding="utf-8").splitlines() if ledger.exists() else ():
        block = json.loads(line)
        if block.pop("first") != first:
            raise SystemExit(f"{ledger}: its blocks do not begin at seed {seeds.start}: name another file")
        first = block.pop("next")
        findings = [Finding(**finding) for finding in block.pop("findings")]
        total.add(Outcome(findings, Counter(block.pop("cases")), Counter(block.pop("accepted")), **block))
    with valid_files() as folder:
        for start in range(first, seeds.stop, BLOCK):
            block, stop = Outcome(), min(start + BLOCK, seeds.stop)
            (folder / str(start)).mkdir()
            Pool(folder / str(start), workers, (), log).run(range(start, stop), block, math.inf)
            shutil.rmtree(folder / str(start))
            with ledger.open("a", encoding="utf-8") as file:
                found = [asdict(finding) for finding in block.findings]
                file.write(
                    json.dumps({"first": start, "next": stop, **vars(block), "findings": found}) + "\n"
                )
            total.add(block)
            log(f"{total.cases.total():,} cases in {total.seconds:,.0f} s: {len(total.findings)} findings")
    return total
