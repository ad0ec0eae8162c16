"""Attack: SIGKILL before every operation on files, and after the last, of the verbs that write.

What the verb writes is then old or new, never half; what else is left goes when it runs again. Exports have
their own test, tests/test_publish.py. `run`, `chat`, `describe`, `transcribe` and `translate` print only.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from fuzz.valid_inputs import SMALL

from gemma_edge.benchmarks.output.result_text import save
from gemma_edge.benchmarks.records.results_file import append_record, parse_record, read_records
from gemma_edge.cli.main import main
from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.exporter import export_bundle
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.runtime.conversations.saved_conversation import SavedConversation, write_conversation
from gemma_edge.runtime.conversations.turns import Turn
from gemma_edge.runtime.files import kept_files
from gemma_edge.runtime.files.abandoned import temporary_folder
from gemma_edge.runtime.files.cache_folder import cache_limit
from gemma_edge.runtime.files.file_digest import SETTLED_NS, remember
from gemma_edge.runtime.files.sealed_arrays import read_header, read_sealed
from support.breaking_disk import kill_everywhere
from support.repository import ROOT
from support.strace import can_trace

RESULTS = ROOT / "benchmarks" / "results"


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def succeed(*argv: object) -> None:
    assert main(list(map(str, argv))) == 0


@pytest.mark.slow
def test_synth(tmp_path: Path) -> None:
    folder, whole = tmp_path / "disk", tmp_path / "whole"

    def synth(path: Path) -> None:
        synthesize(path, config=SMALL, progress=False)

    synth(whole)
    for _ in kill_everywhere(folder, lambda: emptied(folder), lambda: synth(folder / "new"), 50, 15):
        if (folder / "new").exists():
            assert names(folder / "new") == names(whole)
            Checkpoint.open(folder / "new").close()
            shutil.rmtree(folder / "new")
        synth(folder / "new")
        assert [path.name for path in folder.iterdir()] == ["new"]


def record(number: int) -> Any:
    rows = (RESULTS / "1-parity.jsonl").read_text(encoding="utf-8").splitlines()
    return parse_record({**json.loads(rows[0]), "name": f"record {number}"})


@pytest.mark.parametrize("ending", ["csv", "md"])
def test_bench_replaces_a_table(tmp_path: Path, ending: str) -> None:
    folder = tmp_path / "disk"
    path = folder / f"rows.{ending}"

    def prepare() -> None:
        emptied(folder)
        path.write_text("old")

    for _ in kill_everywhere(folder, prepare, lambda: save([record(1)], ending, path), 3):
        found = path.read_text(encoding="utf-8")
        save([record(1)], ending, path)
        assert found in ("old", path.read_text(encoding="utf-8"))
        assert [file.name for file in folder.iterdir()] == [path.name]


def test_bench_and_eval_append_a_record(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    path = folder / "results.jsonl"

    def prepare() -> None:
        emptied(folder)
        append_record(path, record(1))

    for _ in kill_everywhere(folder, prepare, lambda: append_record(path, record(2))):
        found = read_records(path)
        assert found in ([record(1)], [record(1), record(2)])
        append_record(path, record(3))
        assert read_records(path) == [*found, record(3)]


@pytest.mark.parametrize("size", [1, 100, 5000])
def test_a_record_that_is_torn_takes_no_other_with_it(tmp_path: Path, size: int) -> None:
    """The kernel may end a long write where a page ends."""
    path = tmp_path / "results.jsonl"
    append_record(path, record(1))
    append_record(path, record("2" * 8000))
    raw = path.read_bytes()
    path.write_bytes(raw[: raw.index(b"\n") + 1 + size])
    with pytest.warns(UserWarning, match="its last line is not complete"):
        assert read_records(path) == [record(1)]
    append_record(path, record(3))
    assert read_records(path) == [record(1), record(3)]


def test_a_last_line_without_its_newline_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_record(path, record(1))
    path.write_bytes(path.read_bytes().rstrip())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read_records(path) == [record(1)]
        append_record(path, record(2))
        assert read_records(path) == [record(1), record(2)]


def test_report(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    page, tables = folder / "page.html", folder / "tables.md"
    argv = ["report", RESULTS / "3-litert.jsonl", "-o", page, "--md", tables]

    def prepare() -> None:
        emptied(folder)
        page.write_text("old")
        tables.write_text("old")

    for _ in kill_everywhere(folder, prepare, lambda: succeed(*argv), 6):
        found = [path.read_text(encoding="utf-8") for path in (page, tables)]
        succeed(*argv)
        new = [path.read_text(encoding="utf-8") for path in (page, tables)]
        assert found in (["old", "old"], [new[0], "old"], new)
        assert names(folder) == {"page.html", "tables.md"}


def test_report_into_documents(tmp_path: Path) -> None:
    folder, source = tmp_path / "disk", tmp_path / "source"
    (source / "docs").mkdir(parents=True)
    for name in ("README.md", "docs/results.md"):
        shutil.copy(ROOT / name, source / name)
    argv = ["report", *sorted(RESULTS.glob("*.jsonl")), "--readme", folder / "README.md"]

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)

    def contents() -> dict[str, bytes]:
        return {name: (folder / name).read_bytes() for name in names(folder) if ".partial-" not in name}

    prepare()
    old = contents()
    succeed(*argv)
    new = contents()
    for _ in kill_everywhere(folder, prepare, lambda: succeed(*argv)):
        assert all(data in (old.get(name), new[name]) for name, data in contents().items())
        succeed(*argv)
        assert contents() == new and names(folder) == set(new)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GEMMA_EDGE_CACHE_LIMIT", raising=False)
    monkeypatch.setattr(kept_files, "ROOM", 0)
    return tmp_path / "cache"


def make(path: Path) -> None:
    with open(path, "wb", buffering=0) as file:
        for _ in range(3):
            file.write(b"a third of the weights\n")


def keep_one() -> Path:
    return kept_files.keep("weights-", ".x", 69, make)


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_packing(cache: Path) -> None:
    for _ in kill_everywhere(cache, lambda: emptied(cache), keep_one, 8):
        found = kept_files.kept("weights-", ".x")
        assert found is None or found.read_bytes() == b"a third of the weights\n" * 3
        assert visible(cache) == ([found.name] if found else [])
        path = keep_one()
        assert path.read_bytes() == b"a third of the weights\n" * 3
        assert visible(cache) == [path.name]
        kept_files.forget_missing()
        assert not [note for note in cache.glob(".hashes/*") if note.suffix]


def test_a_note_of_a_hash(cache: Path, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"content")
    os.utime(path, ns=(0, path.stat().st_mtime_ns - 2 * SETTLED_NS))
    act: Callable[[], object] = lambda: remember(path, "0" * 64, kept_files.identity(path))  # noqa: E731
    for _ in kill_everywhere(cache, lambda: emptied(cache), act):
        act()
        assert len(list((cache / ".hashes").iterdir())) == 1


def test_a_prefix(cache: Path) -> None:
    def keep() -> bool:
        return kept_files.keep_cheap("one.prefix", 1 << 20, 69, make)

    for _ in kill_everywhere(cache, lambda: emptied(cache), keep, 4):
        assert all(path.stat().st_size == 69 for path in cache.glob("*.prefix"))
        assert keep() and visible(cache) == ["one.prefix"]


def test_a_conversation(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    path = folder / "saved.session"

    def save(system: str) -> None:
        turn = Turn(messages=[{"role": "user", "content": system}])
        write_conversation(path, SavedConversation(system, [turn], {}, None), "bundle")

    def prepare() -> None:
        emptied(folder)
        save("old")

    for _ in kill_everywhere(folder, prepare, lambda: save("new"), 4):
        assert read_header(path)["system"] in ("old", "new")
        read_sealed(path)
        save("next")
        assert [file.name for file in folder.iterdir()] == [path.name]


@pytest.mark.parametrize("verb", ["--clear", "--limit=1MiB"])
def test_the_cache(cache: Path, verb: str) -> None:
    def prepare() -> None:
        emptied(cache)
        keep_one()
        succeed("cache", "--limit", "5GiB")

    for _ in kill_everywhere(cache, prepare, lambda: succeed("cache", verb)):
        assert cache_limit() in (5 << 30, 1 << 20)
        kept = kept_files.kept("weights-", ".x")
        assert kept is None or kept.stat().st_size == 69
        succeed("cache", verb)
        assert visible(cache) == ([] if verb == "--clear" else [kept.name if kept else ""])
        assert not [path.name for path in cache.iterdir() if ".partial-" in path.name]


def test_temporary_folders_of_killed_processes_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    mine = tmp_path / "gemma-edge-bundle"
    mine.mkdir()
    code = (
        "import sys; from gemma_edge.runtime.files.abandoned import folder_of_this_process\n"
        "folder = folder_of_this_process('parts'); (folder / 'weights').touch()\n"
        "print(folder.name, flush=True); sys.stdin.read()"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=pipe, stdout=pipe, env=environment, encoding="utf-8"
    ) as process:
        assert process.stdout
        name = process.stdout.readline().strip()
        with temporary_folder() as folder:
            assert {path.name for path in tmp_path.iterdir()} == {mine.name, name, folder.name}
        process.kill()
    with temporary_folder() as folder:
        assert {path.name for path in tmp_path.iterdir()} == {mine.name, folder.name}
    assert list(tmp_path.iterdir()) == [mine]


PACK = "import sys; from gemma_edge.runtime.engines.packed_weights import packed_weights as pack\n"
PACK += "from pathlib import Path; print(pack(Path(sys.argv[1]), '', 1))"


@pytest.mark.slow
def test_packing_by_the_engine(cache: Path, tmp_path: Path) -> None:
    """The engine writes in a process of its own, where only strace counts; the kill ends it or its parent."""
    pytest.importorskip("ai_edge_litert", reason="LiteRT is not installed")
    if not can_trace():
        pytest.skip("no strace (tests/install.sh), or it may not trace here")
    checkpoint = synthesize(tmp_path / "checkpoint", config=SMALL, progress=False).path
    options: dict[str, Any] = {
        "recipe": "int8",
        "format": "tflite",
        "context": 64,
        "chunk": 32,
        "verify": False,
    }
    bundle = export_bundle(checkpoint, tmp_path / "bundle", **options).path

    def pack(*strace: str) -> subprocess.CompletedProcess[str]:
        argv = [*strace, sys.executable, "-c", PACK, str(bundle / "decoder.tflite")]
        return subprocess.run(argv, capture_output=True, encoding="utf-8", timeout=600, check=False)

    assert pack().returncode == 0
    (packed,) = visible(cache)
    building = cache / f"{packed[:-40]}.xnnpack.building"
    content = (cache / packed).read_bytes()
    for call, number in [("openat", 1), *(("write", n) for n in (1, 2, 9, 30)), ("fsync", 1), ("rename", 1)]:
        emptied(cache)
        inject = f"inject={call}:signal=SIGKILL:when={number}"
        killed = pack("strace", "-f", "-qq", "-o", "/dev/null", "-P", str(building), "-e", inject)
        if killed.returncode == 0:  # the process that packs was killed, and its parent says so
            assert killed.stdout == "None\n" and "exit code -9" in killed.stderr
            assert visible(cache) == []
        else:
            assert killed.returncode == -signal.SIGKILL and call in ("openat", "fsync", "rename")
            assert set(visible(cache)) <= {building.name, packed}
        assert pack().stdout == f"{cache / packed}\n"
        assert visible(cache) == [packed] and (cache / packed).read_bytes() == content
