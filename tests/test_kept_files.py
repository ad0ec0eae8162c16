"""The cache: a kept file is used only while it is what was kept, and nothing stays that nobody uses."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from gemma_edge.cli.main import main
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.files import file_digest, kept_files
from gemma_edge.runtime.files.cache_folder import LIMIT_VARIABLE, cache_folder, cache_limit
from gemma_edge.runtime.files.file_digest import remembered_sha256, sha256
from gemma_edge.runtime.files.kept_files import clear, keep, kept
from support.processes import wait_for


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kept_files, "_in_use", set())
    monkeypatch.delenv(LIMIT_VARIABLE, raising=False)
    return tmp_path / "cache"


def make(before: str, data: bytes) -> Path:
    def write(path: Path) -> None:
        path.write_bytes(data)

    return keep(before, ".x", len(data), write)


def flip(path: Path, at: int = 0) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    with path.open("r+b") as file:
        file.write(data)


def _now(folder: Path) -> int:
    """The time of the file system, whose clock may tick as rarely as every 10 ms."""
    (folder / "now").touch()
    return (folder / "now").stat().st_ctime_ns


def count_hashes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    hashed: list[Path] = []

    def counting(path: Path, *args: object) -> str:
        hashed.append(path)
        return sha256(path, *args)  # type: ignore[arg-type]

    monkeypatch.setattr(file_digest, "sha256", counting)
    return hashed


def test_a_kept_file_is_found_and_not_hashed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    path = make("a-", b"weights")
    hashed = count_hashes(monkeypatch)
    assert kept("a-", ".x") == path and kept("a-", ".x", sha256(path)) == path
    assert kept("b-", ".x") is None and kept("a-", ".x", "0" * 64) is None
    assert hashed == []


@pytest.mark.parametrize("restore_times", [False, True])
def test_a_flipped_bit_is_found(tmp_path: Path, restore_times: bool) -> None:
    path = make("a-", b"weights")
    before = path.stat()
    wait_for(lambda: _now(tmp_path) > before.st_ctime_ns, "the file system's clock stands still")
    flip(path)
    if restore_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert kept("a-", ".x") is None
    assert not path.exists()


def test_a_file_that_was_swapped_or_cut_is_found() -> None:
    path = make("a-", b"weights")
    other = path.with_name("other")
    other.write_bytes(b"w3ights")
    os.replace(other, path)
    assert kept("a-", ".x") is None
    path = make("a-", b"weights")
    os.truncate(path, 3)
    assert kept("a-", ".x") is None


def test_a_young_file_is_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a tick of the file system's clock a file may change and keep its times."""
    file = tmp_path / "file"
    file.write_bytes(b"1")
    hashed = count_hashes(monkeypatch)
    monkeypatch.setattr(file_digest, "SETTLED_NS", 3600 * 10**9)  # young for as long as this takes
    remembered_sha256(file)
    remembered_sha256(file)
    assert len(hashed) == 2
    monkeypatch.setattr(file_digest, "SETTLED_NS", -1)
    remembered_sha256(file)
    remembered_sha256(file)
    assert len(hashed) == 3


def test_a_range_has_a_digest_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_digest, "SETTLED_NS", -1)
    file = tmp_path / "file"
    file.write_bytes(b"abcdef")
    digests = [remembered_sha256(file, *span) for _ in range(2) for span in ((0, 3), (3, 6), (0, None))]
    assert digests[:3] == digests[3:] and len(set(digests)) == 3


def test_a_note_that_is_damaged_is_not_believed(folder: Path) -> None:
    path = make("a-", b"weights")
    for text in ("", "[]", '{"identity": 1}', '{"identity": [1, 2, 3, 4], "sha256": "0"}'):
        file_digest.note_of(path).write_text(text)
        assert kept("a-", ".x") == path


def _make_slowly(started: str) -> None:
    def write(path: Path) -> None:
        path.write_bytes(b"half")
        Path(started).touch()
        time.sleep(600)

    keep("slow-", ".x", 4, write)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_what_a_killed_maker_left_goes_at_the_next_look(folder: Path, tmp_path: Path, number: int) -> None:
    started = tmp_path / "started"
    process = multiprocessing.get_context("spawn").Process(target=_make_slowly, args=(str(started),))
    process.start()
    wait_for(lambda: started.exists() or not process.is_alive(), "it never started")
    (building,) = folder.glob("*.building")
    assert kept("a-", ".x") is None and building.exists()  # its maker lives
    assert process.pid is not None
    os.kill(process.pid, number)
    process.join()
    assert kept("a-", ".x") is None
    assert not building.exists()


def test_a_maker_waits_for_another_and_takes_what_that_made(folder: Path) -> None:
    path = make("a-", b"weights")
    code = (
        "from pathlib import Path; from gemma_edge.runtime.files.kept_files import keep\n"
        "print('waits', flush=True); print(keep('a-', '.x', 7, lambda path: 1 / 0))"
    )
    with open(folder / ".lock", "ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        argv = [sys.executable, "-c", code]
        process = subprocess.Popen(argv, stdout=subprocess.PIPE, encoding="utf-8")
        assert process.stdout is not None and process.stdout.readline() == "waits\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
    assert process.stdout.read().strip() == str(path)
    assert process.wait() == 0


def test_a_maker_that_fails_leaves_nothing(folder: Path) -> None:
    def fail(path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        keep("a-", ".x", 4, fail)
    assert [path.name for path in folder.iterdir() if not path.name.startswith(".")] == []


def test_the_least_recently_used_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    paths = {name: make(name, name.encode() * 1000) for name in "abc"}
    for age, name in enumerate("bca"):
        os.utime(file_digest.note_of(paths[name]), (1e9 - age, 1e9 - age))
    monkeypatch.setattr(kept_files, "_in_use", set())
    assert kept("a", ".x")  # the oldest, until now
    monkeypatch.setattr(kept_files, "_in_use", set())
    monkeypatch.setenv(LIMIT_VARIABLE, "3000")
    new = make("d", b"d" * 1000)
    assert [name for name, path in paths.items() if path.exists()] == ["a", "b"] and new.exists()


def test_files_of_this_process_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    first = make("a", b"a" * 1000)
    monkeypatch.setenv(LIMIT_VARIABLE, "1")
    second = make("b", b"b" * 1000)
    assert first.exists() and second.exists()


def test_the_verb(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["cache"]) == 0
    assert "0 B of at most 8 GiB" in capsys.readouterr().out
    path = make("a-", b"weights" * 1000)
    (folder / "runner").mkdir()
    monkeypatch.setattr(kept_files, "_in_use", set())
    assert main(["cache", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert [file["name"] for file in said["files"]] == [path.name]
    assert said["limit"] == 8 << 30
    assert main(["cache", "--limit", "4kB"]) == 0
    assert "0 B of at most 3.91 KiB, 6.84 KiB removed" in capsys.readouterr().out
    assert not path.exists() and cache_limit() == 4000
    make("a-", b"weights")
    assert main(["cache", "--clear"]) == 0
    assert "7 B removed" in capsys.readouterr().out
    assert kept("a-", ".x") is None and (folder / "runner").is_dir()
    assert not list((folder / ".hashes").iterdir())


def test_a_limit_that_is_no_size(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, "much")
    with pytest.raises(UsageError, match=LIMIT_VARIABLE):
        make("a-", b"")
    assert cache_folder() == folder and clear() == 0
