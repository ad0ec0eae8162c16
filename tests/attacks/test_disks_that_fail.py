"""Attack: a disk that becomes full or breaks, at any moment of an export.

Whatever the moment, the command ends with one line and exit code 1, the old bundle stays as it was (or the
new one is whole), and nothing is left beside it.
"""

from __future__ import annotations

import errno
from pathlib import Path

import pytest
from fuzz.valid_inputs import SMALL

from gemma_edge.cli.main import main
from gemma_edge.export import publish
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.runtime.artifacts.bundle import Bundle
from support.breaking_disk import BreakingDisk
from support.small_disk import small_disk

FORMATS = ("onnx", *(pytest.param(name, marks=pytest.mark.slow) for name in ("tflite", "litertlm")))
MOMENTS = 8  # of each export
SAID = {errno.ENOSPC: "error: the disk is full", errno.EIO: "error: Input/output error"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    return synthesize(folder / "small", config=SMALL, encoders=True, progress=False).path


def export(checkpoint: Path, target: Path, format: str, *more: str) -> int:
    argv = ["export", str(checkpoint), str(target), "--format", format, "--context", "64", "--chunk", "32"]
    return main([*argv, "--calibrate", "none", *more])


def state(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def problem(capsys: pytest.CaptureFixture[str]) -> str:
    """The last line of stderr, before which only the plan was printed."""
    said = capsys.readouterr().err
    assert "Traceback" not in said and said.count("error: ") == 1
    return said.splitlines()[-1].removeprefix("gemma-edge: ")


@pytest.mark.parametrize("format", FORMATS)
def test_writes_that_fail_at_any_moment(
    format: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("litert_lm_builder" if format == "litertlm" else "numpy")
    target = tmp_path / "disk" / ("model.litertlm" if format == "litertlm" else "out")
    with monkeypatch.context() as patch:
        disk = BreakingDisk(target.parent, patch)
        assert export(checkpoint, target, format, "--no-verify") == 0
        writes, before = disk.count, state(tmp_path)
        assert writes > MOMENTS
        for i in range(MOMENTS):
            disk.count, disk.sound = 0, i * (writes - 1) // (MOMENTS - 1)
            disk.error = (errno.ENOSPC, errno.EIO)[i % 2]
            capsys.readouterr()
            code = export(checkpoint, target, format, "--no-verify", "--recipe", "int8")
            if disk.count <= disk.sound:
                continue  # int8 writes less often
            assert (code, problem(capsys)[: len(SAID[disk.error])]) == (1, SAID[disk.error]), disk.sound
            after = state(tmp_path)
            # The last sync comes after the exchange: the new bundle is there, and whole.
            assert after == before or (i == MOMENTS - 1 and set(after) == set(before)), disk.sound
    Bundle.open(target).check_hashes()


@pytest.mark.parametrize("format", FORMATS)
def test_a_disk_of_any_size_that_is_too_small(
    format: str,
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("litert_lm_builder" if format == "litertlm" else "numpy")
    monkeypatch.setattr(publish, "ROOM", -(1 << 40))  # the room was there when the export began
    with small_disk(tmp_path / "disk", 32) as disk:
        target, ballast = disk / ("model.litertlm" if format == "litertlm" else "out"), disk / "ballast"
        assert export(checkpoint, target, format, "--no-verify") == 0
        size, before = used(disk), state(disk)
        for percent in (0, 1, 20, 50, 80, 99):
            ballast.write_bytes(bytes((32 << 20) - size - size * percent // 100 - (64 << 10)))
            capsys.readouterr()
            code = export(checkpoint, target, format, *(["--no-verify"] if percent % 20 else []))
            ballast.unlink()
            full = SAID[errno.ENOSPC]
            assert (code, problem(capsys)[: len(full)]) == (1, full), percent
            assert state(disk) == before, percent
