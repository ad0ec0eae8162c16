"""Packed weights of ONNX bundles: the same logits, and a file that was altered is not used."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from gemma_edge.benchmarks.records.bundle_facts import bundle_files, packing_notes
from gemma_edge.cli.main import main
from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.artifacts import folder_bundle
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.engines import onnx_decoder, packed_graph
from gemma_edge.runtime.engines.onnx_decoder import OnnxDecoder
from gemma_edge.runtime.engines.onnx_runtime import OnnxEngine
from gemma_edge.runtime.errors import BundleError, DeviceError
from gemma_edge.runtime.files import kept_files
from support.small_disk import small_disk

RECIPES = ("int4", "int8", "fp32")
TOKENS = 24


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Bundle]:
    folder = tmp_path_factory.mktemp("packed")
    for recipe in RECIPES:
        export_bundle(
            tiny_checkpoint,
            folder / recipe,
            recipe=recipe,
            context=64,
            chunk=32,
            calibrate="none",
            verify=False,
            progress=False,
        )
    return {recipe: Bundle.open(folder / recipe) for recipe in RECIPES}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def copy(made: dict[str, Bundle], tmp_path: Path) -> Bundle:
    shutil.copytree(made["int4"].path, tmp_path / "copy")
    return Bundle.open(tmp_path / "copy")


def logits(bundle: Bundle) -> NDArray[np.float32]:
    """f32 (calls, vocab): those of a prefill, two steps, and a call of several rows."""
    decoder = OnnxDecoder(bundle, threads=1)
    random = np.random.default_rng(1)
    config = bundle.config
    rows = []
    for tokens in (TOKENS, 1, 1, 3):
        embeddings = random.standard_normal((tokens, config.hidden_size), dtype=np.float32)
        per_layer = random.standard_normal((tokens, config.ple_row_size), dtype=np.float32)
        rows.append(decoder.forward(embeddings, per_layer, n_logits=min(tokens, 3)))
    return np.concatenate(rows)


def only_kept(cache: Path) -> Path:
    (file,) = cache.glob("*.onnxpacked")
    return file


def forged(file: Path, content: bytes) -> None:
    """Other content in the place of a kept file, under a name that has its hash."""
    name = file.name.replace(file.stem[-32:], hashlib.sha256(content).hexdigest()[:32])
    file.unlink()
    file.with_name(name).write_bytes(content)


def must_not_load_plainly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_decoder, "open_session", lambda *_: pytest.fail("loaded the bundle's own graph"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_logits_bit_for_bit(
    made: dict[str, Bundle], cache: Path, monkeypatch: pytest.MonkeyPatch, recipe: str
) -> None:
    expected = logits(made[recipe])
    OnnxEngine().pack_weights(made[recipe])
    assert not list(cache.glob("*.building"))
    must_not_load_plainly(monkeypatch)
    np.testing.assert_array_equal(logits(made[recipe]), expected)


def test_nothing_is_kept_unasked(made: dict[str, Bundle], cache: Path) -> None:
    logits(made["int4"])
    assert not cache.exists()


def packed_copies(content: bytes) -> list[tuple[bytes, int, int]]:
    """The key that the graph has of each packed weight, and where its packed copy begins and ends."""
    found = re.findall(rb"(MatMulNBits\+\d+)\|(\d+);(\d+);", content)
    return [(key, int(at), int(at) + int(size)) for key, at, size in found]


def test_packed_copies_are_aligned(made: dict[str, Bundle], cache: Path) -> None:
    """Otherwise ONNX Runtime's kernels read beside them: here a copy is far below 1 MiB."""
    OnnxEngine().pack_weights(made["int4"])
    copies = packed_copies(only_kept(cache).read_bytes())
    assert copies and all(begin % packed_graph.ALIGNMENT == 0 for _, begin, _ in copies)
    assert max(end - begin for _, begin, end in copies) < 1 << 20


def test_the_packed_copies_are_what_computes(
    made: dict[str, Bundle], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(made["int4"])
    OnnxEngine().pack_weights(made["int4"])
    content = bytearray(only_kept(cache).read_bytes())
    copies = packed_copies(bytes(content))
    assert copies
    for _, begin, end in copies:
        content[begin:end] = bytes(end - begin)
    forged(only_kept(cache), bytes(content))
    must_not_load_plainly(monkeypatch)
    assert not np.array_equal(logits(made["int4"]), expected)


def test_weights_that_another_cpu_packed_are_packed_here(
    made: dict[str, Bundle], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the file had this CPU's name: ONNX Runtime compares what it packs."""
    expected = logits(made["int4"])
    OnnxEngine().pack_weights(made["int4"])
    content = only_kept(cache).read_bytes()
    for key, begin, end in packed_copies(content):
        content = content[:begin] + bytes(end - begin) + content[end:]
        other = key[:-1] + (b"1" if key.endswith(b"0") else b"0")
        content = content.replace(key + b"|", other + b"|")
    forged(only_kept(cache), content)
    must_not_load_plainly(monkeypatch)
    np.testing.assert_array_equal(logits(made["int4"]), expected)


@pytest.mark.parametrize("change", ["flipped", "cut short", "emptied"])
def test_a_damaged_file_goes_and_the_bundle_loads(made: dict[str, Bundle], cache: Path, change: str) -> None:
    expected = logits(made["int4"])
    OnnxEngine().pack_weights(made["int4"])
    file = only_kept(cache)
    content = file.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
    file.write_bytes({"flipped": flipped, "cut short": content[:middle], "emptied": b""}[change])
    np.testing.assert_array_equal(logits(made["int4"]), expected)
    assert not file.exists()
    OnnxEngine().pack_weights(made["int4"])
    assert only_kept(cache).read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"no graph at all", b"no graph" * 9 + (8).to_bytes(8, "little")])
