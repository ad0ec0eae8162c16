"""`Model.load`: what it takes from a bundle, and what it refuses."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gemma_edge.runtime import model_parts
from gemma_edge.runtime.errors import BundleError, UsageError
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.generation_config import read_generation_config
from gemma_edge.runtime.model import Model
from support.rule_decoder import RuleDecoder, answers
from support.tiny_tokenizer import END_OF_TURN, tiny_tokenizer

VOCAB, LAYERS = 315, 2
CONFIG = Gemma3nConfig.from_dict(
    {
        "model_type": "gemma3n_text",
        "vocab_size": VOCAB,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size": 4,
        "hidden_size_per_layer_input": 1,
        "num_hidden_layers": LAYERS,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"],
        "activation_sparsity_pattern": 0.0,
    }
)


class TableDecoder(RuleDecoder):
    """Checks that the rows are those of the bundle's tables, then decodes by the rule."""

    def forward(self, embeddings: Any, per_layer: Any, n_logits: int = 1) -> Any:
        ids = embeddings[:, :1] / 2
        assert np.array_equal(per_layer, np.repeat(ids, LAYERS, axis=1))
        return super().forward(ids, ids, n_logits)


@pytest.fixture
def bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle whose decoder answers "by the template" to a prompt that the bundle's own template made."""
    folder = tmp_path / "bundle"
    folder.mkdir()
    tokenizer = tiny_tokenizer(folder)
    ids = np.arange(VOCAB, dtype="<f4")
    (folder / "decoder.onnx.data").write_bytes(np.repeat(ids, 4).tobytes())
    (folder / "ple.bin").write_bytes(np.repeat(ids, LAYERS).tobytes())
    (folder / "chat_template.jinja").write_text("{{ bos_token }}q<start_of_turn>model{{ '\n' }}")
    (folder / "generation_config.json").write_text(
        json.dumps({"do_sample": False, "eos_token_id": [END_OF_TURN]})
    )
    seal(folder, added_tokens={"<image_soft_token>": tokenizer.n_pieces + 1})
    decoder = TableDecoder(answers("by the template", tokenizer=tokenizer), context=64)
    monkeypatch.setattr(model_parts, "load_decoder", lambda bundle, *, threads, context: decoder)
    return folder


def layout(file: str, columns: int, scale: float) -> dict[str, Any]:
    data = {"offset": 0, "stride": 4 * columns}
    return {
        "file": file,
        "rows": VOCAB,
        "columns": columns,
        "encoding": "float32",
        "data": data,
        "scale": scale,
    }


def seal(folder: Path, **changes: Any) -> None:
    """Writes the manifest of what is in the folder."""
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in folder.iterdir()
        if path.name != "manifest.json"
    }
    manifest = {
        "schema_version": 1,
        "config": CONFIG.to_dict(),
        "context": 64,
        "chunk": 16,
        "kv_cache": "fp32",
        "tables": {
            "embedding": layout("decoder.onnx.data", 4, 2.0),
            "per_layer": layout("ple.bin", LAYERS, 1.0),
        },
        "added_tokens": {},
        "files": files,
        **changes,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))


def test_load_takes_the_bundles_parts(bundle: Path) -> None:
    model = Model.load(bundle)
    completion = model.generate("anything")
    assert (completion.text, completion.finish_reason) == ("by the template", "stop")
    assert model.end_ids == {END_OF_TURN}
    assert model.sampling.temperature == 0.0
    assert model.tokenizer.vocab_size == VOCAB
    assert model.tokenizer.encode("<image_soft_token>", bos=False) == [model.tokenizer.n_pieces + 1]


def test_template_and_generation_config_may_be_missing(bundle: Path) -> None:
    for name in ("chat_template.jinja", "generation_config.json"):
        (bundle / name).unlink()
    seal(bundle)
    model = Model.load(bundle)
    assert model.template.render([{"role": "user", "content": "x"}]).startswith("<bos><start_of_turn>user\n")
    assert model.end_ids == set(CONFIG.eos_token_ids)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tables": {}}, "tables.embedding"),
        ({"tables": {"embedding": layout("decoder.onnx.data", 4, 2.0)}}, "tables.per_layer"),
        ({"tables": {"embedding": {"file": 3}, "per_layer": {}}}, "tables.embedding"),
        ({"tables": []}, "tables: expected dict"),
        ({"added_tokens": {"<x>": "3"}}, "added_tokens"),
        ({"added_tokens": [1]}, "added_tokens"),
    ],
)
def test_a_manifest_that_lies_is_refused(bundle: Path, changes: dict[str, Any], message: str) -> None:
    seal(bundle, **changes)
    with pytest.raises(BundleError, match=message):
        Model.load(bundle)


@pytest.mark.parametrize("options", [{"threads": 0}, {"context": -1}])
def test_options_out_of_range_are_named(bundle: Path, options: dict[str, int]) -> None:
    with pytest.raises(UsageError, match=f"^{next(iter(options))} must be 1 or more"):
        Model.load(bundle, **options)


# generation_config.json. --------------------------------------------------------------------------


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_generation_config(tmp_path: Path) -> None:
    text = '{"eos_token_id": [1, 106], "do_sample": true, "top_k": 10, "top_p": 0.5, "max_length": 20}'
    sampling, end_ids = read_generation_config(write(tmp_path / "generation_config.json", text))
    assert (sampling.temperature, sampling.top_k, sampling.top_p, end_ids) == (1.0, 10, 0.5, (1, 106))


def test_generation_config_without_sampling_is_greedy(tmp_path: Path) -> None:
    sampling, end_ids = read_generation_config(write(tmp_path / "g.json", '{"do_sample": false}'), (1,))
    assert (sampling.temperature, end_ids) == (0.0, (1,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "expected JSON"),
        ("[]", "expected a JSON object"),
        ('{"top_p": 3}', "top_p must be"),
        ('{"eos_token_id": "x"}', "eos_token_id"),
    ],
)
def test_a_malformed_generation_config_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(BundleError, match=message):
        read_generation_config(write(tmp_path / "generation_config.json", text))
