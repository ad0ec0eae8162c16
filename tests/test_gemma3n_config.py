"""`Gemma3nConfig`: what is read from config.json, in every spelling, and what is refused, by its name."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.export.synth.synth_gemma3n import text_config
from gemma_edge.runtime.errors import ConfigError
from gemma_edge.runtime.families.config_fields import FULL, SLIDING
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig, Rope
from support.random_gemma3n_text import SMALL, VARIANTS, Json

MINIMAL: Json = {"model_type": "gemma3n_text"}


def config(**changes: Any) -> Gemma3nConfig:
    return Gemma3nConfig.from_dict(SMALL | changes)


def refusal(data: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        Gemma3nConfig.from_dict(data)
    assert caught.value.exit_code == 3
    return caught.value


# What is read. ------------------------------------------------------------------------------------


def test_e2b() -> None:
    c = Gemma3nConfig.from_dict(text_config("e2b"))
    assert (c.num_hidden_layers, c.first_shared_layer, len(c.kv_layers)) == (30, 20, 20)
    assert {c.kv_owner[i] for i in range(20, 30)} == {18, 19}
    assert c.is_sliding(18) and not c.is_sliding(19)
    assert (c.query_size, c.key_value_size, c.ple_row_size) == (2048, 512, 7680)
    assert c.embed_scale == math.sqrt(2048) and c.ple_scale == 16
    assert c.sparsity_multiplier(0) == pytest.approx(1.6448536, abs=1e-6) and c.sparsity_multiplier(10) == 0
    assert c.rope == {FULL: Rope(1e6), SLIDING: Rope(1e4)}


def test_defaults_are_those_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    theirs = json.loads(transformers.Gemma3nTextConfig().to_json_string(use_diff=False))
    assert Gemma3nConfig.from_dict(MINIMAL) == dataclasses.replace(
        Gemma3nConfig.from_dict(theirs), eos_token_ids=(1,)
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(name: str) -> None:
    original = config(**VARIANTS[name])
    written = json.loads(json.dumps(original.to_dict()))
    assert Gemma3nConfig.from_dict(written) == original


def test_both_spellings_of_rope_are_one() -> None:
    old = config(
        rope_theta=2e5, rope_local_base_freq=50.0, rope_scaling={"rope_type": "linear", "factor": 4.0}
    )
    new = config(
        rope_parameters={
            FULL: {"rope_type": "linear", "rope_theta": 2e5, "factor": 4.0},
            SLIDING: {"rope_type": "default", "rope_theta": 50.0},
        }
    )
    assert old == new and old.rope == {FULL: Rope(2e5, 4.0), SLIDING: Rope(50.0)}
    assert config(rope_scaling={"type": "linear", "factor": 4.0}).rope[FULL] == Rope(1e6, 4.0)
    assert config(rope_scaling=None, rope_parameters=None) == config()


def test_linear_rope_divides_every_frequency() -> None:
    scaled, plain = config(**VARIANTS["rope_linear"]), config(rope_theta=5e5)
    assert scaled.inverse_frequencies(FULL) == pytest.approx([f / 8 for f in plain.inverse_frequencies(FULL)])
    assert plain.inverse_frequencies(FULL)[:2] == pytest.approx([1.0, 5e5 ** (-1 / 8)])


def test_one_value_stands_for_every_layer() -> None:
    assert config(intermediate_size=64).intermediate_size == (64,) * 6
    assert config(activation_sparsity_pattern=0.5).activation_sparsity == (0.5,) * 6


def test_layer_types_follow_the_pattern_when_absent() -> None:
    c = Gemma3nConfig.from_dict(MINIMAL | {"num_hidden_layers": 10, "num_kv_shared_layers": 0})
    assert [i for i, t in enumerate(c.layer_types) if t == FULL] == [4, 9]
    assert c.activation_sparsity == (0.0,) * 10


def test_multimodal_config_is_read_from_its_text_part() -> None:
    inner = {"rms_norm_eps": 1e-5, "eos_token_id": 1, **SMALL}
    outer = {"model_type": "gemma3n", "text_config": inner, "eos_token_id": [1, 106], "vision_config": {}}
    c = Gemma3nConfig.from_dict(outer)
    assert c.hidden_size == 32 and c.rms_norm_eps == 1e-5
    assert c.eos_token_ids == (1, 106)  # the outer one adds the end of turn
    assert c.tie_word_embeddings
    assert not Gemma3nConfig.from_dict(outer | {"tie_word_embeddings": False}).tie_word_embeddings


@pytest.mark.parametrize(("value", "ids"), [(None, ()), (7, (7,)), ([7, 8], (7, 8))])
def test_eos_may_be_one_id_or_several_or_none(value: Any, ids: tuple[int, ...]) -> None:
    assert config(eos_token_id=value).eos_token_ids == ids


def test_read_from_a_folder_or_a_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    assert Gemma3nConfig.from_file(tmp_path) == Gemma3nConfig.from_file(tmp_path / "config.json") == config()


# What is refused. ---------------------------------------------------------------------------------

SIZES = (
    "vocab_size vocab_size_per_layer_input hidden_size hidden_size_per_layer_input num_hidden_layers "
    "num_attention_heads num_key_value_heads head_dim sliding_window altup_num_inputs laurel_rank "
    "max_position_embeddings"
).split()


@pytest.mark.parametrize("value", [0, -1, 1.5, "8", True, None, 2**31])
@pytest.mark.parametrize("field", SIZES)
def test_sizes(field: str, value: Any) -> None:
    error = refusal(SMALL | {field: value})
    assert (error.field, error.got) == (field, repr(value))
    assert "integer of 1 or more" in str(error)


@pytest.mark.parametrize(
    ("field", "value", "expected"),
    [
        ("rms_norm_eps", 0, "positive number"),
        ("rms_norm_eps", float("nan"), "positive number"),
        pytest.param("rms_norm_eps", 10**400, "positive number", id="rms_norm_eps-huge"),
        ("rms_norm_eps", "1e-6", "positive number"),
        ("final_logit_softcapping", 0, "positive number or null"),
        ("final_logit_softcapping", -30.0, "positive number or null"),
        ("rope_theta", -1, "positive number"),
        ("rope_local_base_freq", float("inf"), "positive number"),
        ("hidden_activation", "gelu_fast", "one of gelu_pytorch_tanh, gelu, silu, relu"),
        ("attention_bias", "yes", "true or false"),
        ("altup_correct_scale", 1, "true or false"),
        ("tie_word_embeddings", None, "true or false"),
        ("use_bidirectional_attention", True, "causal"),
        ("num_key_value_heads", 3, "a divisor of num_attention_heads = 4"),
        ("head_dim", 15, "even"),
        ("altup_num_inputs", 65, "at most 64"),
        ("altup_active_idx", 4, "below altup_num_inputs = 4"),
        ("altup_active_idx", -1, "0 or more"),
        ("num_kv_shared_layers", 6, "less than num_hidden_layers = 6"),
        ("num_kv_shared_layers", 5, "an earlier layer of type full_attention"),
        ("num_kv_shared_layers", -1, "0 or more"),
        ("bos_token_id", -2, "token id or null"),
        ("pad_token_id", "0", "token id or null"),
        ("eos_token_id", [1, "2"], "a token id, a list of them, or null"),
        ("model_type", "gemma3", "gemma3n or gemma3n_text"),
        ("model_type", None, "gemma3n or gemma3n_text"),
        ("rope_parameters", [], "an object keyed by layer type"),
    ],
)
def test_values(field: str, value: Any, expected: str) -> None:
    error = refusal(SMALL | {field: value})
    assert error.field == field and expected in str(error.expected)


@pytest.mark.parametrize("count", [0, 5, 7])
@pytest.mark.parametrize(
    ("field", "value"),
    [("intermediate_size", 64), ("layer_types", SLIDING), ("activation_sparsity_pattern", 0.0)],
)
def test_lists_of_the_wrong_length(field: str, value: Any, count: int) -> None:
    error = refusal(SMALL | {field: [value] * count})
    assert error.field == field
    assert (error.expected, error.got) == ("6 values, one for each of num_hidden_layers", f"{count} values")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("intermediate_size", 0),
        ("intermediate_size", 64.0),
        ("layer_types", "chunked_attention"),
        ("activation_sparsity_pattern", 1.0),
        ("activation_sparsity_pattern", -0.1),
    ],
)
def test_one_bad_entry_of_a_list_is_named(field: str, value: Any) -> None:
    values = [*SMALL[field]]
    values[3] = value
    error = refusal(SMALL | {field: values})
    assert (error.field, error.got) == (f"{field}[3]", repr(value))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_parameters": {FULL: {"rope_type": "yarn"}}}, "rope_parameters.full_attention.rope_type"),
        ({"rope_parameters": {SLIDING: {"rope_theta": "x"}}}, "rope_parameters.sliding_attention.rope_theta"),
        ({"rope_parameters": {FULL: 3}}, "rope_parameters.full_attention"),
        (
            {"rope_parameters": {FULL: {"rope_type": "linear", "factor": 0}}},
            "rope_parameters.full_attention.factor",
        ),
        (
            {"rope_parameters": {FULL: {"partial_rotary_factor": 0.5}}},
            "rope_parameters.full_attention.partial_rotary_factor",
        ),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.rope_type"),
        ({"rope_scaling": {"type": "linear", "factor": "8"}}, "rope_scaling.factor"),
    ],
)
def test_rope(fields: Json, named: str) -> None:
    assert refusal(SMALL | fields).field == named


def test_malformed_rope_scaling_is_named() -> None:
    assert refusal(SMALL | {"rope_scaling": "linear"}).field == "rope_scaling"


def test_rope_of_an_absent_layer_type_may_be_anything() -> None:
    c = config(layer_types=[SLIDING] * 6, rope_parameters={FULL: {"rope_type": "yarn", "factor": 8.0}})
    assert c.rope[SLIDING] == Rope(1e4)


def test_fields_inside_a_text_config_are_named_so() -> None:
    data = {"model_type": "gemma3n", "text_config": SMALL | {"head_dim": 0}}
    assert refusal(data).field == "text_config.head_dim"


@pytest.mark.parametrize("data", [[], "config", 3, None])
def test_not_an_object(data: Any) -> None:
    assert refusal(data).expected == "a JSON object"


@pytest.mark.parametrize(
    ("content", "expected"),
    [(b"{", "JSON"), (b"\xff\xfe", "JSON"), (b"[" * 100_000, "JSON"), (b"[]", "a JSON object")],
)
def test_malformed_files(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Gemma3nConfig.from_file(tmp_path)
    assert (caught.value.path, caught.value.expected) == (path, expected)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no such file\. Point to a checkpoint folder"):
        Gemma3nConfig.from_file(tmp_path)
