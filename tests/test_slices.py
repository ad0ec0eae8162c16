"""Slices of nested models: equal to transformers sliced by hand, or refused by name."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_edge.cli.main import main
from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.checkpoint.open_source import open_source
from gemma_edge.export.checkpoint.sliced_checkpoint import CutTensor, sliced_config
from gemma_edge.export.export_families import export_family
from gemma_edge.export.exporter import export_bundle
from gemma_edge.export.gate.parity import verify_bundle
from gemma_edge.export.model.gemma3n.gemma3n_slice import config_json, slices
from gemma_edge.export.model.model_slice import parse_layers, parse_widths
from gemma_edge.export.slicer import best_slice, slice_checkpoint
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.export.synth.synth_gemma3n import random_tensors, text_config
from gemma_edge.export.weights import calibration_text
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import CeilingError, CheckpointError, UsageError
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from support.random_gemma3n_text import random_ids, random_source, transformers_logits, transformers_model
from support.refused_inputs import poke

CUT = "ffn=128x2,256,384x2,96x3,512/skip=1,8-9"  # of the tiny checkpoint: 12 layers of which 5 share KV


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("slices") / "tiny", encoders=True, progress=False).path


@pytest.fixture(scope="module")
def copy(tiny: Path) -> Path:
    return slice_checkpoint(tiny, tiny.with_name("copy"), CUT).path


@pytest.fixture(scope="module")
def e4b(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of E4B's shapes, but for its weights."""
    folder = tmp_path_factory.mktemp("slices") / "e4b"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(text_config("e4b")))
    return folder


# The same model. ----------------------------------------------------------------------------------


def cut_by_hand(model: Any, widths: list[int], skipped: list[int]) -> Any:
    """transformers' own model with fewer layers and columns: state dict and config cut here."""
    import torch
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    old = model.config.to_dict()
    kept = [i for i in range(old["num_hidden_layers"]) if i not in skipped]
    first_shared = old["num_hidden_layers"] - old["num_kv_shared_layers"]
    old["layer_types"] = [old["layer_types"][i] for i in kept]
    old["activation_sparsity_pattern"] = [old["activation_sparsity_pattern"][i] for i in kept]
    old["num_kv_shared_layers"] = len([i for i in kept if i >= first_shared])
    old["intermediate_size"], old["num_hidden_layers"] = widths, len(kept)
    config = Gemma3nTextConfig(**old)
    config._attn_implementation = "eager"
    small, width = Gemma3nForCausalLM(config).eval(), old["hidden_size_per_layer_input"]
    state, cut = model.state_dict(), {}
    for name in small.state_dict():
        whole = re.sub(r"layers\.(\d+)\.", lambda match: f"layers.{kept[int(match[1])]}.", name)
        tensor = state[whole]
        if number := re.search(r"layers\.(\d+)\.mlp", name):
            columns = widths[int(number[1])]
            tensor = tensor[:, :columns] if "down_proj" in name else tensor[:columns]
        elif "embed_tokens_per_layer" in name:
            tensor = torch.cat([tensor[:, i * width : (i + 1) * width] for i in kept], dim=1)
        elif "per_layer_model_projection" in name:
            tensor = torch.cat([tensor[i * width : (i + 1) * width] for i in kept])
        cut[name] = tensor
    small.load_state_dict(cut, strict=True)
    return small


