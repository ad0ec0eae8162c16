"""LoRA adapters merged into checkpoints: equal to PEFT's own merge, or refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_edge.cli.main import main
from gemma_edge.export.checkpoint.open_source import open_source
from gemma_edge.export.exporter import export_bundle
from gemma_edge.export.gate.parity import verify_bundle
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import CheckpointError, GemmaEdgeError, UsageError
from support.random_gemma3n_text import random_source, transformers_model

torch = pytest.importorskip("torch")
peft = pytest.importorskip("peft")
safetensors = pytest.importorskip("safetensors.numpy")

POCKET = Path(__file__).parents[1] / "pocket" / "checkpoint"
Json = dict[str, Any]
ATTENTION = ["q_proj", "v_proj", "o_proj"]
CONFIGS: dict[str, Json] = {
    "lora": {"r": 4, "lora_alpha": 6, "target_modules": [*ATTENTION, "gate_proj"]},
    "patterns": {
        "r": 4,
        "target_modules": [*ATTENTION, "down_proj"],
        "rank_pattern": {"q_proj": 2, "layers.1.self_attn.o_proj": 8},
        "alpha_pattern": {r"layers\.[02]\.self_attn\.(q|v)_proj": 3, "down_proj": 20},
    },
    "rslora": {"r": 9, "lora_alpha": 4, "use_rslora": True, "target_modules": ATTENTION},
    "dora": {"r": 4, "use_dora": True, "target_modules": [*ATTENTION, "up_proj"]},
    "every linear layer": {"r": 2, "target_modules": "all-linear"},
    "an embedding": {"r": 4, "lora_alpha": 2, "target_modules": ["embed_tokens_per_layer", "q_proj"]},
    "whole modules": {
        "r": 2,
        "target_modules": ["q_proj"],
        "modules_to_save": ["per_layer_model_projection", "post_attention_layernorm"],
    },
    "flag for other layers": {"r": 2, "fan_in_fan_out": True, "target_modules": ["q_proj"]},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random checkpoint, as transformers saves it."""
    folder = tmp_path_factory.mktemp("base")
    transformers_model({}, random_source()).save_pretrained(folder)
    return folder


def adapted(folder: Path, base: Path, config: Json, seed: int = 0) -> dict[str, np.ndarray]:
    """Saves an adapter of random weights for the model in `base`; returns what PEFT merges, by name."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    tuned = peft.get_peft_model(model, peft.LoraConfig(**config))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if parameter.requires_grad and "magnitude" in name:
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    tuned.save_pretrained(folder)
    return {name: tensor.numpy() for name, tensor in tuned.merge_and_unload().state_dict().items()}


def edited(folder: Path, **changes: Any) -> Path:
    """An adapter with other fields in its config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_a_merge_is_pefts_merge(base: Path, tmp_path: Path, name: str) -> None:
    merged = adapted(tmp_path / "lora", base, CONFIGS[name])
    with open_source(base) as before, open_source(base, [str(tmp_path / "lora")]) as checkpoint:
        changed = 0
        for tensor in checkpoint.specs:
            expected = merged[f"model.{tensor}"]
            scale = np.abs(expected).max()
            ours = checkpoint.read(tensor)
            np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-6 * scale, err_msg=tensor)
            # Every chunk of rows is the same rows.
            rows = np.concatenate(list(checkpoint.iter_rows(tensor, 7)))
            np.testing.assert_allclose(rows, expected, rtol=0, atol=1e-6 * scale, err_msg=tensor)
            changed += not np.array_equal(ours, before.read(tensor))
        assert changed >= 6
        assert checkpoint.revision() != before.revision()


def test_several_adapters_add_up_with_their_weights(base: Path, tmp_path: Path) -> None:
    one = adapted(tmp_path / "one", base, CONFIGS["lora"], seed=1)
    two = adapted(tmp_path / "two", base, CONFIGS["patterns"], seed=2)
    with (
        open_source(base, [f"{tmp_path}/one=0.5", f"{tmp_path}/two=-2"]) as checkpoint,
        open_source(base) as before,
    ):
        name = "layers.0.self_attn.q_proj.weight"
        start = before.read(name)
        expected = start + 0.5 * (one[f"model.{name}"] - start) - 2 * (two[f"model.{name}"] - start)
        np.testing.assert_allclose(checkpoint.read(name), expected, rtol=0, atol=1e-5)


def test_a_slice_is_cut_out_of_the_merged_model(base: Path, tmp_path: Path) -> None:
    adapted(tmp_path / "lora", base, CONFIGS["every linear layer"])
    adapters = [str(tmp_path / "lora")]
    with (
        open_source(base, adapters) as merged,
        open_source(base, adapters, slice="ffn=40/skip=1") as cut,
    ):
        for part, rows, columns in (("up_proj", 40, 32), ("down_proj", 32, 40)):
            expected = merged.read(f"layers.2.mlp.{part}.weight")[:rows, :columns]
            np.testing.assert_array_equal(cut.read(f"layers.1.mlp.{part}.weight"), expected)
        assert set(cut.changes()) == {"adapters", "slice"}


