"""`export --calibrate`: what it changes, what it leaves alone, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_weight_check import Altered

from gemma_edge.benchmarks.measure import recipe_quality
from gemma_edge.benchmarks.records.record import QualityRecord
from gemma_edge.benchmarks.records.results_file import read_records
from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.emit.onnx.onnx_text import emit_decoder
from gemma_edge.export.exporter import export_bundle
from gemma_edge.export.gate.parity import verify_bundle
from gemma_edge.export.gate.weight_check import check_weights
from gemma_edge.export.synth.synth_gemma3n import text_config
from gemma_edge.export.weights import calibrated_weights, calibration_text
from gemma_edge.export.weights.calibrated_weights import calibrate_weights
from gemma_edge.export.weights.calibration_text import read_calibration, token_limit
from gemma_edge.export.weights.quantize import dequantize
from gemma_edge.export.weights.recipe import DEFAULT_RECIPE, load_recipe
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import ParityError, UsageError
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from support.random_gemma3n_text import random_ids, random_source
from support.repository import ROOT

POCKET, PROSE = ROOT / "pocket" / "checkpoint", ROOT / "pocket" / "questions" / "prose.txt"
FORMATS = {"onnx": "out", "tflite": "out", "litertlm": "out.litertlm"}


@pytest.fixture(scope="module", autouse=True)
def few_tokens() -> Iterator[None]:
    """A quarter of the usual text: these are tests of the way, not of how far it leads."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibration_text, "MOST", 512)
        yield


@pytest.fixture(scope="module")
def calibrated(gate_source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """`gate_source` at int4, calibrated on our text, as is usual, and not verified, by format."""
    options: dict[str, Any] = {"recipe": "int4", "context": 64, "chunk": 16, "verify": False}
    return {
        form: export_bundle(gate_source, tmp_path_factory.mktemp(form) / name, format=form, **options).path
        for form, name in FORMATS.items()
    }


# What is made. ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_the_gate_passes_and_only_integers_change(
    form: str, calibrated: dict[str, Path], gate_bundles: dict[str, Path], gate_source: Path
) -> None:
    agreement = verify_bundle(calibrated[form], gate_source)
    made, plain = Bundle.open(calibrated[form]), Bundle.open(gate_bundles[form])
    assert agreement.tensors > 80 and np.isfinite(agreement.mean_kl)
    record = made.manifest["calibration"]
    assert record["text"] == "auto" and record["tokens"] >= 512 and len(record["sha256"]) == 64
    assert "calibration" not in plain.manifest
    # The same sizes, so the same plan, speed and memory.
    sizes = [{name: file.bytes for name, file in one.files.items()} for one in (made, plain)]
    if form != "litertlm":
        assert sizes[0] == sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_defects_are_noticed(form: str, calibrated: dict[str, Path], gate_source: Path) -> None:
    bundle, up = Bundle.open(calibrated[form]), "layers.2.mlp.up_proj.weight"
    for change in (lambda w: w * 1.02, lambda w: w / 1.02, lambda w: w[::-1], lambda w: -w):
        with Checkpoint.open(gate_source) as checkpoint, pytest.raises(ParityError, match="up_proj"):
            check_weights(bundle, Altered(checkpoint, {up: change}))  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("form", FORMATS)
def test_what_is_exported_by_default(form: str, gate_source: Path, tmp_path: Path) -> None:
    """The faster and smaller recipe, calibrated; what has no 4-bit weights is not."""
    options: dict[str, Any] = {"format": form, "context": 64, "chunk": 16, "verify": False}
    usual = export_bundle(gate_source, tmp_path / FORMATS[form], **options).path
    manifest = Bundle.open(usual).manifest
    assert manifest["recipe"]["name"] == DEFAULT_RECIPE and manifest["calibration"]["text"] == "auto"
    exact = export_bundle(gate_source, tmp_path / "int8" / FORMATS[form], recipe="int8", **options).path
    assert "calibration" not in Bundle.open(exact).manifest


@pytest.mark.slow
def test_two_exports_are_equal(calibrated: dict[str, Path], gate_source: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"recipe": "int4", "context": 64, "chunk": 16, "verify": False}
    again = export_bundle(gate_source, tmp_path / "out", calibrate="auto", **options).path
    for name in Bundle.open(again).files:
        assert (again / name).read_bytes() == (calibrated["onnx"] / name).read_bytes(), name


