"""Attack: a file becomes shorter, or is replaced, while a running model has it mapped.

The kernel ends a process that touches what is gone with SIGBUS. So nothing of ours shortens or rewrites such
a file: it is replaced by a new one, and a model that runs keeps the old. Where somebody else shortens it, the
command says "Bus error", and the next run is sound again.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fuzz.valid_inputs import SMALL

from gemma_edge.cli.main import main
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.runtime.model import Model

pytest.importorskip("ai_edge_litert", reason="LiteRT is not installed")
pytest.importorskip("litert_lm_builder", reason="litert-lm-builder is not installed")

FORMATS = {"onnx": "onnx", "tflite": "tflite", "litertlm": "model.litertlm"}
PROMPT = "the thing"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("small") / "checkpoint", config=SMALL, progress=False).path


@pytest.fixture(params=FORMATS)
def bundle(
    request: pytest.FixtureRequest, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Path:
    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "cache"))
    path = tmp_path / FORMATS[request.param]
    export(checkpoint, path, request.param)
    return path


def export(checkpoint: Path, path: Path, format: str, recipe: str = "int4") -> None:
    argv = [
        "export",
        str(checkpoint),
        str(path),
        "--format",
        format,
        "--recipe",
        recipe,
        "--calibrate",
        "none",
    ]
    assert main([*argv, "--context", "64", "--chunk", "32", "--no-verify", "--force"]) == 0


def files(folder: Path) -> list[Path]:
    if folder.is_file():
        return [folder]
    return [path for path in folder.rglob("*") if path.is_file() and not path.name.startswith(".")]


def test_what_a_running_model_has_mapped_is_replaced_never_shortened(
    bundle: Path, checkpoint: Path, tmp_path: Path
) -> None:
    format = next(name for name, path in FORMATS.items() if path == bundle.name)
    model = Model.load(bundle, threads=1)
    before = model.generate(PROMPT, max_tokens=8, temperature=0).text
    mapped = [path.open("rb") for path in [*files(bundle), *files(tmp_path / "cache")]]
    contents = [file.read() for file in mapped]
    export(checkpoint, bundle, format, recipe="int8")
    assert main(["cache", "--limit", "1"]) == 0 == main(["cache", "--clear"])
    Model.load(bundle, threads=1).generate(PROMPT, max_tokens=1)
    for file, content in zip(mapped, contents, strict=True):
        file.seek(0)
        assert file.read() == content, file.name
        file.close()
    model.reset()
    assert model.generate(PROMPT, max_tokens=8, temperature=0).text == before


@pytest.fixture
def chat(bundle: Path) -> Iterator[subprocess.Popen[str]]:
    # With several threads, a second fault may end the process before the first is told.
    argv = [sys.executable, "-m", "gemma_edge.cli.main", "chat", str(bundle), "--max-tokens", "3"]
    argv += ["--threads", "1"]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8") as process:
        assert process.stdin and process.stdout
        print(PROMPT, file=process.stdin, flush=True)
        assert process.stdout.readline()  # an answer: all is mapped
        yield process
        process.kill()


@pytest.mark.parametrize("bundle", ["tflite", "litertlm"], indirect=True)
def test_somebody_else_shortens_a_file_of_the_cache(
    bundle: Path, chat: subprocess.Popen[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in files(tmp_path / "cache"):
        os.truncate(path, 0)
    _, said = chat.communicate(f"{PROMPT}\n")
    assert chat.returncode == -signal.SIGBUS
    assert said.startswith("Fatal Python error: Bus error\n")
    # The next run removes what is damaged, and makes it again.
    answers = {Model.load(bundle, threads=1).generate(PROMPT, max_tokens=8, temperature=0).text}
    shutil.rmtree(tmp_path / "cache")
    answers.add(Model.load(bundle, threads=1).generate(PROMPT, max_tokens=8, temperature=0).text)
    assert len(answers) == 1


def test_somebody_else_shortens_the_bundle(bundle: Path, chat: subprocess.Popen[str]) -> None:
    """Rows of the embedding are read, not mapped: they notice first."""
    for path in files(bundle):
        os.truncate(path, 0)
    _, said = chat.communicate(f"{PROMPT} in\n")
    assert chat.returncode == 3
    assert "The file was truncated: export the bundle again." in said and said.count("\n") == 1