@pytest.mark.parametrize(
    ("wanted", "widths", "skipped", "changes"),
    [
        ("ffn=32,48,16,64,40,24", [32, 48, 16, 64, 40, 24], [], {}),
        ("ffn=48x2,32,64,24/skip=1", [48, 48, 32, 64, 24], [1], {"attention_bias": True}),
        ("skip=0,4", [48, 64, 96, 48], [0, 4], {"tie_word_embeddings": False}),
        ("ffn=32/skip=4-5", [32] * 4, [4, 5], {}),
        ("skip=2,4", [64, 48, 96, 48], [2, 4], {}),  # nothing that stays reads layer 2
    ],
)  # fmt: skip
def test_transformers_gives_the_logits_of_a_slice_by_hand(
    tmp_path: Path, wanted: str, widths: list[int], skipped: list[int], changes: dict[str, Any]
) -> None:
    pytest.importorskip("torch")
    from transformers import AutoModelForCausalLM

    source = random_source(**changes)
    model = transformers_model(changes, source)
    model.save_pretrained(tmp_path / "whole")
    made = slice_checkpoint(tmp_path / "whole", tmp_path / "slice", wanted)
    assert (list(made.slice.widths), list(made.slice.skipped)) == (widths, skipped)
    loaded, told = AutoModelForCausalLM.from_pretrained(
        made.path, attn_implementation="eager", output_loading_info=True
    )
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    ids = random_ids(source.config, 24)
    expected = transformers_logits(cut_by_hand(model, widths, skipped), ids)
    whole = transformers_logits(model, ids)
    assert np.abs(expected - whole).max() > 0.1
    np.testing.assert_array_equal(transformers_logits(loaded.eval(), ids), expected)


def test_a_copy_is_the_view_in_every_tensor(tiny: Path, copy: Path) -> None:
    with open_source(copy) as written, open_source(tiny, slice=CUT) as view, open_source(tiny) as whole:
        assert written.config == view.config and written.specs.keys() == view.specs.keys()
        assert set(written.towers) == {"vision", "audio"}
        for name, spec in written.specs.items():
            expected = written.read(name)
            assert expected.shape == spec.shape
            np.testing.assert_array_equal(view.read(name), expected, err_msg=name)
            np.testing.assert_array_equal(
                np.concatenate(list(view.iter_rows(name, 7))), expected, err_msg=name
            )
        for name in whole.towers["audio"].specs:
            np.testing.assert_array_equal(written.read(name), whole.read(name), err_msg=name)
        assert len({written.revision(), view.revision(), whole.revision()}) == 3
        assert view.dtype("norm.weight") == "BF16" and view.raw_rows("norm.weight", 3, 3).size == 0
    kept = {"tokenizer.model", "tokenizer_config.json", "chat_template.jinja", "preprocessor_config.json"}
    for name in kept:
        assert (copy / name).read_bytes() == (tiny / name).read_bytes()


