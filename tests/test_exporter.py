"""`export_bundle`: what it publishes, what it refuses, and that it publishes nothing then."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_edge.export import exporter
from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.exporter import Exported, export_bundle, plan_export
from gemma_edge.export.model.tensor_spec import EMBEDDING_NAME, PLE_NAME
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.export.synth.synth_gemma3n import text_config
from gemma_edge.export.weights.recipe import load_recipe
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.ple_table import PleTable
from gemma_edge.runtime.artifacts.row_table import RowTable
from gemma_edge.runtime.errors import (
    CeilingError,
    CheckpointError,
    ConfigError,
    GemmaEdgeError,
    ParityError,
    UsageError,
)
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from support.random_gemma3n_text import Json
from support.refused_inputs import poke


@pytest.fixture
def checkpoint(tiny_checkpoint: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture(scope="module")
def exported(tiny_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """fp32, verified."""
    return export_bundle(
        tiny_checkpoint, tmp_path_factory.mktemp("fp32") / "out", recipe="fp32", context=128, chunk=32
    )


def refused(
    error: type[GemmaEdgeError], checkpoint: Path, out: Path, match: str, **options: Any
) -> GemmaEdgeError:
    """The error; nothing is left beside `out`."""
    out.parent.mkdir(exist_ok=True)
    before = sorted(out.parent.iterdir())
    with pytest.raises(error, match=match) as caught:
        export_bundle(checkpoint, out, **{"context": 64, "verify": False, **options})
    assert sorted(out.parent.iterdir()) == before and not out.exists()
    return caught.value


# What is published. -------------------------------------------------------------------------------


def test_the_bundles_files_and_manifest(exported: Exported, tiny_checkpoint: Path) -> None:
    bundle = Bundle.open(exported.path)
    bundle.check_hashes()
    assert set(bundle.files) == {
        "decoder.onnx",
        "decoder.onnx.data",
        "ple.bin",
        "tokenizer.model",
        "chat_template.jinja",
        "generation_config.json",
    }
    manifest = bundle.manifest
    assert (bundle.context, bundle.chunk, bundle.kv_cache) == (128, 32, "fp32")
    assert manifest["schema_version"] == 1 and manifest["format"] == "onnx"
    with Checkpoint.open(tiny_checkpoint) as checkpoint:
        assert bundle.config == checkpoint.config
        source = {"name": tiny_checkpoint.name, "revision": checkpoint.revision()}
    assert {**manifest["source"], "folder": ""} == {**source, "folder": ""}
    assert str(tiny_checkpoint.parent) not in json.dumps(manifest)
    assert manifest["recipe"] == load_recipe("fp32").to_dict()
    assert manifest["plan"] == json.loads(json.dumps(exported.plan.to_dict()))
    assert exported.agreement is not None and manifest["agreement"] == exported.agreement.to_dict()
    assert manifest["added_tokens"]["<image_soft_token>"] == 513


def test_fp32_agrees_to_rounding(exported: Exported) -> None:
    agreement = exported.agreement
    assert agreement is not None
    assert agreement.max_abs <= 1e-3 and agreement.mean_kl <= 1e-6 and agreement.top1 >= 0.99
    assert agreement.perplexity == pytest.approx(agreement.bundle_perplexity, rel=1e-4)


@pytest.mark.parametrize("name", ["fp32", "int4"])
def test_tables_hold_the_checkpoints_rows(
    name: str, exported: Exported, tiny_bundle: Path, tiny_checkpoint: Path
) -> None:
    """Token embeddings are read from the head's data, and both tables come scaled."""
    bundle = Bundle.open(exported.path if name == "fp32" else tiny_bundle)
    tables, c = bundle.manifest["tables"], bundle.config
    assert tables["embedding"]["file"] == "decoder.onnx.data" and tables["per_layer"]["file"] == "ple.bin"
    embeddings = RowTable(bundle.file("decoder.onnx.data"), tables["embedding"])
    per_layer = PleTable(bundle.file("ple.bin"), tables["per_layer"], c)
    ids = [0, 7, c.vocab_size_per_layer_input - 1]
    with Checkpoint.open(tiny_checkpoint) as checkpoint:
        expected = (
            checkpoint.read(EMBEDDING_NAME)[ids] * np.float32(c.embed_scale),
            checkpoint.read(PLE_NAME)[ids] * np.float32(c.ple_scale),
        )
    for got, rows in zip((embeddings.lookup(ids), per_layer.lookup(ids)), expected, strict=True):
        assert got.shape == rows.shape
        if name == "fp32":
            np.testing.assert_allclose(got, rows, rtol=1e-6)
        else:
            assert 0 < np.abs(got - rows).mean() < 0.15 * np.abs(rows).mean()


