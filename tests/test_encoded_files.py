"""The cache of encoded attachments: the same answers, no encoder loaded, private, bounded."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_edge.cli.main import main
from gemma_edge.export.exporter import export_bundle
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.runtime.files.cache_folder import cache_folder
from gemma_edge.runtime.media.attachments import Attachment
from gemma_edge.runtime.media.encoded_files import EncodedFiles
from gemma_edge.runtime.model import Model

Rows = np.ndarray[Any, np.dtype[np.float32]]
PICTURE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)
COLUMNS = 8


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "cache"))
    return cache_folder()


@pytest.fixture
def files() -> EncodedFiles:
    return EncodedFiles("ab" * 32, 1 << 20)


def image(value: int = 0) -> Attachment:
    return Attachment("image", "a picture", 4, np.full((3, 8, 8), value, np.uint8))


def rows(value: float = 1.5) -> Rows:
    return np.full((4, COLUMNS), value, np.float32)


def entries() -> list[Path]:
    return sorted(cache_folder().glob("*.encoded"))


def test_rows_come_back_and_only_their_owner_may_read_them(files: EncodedFiles) -> None:
    assert files.find(image(), COLUMNS) is None
    files.store(image(), rows())
    np.testing.assert_array_equal(files.find(image(), COLUMNS), rows())
    (path,) = entries()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_another_content_bundle_or_width_misses(files: EncodedFiles) -> None:
    files.store(image(), rows())
    assert files.find(image(1), COLUMNS) is None
    assert EncodedFiles("cd" * 32, 1 << 20).find(image(), COLUMNS) is None
    assert files.find(image(), COLUMNS + 1) is None


@pytest.mark.parametrize("damage", ["a bit", "cut", "empty", "of another"])
def test_a_damaged_entry_is_removed(damage: str, files: EncodedFiles) -> None:
    files.store(image(), rows())
    (path,) = entries()
    data = bytearray(path.read_bytes())
    if damage == "a bit":
        data[-100] ^= 1
    elif damage == "of another":
        files.store(image(1), rows())
        (other,) = set(entries()) - {path}
        data = bytearray(other.read_bytes())
    path.write_bytes({"cut": data[:-7], "empty": bytearray()}.get(damage, data))
    assert files.find(image(), COLUMNS) is None
    assert not path.exists()


def test_the_least_recently_used_give_way() -> None:
    EncodedFiles("ab" * 32, 1 << 20).store(image(), rows())
    size = entries()[0].stat().st_size
    files = EncodedFiles("ab" * 32, rows().nbytes + 4096 + 2 * size)  # what one asks for, beside two
    for value in range(6):
        files.store(image(value), rows())
    assert len(entries()) == 3 and files.find(image(5), COLUMNS) is not None
    EncodedFiles("ab" * 32, 100).store(image(9), rows())  # larger than everything that is allowed
    assert files.find(image(9), COLUMNS) is None


def test_the_cache_verb_clears_them(files: EncodedFiles, capsys: pytest.CaptureFixture[str]) -> None:
    files.store(image(), rows())
    assert main(["cache"]) == 0 and ".encoded" in capsys.readouterr().out
    assert main(["cache", "--clear"]) == 0
    assert entries() == []


@pytest.mark.slow
def test_the_next_process_answers_the_same_and_encodes_nothing(tmp_path: Path) -> None:
    source = synthesize(tmp_path / "tiny", encoders=True, progress=False).path
    options: dict[str, Any] = {"recipe": "int8", "context": 128, "chunk": 32, "verify": False}
    bundle = export_bundle(source, tmp_path / "out", modalities=("text", "image"), **options).path

    def answer(**loading: Any) -> tuple[str, list[str]]:
        told: list[str] = []
        with Model.load(bundle, threads=1, log=told.append, **loading) as model:
            result = model.generate("hello", attach=[PICTURE], temperature=0, max_tokens=12)
        return result.text, told

    plain, told = answer()
    assert len(told) == 1 and entries() == []  # nothing is kept unless it is asked for
    first = answer(attachment_cache="1MiB")
    assert first == (plain, first[1]) and len(first[1]) == 1 and len(entries()) == 1
    assert answer(attachment_cache="1MiB") == (plain, [])  # nothing was encoded
    (path,) = entries()
    path.write_bytes(path.read_bytes()[:-1])
    text, told = answer(attachment_cache="1MiB")
    assert text == plain and len(told) == 1 and len(entries()) == 1  # encoded again, and kept
