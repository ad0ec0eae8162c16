"""Encoders from a checkpoint into a bundle: what is written, what gate and plan say, what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_edge.cli.main import main
from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.exporter import export_bundle, plan_export
from gemma_edge.export.formats.onnx.onnx_encoders import emit_encoder, encoder_memory
from gemma_edge.export.gate.encoder_parity import encoder_errors, relative_error, sample_input
from gemma_edge.export.gate.parity import Agreement, check_quality, verify_bundle
from gemma_edge.export.gate.weight_check import check_weights
from gemma_edge.export.model.gemma3n.gemma3n_towers import read_tower
from gemma_edge.export.model.tower import Tower
from gemma_edge.export.plan import Plan
from gemma_edge.export.plan_table import format_plan
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.export.synth.synth_gemma3n import text_config
from gemma_edge.export.synth.synth_towers import audio_json, preprocessor_json, vision_json
from gemma_edge.export.weights.recipe import Bounds, load_recipe
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.modalities import KINDS, Kind
from gemma_edge.runtime.errors import BundleError, ConfigError, ParityError, UsageError
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.files.file_digest import sha256
from gemma_edge.runtime.media.audio_encoder import AudioEncoder
from gemma_edge.runtime.media.image_encoder import VisionEncoder
from support.random_gemma3n_audio import AudioSource, TransformersAudio
from support.random_gemma3n_vision import transformers_model

Json = dict[str, Any]
# What a published config.json has; ids left out are those that transformers has for absent ones.
E2B: Json = {
    "text_config": text_config("e2b"),
    "vision_config": vision_json(False, 262_144, 128),
    "audio_config": audio_json(False, 262_272, 128),
}
PERFECT = Agreement(1, 0.0, 0.0, 1.0, 0.0, 1.0, 1.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return synthesize(tmp_path_factory.mktemp("encoders") / "tiny", encoders=True, progress=False).path


@pytest.fixture(scope="module")
def exact(source: Path) -> Path:
    """In fp32, verified."""
    return export_bundle(source, source.with_name("fp32"), recipe="fp32", context=64, chunk=32).path


@pytest.fixture
def bundle(exact: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(exact, tmp_path / "bundle"))


def edit(path: Path, change: Callable[[Json], Any]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def encoder(kind: Kind, processors: dict[str, Json] | None = None, **changes: Any) -> Tower:
    """An encoder of E2B's size."""
    text = Gemma3nConfig.from_dict(text_config("e2b"))
    files = {"preprocessor_config.json": preprocessor_json(False)} if processors is None else processors
    return read_tower(kind, E2B | changes, Path("config.json"), lambda name: files.get(name, {}), text)


# What is written. -----------------------------------------------------------------------------------


def test_the_audio_of_a_bundle_is_that_of_transformers(source: Path, exact: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    modality = Bundle.open(exact).audio
    assert modality is not None
    with Checkpoint.open(source) as checkpoint:
        names = checkpoint.towers["audio"].specs
        weights = {name: checkpoint.read(name) for name in names}
        sample = sample_input(checkpoint.towers["audio"])
        theirs = TransformersAudio(AudioSource(modality.config, weights, checkpoint.config))
    mask = np.arange(len(sample)) < len(sample) - 20
    with AudioEncoder(exact / modality.graph, threads=1) as engine:
        rows = engine.encode(sample, mask)
    np.testing.assert_allclose(rows, theirs.soft_tokens(sample, mask), atol=1e-3)
    with modality.token_table() as table:
        ours = table.lookup(np.arange(len(modality.ids)))
    np.testing.assert_allclose(ours, theirs.hard_tokens(), atol=1e-3)


def test_the_images_of_a_bundle_are_those_of_transformers(source: Path, exact: Path) -> None:
    """With timm, where it and torchvision import."""
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError) as error:
        pytest.skip(f"timm: {error}")
    import torch

    modality = Bundle.open(exact).vision
    assert modality is not None
    with Checkpoint.open(source) as checkpoint:
        pixels = sample_input(checkpoint.towers["vision"])
    with VisionEncoder(exact / modality.graph, threads=1) as engine:
        rows = engine.encode(pixels)
    model = transformers_model(source)
    with torch.no_grad():
        theirs = model.get_image_features(torch.from_numpy(pixels)[None]).pooler_output[0].numpy()
        ids = torch.tensor(list(modality.ids))
        hard = model.embed_vision(input_ids=ids).numpy()
    np.testing.assert_allclose(rows, theirs, atol=1e-3 * np.abs(theirs).max())
    with modality.token_table() as table:
        np.testing.assert_allclose(table.lookup(np.arange(len(ids))), hard, atol=1e-3)


