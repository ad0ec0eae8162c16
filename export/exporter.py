"""`export_bundle`: a checkpoint becomes a bundle.

The plan comes first and costs nothing; then weights are streamed, one tensor at a time, into a folder
beside the target; then the parity gate compares the result with the checkpoint; only then is it published.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from gemma_edge.export.checkpoint.checkpoint import Checkpoint, described, has_weights, resolve
from gemma_edge.export.checkpoint.tokenizer_files import tokenizer_files
from gemma_edge.export.checkpoint.towers import Encoder
from gemma_edge.export.emit.onnx.onnx_text import EmittedDecoder, emit_decoder
from gemma_edge.export.formats.onnx.onnx_encoder_files import write_encoders
from gemma_edge.export.gate.encoder_parity import encoder_errors
from gemma_edge.export.gate.gate_prompts import prompt_ids
from gemma_edge.export.gate.parity import Agreement, check_bounds, verify_sequences
from gemma_edge.export.model.gemma3n.gemma3n_text_tensors import EMBEDDING_NAME, PLE_NAME, Part, head_name
from gemma_edge.export.model.ops import Weight
from gemma_edge.export.plan import Plan, check_ceiling, make_plan
from gemma_edge.export.progress_bar import Progress
from gemma_edge.export.publish import BundleWriter, FileWriter
from gemma_edge.export.weights.calibrate import kv_scales
from gemma_edge.export.weights.external_data import ExternalData
from gemma_edge.export.weights.recipe import Bounds, Recipe, load_recipe
from gemma_edge.export.weights.row_table_writer import write_row_table
from gemma_edge.runtime.artifacts.bundle import FORMATS, SCHEMA_VERSION, Bundle
from gemma_edge.runtime.artifacts.modalities import Kind
from gemma_edge.runtime.errors import UsageError
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.prompt.tokenizer import Tokenizer
from gemma_edge.runtime.version import __version__

DEFAULT_CONTEXT = 4096
DEFAULT_CHUNK = 128
# What an int8 cache may cost a recipe whose own bounds are tighter.
INT8_CACHE_BOUNDS = Bounds(mean_kl=1e-3, top1=0.95)
SUFFIX = ".litertlm"
# The gate's prompts are cut to this, so that its logits (a megabyte a token) stay small.
GATE_TOKENS = 48
DECODER, DECODER_DATA, PLE, EMBEDDINGS = "decoder.onnx", "decoder.onnx.data", "ple.bin", "embeddings.bin"
# What people call a modality, and the bundle's name for its encoder.
MODALITIES: dict[str, Kind] = {"image": "vision", "audio": "audio"}
TOKENIZER, TEMPLATE, GENERATION = "tokenizer.model", "chat_template.jinja", "generation_config.json"


@dataclass(frozen=True)
class Exported:
    """What an export made: the bundle's folder, its plan, and how well it agrees (None if not verified)."""

    path: Path
    plan: Plan
    agreement: Agreement | None


