"""The gate's check of the graph: every seeded defect is named, and no sound bundle is refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from copy import copy, deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_edge.export.exporter import export_bundle
from gemma_edge.export.formats.onnx import onnx_format
from gemma_edge.export.formats.tflite import tflite_format
from gemma_edge.export.gate import graph_check
from gemma_edge.export.gate.engine_process import run_isolated
from gemma_edge.export.gate.graph_check import (
    Products,
    SavedCall,
    check_graph,
    follow,
    observe_calls,
    stored_source,
)
from gemma_edge.export.gate.stored_source import StoredSource
from gemma_edge.export.model.ops import Weight
from gemma_edge.export.synth.synth_checkpoint import synthesize
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.errors import BundleError, ParityError
from gemma_edge.runtime.families.config_fields import FULL, SLIDING
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.model_parts import bundle_tables

FORMATS = ("onnx", "tflite", "litertlm")
Json = dict[str, Any]


class Observed:
    """A sound bundle, and what its engine computed: defects are seeded into either side of the comparison."""

    def __init__(self, path: Path, scratch: Path) -> None:
        self.bundle = Bundle.open(path)
        run_isolated(path, observe_calls, scratch)
        self.calls: list[SavedCall] = []
        for file in sorted(scratch.glob("call_*")):
            with open(file, "rb") as opened:
                self.calls.append(pickle.load(opened))
        self.source: StoredSource = stored_source(self.bundle)

    def check(self, change: Callable[[SavedCall], None] = lambda call: None, **config: Any) -> None:
        source = copy(self.source)
        source.config = replace(self.bundle.config, **config)
        for index, call in enumerate(self.calls):
            call = deepcopy(call)
            change(call)
            call.__post_init__()
            follow(self.bundle, Products(source, [call]), call, index)


@pytest.fixture(scope="module", params=FORMATS)
def observed(
    request: pytest.FixtureRequest, gate_bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Observed:
    return Observed(gate_bundles[request.param], tmp_path_factory.mktemp("observed"))


def exchanged(call: SavedCall, part: str, one: str, other: str) -> None:
    """Exchanges two layers' products with their weights."""
    products = call.seen.products
    for a in [name for name in products if name.startswith(f"layers.{one}.") and part in name]:
        b = a.replace(f"layers.{one}.", f"layers.{other}.")
        if b in products:
            products[a], products[b] = products[b], products[a]


def caches_exchanged(call: SavedCall) -> None:
    for caches in (call.seen.keys, call.seen.values):
        caches[0], caches[1] = caches[1], caches[0]


def test_a_sound_bundle_passes(observed: Observed) -> None:
    observed.check()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda c: {"sliding_window": c.sliding_window + 1}, "o_proj"),
        (lambda c: {"sliding_window": c.sliding_window - 1}, "o_proj"),
        (lambda c: {"final_logit_softcapping": None}, "logits"),
        (lambda c: {"final_logit_softcapping": 1.02 * c.final_logit_softcapping}, "logits"),
        (lambda c: {"rope": {**c.rope, FULL: c.rope[SLIDING]}}, "keys that layer 2"),
        (lambda c: {"rope": {**c.rope, SLIDING: c.rope[FULL]}}, "keys that layer 0"),
        (lambda c: {"rms_norm_eps": 1e-3}, ""),
        (lambda c: {"hidden_activation": "silu"}, ""),
        (lambda c: {"altup_active_idx": 1}, ""),
        # 0.95 is 1.645 deviations above the mean; a tenth more is 0.9648.
        (lambda c: {"activation_sparsity": (0.9648, *c.activation_sparsity[1:])}, "layers.0.mlp.down_proj"),
    ],
)  # fmt: skip
def test_another_description(observed: Observed, change: Callable[[Any], Json], said: str) -> None:
    with pytest.raises(ParityError, match="does not compute what its weights say") as caught:
        observed.check(**change(observed.bundle.config))
    assert said in str(caught.value)


@pytest.mark.parametrize("part", ["mlp.gate_proj", "self_attn", "altup", "per_layer_projection", "laurel"])
def test_the_weights_of_two_layers_exchanged(observed: Observed, part: str) -> None:
    with pytest.raises(ParityError):
        observed.check(lambda call: exchanged(call, part, "0", "1"))


def test_the_caches_of_two_layers_exchanged(observed: Observed) -> None:
    with pytest.raises(ParityError, match="layer 0 puts into the cache"):
        observed.check(caches_exchanged)


def test_another_layers_cache_is_read(observed: Observed, monkeypatch: pytest.MonkeyPatch) -> None:
    given = graph_check.given_cache

    def mixed(*args: Any) -> Any:
        caches = given(*args)
        caches[0], caches[1] = caches[1], caches[0]
        return caches

    monkeypatch.setattr(graph_check, "given_cache", mixed)
    with pytest.raises(ParityError, match="o_proj"):
        observed.check()


def test_columns_of_the_per_layer_rows_shifted(observed: Observed, monkeypatch: pytest.MonkeyPatch) -> None:
    tables = bundle_tables

    class Shifted:
        def __init__(self, table: Any) -> None:
            self.table = table

        def lookup(self, ids: Any) -> Any:
            return np.roll(self.table.lookup(ids), 1, axis=1)

    monkeypatch.setattr(graph_check, "bundle_tables", lambda b: (tables(b)[0], Shifted(tables(b)[1])))
    with pytest.raises(ParityError, match="per_layer_projection"):
        observed.check()


