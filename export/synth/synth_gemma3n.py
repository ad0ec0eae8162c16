"""The contents of a synthetic Gemma 3n checkpoint: configs, side files, and the moments of its weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_edge.export.checkpoint.sentencepiece_model import Piece, build_model, synthetic_pieces
from gemma_edge.export.model.gemma3n.gemma3n_text_tensors import tensor_specs, unused_names
from gemma_edge.export.model.tensor_spec import EMBEDDING_NAME, HEAD_NAME, PLE_NAME
from gemma_edge.export.synth.synth_towers import (
    TOWERS,
    audio_json,
    preprocessor_json,
    tower_moments,
    vision_json,
)
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.families.config_fields import FULL, SLIDING
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig

SIZES = ("tiny", "e2b", "e4b")
Json = dict[str, Any]
# A tensor of random values: canonical name, shape as stored, mean, standard deviation.
Moments = tuple[str, tuple[int, ...], float, float]

CHAT_TEMPLATE = """\
{%- macro render(content) -%}
    {%- if content is string -%}
        {{ content | trim }}
    {%- else -%}
        {%- for part in content -%}
            {%- if part['type'] == 'text' -%}
                {{ part['text'] | trim }}
            {%- elif part['type'] == 'image' -%}
                {{ '<image_soft_token>' }}
            {%- elif part['type'] == 'audio' -%}
                {{ '<audio_soft_token>' }}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{{ bos_token }}
{%- set ns = namespace(system='', turns=messages) -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] -%}
    {%- set ns.system = (system if system is string else system[0]['text']) + '\\n\\n' -%}
    {%- set ns.turns = messages[1:] -%}
{%- endif -%}
{%- for message in ns.turns -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif -%}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (ns.system if loop.first else '') }}
    {{- render(message['content']) -}}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""


@dataclass(frozen=True)
class Contents:
    """A checkpoint without its weights: the files beside them, the tensors, and the layout of names."""

    files: dict[str, bytes]
    tensors: Iterable[Moments]
    multimodal: bool

    def stored_name(self, name: str) -> str:
        """The name of a tensor in a shard, from its canonical name."""
        if name.startswith(TOWERS):
            return f"model.{name}"
        prefix = "model.language_model." if self.multimodal else "model."
        return name if name == HEAD_NAME else prefix + name


def synthetic_contents(path: Path, size: str, config: Json, multimodal: bool, encoders: bool) -> Contents:
    """The contents of a checkpoint at `path`; the other arguments are those of `synthesize`.

    Raises:
        ConfigError, UsageError: `config` does not make a valid model.
    """
    text = text_config(size)
    for key, value in config.items():
        text.pop(key, None) if value is None else text.update({key: value})
    parsed = Gemma3nConfig.from_dict(text, path / "config.json")
    documents = _documents(text, parsed, multimodal, size == "tiny")
    tensors = list(random_tensors(parsed))
    if encoders and multimodal:
        towers = tower_moments(documents["config.json"], documents["preprocessor_config.json"])
        tensors += [(spec.name, spec.stored_shape, mean, std) for spec, mean, std in towers]
    return Contents(_side_files(parsed, documents), tensors, multimodal)


def text_config(size: str) -> Json:
    """The text part of config.json: as published for google/gemma-3n-E2B-it and -E4B-it, or the tiny
    model's.
    """
    layers = {"tiny": 12, "e2b": 30, "e4b": 35}[size]
    common: Json = {
        "activation_sparsity_pattern": [0.95] * 10 + [0.0] * (layers - 10),
        "altup_active_idx": 0,
        "altup_coef_clip": 120.0,
        "altup_correct_scale": True,
        "altup_num_inputs": 4,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "final_logit_softcapping": 30.0,
        "head_dim": 256,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": 2048,
        "hidden_size_per_layer_input": 256,
        "initializer_range": 0.02,
        "intermediate_size": [8192 if size == "e2b" else 16384] * layers,
        "laurel_rank": 64,
        "layer_types": [FULL if (i + 1) % 5 == 0 else SLIDING for i in range(layers)],
        "max_position_embeddings": 32768,
        "model_type": "gemma3n_text",
        "num_attention_heads": 8,
        "num_hidden_layers": layers,
        "num_key_value_heads": 2,
        "num_kv_shared_layers": 10 if size == "e2b" else 15,
        "rms_norm_eps": 1e-06,
        "rope_local_base_freq": 10000.0,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": 512,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 262400,
        "vocab_size_per_layer_input": 262144,
    }
    if size != "tiny":
        return common
    return common | {
        "activation_sparsity_pattern": [0.95] * 4 + [0.0] * 8,
        "head_dim": 32,
        "hidden_size": 128,
        "hidden_size_per_layer_input": 32,
        "intermediate_size": [256, 256, 512, 512, 384, 384] + [256] * 5 + [512],
        "laurel_rank": 16,
        "max_position_embeddings": 4096,
        "num_attention_heads": 4,
        "num_kv_shared_layers": 5,
        "sliding_window": 32,
        "vocab_size": 544,
        "vocab_size_per_layer_input": 512,
    }


def _side_files(config: Gemma3nConfig, documents: dict[str, Json]) -> dict[str, bytes]:
    """Every file but the weights."""
    return {
        **{name: (json.dumps(data, indent=2) + "\n").encode() for name, data in documents.items()},
        "tokenizer.model": build_model(_pieces(config)),
        "chat_template.jinja": CHAT_TEMPLATE.encode(),
    }