def export_bundle(
    source: str | Path,
    out: str | Path,
    *,
    recipe: str | Path | Recipe = "int4",
    context: int = DEFAULT_CONTEXT,
    chunk: int = DEFAULT_CHUNK,
    kv_cache: str | None = None,
    ceiling: int | None = None,
    verify: bool = True,
    progress: bool = False,
    format: str = "onnx",
    modalities: Collection[str] | None = None,
) -> Exported:
    """Exports a checkpoint to a bundle.

    Args:
        source: a checkpoint folder, or a Hugging Face id.
        out: folder of the bundle, or for "litertlm" the file; an existing one is replaced, anything else is
            refused.
        recipe: name of a recipe, path of one, or a `Recipe`.
        context: tokens of KV cache that the plan is made for.
        chunk: tokens of one prefill call; bounds the memory of activations.
        kv_cache: "fp32" or "int8"; None for what the recipe says. LiteRT has fp32 only.
        ceiling: bytes of memory that the plan must fit in.
        verify: compare the bundle with the checkpoint before it is published.
        progress: show progress bars on stderr (when it is a terminal).
        format: "onnx" for ONNX Runtime, "tflite" for LiteRT, "litertlm" for LiteRT-LM.
        modalities: "text", and "image" and "audio" for their encoders; None for all that the checkpoint has.

    Raises:
        CheckpointError, ConfigError, TokenizerError: the checkpoint is bad; the message names the file.
        UsageError: an unknown recipe, a target that is not a bundle, or an encoder that the checkpoint lacks.
        CeilingError: the plan does not fit; the message says what would.
        ParityError: the result does not agree with the checkpoint; nothing is published.
    """
    recipe = resolve_recipe(recipe, kv_cache, format)
    with open_checkpoint(source, modalities) as checkpoint:
        encoders = checkpoint.encoders
        plan = plan_export(checkpoint.config, recipe, context, chunk, format, encoders)
        if ceiling is not None:
            check_ceiling(plan, ceiling, checkpoint.config, recipe, encoders)
        if format == "litertlm":
            with FileWriter(Path(out)) as file_writer:
                file_writer.check_room(2 * plan.file_bytes)  # the models, and the file made of them
                return _export_file(checkpoint, recipe, plan, file_writer, str(source), verify, progress)
        with BundleWriter(Path(out)) as writer:
            writer.check_room(plan.file_bytes)
            return _export(checkpoint, recipe, plan, writer, str(source), verify, progress)


def open_checkpoint(source: str | Path, modalities: Collection[str] | None) -> Checkpoint:
    """The checkpoint with the encoders of `modalities`, which are as in `export_bundle`.

    Raises:
        UsageError: one of them is unknown, or the checkpoint does not have it.
    """
    wanted = _kinds(modalities)
    checkpoint = Checkpoint.open(resolve(str(source)), wanted)
    for name, kind in MODALITIES.items():
        if modalities is not None and kind in wanted and kind not in checkpoint.encoders:
            checkpoint.close()
            raise UsageError(
                f"{source}: the checkpoint has no {name} encoder: leave {name} out of the modalities"
            )
    return checkpoint


def _kinds(modalities: Collection[str] | None) -> list[Kind]:
    names = ("text", *MODALITIES) if modalities is None else modalities
    for name in names:
        if name not in ("text", *MODALITIES):
            raise UsageError(f"unknown modality {name!r}: choose from text, {', '.join(MODALITIES)}")
    if "text" not in names:
        raise UsageError("text is always exported: add it to the modalities")
    return [kind for name, kind in MODALITIES.items() if name in names]


def describe_source(
    source: str, modalities: Collection[str] | None
) -> tuple[Gemma3nConfig, Mapping[Kind, Encoder]]:
    """What a plan needs. Where there are no weights yet, config.json is taken at its word."""
    folder = resolve(source)
    if has_weights(folder):
        with open_checkpoint(folder, modalities) as checkpoint:
            return checkpoint.config, checkpoint.encoders
    return described(folder, _kinds(modalities))


def plan_export(
    config: Gemma3nConfig,
    recipe: Recipe,
    context: int,
    chunk: int,
    format: str = "onnx",
    encoders: Mapping[Kind, Encoder] = MappingProxyType({}),
) -> Plan:
    """The plan alone: no weight is read.

    Raises:
        UsageError: a context or chunk that the model cannot have.
    """
    if not 1 <= context <= config.max_position_embeddings:
        raise UsageError(
            f"--context must be 1 to {config.max_position_embeddings} for this model, not {context}"
        )
    if chunk < 1:
        raise UsageError(f"--chunk must be 1 or more, not {chunk}")
    return make_plan(config, recipe, context, min(chunk, context), format, encoders)


