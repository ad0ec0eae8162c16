"""Every tensor of the text model: its name, shape and part.

Names are canonical: relative to the text model (`layers.0.mlp.gate_proj.weight`), whatever prefix a
checkpoint's layout puts before them. The checkpoint reader, the synthetic checkpoint, the plan, the
recipes and the emitters all read this one table.
"""

from __future__ import annotations

from collections.abc import Iterator

from gemma_edge.export.model.tensor_spec import EMBEDDING_NAME, HEAD_NAME, PLE_NAME, Part, TensorSpec
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig


def tensor_specs(config: Gemma3nConfig) -> dict[str, TensorSpec]:
    """All tensors that the model of `config` reads, by canonical name, in the order of use."""
    return {spec.name: spec for spec in _specs(config)}


def unused_names(config: Gemma3nConfig) -> set[str]:
    """Tensors that a checkpoint may hold although no layer reads them.

    Published checkpoints keep k/v weights for layers that share KV, and a tied head may be stored twice.
    """
    names = {
        f"layers.{i}.self_attn.{part}"
        for i in range(config.first_shared_layer, config.num_hidden_layers)
        for part in (
            "k_proj.weight",
            "k_proj.bias",
            "v_proj.weight",
            "v_proj.bias",
            "k_norm.weight",
        )
    }
    return names | ({HEAD_NAME} if config.tie_word_embeddings else set())


def _specs(c: Gemma3nConfig) -> Iterator[TensorSpec]:
    embedding_part = Part.HEAD if c.tie_word_embeddings else Part.EMBEDDING
    yield TensorSpec(EMBEDDING_NAME, (c.vocab_size, c.hidden_size), embedding_part)
    yield TensorSpec(PLE_NAME, (c.vocab_size_per_layer_input, c.ple_row_size), Part.PLE)
    yield TensorSpec("per_layer_model_projection.weight", (c.ple_row_size, c.hidden_size), Part.SMALL)
    yield TensorSpec("per_layer_projection_norm.weight", (c.hidden_size_per_layer_input,), Part.VECTOR)
    square = (c.hidden_size, c.hidden_size)
    for i in range(c.altup_num_inputs - 1):
        yield TensorSpec(f"altup_projections.{i}.weight", square, Part.SMALL)
    for layer in range(c.num_hidden_layers):
        for name, shape, part in _layer(c, layer):
            yield TensorSpec(f"layers.{layer}.{name}", shape, part)
    for i in range(c.altup_num_inputs - 1):
        yield TensorSpec(f"altup_unembed_projections.{i}.weight", square, Part.SMALL)
    yield TensorSpec("norm.weight", (c.hidden_size,), Part.VECTOR)
    if not c.tie_word_embeddings:
        yield TensorSpec(HEAD_NAME, (c.vocab_size, c.hidden_size), Part.HEAD)


def _layer(c: Gemma3nConfig, layer: int) -> Iterator[tuple[str, tuple[int, ...], Part]]:
    hidden, streams, width = c.hidden_size, c.altup_num_inputs, c.intermediate_size[layer]
    yield "altup.router_norm.weight", (hidden,), Part.VECTOR
    yield "altup.modality_router.weight", (streams, hidden), Part.VECTOR
    yield "altup.prediction_coefs.weight", (streams * streams, streams), Part.VECTOR
    yield "altup.correction_coefs.weight", (streams, streams), Part.VECTOR
    yield "altup.correct_output_scale", (hidden,), Part.VECTOR
    yield "input_layernorm.weight", (hidden,), Part.VECTOR
    yield "laurel.linear_left.weight", (c.laurel_rank, hidden), Part.SMALL
    yield "laurel.linear_right.weight", (hidden, c.laurel_rank), Part.SMALL
    yield "laurel.post_laurel_norm.weight", (hidden,), Part.VECTOR
    projections = [("q_proj", c.query_size, hidden)]
    norms = ["q_norm"]
    if layer in c.kv_layers:
        projections += [("k_proj", c.key_value_size, hidden), ("v_proj", c.key_value_size, hidden)]
        norms += ["k_norm"]
    projections += [("o_proj", hidden, c.query_size)]
    for name, out, into in projections:
        yield f"self_attn.{name}.weight", (out, into), Part.DECODER
        if c.attention_bias:
            yield f"self_attn.{name}.bias", (out,), Part.VECTOR
    for name in norms:
        yield f"self_attn.{name}.weight", (c.head_dim,), Part.VECTOR
    for name in ("post_attention_layernorm", "pre_feedforward_layernorm"):
        yield f"{name}.weight", (hidden,), Part.VECTOR
    yield "mlp.gate_proj.weight", (width, hidden), Part.DECODER
    yield "mlp.up_proj.weight", (width, hidden), Part.DECODER
    yield "mlp.down_proj.weight", (hidden, width), Part.DECODER
    yield "post_feedforward_layernorm.weight", (hidden,), Part.VECTOR
    yield "per_layer_input_gate.weight", (c.hidden_size_per_layer_input, hidden), Part.SMALL
    yield "per_layer_projection.weight", (hidden, c.hidden_size_per_layer_input), Part.SMALL
    yield "post_per_layer_input_norm.weight", (hidden,), Part.VECTOR
