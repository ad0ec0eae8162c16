"""Small random Gemma 3n models: weights in a dictionary, and the same weights in `transformers`.

Weights are drawn with NumPy from the table of tensors, so that only the tests that compare with
`transformers` need torch. They are scaled so that every mechanism moves the logits: the AltUp router,
whose input is divided by hidden_size, would otherwise do next to nothing.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gemma_edge.export.emit.onnx.onnx_text import emit_decoder
from gemma_edge.export.emit.reference.reference_text import gather
from gemma_edge.export.model.gemma3n.gemma3n_text_tensors import tensor_specs
from gemma_edge.export.model.tensor_spec import EMBEDDING_NAME, HEAD_NAME, PLE_NAME
from gemma_edge.export.synth.synth_gemma3n import BRANCH_NORMS
from gemma_edge.export.weights.kv_scales import KvScales
from gemma_edge.export.weights.recipe import KvCache, load_recipe
from gemma_edge.export.weights.rounding import NearestRounding
from gemma_edge.runtime.artifacts.bundle import Bundle
from gemma_edge.runtime.artifacts.folder_bundle import FolderBundle
from gemma_edge.runtime.artifacts.manifest import FileRecord
from gemma_edge.runtime.engines.onnx_decoder import OnnxDecoder
from gemma_edge.runtime.families.config_fields import FULL, SLIDING
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig

Array = NDArray[np.float32]
Json = dict[str, Any]

# Every mechanism on six layers: owners of both kinds (layer 0 windowed), then one shared layer of each.
SMALL: Json = {
    "model_type": "gemma3n_text",
    "activation_sparsity_pattern": [0.95, 0.0, 0.5, 0.0, 0.0, 0.9],
    "head_dim": 16,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 16,
    "intermediate_size": [64, 48, 64, 96, 64, 48],
    "laurel_rank": 8,
    "layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING, FULL],
    "max_position_embeddings": 512,
    "num_attention_heads": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 2,
    "num_kv_shared_layers": 2,
    "sliding_window": 4,
    "vocab_size": 96,
    "vocab_size_per_layer_input": 80,
}

# What any text config may ask for, each as changes of SMALL.
VARIANTS: dict[str, Json] = {
    "as_it_is": {},
    "no_sharing": {"num_kv_shared_layers": 0},
    "most_layers_share": {"num_kv_shared_layers": 4},
    "one_kv_head": {"num_key_value_heads": 1},
    "as_many_kv_heads_as_heads": {"num_key_value_heads": 4},
    "three_streams_active_1": {"altup_num_inputs": 3, "altup_active_idx": 1},
    "one_stream": {"altup_num_inputs": 1},
    "attention_bias": {"attention_bias": True},
    "untied_head": {"tie_word_embeddings": False},
    "other_softcap_and_eps": {"final_logit_softcapping": 2.5, "rms_norm_eps": 1e-2},
    "all_full": {"layer_types": [FULL] * 6},
    "all_sliding": {"layer_types": [SLIDING] * 6},
    "own_pattern": {
        "layer_types": [FULL, SLIDING, SLIDING, SLIDING, SLIDING, FULL],
        "num_kv_shared_layers": 2,
    },
    "silu": {"hidden_activation": "silu", "altup_correct_scale": False},
    "gelu": {"hidden_activation": "gelu"},
    "relu": {"hidden_activation": "relu"},
    "dense": {"activation_sparsity_pattern": [0.0] * 6},
    "window_longer_than_the_prompt": {"sliding_window": 128},
    "window_of_one": {"sliding_window": 1},
    "rope_linear": {
        "rope_parameters": {
            FULL: {"rope_type": "linear", "rope_theta": 5e5, "factor": 8.0},
            SLIDING: {"rope_type": "default", "rope_theta": 100.0},
        }
    },
    "rope_old_spelling": {
        "rope_theta": 2e5,
        "rope_local_base_freq": 50.0,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
}


@dataclass
class DictSource:
    """A `WeightSource` over arrays, which remembers what was read."""

    config: Gemma3nConfig
    weights: dict[str, Array]
    names_read: set[str] = field(default_factory=set)

    def read(self, name: str) -> Array:
        self.names_read.add(name)
        return self.weights[name]

    def rows(self, name: str, start: int, stop: int) -> Array:
        return self.read(name)[start:stop]

    def changed(self, **weights: Array) -> DictSource:
        """The same model with other weights; in names "__" stands for "."."""
        return DictSource(self.config, self.weights | {k.replace("__", "."): v for k, v in weights.items()})


@dataclass(frozen=True)
class LiveCase:
    """A random model, a prompt of several windows, and the logits that transformers gives."""

    source: DictSource
    ids: list[int]
    logits: Array


def random_source(seed: int = 0, **changes: Any) -> DictSource:
    """A model of SMALL with `changes`."""
    config = Gemma3nConfig.from_dict(SMALL | changes)
    return DictSource(config, {n: _draw(config, n, s.shape, seed) for n, s in tensor_specs(config).items()})


def _draw(config: Gemma3nConfig, name: str, shape: tuple[int, ...], seed: int) -> Array:
    values = np.random.default_rng([seed, zlib.crc32(name.encode())]).standard_normal(shape, dtype=np.float32)
    if name.endswith((".q_norm.weight", ".k_norm.weight")):
        # Attention scores of a deviation of about 2.
        return np.float32((4 / config.head_dim) ** 0.25) * (np.float32(1) + np.float32(0.2) * values)
    if name.endswith(BRANCH_NORMS):
        # As in a trained model: with large branches, layers of random weights blow up any rounding.
        return np.float32(0.4) + np.float32(0.1) * values
    if len(shape) == 1:
        return np.float32(0.2) * values + np.float32(0 if name.endswith(".bias") else 1)
    if name in (EMBEDDING_NAME, HEAD_NAME):
        return values / np.float32(config.embed_scale)
    if name == PLE_NAME:
        return values / np.float32(config.ple_scale)
    if name.endswith("modality_router.weight"):
        return values * np.float32(config.embed_scale / 2)
    if name.endswith("_coefs.weight"):
        return values * np.float32(0.2)
    return values * np.float32(shape[1] ** -0.5)


def transformers_model(changes: Json, source: DictSource) -> Any:
    """`source` as a Gemma3nForCausalLM in eval mode with eager attention."""
    import torch
    from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

    torch.set_num_threads(1)  # so small that threads only wait for each other
    fields = {k: v for k, v in (SMALL | changes).items() if k != "model_type"}
    config = Gemma3nTextConfig(**fields)
    config._attn_implementation = "eager"
    model: Any = Gemma3nForCausalLM(config)
    model.eval()
    prefix = {name: "" if name == HEAD_NAME else "model." for name in source.weights}
    state = {prefix[name] + name: torch.from_numpy(array) for name, array in source.weights.items()}
    if source.config.tie_word_embeddings:
        state[HEAD_NAME] = state["model." + EMBEDDING_NAME]
    model.load_state_dict(state, strict=True)
    return model


def transformers_logits(model: Any, ids: Sequence[int]) -> Array:
    """(tokens, vocab)."""
    import torch

    with torch.no_grad():
        logits: Array = model(torch.tensor([list(ids)]), use_cache=False).logits[0].numpy()
    return logits


def random_ids(config: Gemma3nConfig, count: int, seed: int = 0) -> list[int]:
    return [int(i) for i in np.random.default_rng(seed).integers(0, config.vocab_size, count)]


# The same model on ONNX Runtime. ------------------------------------------------------------------


def write_decoder(
    source: DictSource,
    folder: Path,
    *,
    context: int = 64,
    chunk: int = 64,
    kv_scales: dict[int, KvScales] | None = None,
) -> Bundle:
    """The fp32 decoder of `source` in `folder`, with an int8 cache if there are scales for one."""
    kv_cache: KvCache = "int8" if kv_scales else "fp32"
    recipe = replace(load_recipe("fp32"), kv_cache=kv_cache)
    emitted = emit_decoder(source.config, recipe, "decoder.onnx.data", kv_scales)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "decoder.onnx.data", "wb") as file:
        emitted.data.write(file, source, NearestRounding("none"))
    (folder / "decoder.onnx").write_bytes(emitted.model.SerializeToString())
    files = FolderBundle(folder, {}, {"decoder.onnx": FileRecord(0, "")})
    return Bundle(files, source.config, context, chunk, kv_cache, "onnx")


def rows_of(source: DictSource, ids: Sequence[int]) -> tuple[Array, Array]:
    """Scaled token embeddings (tokens, hidden) and per-layer rows (tokens, layers * width)."""
    c, wanted = source.config, np.asarray(ids, np.int64)
    per_layer = gather(source, PLE_NAME, np.where(wanted < c.vocab_size_per_layer_input, wanted, 0))
    return gather(source, EMBEDDING_NAME, wanted) * np.float32(c.embed_scale), per_layer * np.float32(
        c.ple_scale
    )


def feed(
    decoder: OnnxDecoder, source: DictSource, ids: Sequence[int], chunks: Sequence[int], wanted: int = 0
) -> Array:
    """Runs `ids` in calls of `chunks` tokens; logits of the last `wanted` tokens of each call (0: all)."""
    embeddings, per_layer = rows_of(source, ids)
    logits, start = [], 0
    for count in chunks:
        rows = slice(start, start + count)
        logits.append(decoder.forward(embeddings[rows], per_layer[rows], min(wanted, count) or count))
        start += count
    return np.concatenate(logits)
