"""Publishing: old, new or absent; never torn, nothing left behind, nothing else overwritten."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from gemma_edge.export.publish import ROOM, BundleWriter, HashingFile
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import GemmaEdgeError, UsageError
from support.processes import wait_for
from support.random_gemma3n_text import SMALL

MANIFEST = {"schema_version": 1, "config": SMALL, "context": 64, "chunk": 16, "kv_cache": "fp32"}

# Publishes a bundle over sys.argv[1], and is killed at the moment that sys.argv[2] names.
KILLED = """\
import json, os, signal, sys
from pathlib import Path
from gemma_edge.export import publish
from gemma_edge.export.publish import BundleWriter

def die(*args):
    os.kill(os.getpid(), signal.SIGKILL)

moment, rename = sys.argv[2], os.rename
publish.exchange = lambda *paths: False  # as on a file system that cannot
with BundleWriter(Path(sys.argv[1])) as writer:
    if moment == "while a file is written":
        writer.write("decoder.onnx", lambda file: (file.write(b"half"), die()))
    writer.write_bytes("decoder.onnx", b"new")
    if moment == "before the manifest":
        die()
    writer.write_manifest(json.loads(sys.argv[3]))
    if moment == "before the renames":
        die()
    if moment == "between the renames":
        os.rename = os.replace = lambda a, b: rename(a, b) if ".partial" not in str(a) else die()
    if moment == "after the renames":
        publish._sync_folder = lambda folder: die() if folder.name == "disk" else None
    writer.publish()
"""


def publish(target: Path, content: bytes) -> Path:
    with BundleWriter(target) as writer:
        writer.write_bytes("decoder.onnx", content)
        writer.write_manifest(MANIFEST)
        return writer.publish()


def content(target: Path) -> bytes:
    """What a sound bundle holds."""
    return Bundle.open(target).file("decoder.onnx").read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "disk" / "out"


# Publishing. --------------------------------------------------------------------------------------


def test_new(target: Path) -> None:
    assert publish(target, b"new") == target
    assert content(target) == b"new"
    assert names(target.parent) == ["out"] and names(target) == ["decoder.onnx", "manifest.json"]


def test_an_old_bundle_is_replaced(target: Path) -> None:
    publish(target, b"old")
    publish(target, b"new")
    assert content(target) == b"new"
    assert names(target.parent) == ["out"]


@pytest.mark.parametrize("links", [True, False], ids=["links", "copies"])
def test_files_of_others_stay(target: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(target, b"old")
    others = {"README.md": b"mine", ".cache/hub/x": b"", "onnx/decoder.onnx": b"another bundle"}
    for name, data in others.items():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_bytes(data)
    (target / "link").symlink_to("nowhere")
    if not links:

        def no_links(*args: Any, **options: Any) -> None:
            raise OSError(errno.EPERM, "no links here")

        monkeypatch.setattr(os, "link", no_links)
    publish(target, b"new")
    assert content(target) == b"new" and names(target.parent) == ["out"]
    assert {name: (target / name).read_bytes() for name in others} == others
    assert os.readlink(target / "link") == "nowhere"


def test_a_file_of_anothers_is_not_overwritten(target: Path) -> None:
    """Nor is the old bundle, whose manifest does not list it."""
    publish(target, b"old")
    (target / "vision.onnx").write_bytes(b"mine")
    with BundleWriter(target) as writer:
        writer.write_bytes("vision.onnx", b"new")
        writer.write_manifest(MANIFEST)
        with pytest.raises(GemmaEdgeError, match=r"vision\.onnx: the new bundle has a file of this name"):
            writer.publish()
    assert content(target) == b"old" and (target / "vision.onnx").read_bytes() == b"mine"
    assert names(target.parent) == ["out"]


def test_an_old_bundle_with_a_damaged_manifest(target: Path) -> None:
    """Which files were its own can only be told by the new one's."""
    publish(target, b"old")
    (target / "manifest.json").write_bytes(b"{")
    (target / "README.md").write_bytes(b"mine")
    publish(target, b"new")
    assert content(target) == b"new" and (target / "README.md").read_bytes() == b"mine"


def test_an_empty_folder_is_filled(target: Path) -> None:
    target.mkdir(parents=True)
    publish(target, b"new")
    assert content(target) == b"new" and names(target.parent) == ["out"]


def test_a_relative_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    publish(Path("out"), b"new")
    assert content(tmp_path / "out") == b"new"


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_no_bundle_is_not_overwritten(target: Path, kind: str) -> None:
    kept = target / "thesis.tex" if kind == "folder" else target
    kept.parent.mkdir(parents=True)
    kept.write_text("years of work")
    with pytest.raises(UsageError, match="exists and is not a bundle"):
        BundleWriter(target)
    assert kept.read_text() == "years of work"