def test_the_manifest_has_what_config_json_says(source: Path, exact: Path) -> None:
    config = json.loads((source / "config.json").read_text())
    opened = Bundle.open(exact)
    assert list(opened.modalities) == list(KINDS)
    for kind, prefix, letter in (("vision", "image", "i"), ("audio", "audio", "a")):
        modality = opened.modalities[kind]
        assert modality.soft_id == config[f"{prefix}_token_id"]
        assert modality.begin_id == config[f"bo{letter}_token_id"]
        assert modality.end_id == config[f"eo{letter}_token_id"] and modality.end_id in modality.ids
        assert modality.first_id == config[f"{kind}_config"]["vocab_offset"]
        assert modality.token_table().layout.scale == 1.0
    assert opened.vision is not None and opened.vision.config.image_size == 64
    assert opened.audio is not None and opened.audio.log_mel.mel_floor == 1e-5


@pytest.mark.parametrize(
    ("modalities", "kinds"), [(["text"], []), (["text", "image"], ["vision"]), (["audio", "text"], ["audio"])]
)
def test_only_what_is_asked_for(
    modalities: list[str], kinds: list[str], source: Path, tmp_path: Path
) -> None:
    out = export_bundle(
        source, tmp_path / "out", recipe="int8", context=64, chunk=32, modalities=modalities, verify=False
    ).path
    assert list(Bundle.open(out).modalities) == kinds
    assert {path.name for path in out.glob("*_tokens.bin")} == {f"{kind}_tokens.bin" for kind in kinds}
    assert ("modalities" in json.loads((out / "manifest.json").read_text())) == bool(kinds)