def test_an_untied_head_has_a_table_of_embeddings(tmp_path: Path) -> None:
    source = synthesize(tmp_path / "untied", config={"tie_word_embeddings": False}, progress=False).path
    exported = export_bundle(source, tmp_path / "out", recipe="int8", context=64)
    assert Bundle.open(exported.path).manifest["tables"]["embedding"]["file"] == "embeddings.bin"
    assert exported.agreement is not None and exported.agreement.mean_kl < 0.01


def test_layouts_and_shards_make_the_same_bundle(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gemma_edge.export.checkpoint import new_checkpoint

    monkeypatch.setattr(new_checkpoint, "SHARD_BYTES", 1_000_000)
    source = synthesize(tmp_path / "text-only", multimodal_layout=False, progress=False).path
    assert (source / "model.safetensors.index.json").is_file()
    other = export_bundle(source, tmp_path / "out", recipe="fp32", context=128, chunk=32, verify=False)
    ours, theirs = (Bundle.open(path).files for path in (exported.path, other.path))
    for name in ("decoder.onnx", "decoder.onnx.data", "ple.bin", "tokenizer.model"):
        assert ours[name] == theirs[name]


def test_an_old_bundle_is_replaced(tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(tiny_bundle, tmp_path / "out"))
    export_bundle(tiny_checkpoint, out, recipe="int8", context=64, verify=False, force=True)
    assert Bundle.open(out).manifest["recipe"]["name"] == "int8"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_unused_kv_weights_of_shared_layers_do_not_matter(
    checkpoint: Path, exported: Exported, tmp_path: Path
) -> None:
    """Published checkpoints hold them; ours may hold NaNs there."""
    for name in ("k_proj", "v_proj", "k_norm"):
        poke(checkpoint, f"layers.11.self_attn.{name}.weight", 3)
    other = export_bundle(checkpoint, tmp_path / "out", recipe="fp32", context=128, chunk=32, verify=False)
    assert (
        Bundle.open(other.path).files["decoder.onnx.data"]
        == Bundle.open(exported.path).files["decoder.onnx.data"]
    )


# What is refused. ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "recipe"),
    [
        ("layers.3.mlp.gate_proj.weight", "int4"),
        ("layers.8.altup.router_norm.weight", "int4"),
        ("embed_tokens.weight", "int4"),
        ("embed_tokens_per_layer.weight", "int4"),
        ("layers.3.mlp.gate_proj.weight", "fp32"),
        ("embed_tokens_per_layer.weight", "fp32"),
    ],
)
def test_nan_weights_name_the_tensor(checkpoint: Path, tmp_path: Path, name: str, recipe: str) -> None:
    poke(checkpoint, name, 77)
    error = refused(CheckpointError, checkpoint, tmp_path / "disk" / "out", re.escape(name), recipe=recipe)
    assert error.exit_code == 3 and "expected a finite weight, got nan" in str(error)


def test_an_infinite_weight(checkpoint: Path, tmp_path: Path) -> None:
    poke(checkpoint, "layers.0.mlp.up_proj.weight", 5, bits=0xFF80)
    refused(CheckpointError, checkpoint, tmp_path / "disk" / "out", r"up_proj\.weight\[0, 5\]: .*got -inf")