def test_files_are_recorded_with_size_and_hash(target: Path) -> None:
    with BundleWriter(target) as writer:
        writer.write("data", lambda file: [file.write(b"ab"), file.write(memoryview(b"cd")), file.tell()])
        assert writer.records == {"data": {"bytes": 4, "sha256": hashlib.sha256(b"abcd").hexdigest()}}
        assert (writer.folder / "data").read_bytes() == b"abcd"


def test_hashing_file_takes_arrays(tmp_path: Path) -> None:
    import numpy as np

    file = HashingFile(tmp_path / "data")
    values = np.arange(6, dtype="<f4").reshape(2, 3)
    assert file.write(values.data) == 24 and file.tell() == 24
    assert file.close() == {"bytes": 24, "sha256": hashlib.sha256(values.tobytes()).hexdigest()}


# Interrupted, failed, killed. ---------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.EIO, "broken"), SystemExit(1)])
@pytest.mark.parametrize("old", [True, False])
def test_an_error_leaves_what_was_there(target: Path, error: BaseException, old: bool) -> None:
    if old:
        publish(target, b"old")

    def produce(file: Any) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(type(error)), BundleWriter(target) as writer:
        writer.write("decoder.onnx", produce)
    assert names(target.parent) == (["out"] if old else [])
    if old:
        assert content(target) == b"old"


def test_leaving_without_publishing_publishes_nothing(target: Path) -> None:
    with BundleWriter(target) as writer:
        writer.write_bytes("decoder.onnx", b"new")
        writer.write_manifest(MANIFEST)
    assert names(target.parent) == []