def resolve_recipe(recipe: str | Path | Recipe, kv_cache: str | None, format: str) -> Recipe:
    if format not in FORMATS:
        raise UsageError(f"unknown format {format!r}: choose from {', '.join(FORMATS)}")
    if not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    if format != "onnx":
        if kv_cache == "int8":
            raise UsageError("an int8 KV cache is for --format onnx only: LiteRT's attention reads fp32")
        kv_cache = "fp32"
    if kv_cache not in (None, "fp32", "int8"):
        raise UsageError(f"kv_cache must be fp32 or int8, not {kv_cache!r}")
    if kv_cache == "int8" != recipe.kv_cache:
        own = recipe.bounds
        mean_kl, top1 = max(own.mean_kl, INT8_CACHE_BOUNDS.mean_kl), min(own.top1, INT8_CACHE_BOUNDS.top1)
        bounds = replace(own, mean_kl=mean_kl, top1=top1, max_abs=None)
        return replace(recipe, kv_cache="int8", bounds=bounds)
    return replace(recipe, kv_cache="fp32") if kv_cache else recipe


def _export(
    checkpoint: Checkpoint,
    recipe: Recipe,
    plan: Plan,
    writer: BundleWriter,
    source: str,
    verify: bool,
    progress: bool,
) -> Exported:
    config = checkpoint.config
    tokens = tokenizer_files(checkpoint)
    writer.write_bytes(TOKENIZER, tokens.model)
    if (template := checkpoint.chat_template()) is not None:
        writer.write_bytes(TEMPLATE, template.encode())
    generation = checkpoint.generation_config()
    if generation:
        writer.write_bytes(GENERATION, json.dumps(generation, indent=1).encode() + b"\n")
    tokenizer = Tokenizer(writer.folder / TOKENIZER, tokens.added_tokens, checkpoint.config.vocab_size)
    sequences = prompt_ids(tokenizer, min(GATE_TOKENS, plan.context))
    if plan.format == "tflite":
        from gemma_edge.export.formats.tflite.tflite_bundle import emit_windowed, write_weights

        decoder = emit_windowed(config, recipe, plan.context, plan.chunk)
        tables = write_weights(checkpoint, recipe, decoder, writer, progress)
    else:
        scales = None
        if recipe.kv_cache == "int8":
            with Progress("calibrating the int8 cache", 0, progress):
                scales = kv_scales(checkpoint, sequences)
        emitted = emit_decoder(config, recipe, DECODER_DATA, scales)
        tables = _write_weights(checkpoint, recipe, emitted, writer, progress)
    modalities = _write_encoders(checkpoint, recipe, plan, writer, progress)
    manifest = {
        **_facts(checkpoint, recipe, plan, source),
        "config": config.to_dict(),
        "tables": tables,
        "added_tokens": tokens.added_tokens,
        **({"modalities": modalities} if modalities else {}),
    }
    writer.write_manifest(manifest)
    agreement = None
    if verify:
        bundle = Bundle.open(writer.folder)
        agreement = verify_sequences(bundle, checkpoint, sequences, progress=progress)
        agreement = replace(agreement, encoders=encoder_errors(bundle, checkpoint, progress=progress))
        check_bounds(agreement, recipe.bounds)
        writer.write_manifest({**manifest, "agreement": agreement.to_dict()})
    return Exported(writer.publish(), plan, agreement)


def _export_file(
    checkpoint: Checkpoint,
    recipe: Recipe,
    plan: Plan,
    writer: FileWriter,
    source: str,
    verify: bool,
    progress: bool,
) -> Exported:
    """As `_export`, into one .litertlm."""
    from gemma_edge.export.formats.litertlm.litertlm_file import record_agreement, write_container

    made = write_container(
        checkpoint, recipe, plan, writer, _facts(checkpoint, recipe, plan, source), progress
    )
    agreement = None
    if verify:
        tokens = tokenizer_files(checkpoint)
        tokenizer = writer.folder / TOKENIZER
        tokenizer.write_bytes(tokens.model)
        sequences = prompt_ids(
            Tokenizer(tokenizer, tokens.added_tokens, checkpoint.config.vocab_size),
            min(GATE_TOKENS, plan.context),
        )
        bundle = Bundle.open(made)
        agreement = verify_sequences(bundle, checkpoint, sequences, progress=progress)
        agreement = replace(agreement, encoders=encoder_errors(bundle, checkpoint, progress=progress))
        check_bounds(agreement, recipe.bounds)
        record_agreement(made, agreement.to_dict())
    return Exported(writer.publish_file(made), plan, agreement)


