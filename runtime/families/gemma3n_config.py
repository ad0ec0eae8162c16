"""`Gemma3nConfig`: what a text model is, frozen, read from a checkpoint's config.json.

Nothing here is wired to E2B or E4B. Whatever `transformers` accepts as a `Gemma3nTextConfig` is either
understood or refused by the name of the field. Both spellings of RoPE are read: `rope_parameters`
(transformers 5) and `rope_theta` / `rope_local_base_freq` / `rope_scaling` (transformers 4).

Defaults are those of `transformers.models.gemma3n.Gemma3nTextConfig` 5.x, because a config.json may omit
any field that equals its default.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from gemma_edge.runtime.errors import ConfigError
from gemma_edge.runtime.families.config_fields import (
    FULL,
    MAX_LAYERS,
    MAX_SIZE,
    MAX_STREAMS,
    SLIDING,
    Fields,
    is_int,
    is_number,
)
from gemma_edge.runtime.files.text_files import read_json

DEFAULT_ROPE_THETA = {FULL: 1_000_000.0, SLIDING: 10_000.0}

Json = dict[str, Any]


@dataclass(frozen=True)
class Rope:
    """Rotary embedding of one layer type: angles are position / factor * theta^(-2i / head_dim)."""

    theta: float
    factor: float = 1.0  # "linear" scaling divides every frequency by it; 1 is "default"


@dataclass(frozen=True)
class Gemma3nConfig:
    """A Gemma 3n text model. Lists have one entry a layer; sizes are in elements."""

    vocab_size: int
    vocab_size_per_layer_input: int
    hidden_size: int
    hidden_size_per_layer_input: int
    num_hidden_layers: int
    intermediate_size: tuple[int, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    layer_types: tuple[str, ...]
    sliding_window: int
    num_kv_shared_layers: int
    activation_sparsity: tuple[float, ...]
    hidden_activation: str
    rms_norm_eps: float
    rope: dict[str, Rope]
    altup_num_inputs: int
    altup_active_idx: int
    altup_correct_scale: bool
    laurel_rank: int
    final_logit_softcapping: float | None
    attention_bias: bool
    tie_word_embeddings: bool
    max_position_embeddings: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None

    # Derived values. ------------------------------------------------------------------------------

    @cached_property
    def first_shared_layer(self) -> int:
        """Layers from this one up have no keys and values of their own."""
        return self.num_hidden_layers - self.num_kv_shared_layers

    @cached_property
    def kv_owner(self) -> tuple[int, ...]:
        """For each layer, the layer whose KV cache it reads: itself, or the last owner of its type."""
        owners = range(self.first_shared_layer)
        last = {self.layer_types[i]: i for i in owners}
        return (*owners, *(last[t] for t in self.layer_types[self.first_shared_layer :]))

    @property
    def kv_layers(self) -> range:
        """The layers that own a KV cache."""
        return range(self.first_shared_layer)

    def is_sliding(self, layer: int) -> bool:
        return self.layer_types[layer] == SLIDING

    @property
    def query_size(self) -> int:
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        return self.num_key_value_heads * self.head_dim

    @property
    def ple_row_size(self) -> int:
        """Per-layer embedding values of one token: layers x hidden_size_per_layer_input."""
        return self.num_hidden_layers * self.hidden_size_per_layer_input

    @property
    def embed_scale(self) -> float:
        return math.sqrt(self.hidden_size)

    @property
    def ple_scale(self) -> float:
        return math.sqrt(self.hidden_size_per_layer_input)

    def sparsity_multiplier(self, layer: int) -> float:
        """Standard deviations above the mean that the gate's survivors lie; 0 for a dense layer."""
        from statistics import NormalDist  # which brings fractions and decimal: exports alone need it

        sparsity = self.activation_sparsity[layer]
        return NormalDist().inv_cdf(sparsity) if sparsity > 0.0 else 0.0

    def inverse_frequencies(self, layer_type: str) -> list[float]:
        """head_dim / 2 rotary frequencies in radians a position."""
        rope, half = self.rope[layer_type], self.head_dim // 2
        return [rope.theta ** (-i / half) / rope.factor for i in range(half)]

    def to_dict(self) -> Json:
        """Plain JSON values; `from_dict` of them gives an equal config."""
        data = dataclasses.asdict(self)
        data["intermediate_size"] = list(self.intermediate_size)
        data["layer_types"] = list(self.layer_types)
        data["activation_sparsity_pattern"] = list(data.pop("activation_sparsity"))
        data["eos_token_id"] = list(data.pop("eos_token_ids"))
        data["rope_parameters"] = {
            layer_type: {"rope_type": "default", "rope_theta": rope.theta}
            if rope.factor == 1.0
            else {"rope_type": "linear", "rope_theta": rope.theta, "factor": rope.factor}
            for layer_type, rope in self.rope.items()
        }
        del data["rope"]
        return {"model_type": "gemma3n_text", **data}

    @classmethod
    def from_file(cls, path: str | Path) -> Gemma3nConfig:
        """Reads a config.json, multimodal (`text_config` inside) or text-only.

        Raises:
            ConfigError: not JSON, not Gemma 3n, or a field that is malformed or unsupported.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "config.json"
        if not path.exists():
            remedy = "Point to a checkpoint folder."
            raise ConfigError(path, "file", "a Hugging Face config.json", "no such file", remedy)
        return cls.from_dict(read_json(path, ConfigError, what="a readable config.json"), path)

    @classmethod
    def from_dict(cls, data: Json, path: str | Path = "config.json") -> Gemma3nConfig:
        """As `from_file`, from a parsed config; `path` only names it in errors."""
        return _Parser(data, Path(path)).config()


class _Parser(Fields):
    """Takes fields out of a config.json, each checked, with the file's own names in every error."""

    def __init__(self, data: object, path: Path) -> None:
        super().__init__(data, path)
        self.outer = self.data
        if isinstance(self.data.get("text_config"), dict):
            self.prefix, self.data = "text_config.", self.data["text_config"]
        model_type = self.data.get("model_type", self.outer.get("model_type"))
        if model_type not in ("gemma3n", "gemma3n_text"):
            self.fail("model_type", "gemma3n or gemma3n_text", model_type)

    def per_layer(
        self, key: str, default: Any, layers: int, ok: Callable[[Any], bool], expected: str
    ) -> tuple[Any, ...]:
        """A list of one value a layer; a single value stands for all of them."""
        value = self.data.get(key)
        value = default if value is None else value
        values = value if isinstance(value, list) else [value] * layers
        if len(values) != layers:
            self.fail(
                self.prefix + key,
                f"{layers} values, one for each of num_hidden_layers",
                f"{len(values)} values",
            )
        for index, item in enumerate(values):
            if not ok(item):
                self.fail(f"{self.prefix}{key}[{index}]", expected, repr(item))
        return tuple(values)

    def config(self) -> Gemma3nConfig:
        layers = self.size("num_hidden_layers", 35, maximum=MAX_LAYERS)
        heads, kv_heads = self.size("num_attention_heads", 8), self.size("num_key_value_heads", 2)
        if heads % kv_heads:
            self.fail(
                self.prefix + "num_key_value_heads", f"a divisor of num_attention_heads = {heads}", kv_heads
            )
        head_dim = self.size("head_dim", 256)
        if head_dim % 2:
            self.fail(self.prefix + "head_dim", "an even number (RoPE rotates halves)", head_dim)
        streams = self.size("altup_num_inputs", 4, maximum=MAX_STREAMS)
        active = self.size("altup_active_idx", 0, minimum=0)
        if active >= streams:
            self.fail(self.prefix + "altup_active_idx", f"below altup_num_inputs = {streams}", active)
        layer_types = self.layer_types(layers)
        softcap = self.get(
            "final_logit_softcapping",
            30.0,
            lambda v: v is None or (is_number(v) and v > 0),
            "a positive number or null",
        )
        bias = self.flag("attention_bias", False)
        if self.flag("use_bidirectional_attention", False):
            self.fail(self.prefix + "use_bidirectional_attention", "false (causal attention)", True)
        vocab = self.size("vocab_size", 262_400)
        return Gemma3nConfig(
            vocab_size=vocab,
            vocab_size_per_layer_input=self.size("vocab_size_per_layer_input", 262_144),
            hidden_size=self.size("hidden_size", 2048),
            hidden_size_per_layer_input=self.size("hidden_size_per_layer_input", 256),
            num_hidden_layers=layers,
            intermediate_size=self.per_layer(
                "intermediate_size", 16_384, layers, lambda v: is_int(v) and v > 0, "a positive integer"
            ),
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            layer_types=layer_types,
            sliding_window=self.size("sliding_window", 512),
            num_kv_shared_layers=self.shared_layers(layers, layer_types),
            activation_sparsity=self.sparsity(layers),
            hidden_activation=self.get(
                "hidden_activation",
                "gelu_pytorch_tanh",
                lambda v: v in ACTIVATIONS,
                f"one of {', '.join(ACTIVATIONS)}",
            ),
            rms_norm_eps=self.number("rms_norm_eps", 1e-6),
            rope=self.rope(layer_types),
            altup_num_inputs=streams,
            altup_active_idx=active,
            altup_correct_scale=self.flag("altup_correct_scale", True),
            laurel_rank=self.size("laurel_rank", 64),
            final_logit_softcapping=None if softcap is None else float(softcap),
            attention_bias=bias,
            tie_word_embeddings=self.tied(),
            max_position_embeddings=self.size("max_position_embeddings", 32_768),
            bos_token_id=self.token("bos_token_id", 2),
            eos_token_ids=self.tokens("eos_token_id", [1]),
            pad_token_id=self.token("pad_token_id", 0),
        )

    def flag(self, key: str, default: bool) -> bool:
        return bool(self.get(key, default, lambda v: isinstance(v, bool) or v is None, "true or false"))

    def tied(self) -> bool:
        # A multimodal config may say it outside text_config only, or inside only.
        value = self.data.get("tie_word_embeddings", self.outer.get("tie_word_embeddings", True))
        if not isinstance(value, bool):
            self.fail("tie_word_embeddings", "true or false", repr(value))
        return value

    def token(self, key: str, default: int) -> int | None:
        value = self.data.get(key, self.outer.get(key, default))
        if value is not None and not (is_int(value) and 0 <= value <= MAX_SIZE):
            self.fail(self.prefix + key, "a token id or null", repr(value))
        return value

    def tokens(self, key: str, default: list[int]) -> tuple[int, ...]:
        # The outer config of a multimodal checkpoint adds end of turn to the inner one's eos.
        value = self.outer.get(key, self.data.get(key, default))
        values = [] if value is None else value if isinstance(value, list) else [value]
        if not all(is_int(v) and 0 <= v <= MAX_SIZE for v in values):
            self.fail(key, "a token id, a list of them, or null", repr(value))
        return tuple(values)

    def layer_types(self, layers: int) -> tuple[str, ...]:
        pattern = [FULL if (i + 1) % 5 == 0 else SLIDING for i in range(layers)]
        return self.per_layer(
            "layer_types", pattern, layers, lambda v: v in (FULL, SLIDING), f"{FULL} or {SLIDING}"
        )

    def sparsity(self, layers: int) -> tuple[float, ...]:
        sparse = 10 if layers > 10 else 0
        values = self.per_layer(
            "activation_sparsity_pattern",
            [0.95] * sparse + [0.0] * (layers - sparse),
            layers,
            lambda v: is_number(v) and 0 <= v < 1,
            "a fraction from 0 up to, not including, 1",
        )
        return tuple(float(v) for v in values)

    def shared_layers(self, layers: int, layer_types: tuple[str, ...]) -> int:
        shared = self.size("num_kv_shared_layers", 15, minimum=0)
        field = self.prefix + "num_kv_shared_layers"
        if shared >= layers:
            self.fail(field, f"less than num_hidden_layers = {layers}", shared)
        orphans = sorted(set(layer_types[layers - shared :]) - set(layer_types[: layers - shared]))
        if orphans:
            self.fail(field, f"an earlier layer of type {orphans[0]} whose KV the shared layers read", "none")
        return shared

    def rope(self, layer_types: tuple[str, ...]) -> dict[str, Rope]:
        new = self.data.get("rope_parameters")
        if new is not None and not isinstance(new, dict):
            self.fail(self.prefix + "rope_parameters", "an object keyed by layer type", repr(new))
        old_theta = {
            FULL: self.number("rope_theta", DEFAULT_ROPE_THETA[FULL]),
            SLIDING: self.number("rope_local_base_freq", DEFAULT_ROPE_THETA[SLIDING]),
        }
        ropes = {}
        for layer_type in (FULL, SLIDING):
            field, parameters = "rope_parameters", (new or {}).get(layer_type)
            if layer_type == FULL and self.data.get("rope_scaling") is not None:
                # Only the global layers are scaled in the old spelling.
                field, scaling = "rope_scaling", self.data["rope_scaling"]
                parameters = {**(parameters or {}), **scaling} if isinstance(scaling, dict) else scaling
            ropes[layer_type] = self.one_rope(
                f"{self.prefix}{field}" + (f".{layer_type}" if field == "rope_parameters" else ""),
                parameters or {},
                old_theta[layer_type],
                used=layer_type in layer_types,
            )
        return ropes

    def one_rope(self, field: str, parameters: object, theta: float, used: bool) -> Rope:
        if not isinstance(parameters, dict):
            self.fail(field, "an object with rope_type and rope_theta", repr(parameters))
        kind = parameters.get("rope_type", parameters.get("type", "default"))
        if kind not in ("default", "linear") and used:
            self.fail(f"{field}.rope_type", "default or linear", repr(kind))
        theta = parameters.get("rope_theta", theta)
        factor = parameters.get("factor", 1.0) if kind == "linear" else 1.0
        for key, value in (("rope_theta", theta), ("factor", factor)):
            if not (is_number(value) and value > 0):
                self.fail(f"{field}.{key}", "a positive number", repr(value))
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            self.fail(f"{field}.partial_rotary_factor", 1.0, parameters["partial_rotary_factor"])
        return Rope(float(theta), float(factor))


# transformers' names of the activations that every emitter has an exact form of.
ACTIVATIONS = ("gelu_pytorch_tanh", "gelu", "silu", "relu")