def test_a_product_of_any_call_is_compared_with_those_of_the_first(observed: Observed) -> None:
    weight = "layers.0.mlp.up_proj.weight"
    assert Products(observed.source, observed.calls).compare(weight, [Weight(weight)]) < 1
    for index in range(len(observed.calls)):
        calls = deepcopy(observed.calls)
        first, *others = calls[index].seen.products[weight]
        calls[index].seen.products[weight] = [replace(first, y=2 * first.y), *others]
        with pytest.raises(ParityError, match=r"the product with layers\.0\.mlp\.up_proj"):
            Products(observed.source, calls).compare(weight, [Weight(weight)])


def test_a_missing_product_and_one_too_many(observed: Observed) -> None:
    def lost(call: SavedCall) -> None:
        if call.seen.complete:
            del call.seen.products["layers.2.mlp.up_proj.weight"]

    def doubled(call: SavedCall) -> None:
        call.seen.products["layers.0.mlp.up_proj.weight"] *= 2

    with pytest.raises(ParityError, match=r"layers\.2\.mlp\.up_proj\.weight the graph has no product"):
        observed.check(lost)
    with pytest.raises(ParityError, match=r"layers\.0\.mlp\.up_proj\.weight has a product that"):
        observed.check(doubled)


def test_what_is_not_a_number(observed: Observed) -> None:
    def poisoned(call: SavedCall) -> None:
        call.seen.products["layers.1.mlp.up_proj.weight"][0].y[0, 3] = np.nan

    with pytest.raises(ParityError, match=r"layers\.1\.mlp\.up_proj"):
        observed.check(poisoned)


# Defects in what an export writes. ------------------------------------------------------------------

MODULES = {"onnx": onnx_format, "tflite": tflite_format, "litertlm": tflite_format}  # where each is emitted


@pytest.mark.parametrize(
    ("form", "changes"),
    [
        ("onnx", {"final_logit_softcapping": None}),
        ("tflite", {"activation_sparsity": (0.9648, 0.0, 0.0, 0.9, 0.0)}),
        ("litertlm", {"sliding_window": 33}),
        ("onnx", {"sliding_window": 33}),
    ],
)
def test_an_export_with_a_defect_is_not_published(
    form: str, changes: Json, gate_source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    emit = MODULES[form].emit_decoder

    def defective(config: Gemma3nConfig, *args: Any, **options: Any) -> Any:
        return emit(replace(config, **changes), *args, **options)

    monkeypatch.setattr(MODULES[form], "emit_decoder", defective)
    with pytest.raises((ParityError, BundleError)) as caught:
        export_bundle(gate_source, tmp_path / "out", format=form, context=64, chunk=16, calibrate="none")
    assert "window" in str(caught.value) or "Nothing was published" in str(caught.value)
    assert not list(tmp_path.iterdir())


# No false alarm. ------------------------------------------------------------------------------------


def odd_shape(seed: int) -> Json:
    """A small model of odd sizes."""
    random = np.random.default_rng(seed)

    def choose(*values: Any) -> Any:
        return values[int(random.integers(len(values)))]

    layers = choose(3, 4, 5)
    heads = choose(1, 2, 4)
    return {
        "num_hidden_layers": layers,
        "num_kv_shared_layers": choose(0, 1, layers - 2),
        "layer_types": [SLIDING, FULL, *(choose(SLIDING, FULL) for _ in range(layers - 2))],
        "hidden_size": choose(48, 72, 128, 160),
        "hidden_size_per_layer_input": choose(16, 24, 32),
        "intermediate_size": [choose(96, 120, 256, 336) for _ in range(layers)],
        "activation_sparsity_pattern": [choose(0.0, 0.5, 0.95) for _ in range(layers)],
        "head_dim": choose(16, 32, 48),
        "num_attention_heads": heads * choose(1, 2),
        "num_key_value_heads": heads,
        "laurel_rank": choose(8, 16, 24),
        "sliding_window": choose(3, 8, 17, 100),
        "altup_num_inputs": choose(2, 3, 4),
        "tie_word_embeddings": choose(True, False),
    }


def make_plain(checkpoint: Path, seed: int) -> None:
    """Draws all weights anew: normal, 1/sqrt(fan-in); norms are 1. Such a network is chaotic."""
    path = checkpoint / "model.safetensors"
    raw = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    random = np.random.default_rng(seed)
    for name, tensor in json.loads(raw[8:start]).items():
        if name == "__metadata__":
            continue
        shape, (begin, end) = tensor["shape"], tensor["data_offsets"]
        plain = random.standard_normal(shape) / np.sqrt(shape[-1]) if len(shape) > 1 else np.ones(shape)
        raw[start + begin : start + end] = (plain.astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    path.write_bytes(raw)


@pytest.mark.parametrize("seed", range(20))
def test_no_sound_model_is_refused(seed: int, tmp_path: Path) -> None:
    """Plain normal weights of deviation 1/sqrt(fan-in), norms of 1: the network amplifies what it can."""
    source = synthesize(tmp_path / "checkpoint", seed=seed, config=odd_shape(seed), progress=False).path
    if seed % 2:
        make_plain(source, seed)
    form, recipe = FORMATS[seed % 3], ("int4", "int8", "int4_g32", "fp32")[seed % 4]
    out = tmp_path / ("out.litertlm" if form == "litertlm" else "out")
    options: dict[str, Any] = {"context": 48, "chunk": 16, "verify": False, "calibrate": "none"}
    export_bundle(source, out, format=form, recipe=recipe, **options)
    assert check_graph(Bundle.open(out)).products > 50
