"""The cache never lies: what was damaged is refused or made again, and a good copy answers right."""

from __future__ import annotations

import mmap
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("ai_edge_litert", reason="LiteRT is not installed")
pytest.importorskip("litert_lm_builder", reason="litert-lm-builder is not installed")

from gemma_edge.benchmarks.measure.target import LocalTarget
from gemma_edge.benchmarks.measure.workload import Workload
from gemma_edge.benchmarks.records.bundle_facts import bundle_files
from gemma_edge.devices.machine.memory import drop_page_cache
from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.artifacts import folder_bundle, litertlm_bundle
from gemma_edge.runtime.artifacts.checked_graph import SUFFIX
from gemma_edge.runtime.artifacts.litertlm_reader import read_litertlm
from gemma_edge.runtime.errors import BundleError, DeviceError
from gemma_edge.runtime.host import cpu_fingerprint
from gemma_edge.runtime.model import Model
from support.processes import PATIENCE_S, limited

LOAD = """
import sys
from gemma_edge.runtime.files import kept_files
from gemma_edge.runtime.model import Model
kept_files.ROOM = -1 << 40  # the room was there when packing began
print("answered:", Model.load(sys.argv[1], threads=1).generate("Hello", max_tokens=4).text)
"""


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packed")
    return {
        format: export_bundle(
            tiny_checkpoint,
            folder / name,
            recipe="int8",
            context=64,
            chunk=32,
            format=format,
            verify=False,
            progress=False,
        ).path
        for format, name in (("tflite", "tflite"), ("litertlm", "model.litertlm"))
    }


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache; and every file is large, so that none is hashed each time that a bundle is opened."""
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(folder_bundle, "HASH_AT_OPEN", 0)
    monkeypatch.setattr(litertlm_bundle, "HASH_AT_OPEN", 0)
    return tmp_path / "cache"


@pytest.fixture
def copies(made: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    copied = {"tflite": tmp_path / "tflite", "litertlm": tmp_path / "model.litertlm"}
    shutil.copytree(made["tflite"], copied["tflite"])
    shutil.copyfile(made["litertlm"], copied["litertlm"])
    return copied


def answer(path: Path) -> str:
    return Model.load(path, threads=1).generate("Hello", max_tokens=16, temperature=0.0).text


def flip(path: Path, at: int) -> None:
    with path.open("r+b") as file:
        file.seek(at)
        (byte,) = file.read(1)
        file.seek(at)
        file.write(bytes([byte ^ 0x10]))


def decoder_at(path: Path) -> tuple[Path, int]:
    """The file with the decoder's weights, and an offset in the middle of them."""
    if path.is_dir():
        file = path / "decoder.tflite"
        return file, file.stat().st_size * 3 // 4
    section = read_litertlm(path).section("TFLiteModel", litertlm_bundle.PREFILL_DECODE)
    return path, section.begin + (section.end - section.begin) * 3 // 4


@pytest.mark.parametrize("format", ["tflite", "litertlm"])
@pytest.mark.usefixtures("cache")
def test_a_good_copy_over_a_damaged_bundle_answers_right(
    made: dict[str, Path], copies: dict[str, Path], format: str
) -> None:
    expected = answer(made[format])
    path = copies[format]
    file, at = decoder_at(path)
    flip(file, at)
    for _ in range(2):
        with pytest.raises(BundleError, match=r"sha256.*copy"):
            answer(path)
    flip(file, at)
    assert answer(path) == expected == answer(made[format])


@pytest.mark.parametrize("format", ["tflite", "litertlm"])
def test_a_damaged_bundle_leaves_nothing_in_an_empty_cache(
    copies: dict[str, Path], cache: Path, format: str
) -> None:
    file, at = decoder_at(copies[format])
    flip(file, at)
    with pytest.raises(BundleError, match="sha256"):
        answer(copies[format])
    assert not [path for path in cache.iterdir() if path.suffix in (".xnnpack", ".tflite", ".building")]


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_flipped_bit_in_packed_weights(copies: dict[str, Path], cache: Path, place: float) -> None:
    expected = answer(copies["tflite"])
    (packed,) = cache.glob("*.xnnpack")
    before = packed.read_bytes()
    flip(packed, int(place * len(before)))
    assert answer(copies["tflite"]) == expected
    (packed,) = cache.glob("*.xnnpack")
    assert len(packed.read_bytes()) == len(before)


