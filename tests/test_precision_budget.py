"""`--budget`: bits by what rounding was measured to cost, on a trained model and in both engines."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from gemma_edge.cli.main import main
from gemma_edge.export.checkpoint.open_source import open_source
from gemma_edge.export.exporter import Exported, export_bundle, export_job, plan_export, resolve_recipe
from gemma_edge.export.formats.litertlm.litertlm_file import Contents, check_header
from gemma_edge.export.formats.litertlm.litertlm_sections import section_types
from gemma_edge.export.formats.litertlm.llm_metadata import LlmFacts, llm_metadata
from gemma_edge.export.formats.registry import export_format
from gemma_edge.export.gate.parity import verify_sequences
from gemma_edge.export.plan import make_plan
from gemma_edge.export.precision_budget import (
    CHOSEN_PARTS,
    KINDS,
    Choice,
    Unit,
    _module,
    _spend,
    _weights,
    choice_rows,
)
from gemma_edge.export.synth.synth_gemma3n import text_config
from gemma_edge.export.weights.recipe import DEFAULT_RECIPE, Precision, load_recipe
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import CeilingError, ConfigError
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.prompt.tokenizer import Tokenizer

POCKET = Path(__file__).parents[1] / "pocket" / "checkpoint"
PROSE = POCKET.parent / "questions" / "prose.txt"


def export(source: Path, out: Path, format: str, **options: object) -> Exported:
    return export_bundle(source, out, format=format, context=512, modalities=["text"], **options)  # type: ignore[arg-type]


def divergence(path: Path) -> float:
    """Of Pocket's bundle, over prose that nothing was measured on."""
    bundle = Bundle.open(path)
    added = bundle.member("added_tokens", dict)
    tokenizer = Tokenizer(bundle.file("tokenizer.model"), added, bundle.config.vocab_size)
    ids = tokenizer.encode(PROSE.read_text(), bos=True)[:1536]
    with open_source(POCKET, (), [], None) as checkpoint:
        sequences = [ids[start : start + 512] for start in range(0, len(ids), 512)]
        return verify_sequences(bundle, checkpoint, sequences).mean_kl


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "tflite"])
def test_a_budget_beats_the_recipe_of_the_same_bytes(format: str, tmp_path: Path) -> None:
    """The margin seen is a third and more; both are calibrated on the same text."""
    uniform = export(POCKET, tmp_path / "uniform", format, recipe="int4", verify=False)
    budget = uniform.plan.bytes_per_token
    mixed = export(POCKET, tmp_path / "mixed", format, budget=budget)  # the gate follows every weight
    assert mixed.plan.bytes_per_token <= budget
    assert divergence(mixed.path) < 0.9 * divergence(uniform.path)
    recipe = Bundle.open(mixed.path).manifest["recipe"]
    assert {choice.precision.bits for choice in mixed.choices} == {4, 8}
    assert recipe["parts"] == load_recipe(DEFAULT_RECIPE).to_dict()["parts"], "encoders have the recipe's"
    (tmp_path / "again.json").write_text(json.dumps(recipe))
    again = load_recipe(tmp_path / "again.json")
    assert again.to_dict() == recipe
    with open_source(POCKET, (), [], None) as checkpoint:
        planned = plan_export(checkpoint.config, resolve_recipe(again, None, format), 512, 128, format)
    assert planned.bytes_per_token == mixed.plan.bytes_per_token
    assert {row[0] for row in choice_rows(mixed.choices)} == {"part", *KINDS}


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "tflite", "litertlm"])
def test_more_than_the_best_takes_the_best(format: str, tiny_checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / f"out{'.litertlm' if format == 'litertlm' else ''}"
    found = export(tiny_checkpoint, out, format, budget=1 << 30)
    assert {choice.precision.bits for choice in found.choices} == {8}
    assert "calibration" not in Bundle.open(found.path).manifest, "no weight of 4 bits is left"


def test_less_than_the_least_is_refused_before_any_work(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(CeilingError, match=r"--budget 1 KiB: .* at least [\d.]+ MiB .* --slice"):
        export(tiny_checkpoint, tmp_path / "out", "onnx", budget=1024)
    assert not list(tmp_path.iterdir())


def test_another_bundle_is_not_replaced(tiny_bundle: Path, tiny_checkpoint: Path) -> None:
    before = (tiny_bundle / "manifest.json").read_bytes()
    assert main(["export", str(tiny_checkpoint), str(tiny_bundle), "--budget", "1GiB"]) != 0
    assert (tiny_bundle / "manifest.json").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--budget", "1GiB", "--dry-run"], "--dry-run reads no weights"),
        (["--budget", "1GiB", "--for", "pi5"], "--for chooses --budget"),
        (["--budget", "many"], "many"),
    ],
)
def test_options_that_contradict(
    options: list[str], said: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["export", str(tiny_checkpoint), str(tmp_path / "out"), *options]) != 0
    assert said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_recipe_with_tensors_that_are_none(tmp_path: Path) -> None:
    data = load_recipe("int4_g128").to_dict()
    for tensors, field in (
        ({}, "tensors"),
        ([{"bits": 5, "names": ["a"]}], r"tensors\[0\]\.bits"),
        ([{"bits": 8, "group": 64}], r"tensors\[0\]\.names"),
    ):
        path = tmp_path / "recipe.json"
        path.write_text(json.dumps(data | {"tensors": tensors}))
        with pytest.raises(ConfigError, match=field):
            load_recipe(path)


