"""Checks that a .tflite belongs to a model, by its signatures.

Two layouts of the decoder's KV caches exist. "litertlm" is the one that LiteRT-LM drives: whole caches of one
length go in and come out. In the "windowed" one caches are read only, those of sliding layers hold a window,
and the keys and values of the new tokens come out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from gemma_edge.runtime.artifacts.decoder_signatures import DecoderSignatures
from gemma_edge.runtime.artifacts.tflite_reader import EMBEDDING_LOOKUP, Signature, Tensor, TfliteModel
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig

OTHER_MODEL = "The file belongs to another model: export this one again."
SEVERAL = re.compile(r"(prefill|verify)_([1-9][0-9]*)")
DECODE = "decode"
# Encoders: what LiteRT-LM calls their tensors, and the signatures `vision` and `audio_F` of F frames.
VISION, AUDIO = "vision", re.compile(r"audio_([1-9][0-9]*)")
IMAGES, LOG_MEL, MASK, FEATURES = "images", "src_inputs", "mask", "features"
Expected = dict[str, tuple[str, tuple[int, ...]]]  # type and shape by name


def check_decoder(model: TfliteModel, config: Gemma3nConfig) -> DecoderSignatures:
    """Checks signatures `prefill_N`, `verify_N` and `decode` against the config.

    Raises:
        BundleError: a signature or tensor is missing, superfluous, or of another shape or type.
    """
    sizes = {}
    for name in model.signatures:
        match = SEVERAL.fullmatch(name)
        if name != DECODE and not match:
            model.fail("signatures", "prefill_N, verify_N and decode", name)
        sizes[name] = int(match[2]) if match else 1
    prefill, verify = (_sorted_sizes(sizes, kind) for kind in ("prefill", "verify"))
    if DECODE not in sizes or not prefill:
        model.fail("signatures", "decode and one or more prefill_N", sorted(sizes))
    inputs = model.signatures[DECODE].inputs
    keys = {i: _tensor(model, inputs, DECODE, f"kv_cache_k_{i}") for i in config.kv_layers}
    lengths = {i: key.shape[2] if len(key.shape) == 4 else 0 for i, key in keys.items()}
    int8 = frozenset(i for i, key in keys.items() if key.type == "int8")
    context = max(lengths.values(), default=0)
    layout = "litertlm" if "input_pos" in inputs else "windowed"
    values = {i: _tensor(model, inputs, DECODE, f"kv_cache_v_{i}").shape for i in config.kv_layers}
    transposed = frozenset(
        i
        for i, shape in values.items()
        if shape[2:3] == (config.head_dim,) and (layout == "litertlm" or lengths[i] != config.head_dim)
    )
    for name, tokens in sizes.items():
        expected_inputs, expected_outputs = (
            _litertlm_caches(config, tokens, context, transposed)
            if layout == "litertlm"
            else _windowed_caches(config, tokens, lengths, transposed)
        )
        for caches in (expected_inputs, expected_outputs):
            for cache in (f"kv_cache_{part}_{layer}" for part in "kv" for layer in int8):
                caches[cache] = ("int8", caches[cache][1])
        expected_inputs |= {
            "embeddings": ("float32", (1, tokens, config.hidden_size)),
            "per_layer_embeddings": (
                "float32",
                (1, tokens, config.num_hidden_layers, config.hidden_size_per_layer_input),
            ),
        }
        if not name.startswith("prefill"):
            expected_outputs["logits"] = ("float32", (1, tokens, config.vocab_size))
        _check(model, model.signatures[name].inputs, name, expected_inputs)
        _check(model, model.signatures[name].outputs, name, expected_outputs)
    return DecoderSignatures(prefill, context, lengths, layout, transposed, verify, int8)


def _sorted_sizes(sizes: Mapping[str, int], kind: str) -> tuple[int, ...]:
    return tuple(sorted(size for name, size in sizes.items() if name.startswith(kind)))


def _litertlm_caches(
    config: Gemma3nConfig, tokens: int, context: int, transposed: Collection[int]
) -> tuple[Expected, Expected]:
    """Types and shapes of caches, positions and mask, in and out."""
    heads, size = config.num_key_value_heads, config.head_dim
    caches: Expected = {}
    for layer in config.kv_layers:
        rows, columns = (1, heads, context, size), (1, heads, size, context)
        caches[f"kv_cache_k_{layer}"] = ("float32", rows)
        caches[f"kv_cache_v_{layer}"] = ("float32", columns if layer in transposed else rows)
    rest: Expected = {"input_pos": ("int32", (tokens,)), "mask": ("float32", (1, 1, tokens, context))}
    return caches | rest, dict(caches)


def _windowed_caches(
    config: Gemma3nConfig, tokens: int, lengths: Mapping[int, int], transposed: Collection[int]
) -> tuple[Expected, Expected]:
    """As `_litertlm_caches`; each kind of layer has its mask and rotary tables."""
    heads, size = config.num_key_value_heads, config.head_dim
    inputs: Expected = {}
    outputs: Expected = {}
    for layer, length in lengths.items():
        for name in (f"kv_cache_k_{layer}", f"kv_cache_v_{layer}"):
            inputs[name] = ("float32", (1, heads, length, size))
            outputs[name] = ("float32", (1, heads, tokens, size))
        if layer in transposed:
            inputs[f"kv_cache_v_{layer}"] = ("float32", (1, heads, size, length))
        kind = "sliding" if config.is_sliding(layer) else "full"
        inputs[f"mask_{kind}"] = ("float32", (1, 1, tokens, length + tokens))
        for table in ("cos", "sin"):
            inputs[f"{table}_{kind}"] = ("float32", (tokens, size // 2))
    return inputs, outputs


def _tensor(model: TfliteModel, tensors: Mapping[str, Tensor], signature: str, name: str) -> Tensor:
    if name not in tensors:
        model.fail(f"signature {signature}", name, ", ".join(tensors)[:200], OTHER_MODEL)
    return tensors[name]


def _check(model: TfliteModel, tensors: Mapping[str, Tensor], signature: str, expected: Expected) -> None:
    for name, (kind, shape) in expected.items():
        tensor = _tensor(model, tensors, signature, name)
        if (tensor.type, tensor.shape) != (kind, shape):
            got = f"{tensor.type} {list(tensor.shape)}"
            model.fail(f"signature {signature} {name}", f"{kind} {list(shape)}", got, OTHER_MODEL)
    if extra := sorted(set(tensors) - set(expected)):
        model.fail(f"signature {signature}", "no other tensor", extra[0], OTHER_MODEL)


def check_embedder(model: TfliteModel, width: tuple[int, ...]) -> Signature:
    """Checks a model that turns one token id, int32 [1, 1], into one embedding, float32 [1, 1, *width].

    Raises:
        BundleError: as `check_decoder`.
    """
    if len(model.signatures) != 1:
        model.fail("signatures", "one", sorted(model.signatures))
    name, signature = next(iter(model.signatures.items()))
    inputs, outputs = list(signature.inputs.values()), list(signature.outputs.values())
    shapes = [(t.type, t.shape) for t in (*inputs, *outputs)]
    if shapes != [("int32", (1, 1)), ("float32", (1, 1, *width))]:
        expected = f"int32 [1, 1] to float32 {[1, 1, *width]}"
        model.fail(f"signature {name}", expected, shapes, OTHER_MODEL)
    return signature


def embedding_table(model: TfliteModel, columns: int, scale: float) -> dict[str, Any]:
    """The layout by which `RowTable` reads the rows of an embedder's table from the file, past the engine.

    Args:
        model: an embedder.
        columns: values in a row.
        scale: what a row is multiplied with, as the embedder does.

    Raises:
        BundleError: the model looks up no table, or one of another width.
    """
    graph = model.subgraphs[next(iter(model.signatures.values())).subgraph]
    lookups = [o.inputs for o in graph.operators if o.code == EMBEDDING_LOOKUP]
    tables = [graph.tensors[inputs[1]] for inputs in lookups if len(inputs) == 2 and inputs[1] >= 0]
    data = tables[0].data if len(tables) == 1 else None
    if data is None or len(tables[0].shape) != 2:
        model.fail("embedder", "a look-up in one constant table", f"{len(tables)} look-ups")
    table, rows = tables[0], tables[0].shape[0]
    if table.shape[1] != columns:
        model.fail("embedder", f"rows of {columns} values", table.shape[1], OTHER_MODEL)
    layout: dict[str, Any] = {
        "file": model.path.name,
        "rows": rows,
        "columns": columns,
        "encoding": table.type,
        "data": {"offset": data.offset, "stride": data.length // rows},
        "scale": scale,
    }
    if table.type == "float32":
        return layout
    scaling = table.quantization
    if table.type not in ("int4", "int8") or scaling is None or (table.type == "int4" and columns % 2):
        model.fail("embedder", "a table of float32, or of int8 or int4 with scales", table.type)
    layout |= {"encoding": table.type.replace("int", "signed"), "group": scaling.block}
    blocks = graph.tensors[scaling.scale_tensor].data if scaling.block else None
    if blocks is not None:
        stride = blocks.length // rows
        layout["scales"] = {"offset": blocks.offset, "stride": stride, "dtype": "float16"}
    elif scaling.scales is not None and scaling.scales.length == 4 * rows:
        layout["scales"] = {"offset": scaling.scales.offset, "stride": 4, "dtype": "float32"}
    else:
        model.fail("embedder", "one scale a row", "one for all")
    return layout


@dataclass(frozen=True)
class EncoderGraph:
    """What an encoder takes and gives: rows of `hidden` values for each of `soft_tokens`.

    Attributes:
        size: height and width of an image; 0 of an audio encoder.
        bins: of a log-mel frame; 0 of an image encoder.
        frames: of each signature of an audio encoder, ascending.
    """

    soft_tokens: int
    hidden: int
    size: int = 0
    bins: int = 0
    frames: tuple[int, ...] = ()


def check_vision(model: TfliteModel) -> EncoderGraph:
    """Checks the signature of an image encoder.

    Raises:
        BundleError: as `check_decoder`.
    """
    if list(model.signatures) != [VISION]:
        model.fail("signatures", VISION, ", ".join(model.signatures))
    signature = model.signatures[VISION]
    size = _sizes(model, signature.inputs, VISION, IMAGES, 4)[1]
    _, soft_tokens, hidden = _sizes(model, signature.outputs, VISION, FEATURES, 3)
    _check(model, signature.inputs, VISION, {IMAGES: ("float32", (1, size, size, 3))})
    _check(model, signature.outputs, VISION, {FEATURES: ("float32", (1, soft_tokens, hidden))})
    return EncoderGraph(soft_tokens, hidden, size=size)


def check_audio(model: TfliteModel) -> EncoderGraph:
    """Checks the signatures of an audio encoder, one for each length of a clip.

    Raises:
        BundleError: as `check_decoder`.
    """
    lengths = {}
    for name in model.signatures:
        if not (match := AUDIO.fullmatch(name)):
            model.fail("signatures", "audio_F, of F frames", name)
        lengths[int(match[1])] = name
    if not lengths:
        model.fail("signatures", "one or more audio_F, of F frames", "none")
    shortest = lengths[min(lengths)]
    bins = _sizes(model, model.signatures[shortest].inputs, shortest, LOG_MEL, 3)[2]
    _, soft_tokens, hidden = _sizes(model, model.signatures[shortest].outputs, shortest, FEATURES, 3)
    for frames, name in lengths.items():
        signature = model.signatures[name]
        inputs: Expected = {LOG_MEL: ("float32", (1, frames, bins)), MASK: ("bool", (1, frames))}
        _check(model, signature.inputs, name, inputs)
        outputs: Expected = {
            FEATURES: ("float32", (1, soft_tokens, hidden)),
            MASK: ("bool", (1, soft_tokens)),
        }
        _check(model, signature.outputs, name, outputs)
    return EncoderGraph(soft_tokens, hidden, bins=bins, frames=tuple(sorted(lengths)))


def check_rows(model: TfliteModel, inputs: list[tuple[str, tuple[int, ...]]], hidden: int) -> None:
    """Checks a model of one signature that turns `inputs`, in this order, into rows, float32 [1, n, hidden].

    Raises:
        BundleError: as `check_decoder`.
    """
    if len(model.signatures) != 1:
        model.fail("signatures", "one", sorted(model.signatures))
    name, signature = next(iter(model.signatures.items()))
    got = [(t.type, t.shape) for t in signature.inputs.values()]
    if got != inputs:
        model.fail(f"signature {name} inputs", inputs, got, OTHER_MODEL)
    outputs = [(t.type, t.shape) for t in signature.outputs.values()]
    if len(outputs) != 1 or outputs[0][0] != "float32" or outputs[0][1][::2] != (1, hidden):
        model.fail(f"signature {name} outputs", f"float32 [1, n, {hidden}]", outputs, OTHER_MODEL)


def _sizes(
    model: TfliteModel, tensors: Mapping[str, Tensor], signature: str, name: str, rank: int
) -> tuple[int, ...]:
    shape = _tensor(model, tensors, signature, name).shape
    if len(shape) != rank:
        model.fail(f"signature {signature} {name}", f"{rank} axes", list(shape), OTHER_MODEL)
    return shape