def test_a_file_that_onnx_runtime_refuses_is_left_alone(
    made: dict[str, Bundle], cache: Path, content: bytes
) -> None:
    expected = logits(made["int4"])
    OnnxEngine().pack_weights(made["int4"])
    forged(only_kept(cache), content)
    np.testing.assert_array_equal(logits(made["int4"]), expected)


@pytest.mark.parametrize("other", ["cpu_fingerprint", "version"])
def test_another_cpu_or_version_has_a_file_of_its_own(
    made: dict[str, Bundle], cache: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    expected = logits(made["int4"])
    OnnxEngine().pack_weights(made["int4"])
    if other == "version":
        monkeypatch.setattr("onnxruntime.__version__", "0.0.0")
    else:
        monkeypatch.setattr(packed_graph, "cpu_fingerprint", lambda: "00000000")
    with monkeypatch.context() as patch:
        patch.setattr(packed_graph, "open_session", lambda *_: pytest.fail("took the file"))
        np.testing.assert_array_equal(logits(made["int4"]), expected)
    OnnxEngine().pack_weights(made["int4"])
    assert len(list(cache.glob("*.onnxpacked"))) == 2


@pytest.mark.parametrize("name", ["decoder.onnx.data", "decoder.onnx"])
@pytest.mark.parametrize("packed", [False, True])
def test_an_altered_bundle_is_refused(copy: Bundle, cache: Path, name: str, packed: bool) -> None:
    if packed:
        OnnxEngine().pack_weights(copy)
    file = copy.file(name)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=rf"{re.escape(name)}: sha256.*copy the bundle again"):
        OnnxDecoder(copy, threads=1) if packed else OnnxEngine().pack_weights(copy)
    assert len(list(cache.glob("*.onnxpacked"))) == packed


def test_a_manifest_cannot_name_another_file(
    copy: Bundle, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a hash that is none: names of kept files begin with it, and they are looked for."""
    expected = logits(copy)
    monkeypatch.setattr(folder_bundle, "HASH_AT_OPEN", 0)
    manifest = copy.path / "manifest.json"
    said = json.loads(manifest.read_text(encoding="utf-8"))
    said["files"]["decoder.onnx.data"]["sha256"] = "../other/*"
    manifest.write_text(json.dumps(said), encoding="utf-8")
    for folder in (cache, cache.with_name("other")):
        folder.mkdir()
    (cache.with_name("other") / "any.onnxpacked").write_bytes(b"")
    monkeypatch.setattr(packed_graph, "kept", lambda *_: pytest.fail("looked for a kept file"))
    np.testing.assert_array_equal(logits(Bundle.open(copy.path)), expected)


def test_a_folder_that_cannot_be_written(
    made: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = logits(made["int4"])
    (tmp_path / "file").touch()
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(DeviceError, match="GEMMA_EDGE_CACHE"):
        OnnxEngine().pack_weights(made["int4"])
    np.testing.assert_array_equal(logits(made["int4"]), expected)


@pytest.mark.parametrize("room", [None, -1 << 40])
def test_a_small_disk(
    made: dict[str, Bundle], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int | None
) -> None:
    """Refused beforehand; or it fills meanwhile."""
    if room is not None:
        monkeypatch.setattr(kept_files, "ROOM", room)
        monkeypatch.setattr(packed_graph, "KEPT_FACTOR", 0)
    with small_disk(tmp_path / "disk", 1) as disk:
        monkeypatch.setenv("GEMMA_EDGE_CACHE", str(disk))
        (disk / "other").write_bytes(bytes(900 << 10))
        with pytest.raises(DeviceError, match="free" if room is None else "disk is full"):
            OnnxEngine().pack_weights(made["int4"])
        assert sorted(path.name for path in disk.iterdir() if not path.name.startswith(".")) == ["other"]


def test_what_a_kill_left_goes(made: dict[str, Bundle], cache: Path) -> None:
    cache.mkdir()
    name = packed_graph._data_name(packed_graph._before(made["int4"]))
    for left in (name, f"graph-{name}"):
        (cache / left).write_bytes(b"half")
    logits(made["int4"])
    OnnxEngine().pack_weights(made["int4"])
    assert not list(cache.glob("*.building"))


def test_two_processes_at_once(made: dict[str, Bundle], cache: Path) -> None:
    argv = [sys.executable, "-m", "gemma_edge", "cache", "--json", "--pack", str(made["int4"].path)]
    both = [subprocess.Popen(argv, stdout=subprocess.PIPE, env=dict(os.environ)) for _ in range(2)]
    for process in both:
        said = json.loads(process.communicate()[0])
        assert process.returncode == 0 and [row["name"] for row in said["files"]] == [only_kept(cache).name]


def test_the_verb(made: dict[str, Bundle], cache: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", "--pack", str(made["int4"].path)]) == 0
    assert only_kept(cache).name in capsys.readouterr().out
    assert only_kept(cache) in bundle_files(made["int4"].path)
    assert "are mapped" in packing_notes(made["int4"].path)[0] and not packing_notes(made["int8"].path)
    assert main(["cache", "--pack", str(cache)]) == 3
    assert "manifest.json" in capsys.readouterr().err
    assert main(["cache", "--clear"]) == 0 and not list(cache.glob("*.onnxpacked"))