def _facts(checkpoint: Checkpoint, recipe: Recipe, plan: Plan, source: str) -> dict[str, Any]:
    """What every format's manifest says."""
    return {
        "schema_version": SCHEMA_VERSION,
        "format": plan.format,
        "generator": f"gemma-edge {__version__}",
        "source": {"name": source, "revision": checkpoint.revision()},
        "recipe": recipe.to_dict(),
        "context": plan.context,
        "chunk": plan.chunk,
        "kv_cache": recipe.kv_cache,
        "plan": plan.to_dict(),
    }


def _write_encoders(
    checkpoint: Checkpoint, recipe: Recipe, plan: Plan, writer: BundleWriter, progress: bool
) -> dict[str, Any]:
    """The manifest's `modalities`."""
    if not checkpoint.encoders:
        return {}
    if plan.format == "tflite":
        from gemma_edge.export.formats.tflite.tflite_bundle import write_encoders_tflite

        return write_encoders_tflite(checkpoint, recipe, writer, progress)
    return write_encoders(checkpoint, recipe, writer, progress)


def _write_weights(
    checkpoint: Checkpoint, recipe: Recipe, emitted: EmittedDecoder, writer: BundleWriter, progress: bool
) -> dict[str, Any]:
    """Writes decoder and tables; returns the layouts of the tables for the manifest."""
    config = checkpoint.config
    total = sum(t.elements for t in emitted.data.tensors)
    total += config.vocab_size_per_layer_input * config.ple_row_size
    if not config.tie_word_embeddings:
        total += config.vocab_size * config.hidden_size
    with Progress("writing weights", total, progress, unit="weights") as bar:
        writer.write(DECODER_DATA, lambda f: emitted.data.write(f, checkpoint, recipe.clip, bar.advance))
        writer.write_bytes(DECODER, _serialize(emitted.model))

        def table(name: str, file: str, part: Part, scale: float) -> dict[str, Any]:
            shape = checkpoint.specs[name].shape
            rows = max(1, (1 << 20) // shape[1])
            precision = recipe.precision(checkpoint.specs[name])

            def chunk(start: int) -> NDArray[Any]:
                stop = min(start + rows, shape[0])
                if precision.bits != 32:
                    return checkpoint.rows(name, start, stop)
                raw = checkpoint.raw_rows(name, start, stop)  # the table keeps the checkpoint's own dtype
                checkpoint.check_finite(name, raw.astype(np.float32, copy=False), start)
                return raw

            chunks = map(chunk, range(0, shape[0], rows))
            layout: dict[str, Any] = writer.write(
                file,
                lambda f: write_row_table(
                    f, chunks, shape[1], precision, recipe.clip, bar.advance, file=file, scale=scale
                ),
            )
            return layout

        per_layer = table(PLE_NAME, PLE, Part.PLE, config.ple_scale)
        if config.tie_word_embeddings:
            embeddings = head_rows(config, emitted.data)
        else:
            embeddings = table(EMBEDDING_NAME, EMBEDDINGS, Part.EMBEDDING, config.embed_scale)
    return {"embedding": embeddings, "per_layer": per_layer}


def head_rows(config: Gemma3nConfig, data: ExternalData) -> dict[str, Any]:
    """The layout of token embeddings inside the tied head's data: no second copy of the table."""
    head = next(t for t in data.tensors if t.weights == (Weight(head_name(config)),))
    rows, columns = head.shape
    layout: dict[str, Any] = {
        "file": data.location,
        "rows": rows,
        "columns": columns,
        "encoding": "float32" if head.scales is None else f"int{head.precision.bits}",
        "data": {"offset": head.data.offset, "stride": head.data.length // rows},
        "scale": config.embed_scale,
    }
    if head.scales is not None:
        layout["group"] = head.precision.group
        layout["scales"] = {"offset": head.scales.offset, "stride": 4 * head.blocks, "dtype": "float32"}
    return layout


def _serialize(model: ModelProto) -> bytes:
    # Weights are external, so this stays far below protobuf's 2 GB whatever the model.
    return bytes(model.SerializeToString(deterministic=True))