@pytest.mark.slow
def test_eval_shows_that_pocket_comes_nearer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: Callable[..., tuple[int, str, str]]
) -> None:
    """On prose: the built-in text is not like it."""
    monkeypatch.setattr(recipe_quality, "PIECES", 3)
    asked = [POCKET, PROSE.with_name("questions.jsonl"), "--task", "facts", "--each", "2", "--text", PROSE]
    methods = ["--recipe", "int4_g128", "--format", "onnx", "--calibrate", "none", "--calibrate", "auto"]
    code, table, told = said("eval", *asked, *methods, "--record", tmp_path / "record.jsonl")
    assert code == 0, told
    [record] = read_records(tmp_path / "record.jsonl")
    assert isinstance(record, QualityRecord)
    nearest, calibrated = record.metrics.columns
    assert (nearest.method, calibrated.method) == ("nearest", "calibrated")
    assert nearest.file_bytes == calibrated.file_bytes
    assert nearest.bytes_per_token == calibrated.bytes_per_token
    assert nearest.prose and calibrated.prose
    assert calibrated.prose.mean_kl < 0.75 * nearest.prose.mean_kl
    for name, prose in (("to the nearest", nearest.prose), ("calibrated", calibrated.prose)):
        assert f"| `int4_g128` | {name} | ONNX | {prose.mean_kl:.3g} |" in table


def test_every_4_bit_weight_meets_its_inputs(tmp_path: Path) -> None:
    """Also the head's, whose logits are not computed, and each as the graph stores it."""
    source = random_source()
    recipe = load_recipe("int4")
    tensors = emit_decoder(source.config, recipe, "data").data.tensors
    rounding = calibrate_weights(source, tensors, [random_ids(source.config, 40)], "mse", tmp_path)
    wanted = [tensor for tensor in tensors if tensor.precision.bits == 4]
    assert wanted and set(rounding.kept) == {weight for tensor in wanted for weight in tensor.weights}
    for tensor in wanted:
        rows = np.concatenate([dequantize(part) for part in rounding.blocks(tensor, iter(()))])
        plain = np.concatenate([source.read(weight.name) for weight in tensor.weights])  # type: ignore[union-attr]
        assert rows.shape == tensor.shape
        assert np.linalg.norm(rows - plain) < 0.25 * np.linalg.norm(plain)


# What is refused, and interrupted. ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is empty"),
        (b" \n\t ", "is empty"),
        (b"\x00\x01\x02" * 99, "is binary"),
        (b"caf\xe9 " * 99, "is binary"),
        (b"\x89PNG\r\n\x1a\n" + bytes(99), "is binary"),
    ],
)
def test_no_text_is_refused_before_any_work(content: bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=said):
        export_bundle("no such checkpoint", tmp_path / "out", calibrate=str(path))


def test_a_text_that_is_not_there_is_refused(tmp_path: Path) -> None:
    for name in ("absent.txt", ".", "aut"):
        with pytest.raises(UsageError, match=r"--calibrate: .*auto"):
            read_calibration(str(tmp_path / name))
    assert read_calibration("none") is None


def test_few_words_and_recipes_without_4_bits_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("One word.")
    for options, said in (
        ({"calibrate": str(short)}, "too few"),
        ({"calibrate": "auto", "recipe": "int8"}, "int8 has no weights of 4 bits"),
    ):
        with pytest.raises(UsageError, match=said):
            export_bundle(tiny_checkpoint, tmp_path / "out", context=64, **options)  # type: ignore[arg-type]
    assert sorted(tmp_path.iterdir()) == [short]


@pytest.mark.slow
def test_an_interrupted_calibration_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C when some weights are rounded."""
    kept = calibrated_weights.CalibratedRounding.keep
    seen: list[Path] = []

    def interrupted(self: Any, *args: Any) -> None:
        kept(self, *args)
        seen.extend(tmp_path.glob(".*/*.calibrated"))
        if len(self.kept) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(calibrated_weights.CalibratedRounding, "keep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(tiny_checkpoint, tmp_path / "out", context=64, calibrate="auto", verify=False)
    assert seen and not list(tmp_path.iterdir())


def test_wide_models_take_fewer_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """The values of all tokens are in memory at once."""
    published = Gemma3nConfig.from_dict(text_config("e2b"))
    small = random_source().config
    assert token_limit(small) == calibration_text.MOST
    monkeypatch.setattr(calibration_text, "MOST", 2048)
    assert 256 < token_limit(published) < 2048
