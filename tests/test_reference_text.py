"""The NumPy reference against transformers, live, over what a text config may ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from gemma_edge.export.emit.reference import reference_text as reference
from gemma_edge.export.emit.reference.reference_text import LOGIT_ROWS, evaluate, evaluate_blocks, gather
from gemma_edge.export.model.gemma3n.gemma3n_text_tensors import tensor_specs, unused_names
from gemma_edge.export.model.tensor_spec import PLE_NAME
from gemma_edge.runtime.engines.rope import rotary_tables
from gemma_edge.runtime.families.config_fields import FULL, SLIDING
from support.random_gemma3n_text import (
    SMALL,
    VARIANTS,
    Array,
    DictSource,
    LiveCase,
    random_ids,
    random_source,
    transformers_logits,
    transformers_model,
)

MAX_ERROR = 1e-4


@pytest.mark.parametrize("name", VARIANTS)
def test_agrees_with_transformers(name: str, live_case: Callable[[str], LiveCase]) -> None:
    case = live_case(name)
    (logits,) = evaluate(case.source, [case.ids])
    assert logits.dtype == np.float32 and logits.shape == case.logits.shape
    assert case.logits.std() > 0.5  # or an error would be hard to see
    assert np.abs(logits - case.logits).max() <= MAX_ERROR


@pytest.mark.parametrize("seed", [1, 2])
def test_agrees_with_transformers_on_the_default_layer_pattern(seed: int) -> None:
    """Twelve layers, a global one every five, ten of them sparse, as transformers fills in by itself."""
    pytest.importorskip("transformers")
    # Wide enough that no sparse gate is all zeros but for rounding, which the norm after it would blow up.
    defaults = {"layer_types": None, "activation_sparsity_pattern": None, "intermediate_size": 256}
    changes: dict[str, Any] = {
        **defaults,
        "num_hidden_layers": 12,
        "num_kv_shared_layers": 5,
        "sliding_window": 8,
    }
    source = random_source(seed, **changes)
    assert source.config.activation_sparsity == (0.95,) * 10 + (0.0,) * 2
    ids = random_ids(source.config, 40, seed)
    expected = transformers_logits(transformers_model(changes, source), ids)
    assert np.abs(evaluate(source, [ids])[0] - expected).max() <= MAX_ERROR


@pytest.mark.parametrize("layer_type", [FULL, SLIDING])
def test_rotary_tables_are_those_of_transformers(layer_type: str) -> None:
    torch = pytest.importorskip("torch")
    modeling = pytest.importorskip("transformers.models.gemma3n.modeling_gemma3n")
    from transformers import Gemma3nTextConfig

    config = random_source(head_dim=256).config
    rotary = modeling.Gemma3nRotaryEmbedding(Gemma3nTextConfig(**SMALL | {"head_dim": 256}))
    cos, sin = rotary(torch.zeros(1), torch.arange(4096)[None], layer_type)
    for ours, theirs in zip(rotary_tables(config, layer_type, 4096), (cos, sin), strict=True):
        # A frequency that is one fp32 step off turns by 4096 * 6e-8 rad at the end.
        np.testing.assert_allclose(ours, theirs[0, :, :128], atol=5e-4)


# Sequences, rows, blocks. -------------------------------------------------------------------------


def test_sequences_of_one_pass_do_not_see_each_other() -> None:
    source = random_source()
    sequences = [random_ids(source.config, n, seed=n) for n in (17, 1, 9)]
    together = evaluate(source, sequences)
    for ids, logits in zip(sequences, together, strict=True):
        np.testing.assert_allclose(logits, evaluate(source, [ids])[0], atol=MAX_ERROR)


@pytest.mark.parametrize("last", [1, 3, 100])
@pytest.mark.parametrize("name", ["as_it_is", "no_sharing", "all_full"])
def test_last_rows_are_those_of_all_rows(name: str, last: int) -> None:
    source = random_source(**VARIANTS[name])
    sequences = [random_ids(source.config, n, seed=n) for n in (12, 2)]
    for whole, rows in zip(evaluate(source, sequences), evaluate(source, sequences, last=last), strict=True):
        np.testing.assert_allclose(rows, whole[-last:], atol=MAX_ERROR)


def test_logits_come_in_blocks_of_bounded_size() -> None:
    source = random_source()
    ids = random_ids(source.config, LOGIT_ROWS + 10)
    blocks = list(evaluate_blocks(source, [ids]))
    assert [len(block) for block in blocks] == [LOGIT_ROWS, 10]
    np.testing.assert_array_equal(np.concatenate(blocks), evaluate(source, [ids])[0])


def test_weights_are_read_in_blocks_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    source, largest = random_source(), 0
    ids = random_ids(source.config, 5)
    expected = evaluate(source, [ids])[0]
    rows = DictSource.rows

    def watched(self: DictSource, name: str, start: int, stop: int) -> Any:
        nonlocal largest
        array = rows(self, name, start, stop)
        largest = max(largest, array.nbytes)
        return array

    monkeypatch.setattr(DictSource, "rows", watched)
    monkeypatch.setattr(reference, "BLOCK_BYTES", 1024)
    np.testing.assert_allclose(evaluate(source, [ids])[0], expected, atol=MAX_ERROR)
    assert largest <= 1024


def test_gather_reads_each_row_once() -> None:
    source, reads = random_source(), []
    source.rows = lambda name, start, stop: reads.append(start) or source.weights[name][start:stop]  # type: ignore
    rows = gather(source, PLE_NAME, np.array([7, 3, 7, 7]))
    assert sorted(reads) == [3, 7]
    np.testing.assert_array_equal(rows, source.weights[PLE_NAME][[7, 3, 7, 7]])


# Facts of the architecture. -----------------------------------------------------------------------


def test_kv_sharing() -> None:
    """Only owners have keys and values, and shared layers depend on those of the last owner of their type."""
    source = random_source()
    ids = random_ids(source.config, 6)
    caches: dict[int, tuple[Array, Array]] = {}
    assert source.config.kv_owner == (0, 1, 2, 3, 2, 3)
    before = evaluate(source, [ids], caches=caches)[0]
    assert list(caches) == [0, 1, 2, 3]
    assert all(k.shape == v.shape == (6, 2, 16) for k, v in caches.values())
    # The owners' own outputs are cut off, so that their values can reach the logits by sharing alone.
    cut = {f"layers__{i}__post_attention_layernorm__weight": np.zeros(32, np.float32) for i in range(4)}
    shared_only = evaluate(source.changed(**cut), [ids])[0]
    for owner, matters in ((0, False), (1, False), (2, True), (3, True)):
        values = source.weights[f"layers.{owner}.self_attn.v_proj.weight"][::-1]
        other = {f"layers__{owner}__self_attn__v_proj__weight": values}
        difference = np.abs(evaluate(source.changed(**cut, **other), [ids])[0] - shared_only).max()
        assert difference > 1e-3 if matters else difference == 0
    assert np.abs(before - shared_only).max() > 1e-3


def test_unused_kv_weights_of_shared_layers_do_not_matter() -> None:
    """Published checkpoints hold them; they may be anything."""
    source = random_source(attention_bias=True)
    ids = random_ids(source.config, 6)
    expected = evaluate(source, [ids])[0]
    unused = {name: np.full((32, 32), np.nan, np.float32) for name in unused_names(source.config)}
    assert {
        "layers.4.self_attn.k_proj.weight",
        "layers.5.self_attn.v_proj.bias",
        "lm_head.weight",
    } <= unused.keys()
    polluted = DictSource(source.config, source.weights | unused)
    np.testing.assert_array_equal(evaluate(polluted, [ids])[0], expected)
    assert polluted.names_read == set(tensor_specs(source.config))


def test_ple_row_zero_for_soft_tokens() -> None:
    """Ids beyond the per-layer table use its row 0, whatever their embedding."""
    source = random_source()
    rows = source.config.vocab_size_per_layer_input
    ids = [5, rows, rows + 1, source.config.vocab_size - 1]
    only = np.full_like(source.weights[PLE_NAME], np.nan)
    only[[0, 5]] = source.weights[PLE_NAME][[0, 5]]
    expected = evaluate(source, [ids])[0]
    unchanged = evaluate(source.changed(embed_tokens_per_layer__weight=only), [ids])[0]
    np.testing.assert_array_equal(unchanged, expected)
    only[0] = only[0][::-1]
    other = evaluate(source.changed(embed_tokens_per_layer__weight=only), [ids])[0]
    assert np.array_equal(other[0], expected[0]) and np.abs(other[1] - expected[1]).max() > 1e-3


def test_ple_row_zero_for_soft_tokens_as_in_transformers() -> None:
    pytest.importorskip("transformers")
    source = random_source()
    ids = [3, *range(source.config.vocab_size_per_layer_input - 2, source.config.vocab_size)]
    expected = transformers_logits(transformers_model({}, source), ids)
    assert np.abs(evaluate(source, [ids])[0] - expected).max() <= MAX_ERROR
