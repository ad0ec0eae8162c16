"""The verdict on a decoder's graph: kept by the file's content, and by nothing less."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.artifacts import checked_graph, tflite_reader
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.checked_graph import SUFFIX, CheckedGraph
from gemma_edge.runtime.artifacts.decoder_signatures import DecoderSignatures
from gemma_edge.runtime.errors import BundleError
from gemma_edge.runtime.files import file_digest
from gemma_edge.runtime.files.file_digest import remembered_sha256
from gemma_edge.runtime.model import Model

pytest.importorskip("ai_edge_litert")


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("checked") / "tflite"
    options: dict[str, Any] = {"context": 64, "chunk": 16, "verify": False, "format": "tflite"}
    return export_bundle(tiny_checkpoint, out, **options).path


@pytest.fixture
def bundle(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of the test's own; its hash is remembered though it is new."""
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_digest, "SETTLED_NS", -(10**12))
    return Path(shutil.copytree(made, tmp_path / "bundle"))


@pytest.fixture
def walks(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files whose graphs were walked."""
    found: list[Path] = []
    walk: Callable[..., Any] = tflite_reader.read_tflite

    def noted(path: Path, *place: int) -> Any:
        found.append(path)
        return walk(path, *place)

    monkeypatch.setattr(tflite_reader, "read_tflite", noted)
    return found


def graph(bundle: Path) -> CheckedGraph:
    return CheckedGraph(bundle / "decoder.tflite", Bundle.open(bundle).config)


def checked(bundle: Path) -> DecoderSignatures:
    """As a load does: the graph, then its hash, then the verdict."""
    found = graph(bundle)
    signatures = found.decoder()
    remembered_sha256(bundle / "decoder.tflite")
    found.keep(signatures)
    return signatures


def verdict(tmp_path: Path) -> Path:
    (file,) = (tmp_path / "cache").glob(f"*{SUFFIX}")
    return file


def test_a_graph_is_walked_once(bundle: Path, walks: list[Path]) -> None:
    with Model.load(bundle) as model:
        answer = model.generate("Why?", max_tokens=3, temperature=0).text
    assert len(walks) == 1
    with Model.load(bundle) as model:
        assert model.generate("Why?", max_tokens=3, temperature=0).text == answer
    assert len(walks) == 1


def test_a_verdict_says_what_the_walk_said(bundle: Path, walks: list[Path]) -> None:
    first = checked(bundle)
    assert checked(bundle) == first and len(walks) == 1
    assert first.prefill and first.lengths and first.layout == "windowed"


def test_a_file_that_changed_is_walked_again(bundle: Path, walks: list[Path]) -> None:
    checked(bundle)
    again = graph(bundle)
    path = bundle / "decoder.tflite"
    data, times = bytearray(path.read_bytes()), path.stat()
    data[len(data) // 8] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))  # what nobody can set back is the ctime
    with contextlib.suppress(BundleError):  # where the bit is one of the graph's
        again.decoder()
    assert len(walks) == 2


def test_a_file_whose_hash_nobody_knows_is_walked(bundle: Path, walks: list[Path], tmp_path: Path) -> None:
    checked(bundle)
    shutil.rmtree(tmp_path / "cache" / ".hashes")
    graph(bundle).decoder()
    assert len(walks) == 2


def test_another_config_and_other_checks_have_verdicts_of_their_own(
    bundle: Path, walks: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked(bundle)
    config = replace(Bundle.open(bundle).config, vocab_size=7)
    with pytest.raises(BundleError, match=r"decoder\.tflite"):
        CheckedGraph(bundle / "decoder.tflite", config).decoder()
    assert len(walks) == 2
    monkeypatch.setattr(checked_graph, "_checks", lambda: "other source")
    graph(bundle).decoder()
    assert len(walks) == 3
    monkeypatch.setattr(checked_graph, "_checks", lambda: None)
    graph(bundle).decoder()
    assert len(walks) == 4, "without the checks' source there is no verdict"


@pytest.mark.parametrize(
    "damage",
    [
        *("", "nonsense", "[]", "{}"),
        *(
            {"layout": "other"},
            {"prefill": [0]},
            {"lengths": {"0": "1"}},
            {"verify": 8},
            {"transposed": [99]},
        ),
    ],
)
def test_a_damaged_verdict_is_none(bundle: Path, walks: list[Path], tmp_path: Path, damage: Any) -> None:
    first = checked(bundle)
    file = verdict(tmp_path)
    said = json.loads(file.read_text())
    file.write_text(damage if isinstance(damage, str) else json.dumps(said | damage))
    assert graph(bundle).decoder() == first and len(walks) == 2
