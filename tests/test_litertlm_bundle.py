"""A .litertlm where a bundle is expected: exported, verified, inspected, run; refused when damaged."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest

from support.margins import assert_allowed, int8_activations, step_logits

pytest.importorskip("ai_edge_litert", reason="LiteRT is not installed")
pytest.importorskip("litert_lm_builder", reason="litert-lm-builder is not installed")

from gemma_edge.cli.main import main
from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.litertlm_bundle import MANIFEST_KEY
from gemma_edge.runtime.artifacts.litertlm_reader import read_litertlm
from gemma_edge.runtime.errors import BundleError, ParityError, UsageError
from gemma_edge.runtime.files import cache_folder as cache
from gemma_edge.runtime.model import Model


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def made(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int4, verified by the gate."""
    folder = tmp_path_factory.mktemp("litertlm")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(cache.CACHE_VARIABLE, str(folder / "cache"))
        path = folder / "out" / "model.litertlm"
        return export_bundle(
            tiny_checkpoint, path, recipe="int8", context=128, chunk=32, format="litertlm"
        ).path


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(made, tmp_path / "copy.litertlm"))


def test_it_is_a_bundle(made: Path) -> None:
    bundle = Bundle.open(made)
    assert (bundle.format, bundle.context, bundle.chunk, bundle.kv_cache) == ("litertlm", 128, 32, "fp32")
    assert bundle.manifest["agreement"]["top1"] >= 0.9
    bundle.check_hashes()


def test_nothing_else_is_left_beside_it(made: Path) -> None:
    assert [path.name for path in made.parent.iterdir()] == [made.name]


def test_it_answers_as_the_folder_does(made: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    export_bundle(
        tiny_checkpoint, folder, recipe="int8", context=128, chunk=32, format="tflite", verify=False
    )
    one, other = Model.load(made), Model.load(folder)
    prompt = one.prompt_ids("Hello, you")
    assert prompt == other.prompt_ids("Hello, you")
    tokens = list(one.stream_tokens(prompt, max_tokens=64))
    logits = step_logits(other, prompt, tokens)
    assert_allowed(tokens, logits, int8_activations(logits), decided=0.25)


def test_the_settings_of_the_checkpoint_come_along(made: Path) -> None:
    model = Model.load(made)
    assert model.template.render([{"role": "user", "content": "x"}]).count("<start_of_turn>") == 2
    assert len(model.prompt_ids("x")) > 3
    assert model.prompt_ids("x").count(model.tokenizer.bos_id) == 1


def test_the_decoder_is_taken_out_once(made: Path, own_cache: Path) -> None:
    Model.load(made)
    (taken_out,) = own_cache.glob("*-decoder.tflite")
    before = taken_out.stat().st_mtime_ns
    Model.load(made)
    assert taken_out.stat().st_mtime_ns == before
    assert not list(own_cache.glob("*.building"))


def test_a_cache_that_cannot_be_written(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv(cache.CACHE_VARIABLE, str(tmp_path / "file"))
    with pytest.warns(UserWarning, match=cache.CACHE_VARIABLE):
        model = Model.load(made)
    assert model.generate("Hello", max_tokens=2, temperature=0.0).usage.completion_tokens


def test_the_commands_take_it(
    made: Path,
    tiny_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert main(["inspect", str(made), "--check"]) == 0
    assert "every file has the recorded SHA-256" in capsys.readouterr().out
    assert main(["verify", str(made), "--source", str(tiny_checkpoint), "--tokens", "32"]) == 0
    assert main(["run", str(made), "Hello", "--max-tokens", "4", "--temperature", "0"]) == 0


def test_several_formats_at_once(tiny_checkpoint: Path, tmp_path: Path) -> None:
    formats = ["--format", "onnx", "--format", "tflite", "--format", "litertlm"]
    argv = ["export", str(tiny_checkpoint), str(tmp_path / "out"), "--context", "64", *formats]
    assert main([*argv, "--no-verify", "--recipe", "int8"]) == 0
    found = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert found == ["model.litertlm", "onnx", "tflite"]


def test_an_altered_weight_is_found(copy: Path) -> None:
    with copy.open("r+b") as file:
        file.seek(-100, 2)
        file.write(bytes([file.read(1)[0] ^ 1]))
    with pytest.raises(BundleError, match="sha256"):
        Bundle.open(copy).check_hashes()


def test_a_truncated_file(copy: Path) -> None:
    with copy.open("r+b") as file:
        file.truncate(copy.stat().st_size - 4096)
    with pytest.raises(BundleError, match=copy.name):
        Model.load(copy)


@pytest.mark.parametrize(
    ("key", "value"), [("schema_version", 99), ("schema_version", 0), ("kv_cache", "fp8"), ("sha256", {})]
)
def test_a_manifest_that_lies(copy: Path, key: str, value: object) -> None:
    text = read_litertlm(copy).system[MANIFEST_KEY]
    manifest = json.loads(text)
    manifest.pop("agreement")
    altered = json.dumps({**manifest, key: value}, separators=(",", ":"))
    data = copy.read_bytes()
    assert data.count(text.encode()) == 1 and len(altered) <= len(text)
    copy.write_bytes(data.replace(text.encode(), altered.ljust(len(text)).encode()))
    with pytest.raises(BundleError, match=key):
        Bundle.open(copy)


def test_another_file_is_not_overwritten(tiny_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "notes.litertlm"
    target.write_text("mine")
    with pytest.raises(UsageError, match="not a bundle"):
        export_bundle(tiny_checkpoint, target, format="litertlm", context=64)
    assert target.read_text() == "mine"


def test_an_old_one_is_replaced_only_by_one_that_agrees(tiny_checkpoint: Path, copy: Path) -> None:
    before = copy.read_bytes()
    with pytest.raises(ParityError):
        export_bundle(tiny_checkpoint, copy, recipe="int8", max_kl=1e-9, context=64, force=True)
    assert copy.read_bytes() == before
    export_bundle(tiny_checkpoint, copy, recipe="int8", context=64, verify=False, force=True)
    assert Bundle.open(copy).context == 64
    assert [path.name for path in copy.parent.iterdir() if path.name.startswith(".")] == []
