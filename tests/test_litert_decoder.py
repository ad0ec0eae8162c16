"""The LiteRT backend: the same tokens as ONNX Runtime, the packed weights' file, what it refuses."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.margins import FP32, assert_allowed, step_logits

pytest.importorskip("ai_edge_litert")

from gemma_edge.cli.main import main
from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.artifacts.artifact_formats import ARTIFACT_FORMATS
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.engines import litert_decoder as litert
from gemma_edge.runtime.engines.engine_registry import load_decoder
from gemma_edge.runtime.errors import BundleError, UsageError
from gemma_edge.runtime.model import Model

CONTEXT, CHUNK = 256, 64


@pytest.fixture(scope="module")
def bundles(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The tiny checkpoint in fp32 in both formats, verified."""
    folder = tmp_path_factory.mktemp("bundles")
    return {
        format: export_bundle(
            tiny_checkpoint, folder / format, recipe="fp32", context=CONTEXT, chunk=CHUNK, format=format
        ).path
        for format in ("onnx", "tflite")
    }


@pytest.fixture(autouse=True)
def packed(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of packed weights, the same for all tests of a session."""
    folder = tmp_path_factory.getbasetemp() / "packed"
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(folder))
    return folder


def ids_of(count: int) -> list[int]:
    return [int(i) for i in np.random.default_rng(count).integers(5, 300, count)]


@pytest.mark.parametrize("count", [1, 5, 120])
def test_greedy_tokens_are_those_of_onnx_runtime(bundles: dict[str, Path], count: int) -> None:
    onnx, tflite = (Model.load(bundles[format], threads=1) for format in ("onnx", "tflite"))
    tokens = list(tflite.stream_tokens(ids_of(count), max_tokens=64))
    assert_allowed(tokens, step_logits(onnx, ids_of(count), tokens), FP32, decided=0.95)


def test_every_way_to_cut_a_prompt_gives_the_same_logits(bundles: dict[str, Path]) -> None:
    model = Model.load(bundles["tflite"], threads=1)
    ids = np.array(ids_of(150))
    last = []
    for cuts in ([64, 64, 22], [1] * 150, [63, 1, 40, 46], [17, 33, 64, 36]):
        model.decoder.reset()
        for rows in np.split(ids, np.cumsum(cuts)[:-1]):
            logits = model.decoder.forward(model.embeddings.lookup(rows), model.per_layer.lookup(rows), 1)
        last.append(logits[0])
    assert max(np.abs(other - last[0]).max() for other in last[1:]) < FP32


def test_no_logits_are_computed_when_none_are_wanted(bundles: dict[str, Path]) -> None:
    model = Model.load(bundles["tflite"], threads=1)
    rows = np.array(ids_of(20))
    logits = model.decoder.forward(model.embeddings.lookup(rows), model.per_layer.lookup(rows), 0)
    assert logits.shape == (0, model.tokenizer.vocab_size)
    assert model.decoder.position == 20


def test_a_context_beyond_the_files_is_refused(bundles: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match=r"context must be 1 to 256.*--context"):
        Model.load(bundles["tflite"], context=CONTEXT + 1)
    model = Model.load(bundles["tflite"], context=10, threads=1)
    with pytest.raises(UsageError, match="do not fit a context of 10"):
        model.decoder.forward(np.zeros((11, 1), np.float32), np.zeros((11, 1), np.float32))


def test_packed_weights_are_written_once(bundles: dict[str, Path], packed: Path) -> None:
    Model.load(bundles["tflite"], threads=1)
    (file,) = packed.glob(f"{digest_of(bundles['tflite'])[:32]}-*.xnnpack")
    before = file.stat()
    Model.load(bundles["tflite"], threads=1)
    after = file.stat()
    assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def digest_of(bundle: Path) -> str:
    return Bundle.open(bundle).files["decoder.tflite"].sha256


def test_without_a_place_for_packed_weights_it_warns_and_runs(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "file" / "below"))
    with pytest.warns(UserWarning, match="GEMMA_EDGE_CACHE"):
        model = Model.load(bundles["tflite"], threads=1)
    assert len(list(model.stream_tokens([5, 6], max_tokens=3))) == 3


def test_a_full_disk_is_seen_before_the_engine_fills_it(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("U", (), {"free": 1000})())
    with pytest.warns(UserWarning, match="1,000 bytes are free"):
        Model.load(bundles["tflite"], threads=1)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]


@pytest.mark.parametrize("format", ["onnx", "tflite"])
@pytest.mark.parametrize("window", [1, 17])
def test_a_window_that_contradicts_the_graph_is_refused(
    format: str, window: int, bundles: dict[str, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "lying"
    shutil.copytree(bundles[format], folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["config"]["sliding_window"] == 32
    manifest["config"]["sliding_window"] = window
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=r"decoder\.(onnx|tflite): .*manifest"):
        Model.load(folder, threads=1).generate("Hello", max_tokens=40)
    assert capfd.readouterr().err == ""


def test_a_damaged_decoder_is_refused_before_the_engine_sees_it(
    bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = Bundle.open(bundles["tflite"])
    path = bundle.file("decoder.tflite")
    raw = path.read_bytes()
    monkeypatch.setattr(litert, "load_model", lambda *_: pytest.fail("the engine saw it"))
    try:
        path.write_bytes(raw[:-4096])
        with pytest.raises(BundleError):
            load_decoder(bundle)
    finally:
        path.write_bytes(raw)


def test_what_the_engine_does_not_allocate_names_the_file(bundles: dict[str, Path]) -> None:
    decoder = load_decoder(Bundle.open(bundles["tflite"]), threads=1)
    refused = pytest.raises(BundleError, match=r"decoder\.tflite: graph: expected a model that LiteRT runs")
    with refused, litert.engine_errors(decoder.path):
        decoder.model.create_input_buffer_by_name("decode", "no such tensor")


def test_quiet(
    bundles: dict[str, Path], capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine's page of log lines does not reach the user."""
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["run", str(bundles["tflite"]), "hi", "--max-tokens", "3", "--threads", "1"]) == 0
    assert "INFO" not in capfd.readouterr().err


