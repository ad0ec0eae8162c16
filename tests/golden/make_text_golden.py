"""Makes text.npz: what `transformers` computes inside a small random Gemma 3n, block by block.

    python tests/golden/make_text_golden.py

One forward pass of one prompt is recorded: what goes into and comes out of each block, so that the values
are those of real activations. Arrays are fp32 but for `ids` and `config` (JSON); weights are there as
`weight.NAME`, blocks as `BLOCK.in.N` and `BLOCK.out`. Shapes are those of `Ops`: (tokens, width), streams
(tokens, streams, width).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parent.parent))

from support.random_gemma3n_text import SMALL, Array, random_ids, random_source, transformers_model

OUT = Path(__file__).with_name("text.npz")
TOKENS = 14  # more than three windows
SHARED = {4: 2, 5: 3}  # layers that share KV: the owner
ATTENTION = {"sliding": 0, "global": 1, "shared_sliding": 4, "shared_global": 5}


def flat(x: Any) -> Array:
    """Without the batch of one; streams, which `transformers` has first, second."""
    array: Array = x.detach().numpy().astype(np.float32)
    return array[:, 0].transpose(1, 0, 2) if array.ndim == 4 else array[0]


class Recorder:
    """Inputs and output of modules and methods while the model runs."""

    def __init__(self) -> None:
        self.calls: dict[str, tuple[list[Any], Any]] = {}

    def module(self, name: str, module: torch.nn.Module) -> None:
        def hook(module: torch.nn.Module, args: Any, kwargs: dict[str, Any], out: Any) -> None:
            # Copied at once: a layer adds to its output in place.
            tensors = [a.clone() for a in (*args, *kwargs.values()) if isinstance(a, torch.Tensor)]
            self.calls[name] = tensors, (out[0] if isinstance(out, tuple) else out).clone()

        module.register_forward_hook(hook, with_kwargs=True)

    def method(self, name: str, owner: Any, method: str) -> None:
        original = getattr(owner, method)

        def wrapped(*args: Any) -> Any:
            out = original(*(inputs := [a.clone() for a in args]))
            self.calls[name] = inputs, out.clone()
            return out

        setattr(owner, method, wrapped)


def main() -> None:
    source = random_source(seed=3)
    model = transformers_model({}, source)
    text, layers = model.model, model.model.layers
    ids = random_ids(source.config, TOKENS, seed=3)
    ids[-1] = source.config.vocab_size - 1  # beyond the per-layer table: row 0
    record = Recorder()
    for index, layer in enumerate(layers):
        record.module(f"layer.{index}", layer)
        record.module(f"attention.{index}", layer.self_attn)
    record.module("rms_norm", layers[0].input_layernorm)
    record.module("rms_norm_without_weight", layers[0].self_attn.v_norm)
    record.module("laurel", layers[0].laurel)
    record.module("feed_forward_sparse", layers[0].mlp)
    record.module("feed_forward_dense", layers[1].mlp)
    record.method("altup_predict", layers[1].altup, "predict")
    record.method("altup_correct", layers[1].altup, "correct")
    record.method("per_layer_inputs", text, "project_per_layer_inputs")
    record.module("norm", text.norm)
    record.module("embedding", text.embed_tokens)
    with torch.no_grad():
        logits = model(torch.tensor([ids]), use_cache=False).logits

    blocks: dict[str, tuple[list[Array], Array]] = {}
    for name in (
        "rms_norm",
        "laurel",
        "feed_forward_sparse",
        "feed_forward_dense",
        "altup_predict",
        "altup_correct",
    ):
        inputs, out = record.calls[name]
        blocks[name] = [flat(x) for x in inputs], flat(out)
    (heads,), normed = record.calls["rms_norm_without_weight"]  # (1, tokens, heads, dim): one head of it
    blocks["rms_norm_without_weight"] = [flat(heads[:, :, 0])], flat(normed[:, :, 0])
    for kind, index in ATTENTION.items():
        inputs, out = record.calls[f"attention.{index}"]
        # Queries of a shared layer need the keys that its owner made of what the owner was given.
        owner = [flat(record.calls[f"attention.{SHARED[index]}"][0][0])] if index in SHARED else []
        blocks[f"attention_{kind}"] = [*owner, flat(inputs[0])], flat(out)
    (embeddings, rows), mixed = record.calls["per_layer_inputs"]
    flat_rows = rows[0].numpy().reshape(TOKENS, -1)
    blocks["per_layer_inputs"] = [flat(embeddings), flat_rows], mixed[0].numpy().transpose(1, 0, 2)
    for index in (0, 1):
        inputs, out = record.calls[f"layer.{index}"]
        blocks[f"decoder_layer_{index}"] = [flat(inputs[0]), flat(inputs[1])], flat(out)
    blocks["expand_streams"] = [flat(embeddings)], flat(record.calls["layer.0"][0][0])
    last = record.calls[f"layer.{len(layers) - 1}"][1]
    blocks["merge_streams"] = [flat(last)], flat(record.calls["norm"][0][0])
    blocks["logits"] = [flat(record.calls["norm"][1])], flat(logits)
    blocks["model"] = [flat(embeddings), flat_rows], flat(logits)

    arrays: dict[str, Any] = {f"weight.{name}": array for name, array in source.weights.items()}
    for name, (inputs, out) in blocks.items():
        arrays |= {f"{name}.in.{i}": x for i, x in enumerate(inputs)} | {f"{name}.out": out}
    arrays["ids"] = np.array(ids)
    arrays["config"] = np.array(json.dumps(SMALL))
    arrays["made_with"] = np.array(f"transformers {transformers.__version__}, torch {torch.__version__}")
    np.savez_compressed(OUT, **arrays)
    print(f"{OUT}: {OUT.stat().st_size:,} bytes, {len(blocks)} blocks")


if __name__ == "__main__":
    main()
