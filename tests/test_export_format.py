"""Every format: one object, the packages of its own alone, and refusals before the first weight is read."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ai_edge_litert")
pytest.importorskip("litert_lm_builder", reason="litert-lm-builder is not installed")

from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.exporter import export_bundle
from gemma_edge.export.formats.export_format import ExportFormat
from gemma_edge.export.formats.registry import FORMAT_NAMES, export_format
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.runtime.errors import (
    CheckpointError,
    ConfigError,
    GemmaEdgeError,
    TokenizerError,
    UsageError,
)

# Packages that the other formats need, and this one does not.
FOREIGN = {
    "onnx": ("flatbuffers", "litert_lm_builder", "ai_edge_litert"),
    "tflite": ("onnx", "litert_lm_builder", "google.protobuf"),
    "litertlm": ("onnx",),
}
BLOCKED = """
import sys
blocked = sys.argv[1].split(",")
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if any(name == b or name.startswith(b + ".") for b in blocked):
            raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Blocker())
from gemma_edge.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with both encoders."""
    return synthesize(tmp_path_factory.mktemp("formats") / "seeing", encoders=True, progress=False).path


@pytest.fixture
def damaged(seeing: Path, tmp_path: Path) -> Path:
    """A copy whose files a test may damage."""
    return Path(shutil.copytree(seeing, tmp_path / "checkpoint"))


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of tensors whose weights are read."""
    names: list[str] = []
    original = Checkpoint.raw_rows

    def counted(self: Checkpoint, name: str, *rows: int) -> Any:
        names.append(name)
        return original(self, name, *rows)

    monkeypatch.setattr(Checkpoint, "raw_rows", counted)
    return names


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_a_format_is_one_object(name: str) -> None:
    found: ExportFormat = export_format(name)
    assert found.runtime.name == name


def test_an_unknown_format() -> None:
    with pytest.raises(UsageError, match="unknown format 'gguf': choose from onnx, tflite, litertlm"):
        export_format("gguf")


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_a_format_needs_only_its_own_packages(name: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / f"out{export_format(name).runtime.suffix}"
    command = [sys.executable, "-c", BLOCKED, ",".join(FOREIGN[name])]
    command += ["export", str(tiny_checkpoint), str(out), "--format", name]
    command += ["--context", "64", "--chunk", "16", "--no-verify"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr
    assert out.exists()


MAKERS = {"onnx": "onnx", "litertlm": "litert_lm_builder"}


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_a_plan_needs_no_package_that_writes(name: str, seeing: Path) -> None:
    """A board has the runtime's packages alone; with and without the others the plan is the same."""
    words = ["export", str(seeing), "--format", name, "--context", "64", "--dry-run", "--json"]
    plans = []
    for blocked in ("nothing", "onnx,litert_lm_builder,absl,tomli,huggingface_hub"):
        command = [sys.executable, "-c", BLOCKED, blocked, *words]
        plans.append(subprocess.run(command, capture_output=True, text=True, timeout=600, check=True).stdout)
    assert plans[0] == plans[1] and json.loads(plans[0])["format"] == name


@pytest.mark.parametrize("name", ["onnx", "litertlm"])
def test_a_missing_package_is_named(name: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-c", BLOCKED, MAKERS[name]]
    command += ["export", str(tiny_checkpoint), str(tmp_path / "out"), "--format", name, "--context", "64"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=600)
    distribution = MAKERS[name].replace("_", "-")
    hint = f'--format {name} needs {distribution}: pip install ".[export]" in a clone of gemma-edge'
    assert run.returncode == 2 and hint in run.stderr
    assert list(tmp_path.iterdir()) == []


# Refused before a weight is read. -----------------------------------------------------------------


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer.*"):
        path.unlink()


def spoil(file: str, content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / file).write_text(content)


def forget_added_tokens(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["added_tokens_decoder"] = {}
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("name", FORMAT_NAMES)
@pytest.mark.parametrize(
    ("damage", "error", "match"),
    [
        (no_tokenizer, TokenizerError, "tokenizer.model or tokenizer.json"),
        (spoil("tokenizer.model", "none"), TokenizerError, "a SentencePiece model"),
        (forget_added_tokens, TokenizerError, "vision token .*export without this modality"),
        (spoil("chat_template.jinja", "{% if %}"), CheckpointError, "a Jinja template"),
        (spoil("generation_config.json", "["), GemmaEdgeError, "generation_config.json: file: expected"),
        (spoil("generation_config.json", '{"top_p": 7}'), CheckpointError, "values in range"),
    ],
    ids=["no tokenizer", "no model", "no added tokens", "template", "no JSON", "top_p"],
)
def test_side_files_are_checked_first(
    name: str,
    damage: Callable[[Path], object],
    error: type[GemmaEdgeError],
    match: str,
    damaged: Path,
    tmp_path: Path,
    reads: list[str],
) -> None:
    damage(damaged)
    with pytest.raises(error, match=match):
        export_bundle(damaged, tmp_path / "out", format=name, context=64, chunk=16)
    assert reads == []
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_a_target_that_is_something_else(name: str, seeing: Path, tmp_path: Path, reads: list[str]) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="is not a bundle"):
        export_bundle(seeing, tmp_path / "out", format=name, context=64, chunk=16)
    assert reads == []


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_too_little_disk_space(
    name: str, seeing: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma_edge.export.publish.ROOM", 1 << 62)
    with pytest.raises(GemmaEdgeError, match="bytes of disk"):
        export_bundle(seeing, tmp_path / "out", format=name, context=64, chunk=16)
    assert reads == [] and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "options", "match"),
    [
        ("onnx", {"recipe": "int4_channelwise"}, "channel-wise"),
    ],
)
def test_combinations_that_no_engine_takes(
    name: str, options: dict[str, str], match: str, seeing: Path, tmp_path: Path, reads: list[str]
) -> None:
    with pytest.raises(UsageError, match=match):
        export_bundle(seeing, tmp_path / "out", format=name, context=64, chunk=16, **options)  # type: ignore[arg-type]
    assert reads == []


def test_a_header_that_is_too_long_for_a_litertlm(
    seeing: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "gemma_edge.export.formats.litertlm.litertlm_file"
    monkeypatch.setattr(f"{module}.HEADER_LIMIT", 1000)
    with pytest.raises(ConfigError, match="a header of 1000 bytes"):
        export_bundle(seeing, tmp_path / "out.litertlm", format="litertlm", context=64, chunk=16)
    assert reads == [] and list(tmp_path.iterdir()) == []