def test_several_formats_in_one_export(tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = [
        "export",
        str(tiny_checkpoint),
        str(out),
        "--recipe",
        "int4",
        "--context",
        "64",
        "--no-verify",
    ]
    assert main([*arguments, "--format", "onnx", "--format", "tflite"]) == 0
    assert {Bundle.open(out / name).format for name in ("onnx", "tflite")} == {"onnx", "tflite"}
    assert main([*arguments[:2], str(tmp_path / "one"), *arguments[3:], "--format", "tflite"]) == 0
    assert Bundle.open(tmp_path / "one").format == "tflite"


def test_channelwise_is_for_litert_only(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--format tflite"):
        export_bundle(tiny_checkpoint, tmp_path / "x", recipe="int4_channelwise")
    exported = export_bundle(
        tiny_checkpoint, tmp_path / "y", recipe="int4_channelwise", context=64, chunk=32, format="tflite"
    )
    assert exported.agreement is not None
    assert exported.agreement.mean_kl < 0.2


@pytest.mark.parametrize("format", ["tflite", "litertlm"])
def test_an_int8_cache_is_near_the_checkpoint(format: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """The gate compares every new key and value with the reference's, to half a step."""
    path = tmp_path / ("out" + ARTIFACT_FORMATS[format].suffix)
    options: dict[str, Any] = {"recipe": "fp32", "context": CONTEXT, "chunk": CHUNK, "format": format}
    exported = export_bundle(tiny_checkpoint, path, kv_cache="int8", **options)
    assert exported.agreement is not None and 1e-9 < exported.agreement.mean_kl < 1e-3
    with Model.load(path, threads=1) as model:
        c = Bundle.open(path).config
        arrays = model.decoder.snapshot().arrays
        rings = {i for i in c.kv_layers if c.is_sliding(i)} if format == "tflite" else set()
        found = {i for i in c.kv_layers if arrays[f"kv_cache_k_{i}"].dtype == np.float32}
        assert found == rings and len(rings) < len(c.kv_layers)


def test_a_manifest_that_says_another_precision(
    bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(bundles["tflite"], tmp_path / "copy"))
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | {"kv_cache": "int8"}))
    with pytest.raises(
        BundleError, match=r"256 positions of int8, by the manifest, got 256 positions of fp32"
    ):
        Model.load(copy, threads=1)