def test_a_slice_of_a_slice_of_several_files(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gemma_edge.export.checkpoint.new_checkpoint.SHARD_BYTES", 1_500_000)
    first = slice_checkpoint(tiny, tmp_path / "first", "ffn=128").path
    assert len(list(first.glob("model-*-of-*.safetensors"))) > 3
    slice_checkpoint(first, tmp_path / "second", "ffn=96/skip=0")
    with open_source(tmp_path / "second") as twice, open_source(tiny, slice="ffn=96/skip=0") as once:
        for name in twice.specs:
            np.testing.assert_array_equal(twice.read(name), once.read(name), err_msg=name)


def test_weights_that_no_layer_reads_are_kept(copy: Path) -> None:
    header = (copy / "model.safetensors").read_bytes()[:100_000]
    assert b"model.language_model.layers.8.self_attn.k_proj.weight" in header
    assert b"layers.9." not in header


# Export and verify. -------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_export_of_a_slice_is_the_export_of_its_copy(tiny: Path, copy: Path, tmp_path: Path) -> None:
    text: dict[str, Any] = {"modalities": ["text"]}
    made, other = (
        export_bundle(
            source, tmp_path / source.name, slice=cut, recipe="int8", context=64, verify=False, **text
        )
        for source, cut in ((tiny, CUT), (copy, None))
    )
    ours, theirs = Bundle.open(made.path), Bundle.open(other.path)
    assert ours.files == theirs.files
    assert ours.manifest["slice"]["skipped_layers"] == [1, 8, 9]
    # The source of either bundle, but no other slice.
    assert verify_bundle(other.path, tiny, slice=CUT).mean_kl < 0.1
    for given in (None, "ffn=128x2,256,384x2,96x3,512/skip=0,8-9"):
        with pytest.raises(UsageError, match=re.escape(f"give --slice {CUT}")):
            verify_bundle(made.path, tiny, slice=given)
    with pytest.raises(UsageError, match="is a bundle of"):
        export_bundle(tiny, made.path, recipe="int4", context=64, slice="ffn=128")


@pytest.mark.slow
def test_a_slice_is_calibrated_in_every_format(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The gate demands that each weight is one of the slice's, rounded up or down."""
    monkeypatch.setattr(calibration_text, "MOST", 64)
    out, forms = tmp_path / "out", ("onnx", "tflite")
    options = ["--recipe", "int4_g128", "--context", "64", "--modalities", "text", "--calibrate", "auto"]
    formats = [word for form in forms for word in ("--format", form)]
    assert main(["export", str(tiny), str(out), "--slice", CUT, *options, *formats]) == 0
    for form in forms:
        manifest = Bundle.open(out / form).manifest
        assert manifest["slice"]["skipped_layers"] == [1, 8, 9] and manifest["format"] == form
        assert manifest["calibration"]["text"] == "auto" and manifest["agreement"]["tensors"] > 80


@pytest.mark.slow
def test_a_bundle_of_the_whole_model_is_no_slices(tiny: Path, tmp_path: Path) -> None:
    made = export_bundle(tiny, tmp_path / "out", recipe="int8", context=64, modalities=["text"], verify=False)
    with pytest.raises(UsageError, match="and no --slice"):
        verify_bundle(made.path, tiny, slice="ffn=128")


# Google's slices. ---------------------------------------------------------------------------------


def test_the_published_slices_have_the_parameters_that_are_published() -> None:
    config = Gemma3nConfig.from_dict(text_config("e4b"))
    tables = ("embed_tokens.weight", "embed_tokens_per_layer.weight")
    found = slices(config)
    scores = [each.quality["mmlu"] for each in found if each.quality]
    assert len(scores) == len(found) == 16 and scores == sorted(scores, reverse=True)
    for each in found:
        cut = Gemma3nConfig.from_dict(config_json(text_config("e4b"), config, each))
        shapes = {name: shape for name, shape, _, _ in random_tensors(cut)}  # all that is stored
        billions = sum(math.prod(shape) for name, shape in shapes.items() if name not in tables) / 1e9
        told = float(str(each).removeprefix("E").partition("B")[0])
        exact = {"E2B": 1.91, "E4B": 3.98, "E3.79B-block": 3.74}.get(str(each), told)
        assert billions == pytest.approx(exact, abs=0.025), each
    assert cut == Gemma3nConfig.from_dict(text_config("e2b"))  # the last is E2B


def test_a_slice_by_widths_is_known_by_its_name(e4b: Path) -> None:
    family = export_family(e4b)
    chosen, _, config = sliced_config(family, e4b, family.read_config(e4b), "ffn=8192/skip=20-24")
    assert chosen.name == "E2B" and chosen.quality and chosen.quality["mmlu"] == 50.9
    assert config == Gemma3nConfig.from_dict(text_config("e2b"))


def test_a_budget_takes_the_best_that_fits(e4b: Path) -> None:
    chosen, plan = best_slice(str(e4b), 1 << 40)
    assert str(chosen) == "E3.59B"
    less, smaller = best_slice(str(e4b), plan.needed_bytes - 1)
    assert smaller.needed_bytes < plan.needed_bytes and less != chosen
    with pytest.raises(CeilingError, match="E2B, the smallest, needs"):
        best_slice(str(e4b), 1 << 20)


# What is refused, and what is left behind. --------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        ("ffn=8192/skip=18", "layer 18 must stay: 12 layers from 20 on read its keys and values"),
        ("skip=19", "layer 19 must stay: 3 layers from 24 on"),
        ("skip=0-34", "a layer must stay"),
        ("skip=35", "layers 0 to 34, and no 35"),
        ("ffn=16385", "layer 0 has an FFN of 16384, which cannot become 16385"),
        ("ffn=8192x30", "30 widths for 35 layers that stay"),
        ("ffn=16384", "takes nothing away"),
        ("E4B", "is the whole model"),
        ("E2.54", "Did you mean E2.54B?"),
        ("", "there is no slice ''"),
        ("ffn=", "expected numbers such as 8192"),
        ("ffn=0", "expected numbers such as 8192"),
        ("ffn=8192x0", "expected numbers such as 8192"),
        ("ffn=1x9999,1x9999", "expected numbers such as 8192"),
        ("skip=5-3", "expected numbers such as 3"),
        ("skip=3,3", "each once"),
        ("skip=3/skip=4", "ffn=WIDTHS/skip=LAYERS"),
        ("width=3", "ffn=WIDTHS/skip=LAYERS"),
    ],
)  # fmt: skip
def test_slices_that_are_refused(e4b: Path, wanted: str, told: str) -> None:
    family = export_family(e4b)
    with pytest.raises(UsageError) as caught:
        sliced_config(family, e4b, family.read_config(e4b), wanted)
    assert told in str(caught.value)


