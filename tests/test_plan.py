"""The plan: sizes that are those of the files, memory that follows from the config, remedies that fit."""

from __future__ import annotations

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

import pytest

from gemma_edge.export.exporter import export_bundle, export_job, plan_export
from gemma_edge.export.formats.registry import export_format
from gemma_edge.export.formats.tflite.tflite_format import whole_decoder
from gemma_edge.export.formats.tflite.tflite_stored import tflite_matrices
from gemma_edge.export.model.gemma3n.gemma3n_text_tensors import tensor_specs
from gemma_edge.export.model.tensor_spec import Part
from gemma_edge.export.plan import WORKING_FILE_BYTES, Plan, check_ceiling, make_plan
from gemma_edge.export.plan_table import format_plan, needed_size
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.export.synth.synth_gemma3n import text_config
from gemma_edge.export.weights.recipe import KvCache, Recipe, load_recipe
from gemma_edge.runtime.errors import CeilingError, UsageError
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.model import Model
from gemma_edge.runtime.reuse.snapshot_pool import SNAPSHOTS
from gemma_edge.runtime.units import format_size, parse_size
from support.random_gemma3n_text import SMALL, VARIANTS, Json
from support.repository import ROOT

ONNX = export_format("onnx")
GIB, MIB = 1 << 30, 1 << 20
KV_BYTES: tuple[tuple[KvCache, int], ...] = (("fp32", 4), ("int8", 1))
E2B, E4B = (Gemma3nConfig.from_dict(text_config(size)) for size in ("e2b", "e4b"))


def recipe(name: str, kv_cache: KvCache | None = None) -> Recipe:
    loaded = load_recipe(name)
    return dataclasses.replace(loaded, kv_cache=kv_cache or loaded.kv_cache)


@functools.cache
def planned(
    size: str, name: str, context: int = 4096, chunk: int = 256, kv_cache: KvCache | None = None
) -> Plan:
    """The plan of a model of true size."""
    return plan_export({"e2b": E2B, "e4b": E4B}[size], recipe(name, kv_cache), context, chunk)


def part(plan: Plan, name: str) -> Any:
    return next(p for p in plan.parts if p.part == name)


# Sizes. -------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("int4", {}),
        ("fp32", {}),
        ("fp32", {"tie_word_embeddings": False}),
        # Rows of 48 take groups of 32, not the recipe's 64.
        ("int8", {"tie_word_embeddings": False, "hidden_size": 48}),
    ],
)
def test_sizes_are_those_of_the_written_files(name: str, config: Json, tmp_path: Path) -> None:
    untied = bool(config)
    checkpoint = synthesize(tmp_path / "checkpoint", config=config, progress=False).path
    exported = export_bundle(
        checkpoint, tmp_path / "out", recipe=name, context=64, verify=False, calibrate="none"
    )
    sizes = {path.name: path.stat().st_size for path in exported.path.iterdir()}
    plan = exported.plan
    assert plan == plan_export(Gemma3nConfig.from_file(checkpoint), load_recipe(name), 64, 256)
    assert part(plan, "ple").file_bytes == sizes["ple.bin"]
    assert [p.part for p in plan.parts if p.residency == "mapped"] == [
        "ple",
        *(["embedding"] if untied else []),
    ]
    tables = sizes["ple.bin"] + (sizes["embeddings.bin"] if untied else 0)
    if untied:
        assert part(plan, "embedding").file_bytes == sizes["embeddings.bin"]
    else:
        assert "embeddings.bin" not in sizes
    assert plan.file_bytes == sizes["decoder.onnx.data"] + tables
    resident = sum(p.file_bytes for p in plan.parts if p.residency == "resident")
    # Tensors start on pages: what lies between them is in the file and in no part.
    assert resident <= sizes["decoder.onnx.data"] < resident * 1.35


@pytest.mark.slow
def test_sizes_of_a_tflite_are_those_behind_its_flatbuffer(tmp_path: Path) -> None:
    """A plan packs none."""
    options: dict[str, Any] = {"format": "tflite", "context": 64, "modalities": ["text"], "verify": False}
    exported = export_bundle(ROOT / "pocket" / "checkpoint", tmp_path / "out", **options)
    plan = exported.plan
    path = exported.path / "decoder.tflite"
    begin = min(weight.data.offset for weight in tflite_matrices(path).values())
    assert plan.file_bytes - part(plan, "ple").file_bytes == path.stat().st_size - begin