# What parts cost.


@pytest.mark.slow
@pytest.mark.parametrize("format", ["onnx", "tflite"])
def test_each_part_costs_what_its_rounding_does(
    format: str, tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = load_recipe("fp32").to_dict()
    data["parts"] |= {"head": {"bits": 8, "group": 64}, "decoder": {"bits": 4, "group": 64}}
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(data | {"kv_cache": "fp32"}))
    made = export(tiny_checkpoint, tmp_path / "out", format, recipe=path, calibrate="none")
    capsys.readouterr()
    assert main(["verify", str(made.path), "--source", str(tiny_checkpoint), "--by-part", "--json"]) == 0
    costs = json.loads(capsys.readouterr().out)["by_part"]
    assert set(costs) == {"attention", "feed-forward", "head", "per-layer embeddings"}
    assert list(costs.values()) == sorted(costs.values(), reverse=True)
    assert min(costs["attention"], costs["feed-forward"]) > 10 * costs["head"] > 0
    assert costs["per-layer embeddings"] < 1e-9, "at 32 bits the table keeps the checkpoint's own type"


# Spending.


A, B = Unit(0, "attention"), Unit(None, "head")


def test_a_byte_goes_where_it_saves_most() -> None:
    costs = {A: [4.0, 1.0, 0.0], B: [4.0, 3.0, 0.0]}
    sizes = {A: [10, 20, 30], B: [10, 20, 30]}
    assert _spend(costs, sizes, 0) == {A: 0, B: 0}
    assert _spend(costs, sizes, 10) == {A: 1, B: 0}
    assert _spend(costs, sizes, 30) == {A: 1, B: 2}
    assert _spend(costs, sizes, 99) == {A: 2, B: 2}


def test_bytes_that_save_nothing_are_not_spent() -> None:
    assert _spend({A: [1.0, 1.0]}, {A: [10, 20]}, 99) == {A: 0}


def test_the_table_sums_what_is_alike() -> None:
    small, large = Precision(4, 128), Precision(8, 128)
    rows = list(
        choice_rows([Choice(A, small, 1024, 3.0), Choice(B, large, 2048, 1.0), Choice(A, small, 1024, 0.0)])
    )
    assert rows[1:] == [
        ("attention", "4", "128", "2", "2 KiB", "75%"),
        ("head", "8", "128", "1", "2 KiB", "25%"),
    ]


@pytest.mark.parametrize("size", ["e2b", "e4b"])
def test_a_budget_of_every_layer_fits_into_the_header_of_a_litertlm(size: str) -> None:
    """Nothing may be refused for its length after minutes of measuring."""
    config = Gemma3nConfig.from_dict(text_config(size))
    job = export_job(config, load_recipe(DEFAULT_RECIPE), 4096, 128)
    litertlm = export_format("litertlm")
    tensors = litertlm.decoder_layout(job).tensors
    names = sorted({name for t in tensors if t.part in CHOSEN_PARTS for name in map(_module, _weights(t))})
    assert len(names) > 4 * config.num_hidden_layers
    chosen = {name: Precision(8, 64 << at % 3) for at, name in enumerate(names)}
    recipe = replace(job.recipe, tensors=chosen)
    plan = make_plan(replace(job, recipe=recipe), litertlm)
    hashes = dict.fromkeys(section_types({}), "0" * 64)
    contents = Contents(
        config,
        b"",
        llm_metadata(LlmFacts(config, (1,), job.context)),
        {"recipe": recipe.to_dict(), "plan": plan.to_dict(), "sha256": hashes},
    )
    check_header(contents, section_types({}).values(), tokens=True)