def test_a_flipped_bit_in_a_part_that_was_taken_out(copies: dict[str, Path], cache: Path) -> None:
    expected = answer(copies["litertlm"])
    (decoder,) = cache.glob("*-decoder.tflite")
    before = decoder.read_bytes()
    flip(decoder, len(before) // 2)
    assert answer(copies["litertlm"]) == expected
    assert decoder.read_bytes() == before


def test_a_swapped_tokenizer_does_not_run(
    copies: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(litertlm_bundle, "HASH_AT_OPEN", 16 << 20)
    section = read_litertlm(copies["litertlm"]).section("SP_Tokenizer", "")
    flip(copies["litertlm"], (section.begin + section.end) // 2)
    with pytest.raises(BundleError, match=r"sha256 of tokenizer\.model"):
        Model.load(copies["litertlm"])


def test_a_reused_file_is_neither_hashed_nor_packed_again(
    copies: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma_edge.runtime.files.file_digest.SETTLED_NS", -1)
    expected = answer(copies["litertlm"])
    monkeypatch.setattr("gemma_edge.runtime.files.file_digest.sha256", lambda *_: pytest.fail("hashed again"))
    monkeypatch.setattr(subprocess, "run", lambda *_: pytest.fail("packed again"))
    assert answer(copies["litertlm"]) == expected


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("format", ["tflite", "litertlm"])
def test_a_cold_load_drops_packed_weights(format: str, copies: dict[str, Path], cache: Path) -> None:
    """Packed weights are most of what LiteRT reads: a load is cold only if their pages are dropped too."""
    target = LocalTarget(copies[format])  # in other processes: this one would keep the pages mapped
    target.work(Workload(threads=1), None, PATIENCE_S)
    (packed,) = cache.glob("*.xnnpack")
    assert packed in bundle_files(copies[format])
    if drop_page_cache([packed]):
        pytest.skip("this file system keeps pages")
    packed.read_bytes()
    report = target.work(Workload(threads=1, cold=True, import_time=True), None, PATIENCE_S).report
    assert report and report.cached_bytes == 0 and report.import_s
    with packed.open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[i] for i in range(0, len(mapped), mmap.PAGESIZE)) > 0
        assert drop_page_cache(bundle_files(copies[format])) >= packed.stat().st_size, "pages that stay count"


def run_in(folder: Path, bundle: Path, **limits: int) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"GEMMA_EDGE_CACHE": str(folder)}
    argv = [*limited(LOAD, **limits), str(bundle)]
    return subprocess.run(argv, env=environment, capture_output=True, encoding="utf-8")


def left_in(cache: Path) -> list[Path]:
    """Kept files, whole or not, but for the verdicts on graphs, which are small."""
    return [path for path in cache.iterdir() if not path.name.startswith(".") and path.suffix != SUFFIX]


def test_a_file_that_may_not_grow_ends_in_a_warning(made: dict[str, Path], tmp_path: Path) -> None:
    """The engine aborts its process when a write fails."""
    run = run_in(tmp_path, made["tflite"], FSIZE=100_000)
    assert run.returncode == 0, run.stderr
    assert "GEMMA_EDGE_CACHE" in run.stderr and run.stdout.startswith("answered:")
    assert left_in(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=200k", "tmpfs", str(folder)]
    if os.getuid() or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_fills_while_packing_ends_in_a_warning(made: dict[str, Path], small_disk: Path) -> None:
    run = run_in(small_disk, made["tflite"])
    assert run.returncode == 0, run.stderr
    assert "disk became full" in run.stderr and run.stdout.startswith("answered:")
    assert left_in(small_disk) == []


def test_a_cpu_without_the_engines_instructions_is_named(
    made: dict[str, Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dies = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
    monkeypatch.setattr("gemma_edge.runtime.engines.packed_weights._PACK", dies)
    with pytest.raises(DeviceError, match=r"CPU lacks instructions that LiteRT .* needs"):
        Model.load(made["tflite"], threads=1)
    assert not list(cache.glob("*.xnnpack*"))


OLD_CPU = "processor : 0\nFeatures : fp asimd crc32\n\nprocessor : 1\nFeatures : fp asimd crc32 atomics\n"


@pytest.mark.parametrize("instructions", ["old", "usual", "unknown"])
def test_it_is_named_without_a_cache_too(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instructions: str
) -> None:
    """Then no process packs, unless the CPU is an old one: that would be a second packing in vain."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "file" / "cache"))
    text = OLD_CPU if instructions == "old" else OLD_CPU.replace("crc32\n", "crc32 atomics\n")
    if instructions != "unknown":
        (tmp_path / "cpuinfo").write_text(text)
    monkeypatch.setattr(cpu_fingerprint, "CPUINFO", tmp_path / "cpuinfo")
    cpu_fingerprint.has_usual_instructions.cache_clear()
    dies = "import os, signal; os.kill(os.getpid(), signal.SIGILL)"
    with monkeypatch.context() as patch:
        patch.setattr("gemma_edge.runtime.engines.packed_weights._PACK", dies)
        if instructions == "usual":
            with pytest.warns(UserWarning, match="anonymous memory"):
                assert answer(made["tflite"])
        else:
            with pytest.raises(DeviceError, match=r"CPU lacks instructions that LiteRT .* needs"):
                answer(made["tflite"])
    with pytest.warns(UserWarning, match="anonymous memory"):  # the real one packs for nothing, and lives
        assert answer(made["tflite"])
    cpu_fingerprint.has_usual_instructions.cache_clear()


@pytest.mark.parametrize("format", ["tflite", "litertlm"])
def test_two_processes_with_one_cold_cache(made: dict[str, Path], cache: Path, format: str) -> None:
    """Both wait until the other is ready to load."""
    code = (
        "import sys; from gemma_edge.runtime.model import Model\n"
        "print('ready', flush=True); sys.stdin.readline(); model = Model.load(sys.argv[1], threads=1)\n"
        "print(model.generate('Hello', max_tokens=16, temperature=0.0).text)"
    )
    argv = [sys.executable, "-c", code, str(made[format])]
    pipe = subprocess.PIPE
    processes = [subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe) for _ in range(2)]
    for process in processes:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
    assert not list(cache.glob("*"))
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.flush()
    said = [process.communicate() for process in processes]
    assert [process.returncode for process in processes] == [0, 0] and {err for _, err in said} == {b""}
    expected = answer(made[format])  # from the cache that they made
    assert [out.decode() for out, _ in said] == [f"{expected}\n"] * 2
    assert len(list(cache.glob("*.xnnpack*"))) <= 1 and not list(cache.glob("*.building*"))


def test_a_process_that_packs_ends_with_its_parent(tmp_path: Path) -> None:
    child = (
        "import os, sys, time; from gemma_edge.runtime.host.parent_process import end_with_parent\n"
        "end_with_parent(int(sys.argv[1])); print(os.getpid(), flush=True)\n"
        "time.sleep(60); print('outlived')"
    )
    parent = (
        f"import os, subprocess, sys\nsubprocess.run([sys.executable, '-c', {child!r}, str(os.getpid())])"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, encoding="utf-8")
    assert process.stdout is not None
    assert process.stdout.readline().strip().isdigit()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert process.stdout.read() == ""  # ends when the child has ended: it holds the other end of the pipe


def test_another_cpu_packs_weights_of_its_own(
    made: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path))
    cpus = {"aaaaaaaa", "bbbbbbbb"}
    for cpu in cpus:
        monkeypatch.setattr("gemma_edge.runtime.engines.packed_weights.cpu_fingerprint", lambda cpu=cpu: cpu)
        Model.load(made["tflite"], threads=1).generate("Hello", max_tokens=2)
    names = [path.name for path in tmp_path.glob("*.xnnpack")]
    assert {cpu for cpu in ("aaaaaaaa", "bbbbbbbb") for name in names if cpu in name} == {
        "aaaaaaaa",
        "bbbbbbbb",
    }
