"""The Gemma 3n text model, written once against `Ops`.

It follows `transformers.models.gemma3n.modeling_gemma3n` (Gemma3nTextModel, Gemma3nForCausalLM) in eval mode.
Three things make it cheaper without changing a result:

- the per-layer embeddings come in as rows that the caller has read from the table, already multiplied by
  sqrt(hidden_size_per_layer_input), so that the table is no part of the graph;
- from the first layer that shares KV upwards only the rows whose logits are wanted are computed, because
  those layers leave nothing behind in any cache (`ops.wanted`);
- weights of layers that share KV have no k and v.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TypeVar

from gemma_edge.export.model.ops import HeadProjection, Ops, Weight, Weights
from gemma_edge.export.model.tensor_spec import head_name
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig

T = TypeVar("T")

# Gemma3nTextModel.forward clamps the mean square of a projected stream before its square root.
MIN_MEAN_SQUARE = 1e-5


def decoder(ops: Ops[T], config: Gemma3nConfig, embeddings: T, ple_low: T, ple_high: T | None) -> T:
    """Logits of the wanted rows: `logits` of `hidden_states`."""
    return logits(ops, config, hidden_states(ops, config, embeddings, ple_low, ple_high))


def hidden_states(ops: Ops[T], config: Gemma3nConfig, embeddings: T, ple_low: T, ple_high: T | None) -> T:
    """Hidden states of the wanted rows, after the final norm.

    Args:
        embeddings: (tokens, hidden), token embeddings times sqrt(hidden), or soft tokens.
        ple_low: (tokens, first_shared_layer * ple_width), the columns of the tokens' per-layer rows that
            belong to the layers that own KV.
        ple_high: (wanted, shared layers * ple_width), the rest of them for the wanted rows; None where no
            layer shares KV.
    """
    w, first_shared = Weights(), config.first_shared_layer
    ple = per_layer_inputs(ops, config, embeddings, ple_low, 0, first_shared)
    streams = expand_streams(ops, config, embeddings)
    for layer in range(first_shared):
        streams = decoder_layer(ops, config, w.layer(layer), layer, streams, ple[layer])
    streams = ops.wanted(streams)
    if ple_high is not None:
        wanted = ops.wanted(embeddings)
        ple += per_layer_inputs(ops, config, wanted, ple_high, first_shared, config.num_hidden_layers)
    for layer in range(first_shared, config.num_hidden_layers):
        streams = decoder_layer(ops, config, w.layer(layer), layer, streams, ple[layer])
    return ops.rms_norm(merge_streams(ops, config, streams), w["norm"])


def logits(ops: Ops[T], config: Gemma3nConfig, hidden: T) -> T:
    """(tokens, hidden) -> (tokens, vocab), softcapped."""
    raw = ops.linear(hidden, Weight(head_name(config)))
    cap = config.final_logit_softcapping
    return ops.scale(ops.tanh(ops.scale(raw, 1.0 / cap)), cap) if cap else raw


def activation_bytes(config: Gemma3nConfig, chunk: int) -> int:
    """Largest set of tensors alive at once in a prefill call of `chunk` tokens, and one row of logits.

    In the feed-forward block: gate, up and two temporaries of its width, beside the streams before and after
    prediction, their updates, and the per-layer inputs of the call.
    """
    width = max(config.intermediate_size)
    streams = config.altup_num_inputs * config.hidden_size
    per_token = 4 * width + 4 * streams + 6 * config.hidden_size + 3 * config.ple_row_size
    attention = config.num_attention_heads * (config.sliding_window + chunk)
    return 4 * (chunk * (per_token + attention) + 3 * config.vocab_size)


def per_layer_inputs(
    ops: Ops[T], config: Gemma3nConfig, embeddings: T, rows: T, start: int, stop: int
) -> list[T]:
    """(norm(projection(embeddings) / sqrt(hidden)) + rows) / sqrt(2), split into layers [start, stop)."""
    width = config.hidden_size_per_layer_input
    weight = Weight("per_layer_model_projection.weight", rows=(start * width, stop * width))
    projected = ops.scale(ops.linear(embeddings, weight), config.hidden_size**-0.5)
    normed = ops.rms_norm(projected, Weight("per_layer_projection_norm.weight"), groups=stop - start)
    mixed = ops.scale(ops.add(normed, rows), math.sqrt(0.5))
    return [ops.columns(mixed, i * width, (i + 1) * width) for i in range(stop - start)]


def expand_streams(ops: Ops[T], config: Gemma3nConfig, x: T) -> T:
    """(tokens, hidden) -> (tokens, streams, hidden): projections with the magnitude of x."""
    others = [
        match_magnitude(ops, ops.linear(x, Weight(f"altup_projections.{i}.weight")), x)
        for i in range(config.altup_num_inputs - 1)
    ]
    return ops.stack([x, *others])


def merge_streams(ops: Ops[T], config: Gemma3nConfig, streams: T) -> T:
    """The reverse: the mean of stream 0 and the others projected to its magnitude."""
    first = total = ops.stream(streams, 0)
    for i in range(config.altup_num_inputs - 1):
        projected = ops.linear(ops.stream(streams, i + 1), Weight(f"altup_unembed_projections.{i}.weight"))
        total = ops.add(total, match_magnitude(ops, projected, first))
    return ops.scale(total, 1.0 / config.altup_num_inputs)


def match_magnitude(ops: Ops[T], x: T, like: T) -> T:
    magnitude = ops.sqrt(ops.mean_square(like))
    own = ops.sqrt(ops.at_least(ops.mean_square(x), MIN_MEAN_SQUARE))
    return ops.divide(ops.multiply(x, magnitude), own)


def decoder_layer(
    ops: Ops[T], config: Gemma3nConfig, w: Weights, layer: int, streams: T, per_layer_input: T
) -> T:
    """One layer over (tokens, streams, hidden)."""
    active_index = config.altup_active_idx
    predictions = altup_predict(ops, config, w, streams)
    active = ops.stream(predictions, active_index)
    normed = ops.rms_norm(active, w["input_layernorm"])
    attended = ops.rms_norm(attention(ops, config, w, layer, normed), w["post_attention_layernorm"])
    gated = ops.add(active, attended)
    mixed = ops.scale(ops.add(gated, laurel(ops, w, normed)), math.sqrt(0.5))
    fed = feed_forward(ops, config, w, layer, ops.rms_norm(mixed, w["pre_feedforward_layernorm"]))
    activated = ops.add(mixed, ops.rms_norm(fed, w["post_feedforward_layernorm"]))
    corrected = altup_correct(ops, config, w, predictions, activated)
    gate = ops.stream(corrected, active_index)
    if config.altup_correct_scale:
        gate = ops.scale_by(gate, w.raw("altup.correct_output_scale"))
    gate = ops.activation(ops.linear(gate, w["per_layer_input_gate"]), config.hidden_activation)
    injected = ops.linear(ops.multiply(gate, per_layer_input), w["per_layer_projection"])
    return ops.add_to_tail(corrected, ops.rms_norm(injected, w["post_per_layer_input_norm"]))


def attention(ops: Ops[T], config: Gemma3nConfig, w: Weights, layer: int, x: T) -> T:
    """Grouped-query attention with norms on q, k (weighted) and v (not), scale 1.0."""

    def bias(name: str) -> Weight | None:
        return w.raw(f"self_attn.{name}.bias") if config.attention_bias else None

    def projection(name: str, norm: Weight | None, heads: int) -> HeadProjection:
        return HeadProjection(w[f"self_attn.{name}"], bias(name), norm, heads)

    projections = [projection("q_proj", w["self_attn.q_norm"], config.num_attention_heads)]
    if layer in config.kv_layers:
        projections.append(projection("k_proj", w["self_attn.k_norm"], config.num_key_value_heads))
        projections.append(projection("v_proj", None, config.num_key_value_heads))
    attended = ops.attention(ops.project_heads(x, projections), layer)
    return ops.linear(attended, w["self_attn.o_proj"], bias("o_proj"))


def laurel(ops: Ops[T], w: Weights, x: T) -> T:
    """Learned augmented residual: x + norm(right(left(x)))."""
    low_rank = ops.linear(ops.linear(x, w["laurel.linear_left"]), w["laurel.linear_right"])
    return ops.add(x, ops.rms_norm(low_rank, w["laurel.post_laurel_norm"]))


def feed_forward(ops: Ops[T], config: Gemma3nConfig, w: Weights, layer: int, x: T) -> T:
    gate = ops.linear(x, w["mlp.gate_proj"])
    if config.activation_sparsity[layer] > 0.0:
        gate = gaussian_top_k(ops, gate, config.sparsity_multiplier(layer))
    up = ops.linear(x, w["mlp.up_proj"])
    return ops.linear(ops.multiply(ops.activation(gate, config.hidden_activation), up), w["mlp.down_proj"])


def gaussian_top_k(ops: Ops[T], x: T, multiplier: float) -> T:
    """relu(x - (mean + multiplier * std)), std over n, not n - 1: keeps about the top 1 - sparsity."""
    centered = ops.subtract(x, ops.mean(x))
    deviation = ops.sqrt(ops.mean_square(centered))
    return ops.relu(ops.subtract(centered, ops.scale(deviation, multiplier)))


def router(ops: Ops[T], config: Gemma3nConfig, w: Weights, x: T) -> T:
    """(tokens, hidden) -> (tokens, streams) in (-1, 1)."""
    # The factor belongs to the norm's output; on its weight it costs nothing.
    weight = replace(w["altup.router_norm"], factor=1.0 / config.hidden_size)
    return ops.tanh(ops.linear(ops.rms_norm(x, weight), w["altup.modality_router"]))


def altup_predict(ops: Ops[T], config: Gemma3nConfig, w: Weights, streams: T) -> T:
    modalities = router(ops, config, w, ops.stream(streams, config.altup_active_idx))
    return ops.mix(ops.linear(modalities, w["altup.prediction_coefs"]), streams)


def altup_correct(ops: Ops[T], config: Gemma3nConfig, w: Weights, predictions: T, activated: T) -> T:
    modalities = router(ops, config, w, activated)
    innovation = ops.subtract(activated, ops.stream(predictions, config.altup_active_idx))
    return ops.spread(ops.linear(modalities, w["altup.correction_coefs"]), innovation, predictions)