@pytest.mark.parametrize("form", ["tflite", "litertlm"])
@pytest.mark.parametrize("size", ["tiny", "e2b"])
def test_one_signature_lays_out_the_weights_of_all(size: str, form: str) -> None:
    for name in ("int4", "int4_channelwise"):
        job = export_job(Gemma3nConfig.from_dict(text_config(size)), recipe(name), 512, 128)
        planned = export_format(form).decoder_layout(job)
        written = whole_decoder(job, "litertlm" if form == "litertlm" else "windowed")
        assert (planned.tensors, planned.size) == (written.tensors, written.size)
        assert "head" not in vars(planned), "a plan packs no FlatBuffer"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_weight_is_in_one_part(name: str) -> None:
    config = Gemma3nConfig.from_dict(SMALL | VARIANTS[name])
    plan = plan_export(config, load_recipe("fp32"), 64, 16)
    specs = tensor_specs(config).values()
    for part_name in Part:
        expected = sum(spec.size for spec in specs if spec.part == part_name)
        planned = sum(p.elements for p in plan.parts if p.part == part_name)
        if part_name == Part.VECTOR:
            assert planned >= expected  # one row of ones or of a norm's weight for each head that it serves
        else:
            assert planned == expected


def test_elements_of_e2b_and_e4b() -> None:
    """As published; the decoder's count includes k/v weights that no layer reads."""
    for size, config, decoder, table in (("e2b", E2B, 1.905e9, 2.013e9), ("e4b", E4B, 3.980e9, 2.349e9)):
        plan = planned(size, "int4")
        unread = config.num_kv_shared_layers * 2 * config.key_value_size * config.hidden_size
        core = sum(part(plan, name).elements for name in ("decoder", "small", "vector"))
        assert core + unread == pytest.approx(decoder, rel=0.001)
        assert part(plan, "head").elements == pytest.approx(0.537e9, rel=0.001)
        assert part(plan, "ple").elements == pytest.approx(table, rel=0.001)


def test_bits_include_scales() -> None:
    plan = planned("e2b", "int4")
    assert part(plan, "decoder").bits == pytest.approx(4 + 32 / 64)
    assert part(plan, "ple").bits == pytest.approx(4 + 16 / 32)
    assert part(planned("e2b", "fp32"), "decoder").bits == 32


# Memory. ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "bits"), [("int4", 4 + 64 / 64), ("int4_g32", 4 + 64 / 32), ("int4_g128", 4 + 64 / 128)]
)
def test_resident_bytes_follow_from_the_config(name: str, bits: float) -> None:
    """Once prepacked, a block of weights keeps an fp32 scale and an fp32 sum beside its integers."""
    plan = planned("e2b", name)
    c, layers = E2B, E2B.num_hidden_layers
    projections = layers * 2 * c.query_size * c.hidden_size + 20 * 2 * c.key_value_size * c.hidden_size
    feed_forward = 3 * sum(c.intermediate_size) * c.hidden_size
    assert part(plan, "decoder").memory_bytes == (projections + feed_forward) * bits / 8
    assert part(plan, "head").memory_bytes == c.vocab_size * c.hidden_size * bits / 8
    assert part(plan, "ple").memory_bytes == 0
    assert part(plan, "vector").memory_bytes == 0


def test_kv_cache_follows_from_the_config() -> None:
    """5 full caches, 15 fp32 ones of 544 rows, and the rotary tables of both layer types."""
    for context in (1024, 4096, 32768):
        rotary = 2 * 2 * context * 128 * 4
        for precision, size in KV_BYTES:
            plan = planned("e2b", "int4", context, kv_cache=precision)
            assert plan.kv_cache_bytes == 2 * 512 * (5 * context * size + 15 * 544 * 4) + rotary


def test_the_peak_is_the_sum_of_its_parts() -> None:
    plan = planned("e2b", "int4")
    weights = sum(p.memory_bytes for p in plan.parts)
    assert plan.peak_bytes == weights + plan.kv_cache_bytes + plan.activation_bytes + plan.base_bytes
    assert plan.peak_bytes < plan.needed_bytes
    assert plan.to_dict()["peak_bytes"] == plan.peak_bytes


@pytest.mark.slow
def test_snapshots_are_counted_where_they_are_asked_for(tiny_checkpoint: Path, tmp_path: Path) -> None:
    plans = [
        export_bundle(
            tiny_checkpoint, tmp_path / str(size), context=64, verify=False, snapshots=size, calibrate="none"
        ).plan.to_dict()
        for size in (0, 5 << 20)
    ]
    without, counted = plans
    assert counted["peak_bytes"] - without["peak_bytes"] == counted["snapshot_bytes"] == 5 << 20
    assert "KV snapshots" in format_plan(counted) and "KV snapshots" not in format_plan(without)
    assert Model.load(tmp_path / str(5 << 20)).prompts.pool.budget == 5 << 20
    assert Model.load(tmp_path / "0").prompts.pool.budget == SNAPSHOTS
    assert Model.load(tmp_path / "0", snapshots="1MiB").prompts.pool.budget == 1 << 20


