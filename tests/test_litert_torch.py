"""An independent conversion as the witness: Google's litert-torch on the model of transformers.

Its own exporter for Gemma 3n leaves the factor of the activation sparsity uninitialised and omits the final
softcap (0.10). So it converts transformers' model itself, whose buffers are initialised, softcap included, over all
tokens at once without a cache. It wants packages of 2 GB and an undeclared tensorflow, and is not installed by us:

    pip install litert-torch==0.10.0
"""

from __future__ import annotations

import sys
import types
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("litert_converter", reason="litert-torch is not installed: pip install litert-torch==0.10.0")
torch = pytest.importorskip("torch", reason="torch is not installed")

from gemma_edge.export.exporter import export_bundle
from gemma_edge.runtime.model import Model

TOKENS = 40  # beyond the window of the tiny model


@pytest.fixture
def litert_torch(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    if "tensorflow" not in sys.modules:  # all that it wants of tensorflow is the schema
        from ai_edge_litert import schema_py_generated

        names = "tensorflow", "tensorflow.lite", "tensorflow.lite.python"
        for name in names:
            monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
        sys.modules["tensorflow.lite.python"].schema_py_generated = schema_py_generated  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "tensorflow.lite.python.schema_py_generated", schema_py_generated)
    import litert_torch

    return litert_torch


def test_it_agrees_with_another_converter(
    litert_torch: types.ModuleType, tiny_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import Gemma3nForCausalLM

    monkeypatch.setenv("GEMMA_EDGE_CACHE", str(tmp_path / "cache"))
    model = Gemma3nForCausalLM.from_pretrained(
        tiny_checkpoint, dtype=torch.float32, attn_implementation="eager"
    ).eval()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, use_cache=False).logits

    ids = np.random.default_rng(0).integers(0, model.config.get_text_config().vocab_size_per_layer_input, TOKENS)
    converted = litert_torch.convert(Logits(), (torch.tensor(ids)[None],))
    theirs = np.asarray(converted(torch.tensor(ids)[None]))[0]

    options = {"recipe": "fp32", "format": "tflite", "context": 64, "chunk": 32, "verify": False}
    ours = Model.load(export_bundle(tiny_checkpoint, tmp_path / "out", **options).path)
    logits = np.concatenate(
        [
            ours.decoder.forward(ours.embeddings.lookup(part), ours.per_layer.lookup(part), len(part))
            for part in np.split(ids, range(32, TOKENS, 32))
        ]
    )
    assert np.abs(logits - theirs).max() <= 1e-3