# Bad input. ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved") / "lora"
    adapted(folder, base, CONFIGS["lora"])
    return folder


@pytest.fixture
def lora(saved: Path, tmp_path: Path) -> Path:
    """An adapter to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "lora"))


def refusal(base: Path, *adapters: object) -> str:
    with pytest.raises(GemmaEdgeError) as caught:
        open_source(base, [str(adapter) for adapter in adapters])
    assert caught.value.exit_code in (2, 3) and "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [("peft_type", "LOHA"), ("peft_type", None), ("use_qalora", True), ("alora_invocation_tokens", [1]),
     ("layer_replication", [[0, 2]]), ("target_parameters", ["x"]), ("trainable_token_indices", [3]),
     ("lora_bias", True), ("megatron_config", {"a": 1}), ("a_field_of_2030", 1),
     ("init_lora_weights", "pissa_niter_4"), ("init_lora_weights", "olora"), ("r", 0), ("r", "8"),
     ("r", True), ("lora_alpha", float("nan")), ("lora_alpha", None), ("alpha_pattern", [1]),
     ("alpha_pattern", {"(a+)+": 1}), ("alpha_pattern", {"(": 1}),
     ("alpha_pattern", {".*.*.*.*x": 1}), ("alpha_pattern", {"q_proj": "big"}),
     ("rank_pattern", {"q_proj": 0.5})],
)  # fmt: skip
def test_configs_that_are_not_merged(base: Path, lora: Path, field: str, value: object) -> None:
    assert field in refusal(base, edited(lora, **{field: value}))


def test_a_rank_that_the_config_does_not_state(base: Path, lora: Path) -> None:
    assert "expected a rank of adapter_config.json: [5]" in refusal(base, edited(lora, r=5))


MODEL = "base_model.model."
QUERY = f"{MODEL}model.layers.0.self_attn.q_proj"


def put(**tensors: tuple[int, ...]) -> Callable[[Json], object]:
    """Adds tensors of these shapes, which may replace others."""
    return lambda file: file.update({name: np.zeros(shape, np.float32) for name, shape in tensors.items()})


def pair(module: str, a: tuple[int, ...], b: tuple[int, ...], kind: str = "lora_{}.weight") -> Any:
    """Adds both factors of a module."""
    return put(**{f"{MODEL}{module}.{kind.format(end)}": shape for end, shape in (("A", a), ("B", b))})


SPOILED: dict[str, tuple[Callable[[Json], object], str]] = {
    "another layer": (pair("model.layers.99.mlp.up_proj", (4, 32), (64, 4)), "no such tensor. The adapter"),
    "another width": (put(**{f"{QUERY}.lora_A.weight": (4, 33)}), "(rank, 32)"),
    "another height": (put(**{f"{QUERY}.lora_B.weight": (9, 4)}), "(64, 4)"),
    "half a product": (lambda file: file.pop(f"{QUERY}.lora_B.weight"), "two factors"),
    "a bias of its own": (put(**{f"{QUERY}.lora_B.bias": (64,)}), "another tensor"),
    "nothing": (put(**{f"{QUERY}.lora_A.weight": (0, 32)}), "weights in BF16"),
    "a convolution": (put(**{f"{QUERY}.lora_A.weight": (4, 32, 1, 1)}), "(rank, 32)"),
    "a name of no PEFT": (put(**{"q_proj.lora_A.weight": (4, 32)}), "begins with"),
    "half of DoRA": (put(**{f"{QUERY}.lora_magnitude_vector": (64,)}), "DoRA in one"),
    "a norm of another shape": (put(**{f"{MODEL}model.norm.weight": (3,)}), "(32,)"),
    "a tied head": (pair("lm_head", (4, 32), (96, 4)), "head is tied"),
    "tied embeddings": (
        pair("model.embed_tokens", (4, 96), (32, 4), "lora_embedding_{}"),
        "head is tied",
    ),
    "integers": (
        lambda file: file.update({f"{QUERY}.lora_A.weight": np.zeros((4, 32), np.int64)}),
        "weights in BF16",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_tensors_that_are_not_merged(base: Path, lora: Path, name: str) -> None:
    path = lora / "adapter_model.safetensors"
    tensors = safetensors.load_file(path)
    change, expected = SPOILED[name]
    change(tensors)
    safetensors.save_file(tensors, path)
    assert expected in refusal(base, lora)


def test_files_that_are_no_adapter(base: Path, lora: Path, tmp_path: Path) -> None:
    weights = lora / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[:-1])
    assert "adapter_model.safetensors" in refusal(base, lora)
    weights.write_bytes(data)
    (lora / "adapter_model.bin").write_bytes(b"pickle")
    open_source(base, [str(lora)]).close()
    weights.unlink()
    assert "safe_serialization=True" in refusal(base, lora)
    (lora / "adapter_config.json").write_text("{")
    assert "adapter_config.json" in refusal(base, lora)
    (tmp_path / "empty").mkdir()
    assert "adapter_config.json" in refusal(base, tmp_path / "empty")
    assert "neither" in refusal(base, tmp_path / "none")


def test_weights_that_are_none(base: Path, lora: Path, tmp_path: Path) -> None:
    for text in ("=", "=x", "=nan", "=inf"):
        assert "FOLDER=WEIGHT" in refusal(base, f"{lora}{text}")
    adapted(tmp_path / "dora", base, CONFIGS["dora"])
    assert "Leave out =WEIGHT" in refusal(base, f"{tmp_path}/dora=0.5")
    assert "two that do not add up" in refusal(base, lora, tmp_path / "dora")
    assert "two that do not add up" in refusal(base, tmp_path / "dora", lora)


def test_a_nan_is_named_when_it_is_read(base: Path, lora: Path) -> None:
    path = lora / "adapter_model.safetensors"
    tensors = safetensors.load_file(path)
    tensors[f"{QUERY}.lora_A.weight"][0, 0] = np.nan
    safetensors.save_file(tensors, path)
    with open_source(base, [str(lora)]) as checkpoint, pytest.raises(CheckpointError, match="lora_A"):
        checkpoint.read("layers.0.self_attn.q_proj.weight")


def test_an_adapter_of_another_id(base: Path, lora: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    edited(lora, base_model_name_or_path="google/gemma-3n-E2B")
    open_source(base, [str(lora)]).close()  # a folder has no id
    monkeypatch.setattr(
        "gemma_edge.export.checkpoint.adapted_checkpoint.resolve",
        lambda source, adapter=False: Path(source) if adapter else base,
    )
    assert "is an adapter of google/gemma-3n-E2B, not of google/gemma-3n-E2B-it" in refusal(
        Path("google/gemma-3n-E2B-it"), lora
    )


# Export and verify. -------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_export_with_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, lora, generator = POCKET, tmp_path / "lora", np.random.default_rng(0)
    lora.mkdir()
    with open_source(checkpoint) as opened:
        shapes = {name: spec.shape for name, spec in opened.specs.items()}
    audio = next(n for n in shapes if n.startswith("audio_tower") and n.endswith("q_proj.weight"))
    text, table = "layers.0.self_attn.q_proj.weight", "embed_tokens_per_layer.weight"
    targets = {f"language_model.{name}": shapes[name] for name in (text, table)} | {audio: shapes[audio]}
    tensors = {}
    for name, (rows, columns) in targets.items():
        module = f"base_model.model.model.{name.removesuffix('.weight')}"
        is_table = "embed" in name
        for end, shape in {
            "lora_embedding_A" if is_table else "lora_A.weight": (2, rows if is_table else columns),
            "lora_embedding_B" if is_table else "lora_B.weight": (columns if is_table else rows, 2),
        }.items():
            tensors[f"{module}.{end}"] = generator.normal(0, 0.05, shape).astype(np.float32)
    safetensors.save_file(tensors, lora / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "base_model_name_or_path": str(checkpoint)}
    (lora / "adapter_config.json").write_text(json.dumps(config))

    made = export_bundle(
        checkpoint,
        tmp_path / "out",
        recipe="fp32",
        context=64,
        modalities=["text", "audio"],
        adapters=[str(lora)],
    )
    assert made.agreement is not None and made.agreement.max_abs < 1e-2
    records = Bundle.open(made.path).manifest["adapters"]
    assert [(each["name"], each["weight"], len(each["sha256"])) for each in records] == [(lora.name, 1.0, 64)]
    assert verify_bundle(made.path, checkpoint, adapters=[str(lora)]).max_abs < 1e-2
    for adapters in ([], [f"{lora}=0.5"]):
        with pytest.raises(UsageError, match=f"give --adapter {lora.name}=1.0"):
            verify_bundle(made.path, checkpoint, adapters=adapters)
    # The other checkpoint is another bundle: it is not replaced by chance.
    assert main(["export", str(checkpoint), str(made.path), "--recipe", "int8", "--context", "64"]) == 2
    capsys.readouterr()
    assert main(["export", str(lora), str(tmp_path / "x")]) == 2
    assert f"gemma-edge export {checkpoint} OUT --adapter {lora}" in capsys.readouterr().err
    assert main(["run", str(lora), "Hello"]) == 3
    assert "--adapter" in capsys.readouterr().err
