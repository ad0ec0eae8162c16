"""Plans for devices: what fits, in which order, and that nothing unmeasured looks measured."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.benchmarks.records.results_file import append_record
from gemma_edge.benchmarks.records.rows import BenchRow
from gemma_edge.cli import export as cli_export
from gemma_edge.cli.main import main
from gemma_edge.devices.known_devices import formats_for, known_device, known_devices
from gemma_edge.export.device_plans import DevicePlan, Machine, Wishes, rank_plans, weight_floor
from gemma_edge.export.exporter import export_bundle, export_job
from gemma_edge.export.formats.registry import export_format
from gemma_edge.export.synth.synth_gemma3n import text_config
from gemma_edge.export.weights import calibration_text
from gemma_edge.export.weights.recipe import load_recipe
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import CeilingError, UsageError
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig

GIB = 1 << 30
ROOMY = Machine("a machine", 64 * GIB, ("onnx",), 20.0)


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, str]:
    """Checkpoints of published shapes, without weights."""
    folders = {}
    for size in ("e2b", "e4b"):
        folder = tmp_path_factory.mktemp("shapes") / size
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(text_config(size)))
        folders[size] = str(folder)
    return folders


def test_every_known_device_has_what_a_plan_needs() -> None:
    devices = known_devices()
    assert {"pi4", "pi5", "pi5-2gb", "orin-nano", "phone-6gb"} <= set(devices)
    for device in devices.values():
        assert 0 < device.usable <= 1 and device.usable_bytes < device.memory_bytes
        if device.bandwidth_gb_s is not None:
            assert device.kind in ("measured by others", "vendor") and device.sources
        assert all(source.startswith("https://") for source in device.sources)
        for format in formats_for(device.system, device.arch, device.cpu_flags):
            assert export_format(format)
    pi4, phone = known_device("pi4"), known_device("phone-6gb")
    assert formats_for(pi4.system, pi4.arch, pi4.cpu_flags) == ("onnx",)
    assert formats_for(phone.system, phone.arch, phone.cpu_flags) == ("litertlm",)
    with pytest.raises(UsageError, match="Did you mean pi5"):
        known_device("pi55")


# The order. ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_best_slice_that_fits_and_is_fast_enough_comes_first(shapes: Mapping[str, str]) -> None:
    machine = Machine("a board", 2 * GIB, ("onnx",), 10.0)
    wishes = Wishes(min_speed=6.0)
    plans = rank_plans(shapes["e4b"], machine, wishes)
    assert all(plan.memory_bytes <= machine.memory for plan in plans)
    fast = [plan for plan in plans if plan.speed and plan.speed >= 6.0]
    assert fast and plans[: len(fast)] == fast
    assert fast[0].mmlu == max(plan.mmlu or 0 for plan in fast)
    slow = plans[len(fast) :]
    assert [plan.speed for plan in slow] == sorted((plan.speed or 0 for plan in slow), reverse=True)
    # The slice above the first one does not fit, or is too slow.
    better = next(p for p in rank_plans(shapes["e4b"], ROOMY, Wishes(min_speed=0.1)) if _same(p, plans[0]))
    assert (better.mmlu or 0) > (plans[0].mmlu or 0)
    assert better.memory_bytes > machine.memory or (better.speed or 0) / 2 < 6.0


def _same(one: DevicePlan, other: DevicePlan) -> bool:
    return (one.recipe.name, one.recipe.kv_cache) == (other.recipe.name, other.recipe.kv_cache)


def test_a_speed_is_bandwidth_over_the_bytes_of_a_step(shapes: Mapping[str, str]) -> None:
    for plan in rank_plans(shapes["e2b"], ROOMY, Wishes()):
        step = plan.plan.bytes_per_token + plan.plan.kv_cache_bytes
        assert plan.speed == pytest.approx(20e9 / step) and not plan.measured
        assert (plan.slice, plan.mmlu, plan.mean_kl) == (None, 50.9, None)
    unknown = rank_plans(shapes["e2b"], Machine("a phone", 64 * GIB, ("onnx",)), Wishes())
    assert all(plan.speed is None for plan in unknown) and unknown[0].recipe.name == "fp32"


def test_what_every_plan_holds_at_least(shapes: Mapping[str, str]) -> None:
    config = Gemma3nConfig.from_dict(text_config("e2b"))
    for name in ("int4", "int8", "fp32"):
        recipe = load_recipe(name)
        job = export_job(config, recipe, 512, 128)
        layout = export_format("onnx").decoder_layout(job)
        floor = weight_floor(config, recipe)
        assert 0.9 * layout.size < floor <= layout.size


@pytest.mark.slow
def test_mapped_weights_count_for_the_machine_and_not_for_a_ceiling(tiny_checkpoint: Path) -> None:
    machine = Machine("a board", GIB, ("tflite",), 10.0)
    [plan, *_] = rank_plans(str(tiny_checkpoint), machine, Wishes(context=64, modalities=["text"]))
    assert plan.mapped_bytes == plan.plan.bytes_per_token > 0
    assert plan.memory_bytes == plan.plan.needed_bytes + plan.mapped_bytes


@pytest.mark.slow
def test_a_shorter_context_is_taken_only_where_it_is_needed(shapes: Mapping[str, str]) -> None:
    fits = rank_plans(shapes["e2b"], ROOMY, Wishes())
    assert {plan.plan.context for plan in fits} == {4096}
    least = min(plan.memory_bytes for plan in fits)
    plans = rank_plans(shapes["e2b"], Machine("less", least - 1, ("onnx",), 20.0), Wishes())
    assert plans and all(plan.plan.context < 4096 for plan in plans)
    with pytest.raises(CeilingError, match="nothing fits"):
        rank_plans(shapes["e2b"], Machine("less", least - 1, ("onnx",), 20.0), Wishes(context=4096))


# Quality and speed that were measured. ------------------------------------------------------------


def test_a_measured_kl_is_that_of_a_bundles_gate(tiny_checkpoint: Path, tiny_bundle: Path) -> None:
    wishes = Wishes(context=64)
    plans = rank_plans(str(tiny_checkpoint), ROOMY, wishes, [tiny_bundle.parent])
    bundle = Bundle.open(tiny_bundle)
    agreement, cache = bundle.manifest["agreement"], bundle.manifest["kv_cache"]
    for plan in plans:
        same = (plan.recipe.name, plan.recipe.kv_cache, plan.calibrate) == ("int4", cache, "none")
        assert plan.mean_kl == (agreement["mean_kl"] if same else None)
    assert any(plan.mean_kl is not None for plan in plans)


def test_a_bundle_of_another_checkpoint_says_nothing(shapes: Mapping[str, str], tiny_bundle: Path) -> None:
    plans = rank_plans(shapes["e2b"], ROOMY, Wishes(), [tiny_bundle.parent])
    assert all(plan.mean_kl is None for plan in plans)


@pytest.mark.slow
def test_a_plan_has_the_kl_of_its_rounding(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration_text, "MOST", 128)
    source, folder = str(tiny_checkpoint), tmp_path / "out"
    options: dict[str, Any] = {"recipe": "int4_g128", "context": 64, "modalities": ["text"]}
    bundle = Bundle.open(export_bundle(source, folder, calibrate="auto", **options).path)
    wanted = ["--for", "pi4", "--context", "64", "--modalities", "text", "--bundles", str(folder)]

    def planned() -> dict[str, Any]:
        assert main(["plan", source, *wanted, "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    def alter(part: str, **fields: Any) -> None:
        manifest = json.loads((folder / "manifest.json").read_text())
        manifest[part] |= fields
        (folder / "manifest.json").write_text(json.dumps(manifest))

    [calibrated] = [plan for plan in planned()["plans"] if plan["mean_kl"] is not None]
    assert (calibrated["recipe"], calibrated["kv_cache"]) == ("int4_g128", bundle.kv_cache)
    assert calibrated["calibrate"] is None
    assert calibrated["mean_kl"] == bundle.manifest["agreement"]["mean_kl"]

    # One that was calibrated on another text says nothing.
    alter("calibration", sha256="0" * 64)
    assert all(plan["mean_kl"] is None for plan in planned()["plans"])

    # One that was not calibrated does not come before one that was and is not measured.
    alter("agreement", mean_kl=1e-9)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["calibration"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    same = [plan for plan in planned()["plans"] if plan["recipe"] == "int4_g128"]
    same = [plan["calibrate"] for plan in same if plan["kv_cache"] == bundle.kv_cache]
    assert same == [None, "none"]

    # Where it is the best of both, `plan` prints its command, and `export --for` makes it.
    (tmp_path / "calibrated").mkdir()
    (tmp_path / "calibrated" / "manifest.json").write_text(json.dumps(bundle.manifest))
    wanted += ["--bundles", str(tmp_path / "calibrated")]
    assert planned()["command"].endswith("--calibrate none --modalities text")
    seen: dict[str, Any] = {}

    def exported(*args: object, **options: Any) -> None:
        seen.update(options)
        raise UsageError("seen")

    monkeypatch.setattr(cli_export, "export_bundle", exported)
    assert main(["export", source, str(tmp_path / "new"), *wanted]) == 2
    assert (seen["calibrate"], seen["recipe"].name) == ("none", "int4_g128")


def test_measured_speeds(
    shapes: Mapping[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    known = rank_plans(shapes["e2b"], Machine("pi4", 8 * GIB, ("onnx",), 5.56), Wishes())
    chosen = next(plan for plan in known if plan.recipe.name == "int8")
    row: dict[str, Any] = {"n_prompt": 0, "n_gen": 8, "n_depth": 0, "samples_ns": [10**9] * 3}
    bytes_per_token = chosen.plan.bytes_per_token
    append_record(
        tmp_path / "r.jsonl",
        BenchRow(name="x", time="t", format="onnx", recipe="int8", bytes_per_token=bytes_per_token, **row),
    )
    words = ["plan", shapes["e2b"], "--for", "pi4-8gb", "--results", str(tmp_path / "r.jsonl")]
    assert main([*words, "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    measured = [plan for plan in plans if plan["speed_measured"]]
    assert {plan["recipe"] for plan in measured} == {"int8"}
    assert {plan["tokens_per_second"] for plan in measured} == {8.0}
    assert plans[0] == measured[0]  # the only ones above 5 tokens a second


# What is asked for. -------------------------------------------------------------------------------


def test_a_quality_that_is_asked_for(shapes: Mapping[str, str], tiny_checkpoint: Path) -> None:
    plans = rank_plans(shapes["e4b"], ROOMY, Wishes(min_quality=60.0, min_speed=100.0))
    assert plans and all((plan.mmlu or 0) >= 60.0 for plan in plans)
    with pytest.raises(UsageError, match=r"the best that is published is 63\.4 %"):
        rank_plans(shapes["e4b"], ROOMY, Wishes(min_quality=70.0))
    with pytest.raises(UsageError, match="no MMLU of this model is published"):
        rank_plans(str(tiny_checkpoint), ROOMY, Wishes(min_quality=1.0))


@pytest.mark.slow
def test_a_ceiling_is_of_anonymous_memory(shapes: Mapping[str, str]) -> None:
    plans = rank_plans(shapes["e4b"], ROOMY, Wishes(ceiling=2 * GIB))
    assert plans and all(plan.plan.needed_bytes <= 2 * GIB for plan in plans)
    with pytest.raises(CeilingError, match="with a ceiling of 1 MiB"):
        rank_plans(shapes["e4b"], ROOMY, Wishes(ceiling=1 << 20))


def test_the_printed_command_is_the_first_plan(
    shapes: Mapping[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", shapes["e4b"], "--for", "pi4", "--ceiling", "2GiB", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    words = found["command"].split()
    assert words[:3] == ["gemma-edge", "export", shapes["e4b"]] and words[-2:] == ["--ceiling", "2GiB"]
    assert main([*words[1:], "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert (plan["needed_bytes"], plan["context"]) == (found["plans"][0]["memory_bytes"], 4096)
    assert main(["plan", shapes["e4b"], "--for", "pi4"]) == 0
    text = capsys.readouterr().out
    assert "not measured" in text and "measured by others: https://" in text and "<= " in text
    assert text.splitlines()[-1].startswith("gemma-edge export ")


@pytest.mark.slow
def test_an_export_for_a_device_takes_the_first_plan(
    tiny_checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ["--for", "pi4", "--context", "64", "--modalities", "text"]
    assert main(["plan", str(tiny_checkpoint), *wanted, "--json"]) == 0
    first = json.loads(capsys.readouterr().out)["plans"][0]
    assert main(["export", str(tiny_checkpoint), str(tmp_path / "out"), *wanted, "--no-verify"]) == 0
    bundle = Bundle.open(tmp_path / "out")
    assert (bundle.format, bundle.kv_cache, bundle.context) == (first["format"], first["kv_cache"], 64)
    assert bundle.manifest["recipe"]["name"] == first["recipe"]


@pytest.mark.slow
def test_this_machine_is_asked(tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(tiny_checkpoint), "--device", "local", "--context", "64"]) == 0
    assert "GB/s (measured now)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["plan", "CKPT", "--for", "pi6"], "no device 'pi6' is known"),
        (["plan", "CKPT", "--for", "pi5", "--device", "local"], "give one of them"),
        (["plan", "CKPT", "--for", "pi4", "--context", "99999999"], "--context must be 1 to"),
        (["plan", "CKPT", "--for", "pi4", "--ceiling", "2G"], "2GiB"),
        (["plan", "CKPT", "--for", "pi4", "--modalities", "text,smell"], "unknown modality"),
        (["plan", "CKPT", "--device", "tape:0"], "expected local"),
        (["plan", "CKPT", "--for", "pi4", "--bundles", "/none"], "/none: no such folder of bundles"),
        (["plan", "CKPT", "--for", "pi4", "--min-quality", "nan"], "a percentage from 0 to 100"),
        (["plan", "CKPT", "--for", "pi4", "--min-speed", "-1"], "--min-speed must be 0 or more"),
        (["export", "CKPT", "OUT", "--for", "pi4", "--recipe", "int8"], "--for chooses --recipe"),
        (["export", "CKPT", "OUT", "--for", "pi4", "--slice", "E2B"], "--for chooses --slice"),
        (["export", "CKPT", "OUT", "--bundles", "."], "--bundles is for --for"),
    ],
)
def test_requests_that_are_refused(
    tiny_checkpoint: Path, capsys: pytest.CaptureFixture[str], words: list[str], told: str
) -> None:
    assert main([str(tiny_checkpoint) if word == "CKPT" else word for word in words]) == 2
    assert told in capsys.readouterr().err