def test_texts_of_widths_and_layers() -> None:
    assert parse_widths("8192x2, 16384") == (8192, 8192, 16384)
    assert parse_layers("20-22,3") == (3, 20, 21, 22)


def test_published_slices_are_of_e4b_alone(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is one of a model with 35 layers of 16384, and this one has 12"):
        slice_checkpoint(tiny, tmp_path / "out", "E2B")
    with pytest.raises(UsageError, match="no slices of such a model are published"):
        best_slice(str(tiny), 1 << 40)
    assert list(tmp_path.iterdir()) == []


def test_the_verb(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["slice", str(tiny), str(out), "--ffn", "128", "--skip", "1"]) == 0
    assert f"{out}: 11 layers," in capsys.readouterr().out
    assert Checkpoint.open(out).config.num_hidden_layers == 11
    for options in ([], ["--config", "E2B", "--ffn", "128"], ["--budget", "1GiB", "--skip", "1"]):
        assert main(["slice", str(tiny), str(tmp_path / "x"), *options]) == 2
        assert "say what to take" in capsys.readouterr().err
    assert main(["slice", str(tiny), str(out), "--ffn", "128"]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert main(["export", str(tiny), "--dry-run", "--slice", "ffn=128", "--context", "64"]) == 0


def test_a_weight_that_is_none_is_named(tiny: Path, tmp_path: Path) -> None:
    bad = Path(shutil.copytree(tiny, tmp_path / "bad"))
    poke(bad, "layers.2.mlp.down_proj.weight", 5)
    with open_source(bad, slice="ffn=128/skip=0") as view:
        view.read("layers.2.mlp.down_proj.weight")
        with pytest.raises(CheckpointError, match=r"layers\.2\.mlp\.down_proj\.weight\[0, 5\]"):
            view.read("layers.1.mlp.down_proj.weight")


def test_a_record_that_is_no_record(copy: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(copy, tmp_path / "other"))
    (other / "slice.json").write_text("[")
    with open_source(other) as checkpoint, pytest.raises(CheckpointError, match=r"slice\.json"):
        checkpoint.changes()


def test_an_interrupt_leaves_nothing(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = CutTensor.chunks, []

    def chunks(self: CutTensor, most: int) -> Any:
        calls.append(self.key)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return real(self, most)

    monkeypatch.setattr(CutTensor, "chunks", chunks)
    with pytest.raises(KeyboardInterrupt):
        slice_checkpoint(tiny, tmp_path / "out", CUT)
    assert list(tmp_path.iterdir()) == []


PEAK = """
import sys
from gemma_edge.cli.main import main
assert main(sys.argv[1:]) == 0
print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_tensors(tmp_path: Path) -> None:
    def peak(rows: int) -> int:
        """kB of a process that slices a checkpoint whose per-layer table has so many rows."""
        name = str(rows)
        source = synthesize(tmp_path / name, config={"vocab_size_per_layer_input": rows}, progress=False).path
        command = [
            sys.executable,
            "-c",
            PEAK,
            "slice",
            str(source),
            str(tmp_path / f"{name}-out"),
            "--ffn",
            "128",
        ]
        done = subprocess.run(
            [*command, "--skip", "1"], capture_output=True, text=True, check=True, timeout=600
        )
        return int(done.stdout.split()[-1])

    assert peak(200_000) < peak(1_000) + 40_000  # the larger one's table has 154 MB