@pytest.mark.parametrize(
    ("modalities", "message"),
    [(["text", "smell"], "smell"), (["image"], "text is always"), (["text", "image"], "no image encoder")],
)
def test_what_cannot_be_asked_for(
    modalities: list[str], message: str, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        export_bundle(tiny_checkpoint, tmp_path / "out", modalities=modalities)
    assert list(tmp_path.iterdir()) == []


def test_the_command_line_takes_modalities(source: Path, tmp_path: Path, capsys: Any) -> None:
    assert main(["export", str(source), "--dry-run", "--json", "--modalities", "text, audio"]) == 0
    parts = [part["part"] for part in json.loads(capsys.readouterr().out)["parts"]]
    assert "audio" in parts and "vision" not in parts
    assert main(["synth", str(tmp_path / "no"), "--encoders", "--text-only"]) == 2


def test_inspect_says_what_a_bundle_takes(exact: Path, capsys: Any) -> None:
    assert main(["inspect", str(exact)]) == 0
    shown = capsys.readouterr().out
    for text in ("image encoder", "audio encoder", "takes text, images, audio", "vision encoder off by"):
        assert text in shown


# The gate. ------------------------------------------------------------------------------------------


def test_the_gate_records_how_near_encoders_are(source: Path, exact: Path) -> None:
    found = json.loads((exact / "manifest.json").read_text())["agreement"]["encoders"]
    assert set(found) == set(KINDS) and all(0 < error < 1e-4 for error in found.values())
    assert verify_bundle(exact, source).encoders == pytest.approx(found, rel=0.5)


@pytest.mark.parametrize("kind", KINDS)
def test_another_encoder_does_not_pass(kind: Kind, bundle: Path, source: Path) -> None:
    """A hundredth of its weights lost, all in one place."""
    data = bundle / f"{kind}.onnx.data"
    size = data.stat().st_size
    with open(data, "r+b") as file:
        file.seek(size // 3 // 4096 * 4096)
        file.write(bytes(max(4096, size // 100)))
    record = {"bytes": size, "sha256": sha256(data)}
    edit(bundle / "manifest.json", lambda manifest: manifest["files"].update({data.name: record}))
    with Checkpoint.open(source, [kind]) as checkpoint:
        errors = encoder_errors(Bundle.open(bundle), checkpoint)
        with pytest.raises(ParityError, match=rf"{kind}\.onnx: .* the checkpoint's"):
            check_weights(Bundle.open(bundle), checkpoint)
    assert errors[kind] > 1e-3
    with pytest.raises(ParityError, match=f"{kind} encoder"):
        check_quality(replace(PERFECT, encoders=errors), load_recipe("fp32").bounds)


def test_what_is_not_a_number_does_not_pass() -> None:
    error = relative_error(np.array([np.nan, 1], np.float32), np.ones(2, np.float32))
    with pytest.raises(ParityError):
        check_quality(replace(PERFECT, encoders={"vision": error}), Bounds(1e9, 0.0, encoder=1e9))


# Bad bundles. ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["vision.onnx", "audio.onnx", "vision_tokens.bin"])
def test_an_altered_file_is_named(name: str, bundle: Path) -> None:
    raw = bytearray((bundle / name).read_bytes())
    raw[len(raw) // 2] ^= 1
    (bundle / name).write_bytes(raw)
    with pytest.raises(BundleError) as error:
        Bundle.open(bundle)
    assert error.value.path == bundle / name and error.value.field == "sha256"


@pytest.mark.parametrize(
    ("kind", "changes", "field"),
    [
        ("vision", None, "modalities.vision"),
        ("vision", {"graph": "../vision.onnx"}, "files"),
        ("vision", {"graph": 3}, "modalities.vision.graph"),
        ("vision", {"soft_tokens": 17}, "modalities.vision.soft_tokens"),
        ("vision", {"size": 65}, "modalities.vision.size"),
        ("vision", {"config": {}}, "modalities.vision.config"),
        ("vision", {"config": []}, "modalities.vision.config"),
        ("vision", {"preprocessor": {"resample": 17}}, "modalities.vision.preprocessor"),
        ("audio", {"soft_id": 544}, "modalities.audio.soft_id"),
        ("audio", {"begin_id": -1}, "modalities.audio.begin_id"),
        ("audio", {"end_id": True}, "modalities.audio.end_id"),
        ("audio", {"memory": {"resident": 1}}, "modalities.audio.memory.activations"),
        ("audio", {"preprocessor": {"feature_size": 64}}, "modalities.audio.preprocessor"),
        ("audio", {"tokens": {}}, "modalities.audio.tokens.first_id"),
    ],
)
def test_nonsense_in_the_manifest_is_named(kind: str, changes: Json | None, field: str, bundle: Path) -> None:
    def change(manifest: Json) -> None:
        if changes is None:
            manifest["modalities"][kind] = []
        else:
            manifest["modalities"][kind].update(changes)

    edit(bundle / "manifest.json", change)
    with pytest.raises(BundleError) as error:
        Bundle.open(bundle)
    assert error.value.field.startswith(field)


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"rows": 15}, "modalities.vision.tokens"),
        ({"first_id": 500}, "modalities.vision.tokens"),
        ({"file": "none.bin"}, "files"),
        ({"data": {"offset": 64, "stride": 512}}, "layout.data"),
    ],
)
def test_a_token_table_that_is_none(changes: Json, field: str, bundle: Path) -> None:
    edit(bundle / "manifest.json", lambda m: m["modalities"]["vision"]["tokens"].update(changes))
    with pytest.raises(BundleError) as error:
        Bundle.open(bundle)
    assert error.value.field == field


def test_a_modality_of_later_versions_is_refused(bundle: Path) -> None:
    edit(bundle / "manifest.json", lambda m: m["modalities"].update(smell={}))
    with pytest.raises(BundleError, match="vision and audio"):
        Bundle.open(bundle)


# Configs. -------------------------------------------------------------------------------------------


def test_ids_that_config_json_leaves_out() -> None:
    vision, audio = encoder("vision"), encoder("audio")
    assert (vision.soft_id, vision.begin_id, vision.end_id) == (262_145, 255_999, 262_144)
    assert (audio.soft_id, audio.begin_id, audio.end_id) == (262_273, 256_000, 262_272)
    assert encoder("vision", image_token_id=262_150).soft_id == 262_150
    with pytest.raises(ConfigError, match="boa_token_id"):
        encoder("audio", boa_token_id=262_400)


def test_processors_in_either_file() -> None:
    flat = preprocessor_json(False) | {"resample": 3, "mel_floor": 1e-3}
    nested = {"image_processor": {"resample": 3}, "feature_extractor": {"mel_floor": 1e-3}}
    # As published: processor_config.json is there and says nothing about either.
    beside: Json = {"processor_class": "Gemma3nProcessor", "image_seq_length": 256}
    for files in (
        {"preprocessor_config.json": flat},
        {"preprocessor_config.json": flat, "processor_config.json": beside},
        {"preprocessor_config.json": preprocessor_json(False), "processor_config.json": nested},
    ):
        assert encoder("vision", files).preprocessor["resample"] == 3
        assert encoder("audio", files).preprocessor["mel_floor"] == 1e-3
    assert encoder("vision", {}).preprocessor["resample"] == 2
    with pytest.raises(ConfigError, match=r"feature_size: expected 128"):
        encoder("audio", {"preprocessor_config.json": {"feature_size": 80}})


# The plan. ------------------------------------------------------------------------------------------


def planned(size: str, recipe: str, kinds: tuple[Kind, ...] = KINDS) -> Plan:
    config = Gemma3nConfig.from_dict(text_config(size))
    return plan_export(
        config, load_recipe(recipe), 4096, 128, "onnx", {kind: encoder(kind) for kind in kinds}
    )


@pytest.mark.parametrize(("size", "limit"), [("e2b", 2 << 30), ("e4b", 3 << 30)])
def test_encoders_fit_where_the_decoder_does(size: str, limit: int) -> None:
    """They are released before it is loaded."""
    plan, text = planned(size, "int4"), planned(size, "int4", ())
    assert plan.peak_bytes == text.peak_bytes and plan.needed_bytes <= limit
    assert plan.beside_bytes > plan.peak_bytes
    assert text.beside_bytes == text.peak_bytes


def test_config_json_alone_is_enough_to_plan(source: Path, tmp_path: Path, capsys: Any) -> None:
    shown = []
    for folder in (source, tmp_path):
        if folder is tmp_path:
            for name in ("config.json", "preprocessor_config.json"):
                shutil.copy(source / name, tmp_path)
        assert main(["export", str(folder), "--dry-run", "--json"]) == 0
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1] and "vision" in shown[0]


def test_the_peak_is_that_of_the_larger_phase(source: Path) -> None:
    with Checkpoint.open(source) as checkpoint:
        config, encoders = checkpoint.config, checkpoint.towers
    plan = plan_export(config, load_recipe("int4"), 64, 32, "onnx", encoders)
    data = {kind: emit_encoder(e, load_recipe("int4")).data for kind, e in encoders.items()}
    memory = {kind: sum(encoder_memory(e, data[kind])) for kind, e in encoders.items()}
    assert plan.peak_bytes == max(memory.values()) + plan.base_bytes  # the tiny decoder has less
    parts = {part.part: part for part in plan.parts}
    for kind in KINDS:
        assert parts[kind].memory_bytes == memory[kind] and parts[kind].residency == "on demand"
        assert parts[kind].elements == sum(t.elements for t in data[kind].tensors)


@pytest.mark.parametrize(
    ("kind", "recipe", "low", "high"),
    [
        ("vision", "int4", 290 << 20, 330 << 20),  # packed integers
        ("audio", "int4", 0, 64 << 20),  # its weights stay in their file
        ("vision", "fp32", 1 << 30, 3 << 30),
        ("audio", "fp32", 1 << 30, 3 << 30),
    ],
)
def test_what_a_loaded_encoder_takes(kind: Kind, recipe: str, low: int, high: int) -> None:
    resident, _ = encoder_memory(encoder(kind), emit_encoder(encoder(kind), load_recipe(recipe)).data)
    assert low < resident < high


def test_the_table_has_a_row_for_each_encoder() -> None:
    text = format_plan(planned("e2b", "int4").to_dict())
    assert "image encoder" in text and "audio encoder" in text and "in a later turn" in text
    assert "in a later turn" not in format_plan(planned("e2b", "int4", ()).to_dict())