def test_e2b_fits_two_gibibytes_and_e4b_three() -> None:
    """What the model is for, at int4 with a context of 4096."""
    assert planned("e2b", "int4").needed_bytes <= 2 * GIB
    assert planned("e4b", "int4").needed_bytes <= 3 * GIB


def test_more_of_anything_needs_more() -> None:
    base = planned("e2b", "int4", 4096, 128)
    for more in (
        planned("e2b", "int4", 8192, 128),
        planned("e2b", "int4"),
        planned("e2b", "int8", 4096, 128),
        planned("e4b", "int4", 4096, 128),
    ):
        assert more.needed_bytes > base.needed_bytes


def test_a_chunk_is_not_longer_than_the_context() -> None:
    assert plan_export(E2B, recipe("int4"), 64, 256).chunk == 64


@pytest.mark.parametrize(
    ("context", "chunk", "message"),
    [
        (0, 256, "--context must be 1 to 32768"),
        (32769, 256, "not 32769"),
        (64, 0, "--chunk must be 1 or more, not 0"),
    ],
)
def test_a_context_or_chunk_the_model_cannot_have(context: int, chunk: int, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        plan_export(E2B, recipe("int4"), context, chunk)


# The ceiling. -------------------------------------------------------------------------------------


def refusal(name: str, context: int, ceiling: int) -> str:
    """What is said of E2B with an fp32 cache."""
    job = export_job(E2B, recipe(name, "fp32"), context, 256)
    with pytest.raises(CeilingError) as caught:
        check_ceiling(planned("e2b", name, context, kv_cache="fp32"), ceiling, job, ONNX)
    assert caught.value.exit_code == 5
    return str(caught.value)


def test_the_ceiling_itself_is_enough() -> None:
    job = export_job(E2B, recipe("int4"), 4096, 256)
    plan = make_plan(job, ONNX)
    check_ceiling(plan, plan.needed_bytes, job, ONNX)
    with pytest.raises(CeilingError) as caught:
        check_ceiling(plan, plan.needed_bytes - 1, job, ONNX)
    # The message and the table show the sum that is compared.
    peak, room = map(format_size, (plan.peak_bytes, WORKING_FILE_BYTES))
    needed = needed_size(plan.needed_bytes)
    check_ceiling(plan, parse_size(needed), job, ONNX)
    assert f"needs {needed} (a peak of {peak} and {room} for file pages in use)" in str(caught.value)
    assert f"the smallest --ceiling is {needed}: the peak and {room} for" in format_plan(plan.to_dict())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "context", "ceiling"),
    [
        ("int8", 4096, 2 * GIB),
        ("fp32", 4096, 4 * GIB),
        ("int4", 32768, 2 * GIB),
        ("int4_g32", 4096, 2 * GIB - 100 * MIB),
    ],
)
def test_remedies_really_fit(name: str, context: int, ceiling: int) -> None:
    text = refusal(name, context, ceiling)
    assert f"recipe {name} with a context of {context} needs" in text
    remedies = re.findall(r"--(context|recipe|chunk|kv-cache) (\w+)", text.partition("What would fit:")[2])
    assert remedies
    for option, value in remedies:
        plan = planned(
            "e2b",
            value if option == "recipe" else name,
            int(value) if option == "context" else context,
            int(value) if option == "chunk" else 256,
            None if option == "recipe" else value if option == "kv-cache" else "fp32",
        )
        assert plan.needed_bytes <= ceiling, (option, value)


def test_the_int8_cache_is_a_remedy_for_a_long_context() -> None:
    ceiling = planned("e2b", "int8", 32768, kv_cache="int8").needed_bytes
    assert "--kv-cache int8" in refusal("int8", 32768, ceiling)


def test_nothing_fits_and_the_message_says_so() -> None:
    assert "no recipe of ours fits this model under it" in refusal("int4", 4096, 100 * MIB)


def test_format_plan_names_every_part_and_the_peak() -> None:
    plan = planned("e2b", "int4")
    text = format_plan(plan.to_dict())
    for words in (
        "decoder layers",
        "output head",
        "per-layer embeddings",
        "mapped",
        "KV cache, 4096 tokens",
        "peak",
    ):
        assert words in text


def test_the_embedder_of_a_tied_model_is_no_second_head() -> None:
    tiny = Gemma3nConfig.from_dict(text_config("tiny"))
    parts = [part.part for part in plan_export(tiny, recipe("int4"), 64, 16, "litertlm").parts]
    assert parts.count("head") == parts.count("embedding") == 1