def test_a_failing_rename_leaves_the_old_bundle(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish(target, b"old")
    rename = os.rename

    def failing(source: Path, to: Path) -> None:
        if Path(to) == target and ".partial" in Path(source).name:
            raise OSError(errno.EIO, "broken")
        rename(source, to)

    monkeypatch.setattr("gemma_edge.export.publish.exchange", lambda *_: False)
    monkeypatch.setattr("gemma_edge.export.publish.os.rename", failing)
    with pytest.raises(OSError, match="broken"):
        publish(target, b"new")
    monkeypatch.undo()
    assert content(target) == b"old" and names(target.parent) == ["out"]


@pytest.mark.parametrize("old", [True, False], ids=["over an old bundle", "afresh"])
@pytest.mark.parametrize(
    "moment",
    [
        "while a file is written",
        "before the manifest",
        "before the renames",
        "between the renames",
        "after the renames",
    ],
)
def test_old_new_or_absent_whenever_it_is_killed(target: Path, moment: str, old: bool) -> None:
    target.parent.mkdir(parents=True)
    if old:
        publish(target, b"old")
    argv = [sys.executable, "-c", KILLED, str(target), moment, json.dumps(MANIFEST)]
    assert subprocess.run(argv, check=False).returncode == -signal.SIGKILL
    if moment == "after the renames":
        assert content(target) == b"new"
    elif old and moment != "between the renames":
        assert content(target) == b"old"
    else:
        assert not target.exists()
    # The next export is not hindered, and clears what the killed one has left.
    publish(target, b"next")
    assert content(target) == b"next" and names(target.parent) == ["out"]


# Publishes once for every file operation, in a process that kills itself before that operation.
EVERY_KILL = """\
import json, os, signal, shutil, sys
from pathlib import Path
from gemma_edge.export import publish
from gemma_edge.export.publish import BundleWriter
from gemma_edge.runtime.artifacts.bundle import Bundle

target, old, exchanges, manifest = Path(sys.argv[1]), sys.argv[2], sys.argv[3], json.loads(sys.argv[4])
OPERATIONS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.scandir", "shutil.rmtree")
count, deadly = 0, -1

def step(name, *args):
    global count
    count += 1
    if count == deadly:
        os.kill(os.getpid(), signal.SIGKILL)

def stepping(module, name):
    function = getattr(module, name)
    setattr(module, name, lambda *args: (step(name), function(*args))[1])

def write(content):
    with BundleWriter(target) as writer:
        writer.write_bytes("decoder.onnx", content)
        writer.write_manifest(manifest)
        writer.publish()

def state():
    return Bundle.open(target).file("decoder.onnx").read_bytes() if target.exists() else None

if exchanges == "no":
    publish.exchange = lambda *paths: False
states = []
while True:
    deadly += 1 if deadly > 0 else 2
    if old == "old":
        write(b"old")
    else:
        shutil.rmtree(target, ignore_errors=True)
    if not (pid := os.fork()):
        stepping(os, "fsync")
        stepping(publish, "exchange")
        sys.addaudithook(lambda name, args: step(name) if name in OPERATIONS else None)
        write(b"new")
        os._exit(0)
    killed = os.waitpid(pid, 0)[1] != 0
    found = state()
    write(b"next")
    if state() != b"next" or [path.name for path in target.parent.iterdir()] != [target.name]:
        sys.exit(f"killed at {deadly}: {list(target.parent.iterdir())}")
    if not killed:
        break
    states.append(None if found is None else found.decode())
print(json.dumps(states))
"""


@pytest.mark.parametrize("exchanges", ["yes", "no"])
@pytest.mark.parametrize("old", ["old", "absent"])
def test_killed_before_every_file_operation(target: Path, old: str, exchanges: str) -> None:
    target.parent.mkdir(parents=True)
    argv = [sys.executable, "-c", EVERY_KILL, str(target), old, exchanges, json.dumps(MANIFEST)]
    run = subprocess.run(argv, capture_output=True, encoding="utf-8", check=False)
    assert run.returncode == 0, run.stderr
    states = json.loads(run.stdout)
    assert len(states) > 15
    before = "old" if old == "old" else None
    absent_between = 1 if old == "old" and exchanges == "no" else 0  # the one moment of two renames
    first = states.index("new")
    assert states[: first - absent_between] == [before] * (first - absent_between)
    assert states[first:] == ["new"] * (len(states) - first)


def test_a_link_is_followed(target: Path, tmp_path: Path) -> None:
    publish(target, b"old")
    link = tmp_path / "link"
    link.symlink_to(target)
    publish(link, b"new")
    assert link.is_symlink() and content(target) == b"new" and names(target.parent) == ["out"]
    dangling = tmp_path / "dangling"
    dangling.symlink_to(target.parent / "made")
    publish(dangling, b"new")
    assert content(target.parent / "made") == b"new"


def test_a_disk_that_fills_leaves_nothing_behind(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    try:
        publish(disk / "out", b"old")
        for size in (1_040_000, 1_050_000, 1_100_000, 5_000_000):
            with pytest.raises(OSError, match="No space"):
                publish(disk / "out", bytes(size))
            assert names(disk) == ["out"] and content(disk / "out") == b"old"
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_an_export_that_is_ended_cleans_up(
    target: Path, tiny_checkpoint: Path, tmp_path: Path, number: int
) -> None:
    """Ended while the gate's process runs: neither outlives the other, and none prints a traceback."""
    publish(target, b"old")
    argv = [sys.executable, "-m", "gemma_edge.cli.main", "export", str(tiny_checkpoint), str(target)]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [*argv, "--context", "64", "--force", "--calibrate", "none"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )
    scratch = target.parent / f".out.partial-scratch-{process.pid}"
    wait_for(lambda: list(scratch.glob("*")) or process.poll() is not None, "the gate never began")
    assert process.poll() is None
    process.send_signal(number)
    assert process.stdout is not None
    said = process.stdout.read()  # until the gate's process, too, has ended
    assert process.wait() == 128 + number and "Traceback" not in said
    assert names(target.parent) == ["out"] and content(target) == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["disk"]


def test_an_export_below_nohup_goes_on(target: Path, tiny_checkpoint: Path) -> None:
    argv = ["nohup", sys.executable, "-m", "gemma_edge.cli.main", "export", str(tiny_checkpoint), str(target)]
    process = subprocess.Popen(
        [*argv, "--context", "64", "--force", "--calibrate", "none"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    scratch = target.parent / f".out.partial-scratch-{process.pid}"
    wait_for(lambda: list(scratch.glob("*")) or process.poll() is not None, "the gate never began")
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGHUP)  # as a terminal that is closed: the gate's process gets it, too
    assert process.wait() == 0
    Bundle.open(target).check_hashes()
    assert names(target.parent) == ["out"]


def test_the_folder_of_another_running_export_is_left_alone(target: Path) -> None:
    other = target.parent / f".out.partial-{os.getppid()}"
    other.mkdir(parents=True)
    publish(target, b"new")
    assert names(target.parent) == [other.name, "out"]


def test_folders_of_other_names_are_left_alone(target: Path) -> None:
    pid = subprocess.Popen([sys.executable, "-c", ""])
    pid.wait()
    kept = [f".other.partial-{pid.pid}", f"out.partial-{pid.pid}", ".out.partial-x"]
    for name in kept:
        (target.parent / name).mkdir(parents=True)
    publish(target, b"new")
    assert names(target.parent) == sorted([*kept, "out"])


# Room on the disk. --------------------------------------------------------------------------------


class Usage(NamedTuple):
    total: int
    used: int
    free: int


def test_a_disk_without_room_is_refused_before_anything_is_written(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = Usage(10**12, 10**12 - 10**8, 10**8)
    monkeypatch.setattr("gemma_edge.export.publish.shutil.disk_usage", lambda path: usage)
    with BundleWriter(target) as writer:
        writer.check_room(10**8 - ROOM)
        with pytest.raises(GemmaEdgeError, match="are free; free some, or name a folder") as caught:
            writer.check_room(10**8)
    assert caught.value.exit_code == 1
    assert names(target.parent) == []
