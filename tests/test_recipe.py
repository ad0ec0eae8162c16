"""Recipes: ours load and mean what their names say; a user's are refused by the name of the field."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.export.exporter import resolve_recipe
from gemma_edge.export.model.gemma3n.gemma3n_text_tensors import tensor_specs
from gemma_edge.export.model.tensor_spec import Part, TensorSpec
from gemma_edge.export.weights.recipe import DEFAULT_RECIPE, FP32, PARTS, Precision, list_recipes, load_recipe
from gemma_edge.runtime.errors import ConfigError, UsageError
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig

NAMES = [
    "balanced",
    "fp32",
    "int4",
    "int4_channelwise",
    "int4_g128",
    "int4_g32",
    "int4_g64",
    "int8",
    "maximum_efficiency",
    "performance",
]


def valid() -> dict[str, Any]:
    return load_recipe("int4").to_dict()


def write(folder: Path, data: object) -> Path:
    path = folder / "mine.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_our_recipes_all_load() -> None:
    assert list(list_recipes()) == NAMES and all(list_recipes().values())
    for name in NAMES:
        assert set(load_recipe(name).parts) == set(PARTS)


@pytest.mark.parametrize(
    ("name", "bits", "group"),
    [("int4_g32", 4, 32), ("int4_g64", 4, 64), ("int4_g128", 4, 128), ("int8", 8, 64)],
)
def test_names_say_bits_and_group(name: str, bits: int, group: int) -> None:
    recipe = load_recipe(name)
    assert recipe.parts[Part.DECODER] == recipe.parts[Part.HEAD] == Precision(bits, group)
    assert recipe.parts[Part.SMALL].bits == 8


@pytest.mark.parametrize(("name", "bits"), [("maximum_efficiency", 4), ("balanced", 8), ("performance", 32)])
def test_everyday_names(name: str, bits: int) -> None:
    assert load_recipe(name).parts[Part.DECODER].bits == bits


def test_an_alias_is_the_recipe_it_names() -> None:
    assert load_recipe("int4_g64") == load_recipe("int4")
    assert load_recipe("maximum_efficiency") == load_recipe(DEFAULT_RECIPE)


def test_bounds_grow_as_bits_fall() -> None:
    bounds = [load_recipe(name).bounds for name in ("fp32", "int8", "int4_g32", "int4", "int4_g128")]
    assert [b.mean_kl for b in bounds] == sorted(b.mean_kl for b in bounds)
    assert [b.top1 for b in bounds] == sorted((b.top1 for b in bounds), reverse=True)
    assert bounds[0].max_abs == 1e-3


@pytest.mark.parametrize(
    ("columns", "expected"),
    [(2048, 128), (128, 128), (127, 64), (64, 64), (48, 32), (16, 16)],
)
def test_group_never_exceeds_the_columns(columns: int, expected: int) -> None:
    spec = TensorSpec("w", (8, columns), Part.DECODER)
    assert load_recipe("int4_g128").precision(spec) == Precision(4, expected)


def test_narrow_and_vector_tensors_stay_fp32() -> None:
    recipe = load_recipe("int4")
    assert recipe.precision(TensorSpec("w", (8, 15), Part.DECODER)) == FP32
    assert recipe.precision(TensorSpec("norm", (2048,), Part.VECTOR)) == FP32
    assert load_recipe("fp32").precision(TensorSpec("w", (8, 64), Part.HEAD)) == FP32


def test_every_tensor_of_a_default_model_gets_a_precision() -> None:
    config = Gemma3nConfig.from_dict({"model_type": "gemma3n_text"})
    recipe = load_recipe("int4_g128")
    by_name = {name: recipe.precision(spec) for name, spec in tensor_specs(config).items()}
    assert by_name["layers.0.laurel.linear_right.weight"] == Precision(8, 64)
    assert by_name["layers.0.mlp.down_proj.weight"] == Precision(4, 128)
    assert by_name["embed_tokens_per_layer.weight"] == Precision(4, 32)
    assert by_name["norm.weight"] == FP32


def test_a_users_file_round_trips(tmp_path: Path) -> None:
    data = valid() | {"name": "mine", "kv_cache": "int8", "clip": "none"}
    recipe = load_recipe(write(tmp_path, data))
    assert recipe.to_dict() == data and (recipe.kv_cache, recipe.clip) == ("int8", "none")
    del data["kv_cache"], data["clip"]
    assert load_recipe(str(write(tmp_path, data))).kv_cache == "fp32"


@pytest.mark.parametrize(("name", "near"), [("int44", "int4"), ("balance", "balanced"), ("INT8", "")])
def test_an_unknown_name_lists_the_names(name: str, near: str) -> None:
    with pytest.raises(UsageError, match="Choose from balanced, fp32") as caught:
        load_recipe(name)
    assert caught.value.exit_code == 2
    assert (f"Did you mean {near}?" in str(caught.value)) == bool(near)


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    for path in (tmp_path / "none.json", tmp_path, tmp_path / "none"):
        with pytest.raises(UsageError, match="no such recipe file"):
            load_recipe(path)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"speed": 1}, "speed"),
        ({"name": ""}, "name"),
        ({"parts": []}, "parts"),
        ({"clip": "max"}, "clip"),
        ({"clip": ["mse"]}, "clip"),
        ({"kv_cache": "fp8"}, "kv_cache"),
        ({"bounds": {"mean_kl": 1}}, "bounds.top1"),
        ({"bounds": {"mean_kl": -1, "top1": 1}}, "bounds.mean_kl"),
        ({"bounds": {"mean_kl": 1, "top1": 1.5}}, "bounds.top1"),
        ({"bounds": {"mean_kl": 1, "top1": 1, "max_abs": float("nan")}}, "bounds.max_abs"),
        ({"bounds": {"mean_kl": True, "top1": 1}}, "bounds.mean_kl"),
        ({"alias": "int4"}, "name"),
    ],
)
def test_a_bad_field_is_named(tmp_path: Path, change: dict[str, Any], field: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, valid() | change))
    assert caught.value.field == field and "mine.json" in str(caught.value) and caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("part", "value", "field"),
    [
        ("decoder", {"bits": 5, "group": 32}, "parts.decoder.bits"),
        ("decoder", {"bits": True, "group": 32}, "parts.decoder.bits"),
        ("decoder", {"bits": 4.0, "group": 32}, "parts.decoder.bits"),
        ("head", {"bits": 4}, "parts.head.group"),
        ("head", {"bits": 4, "group": 48}, "parts.head.group"),
        ("head", {"bits": 4, "group": 8}, "parts.head.group"),
        ("head", {"bits": 4, "group": 512}, "parts.head.group"),
        ("ple", {"bits": 32, "group": 32}, "parts.ple.group"),
        ("ple", {"group": 32}, "parts.ple.bits"),
        ("small", {"bits": 8, "group": 32, "size": 1}, "parts.small.size"),
        ("small", 8, "parts.small"),
        ("vector", {"bits": 32}, "parts.vector"),
    ],
)
def test_a_bad_part_is_named(tmp_path: Path, part: str, value: object, field: str) -> None:
    data = valid()
    data["parts"][part] = value
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, data))
    assert caught.value.field == field


@pytest.mark.parametrize("missing", ["name", "description", "parts", "bounds"])
def test_a_missing_field_is_named(tmp_path: Path, missing: str) -> None:
    data = valid()
    del data[missing]
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, data))
    assert caught.value.field == missing


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    data = valid()
    del data["parts"]["ple"]
    with pytest.raises(ConfigError, match=r"parts\.ple"):
        load_recipe(write(tmp_path, data))


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"name": 1', "\x00", "[" * 100_000])
def test_what_is_not_a_json_object_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"mine\.json: file"):
        load_recipe(write(tmp_path, text))


@pytest.mark.parametrize("alias", ["balanced", "none", "../recipes/int4", "", 4])
def test_an_alias_must_name_one_of_ours_directly(tmp_path: Path, alias: object) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, {"alias": alias, "description": "mine"}))
    assert caught.value.field == "alias"


@pytest.mark.parametrize("own", ["int4", "fp32"])  # whose own cache is int8, and fp32
@pytest.mark.parametrize("asked", ["int8", "fp32"])
def test_the_kv_cache_that_is_asked_for_is_the_one_that_is_made(own: str, asked: str) -> None:
    for format in ("onnx", "tflite", "litertlm"):
        assert resolve_recipe(own, asked, format).kv_cache == asked


def test_a_recipes_int8_cache_is_the_default_where_it_costs_no_time() -> None:
    made = {form: resolve_recipe("int4", None, form).kv_cache for form in ("onnx", "tflite", "litertlm")}
    assert made == {"onnx": "int8", "tflite": "fp32", "litertlm": "int8"}
    assert resolve_recipe("fp32", None, "litertlm").kv_cache == "fp32"