def test_a_truncated_shard(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    error = refused(
        CheckpointError, checkpoint, tmp_path / "disk" / "out", r"model\.safetensors: file: expected"
    )
    assert "as the header says" in str(error) and error.exit_code == 3


def test_a_config_that_contradicts_the_tensors(checkpoint: Path, tmp_path: Path) -> None:
    path = checkpoint / "config.json"
    config: Json = json.loads(path.read_text())
    config["text_config"]["intermediate_size"][4] += 8
    path.write_text(json.dumps(config))
    error = refused(
        CheckpointError,
        checkpoint,
        tmp_path / "disk" / "out",
        r"layers\.4\.mlp\.gate_proj\.weight: expected shape",
    )
    assert "Check that config.json belongs to these weights" in str(error)


def test_a_config_that_is_none(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / "config.json").write_text('{"model_type": "llama"}')
    refused(ConfigError, checkpoint, tmp_path / "disk" / "out", "model_type: expected gemma3n")


def test_an_unknown_recipe(tiny_checkpoint: Path, tmp_path: Path) -> None:
    error = refused(
        UsageError, tiny_checkpoint, tmp_path / "disk" / "out", "Did you mean int4_g64", recipe="int4_g46"
    )
    assert error.exit_code == 2


def test_an_unknown_cache(tiny_checkpoint: Path, tmp_path: Path) -> None:
    refused(
        UsageError,
        tiny_checkpoint,
        tmp_path / "disk" / "out",
        "kv_cache must be fp32 or int8",
        kv_cache="fp16",
    )


def test_a_ceiling(tiny_checkpoint: Path, tmp_path: Path) -> None:
    refused(CeilingError, tiny_checkpoint, tmp_path / "disk" / "out", "the ceiling is 1 MiB", ceiling=1 << 20)


def test_a_target_that_is_not_a_bundle(tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="exists and is not a bundle"):
        export_bundle(tiny_checkpoint, tmp_path, verify=False)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("change", ["recipe", "source", "manifest"])
def test_another_bundle_is_replaced_only_by_force(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path, change: str
) -> None:
    out = Path(shutil.copytree(tiny_bundle, tmp_path / "out"))
    recipe = "int8" if change == "recipe" else "int4"
    options: dict[str, Any] = {"recipe": recipe, "context": 64, "verify": False, "calibrate": "none"}
    source = tiny_checkpoint
    if change == "source":
        # Of the same name.
        source = synthesize(tmp_path / tiny_checkpoint.name, seed=1, progress=False).path
    elif change == "manifest":
        (out / "manifest.json").write_text("{")
    what = (
        "of unknown origin"
        if change == "manifest"
        else f"of {re.escape(tiny_checkpoint.name)} in recipe int4"
    )
    with pytest.raises(UsageError, match=f"out is a bundle {what}: --force replaces it"):
        export_bundle(source, out, **options)
    export_bundle(source, out, force=True, **options)
    assert Bundle.open(out).context == 64


def test_the_same_checkpoint_elsewhere_is_the_same(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(tiny_bundle, tmp_path / "out"))
    moved = shutil.copytree(tiny_checkpoint, tmp_path / "moved")
    options: dict[str, Any] = {"recipe": "int4", "context": 64, "verify": False, "calibrate": "none"}
    assert export_bundle(moved, out, **options).path == out


@pytest.mark.parametrize(("most", "default"), [(2048, 2048), (8192, 4096)])
def test_the_default_context_is_at_most_the_models(most: int, default: int) -> None:
    config = Gemma3nConfig.from_dict({**text_config("tiny"), "max_position_embeddings": most})
    assert plan_export(config, load_recipe("int4"), None, 64).context == default


def test_the_parity_gate_keeps_the_old_bundle(
    tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    out = Path(shutil.copytree(tiny_bundle, tmp_path / "disk" / "out"))
    with pytest.raises(
        ParityError, match=r"mean KL .*, and --max-kl is 1e-05.* Nothing was published"
    ) as caught:
        export_bundle(tiny_checkpoint, out, max_kl=1e-5, context=64, force=True, calibrate="none")
    assert caught.value.exit_code == 6
    assert Bundle.open(out).manifest == Bundle.open(tiny_bundle).manifest
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_without_the_gate_a_bundle_is_published(tiny_checkpoint: Path, tmp_path: Path) -> None:
    exported = export_bundle(tiny_checkpoint, tmp_path / "out", recipe="int8", context=64, verify=False)
    assert exported.agreement is None
    assert "agreement" not in Bundle.open(exported.path).manifest


def test_an_interrupt_leaves_nothing(
    tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(exporter, "verify_opened", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_bundle(tiny_checkpoint, tmp_path / "out", recipe="int8", context=64)
    assert list(tmp_path.iterdir()) == []