def _pieces(config: Gemma3nConfig) -> list[Piece]:
    try:
        return synthetic_pieces(min(config.vocab_size, config.vocab_size_per_layer_input))
    except ValueError as error:
        raise UsageError(str(error)) from None


def _documents(text: Json, config: Gemma3nConfig, multimodal: bool, tiny: bool) -> dict[str, Json]:
    """The JSON files, by name."""
    pieces = _pieces(config)
    count = len(pieces)
    ids = {piece.text: index for index, piece in enumerate(pieces)}
    # Soft tokens follow the pieces: one half of the rest belongs to images, the other to audio.
    half = (config.vocab_size - count) // 2
    soft = {
        "<end_of_image>": count,
        "<image_soft_token>": count + 1,
        "<end_of_audio>": count + half,
        "<audio_soft_token>": count + half + 1,
    }
    if half < 2:
        soft = {}
    whole: Json = {"eos_token_id": [1, 106]}
    if multimodal:
        whole |= {
            "architectures": ["Gemma3nForConditionalGeneration"],
            "model_type": "gemma3n",
            "text_config": text,
        }
        whole |= {"initializer_range": 0.02, "torch_dtype": "bfloat16"}
        whole |= {"boi_token_id": ids["<start_of_image>"], "boa_token_id": ids["<start_of_audio>"]}
        whole |= {
            f"{key}_token_id": index
            for key, index in zip(("eoi", "image", "eoa", "audio"), soft.values(), strict=False)
        }
        image_tokens = preprocessor_json(tiny)["image_seq_length"]
        whole |= {"audio_soft_tokens_per_image": 188, "vision_soft_tokens_per_image": image_tokens}
        if not config.tie_word_embeddings:
            whole["tie_word_embeddings"] = False
        whole["audio_config"] = audio_json(tiny, count + half, max(half, 1))
        whole["vision_config"] = vision_json(tiny, count, max(half, 1))
    else:
        whole |= {**text, "architectures": ["Gemma3nForCausalLM"], "eos_token_id": [1, 106]}
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    special += ["<start_of_image>", "<start_of_audio>"]
    tokenizer: Json = {
        "tokenizer_class": "GemmaTokenizer",
        "add_bos_token": True,
        "add_eos_token": False,
        **{f"{name}_token": f"<{name}>" for name in ("pad", "eos", "bos", "unk", "mask")},
        "added_tokens_decoder": {
            str(index): {"content": name, "special": True}
            for name, index in ({name: ids[name] for name in special} | soft).items()
        },
    }
    generation: Json = {"bos_token_id": 2, "do_sample": True, "eos_token_id": [1, 106], "pad_token_id": 0}
    generation |= {"temperature": 1.0, "top_k": 64, "top_p": 0.95}
    documents = {
        "config.json": whole,
        "tokenizer_config.json": tokenizer,
        "generation_config.json": generation,
    }
    if multimodal:
        documents["preprocessor_config.json"] = preprocessor_json(tiny)
    return documents


def random_tensors(config: Gemma3nConfig) -> Iterator[Moments]:
    """What a published checkpoint holds: the model's tensors, and k/v weights of layers that share KV."""
    specs = tensor_specs(config)
    shapes = {name: spec.shape for name, spec in specs.items()}
    for name in sorted(unused_names(config) - {HEAD_NAME}):
        # Layer 0 always owns its KV; it has a bias only when the config says so.
        if layer_0 := shapes.get("layers.0." + name.split(".", 2)[2]):
            shapes[name] = layer_0
    for name, shape in shapes.items():
        yield name, shape, *_mean_and_std(name, shape, config)


def _mean_and_std(name: str, shape: tuple[int, ...], config: Gemma3nConfig) -> tuple[float, float]:
    """Moments that keep every activation near unit size, so that every mechanism matters."""
    if name in (EMBEDDING_NAME, HEAD_NAME):
        return 0.0, 1 / config.embed_scale
    if name == PLE_NAME:
        return 0.0, 1 / config.ple_scale
    if name.endswith(("q_norm.weight", "k_norm.weight")):
        # Attention has no scale: these make the scores' deviation about 2 whatever head_dim is.
        mean = (4 / config.head_dim) ** 0.25
        return mean, mean / 10
    if name.endswith("modality_router.weight"):
        # Its input is a unit vector divided by hidden_size.
        return 0.0, config.embed_scale / 2
    if name.endswith("_coefs.weight"):
        return 0.0, 0.1
    if name.endswith(".bias"):
        return 0.0, 0.1
    if name == "norm.weight":
        # Of either sign, or a tied model would only repeat its input; large, for a peaked distribution.
        return 0.0, 4.0
    if name.endswith(BRANCH_NORMS):
        # Small branches, as in a trained model: with large ones, random layers blow up any rounding.
        return 0.15, 0.015
    if len(shape) == 1:
        return 1.0, 0.1
    return 0.0, float(shape[1] ** -0.5)


BRANCH_NORMS = (
    "post_attention_layernorm.weight",
    "post_feedforward_layernorm.weight",
    "post_laurel_norm.weight",
    "post_per_layer_input_norm.weight",
)
