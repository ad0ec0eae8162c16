"""The single file that Google's LiteRT-LM runs: models, tokenizer and metadata in one .litertlm.

The container is written by the package `litert-lm-builder`, which copies the models section by section; no
model is held in memory. What LiteRT-LM expects of a Gemma 3n file is in `runtime.litertlm_reader`, which
reads the result back before it is published.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from gemma_edge.export.checkpoint.checkpoint import Checkpoint
from gemma_edge.export.checkpoint.sentencepiece_model import Kind, spm
from gemma_edge.export.checkpoint.tokenizer_files import tokenizer_files
from gemma_edge.export.checkpoint.towers import Encoder
from gemma_edge.export.emit.reference.reference_text import WeightSource
from gemma_edge.export.emit.tflite.tflite_file import TfliteFile
from gemma_edge.export.emit.tflite.tflite_text import emit_decoder, emit_embedder, emit_per_layer_embedder
from gemma_edge.export.formats.litertlm.litertlm_sections import describe_encoders, encoder_sections
from gemma_edge.export.formats.tflite.tflite_bundle import (
    EMBEDDER,
    GRAPHS,
    PER_LAYER_EMBEDDER,
    encoder_memory,
    prefill_sizes,
)
from gemma_edge.export.plan import Plan
from gemma_edge.export.progress_bar import Progress
from gemma_edge.export.publish import BundleWriter
from gemma_edge.export.weights.recipe import Recipe
from gemma_edge.runtime.artifacts.litertlm_bundle import DECODER, MANIFEST_KEY, TOKENIZER, TOKENS
from gemma_edge.runtime.artifacts.litertlm_reader import CONFIG_KEY, HEADER_LIMIT, read_litertlm
from gemma_edge.runtime.artifacts.modalities import Kind as Modality
from gemma_edge.runtime.errors import ConfigError, TokenizerError
from gemma_edge.runtime.families.gemma3n_config import Gemma3nConfig
from gemma_edge.runtime.model import read_generation_config
from gemma_edge.runtime.prompt.chat_template import GEMMA3_TEMPLATE
from gemma_edge.runtime.prompt.tokenizer import BOS_PIECE
from gemma_edge.runtime.sampling import Sampling

# JSON ignores the spaces around a value: what the gate finds is written in their place.
AGREEMENT, AGREEMENT_ROOM = "agreement of the parity gate", "null".ljust(400)
USER, MODEL, END_OF_TURN = "<start_of_turn>user\n", "<start_of_turn>model\n", "<end_of_turn>\n"


def write_container(
    checkpoint: Checkpoint,
    recipe: Recipe,
    plan: Plan,
    writer: BundleWriter,
    manifest: Mapping[str, Any],
    progress: bool,
) -> Path:
    """Emits the models, one weight in memory at a time, and puts them into one .litertlm.

    Args:
        writer: the file is written into its folder.
        manifest: what is recorded in the file's header.

    Returns:
        The file, not published yet.

    Raises:
        CheckpointError, TokenizerError: the checkpoint is bad.
        The errors of `write_litertlm`.
    """
    config = checkpoint.config
    tokens = tokenizer_files(checkpoint)
    sampling, stop_ids = Sampling(), config.eos_token_ids
    if generation := checkpoint.files().get("generation_config.json"):
        sampling, stop_ids = read_generation_config(generation, stop_ids)
    models: dict[str, tuple[TfliteFile, WeightSource]] = {
        name: (model, checkpoint)
        for name, model in emit_models(config, recipe, plan.context, plan.chunk).items()
    }
    sections = encoder_sections(checkpoint.encoders, recipe, checkpoint)
    models |= {name: (section.model, section.source) for name, section in sections.items()}
    total = sum(tensor.elements for model, _ in models.values() for tensor in model.tensors)
    with Progress("writing weights", total, progress, unit="weights") as bar:
        for name, (model, source) in models.items():
            produce = partial(model.write, source=source, clip=recipe.clip, progress=bar.advance)
            writer.write(name, produce)
    writer.write_bytes(TOKENIZER, pad_tokenizer(tokens.model, tokens.added_tokens, config.vocab_size))
    modalities = {}
    if checkpoint.encoders:
        modalities = write_tokens(checkpoint, writer)
    hashes = {name: record["sha256"] for name, record in writer.records.items()}
    made = write_litertlm(
        writer.folder / "model.litertlm",
        prefill_decode=writer.folder / DECODER,
        embedder=writer.folder / EMBEDDER,
        per_layer_embedder=writer.folder / PER_LAYER_EMBEDDER,
        tokenizer_model=writer.folder / TOKENIZER,
        config=config,
        chat_template=checkpoint.chat_template(),
        stop_ids=stop_ids,
        max_tokens=plan.context,
        sampling=sampling,
        manifest={**manifest, **modalities, "generation": checkpoint.generation_config(), "sha256": hashes},
        encoders=checkpoint.encoders,
        encoder_models={section.model_type: writer.folder / name for name, section in sections.items()},
        encoder_tokens=writer.folder / TOKENS if modalities else None,
    )
    for name in writer.records:
        (writer.folder / name).unlink()
    return made


def emit_models(config: Gemma3nConfig, recipe: Recipe, context: int, chunk: int) -> dict[str, TfliteFile]:
    """The three models as LiteRT-LM calls them, by their names as files; reads no weight."""
    prefill = prefill_sizes(chunk)
    return {
        DECODER: emit_decoder(config, recipe, context=context, prefill=prefill, layout="litertlm"),
        EMBEDDER: emit_embedder(config, recipe),
        PER_LAYER_EMBEDDER: emit_per_layer_embedder(config, recipe),
    }


def write_tokens(checkpoint: Checkpoint, writer: BundleWriter) -> dict[str, Any]:
    """Writes the rows of the encoders' own token ids, fp32, into one file; returns the manifest's part."""
    tables = {kind: encoder.token_table(checkpoint) for kind, encoder in checkpoint.encoders.items()}
    modalities: dict[str, Any] = {}
    offset = 0
    for kind, encoder in checkpoint.encoders.items():
        table = tables[kind]
        layout = {
            "file": TOKENS,
            "rows": len(table),
            "columns": table.shape[1],
            "encoding": "float32",
            "data": {"offset": offset, "stride": table.strides[0]},
            "scale": 1.0,
        }
        modalities[kind] = encoder.entry(GRAPHS[kind], layout, *encoder_memory(encoder))
        offset += table.nbytes
    writer.write_bytes(TOKENS, b"".join(table.astype("<f4").tobytes() for table in tables.values()))
    return {"modalities": modalities}


def record_agreement(path: Path, agreement: Mapping[str, Any]) -> None:
    """Writes what the parity gate found into the manifest of a .litertlm, in the room kept for it."""
    with path.open("r+b") as file:
        head = file.read(HEADER_LIMIT)
        begin = head.index(AGREEMENT_ROOM.encode())
        text = _compact(agreement)
        if len(text) > len(AGREEMENT_ROOM):
            raise ValueError(f"{len(text)} bytes for {len(AGREEMENT_ROOM)}")
        file.seek(begin)
        file.write(text.ljust(len(AGREEMENT_ROOM)).encode())


def write_litertlm(
    out: str | Path,
    *,
    prefill_decode: Path,
    embedder: Path,
    per_layer_embedder: Path,
    tokenizer_model: Path,
    config: Gemma3nConfig,
    chat_template: str | None,
    stop_ids: Sequence[int],
    max_tokens: int,
    added_tokens: Mapping[str, int] | None = None,
    sampling: Sampling | None = None,
    manifest: Mapping[str, Any] | None = None,
    encoders: Mapping[Modality, Encoder] | None = None,
    encoder_models: Mapping[str, Path] | None = None,
    encoder_tokens: Path | None = None,
) -> Path:
    """Writes a .litertlm beside `out`, checks it, and renames it to `out`.

    Args:
        out: the file; an existing one is replaced when the new one is complete.
        prefill_decode, embedder, per_layer_embedder: .tflite files with the signatures of LiteRT-LM.
        tokenizer_model: a SentencePiece model; it is padded to `config.vocab_size` pieces.
        config: the model's; it is recorded in the file.
        chat_template: Jinja source; None for Gemma 3's.
        stop_ids: ids that end an answer.
        max_tokens: tokens of context, the length of the KV caches.
        added_tokens: text -> id of tokens beyond the tokenizer's pieces.
        sampling: what LiteRT-LM samples with unless told otherwise; default: Gemma's.
        manifest: what our runtime must know of the file; without one, only LiteRT-LM runs it.
        encoders, encoder_models, encoder_tokens: what sees and hears: its description for LiteRT-LM, its
            models by model type, and the rows of its own token ids, which our runtime reads.

    Returns:
        `out`.

    Raises:
        BundleError: a model is damaged, or not of this config.
        ConfigError: the config has no bos token, or is too long for the header.
        TokenizerError: the tokenizer has more pieces than the vocabulary, or is none.
    """
    from litert_lm_builder import litertlm_builder as builder

    out = Path(out)
    tokenizer = pad_tokenizer(tokenizer_model.read_bytes(), added_tokens or {}, config.vocab_size)
    metadata = llm_metadata(
        config, chat_template, stop_ids, max_tokens, sampling or Sampling(), encoders or {}, tokenizer
    )
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        parts = Path(folder)
        (parts / "metadata.pb").write_bytes(metadata)
        (parts / "tokenizer.model").write_bytes(tokenizer)
        made = builder.LitertLmFileBuilder()
        text = builder.DType.STRING
        made.add_system_metadata(builder.Metadata("Authors", "gemma-edge", text))
        made.add_system_metadata(builder.Metadata(CONFIG_KEY, _compact(config.to_dict()), text))
        if manifest is not None:
            record = _compact({**manifest, "agreement": AGREEMENT})
            record = record.replace(f'"{AGREEMENT}"', AGREEMENT_ROOM)
            made.add_system_metadata(builder.Metadata(MANIFEST_KEY, record, text))
        made.add_llm_metadata(str(parts / "metadata.pb"))
        made.add_sentencepiece_tokenizer(str(parts / "tokenizer.model"))
        # LiteRT-LM prefers fp16 activations where a CPU has them; these models are made and verified in fp32.
        precise = [builder.Metadata("prefer_activation_type", "fp32", text)]
        for path, kind in (
            (embedder, builder.TfLiteModelType.EMBEDDER),
            (per_layer_embedder, builder.TfLiteModelType.PER_LAYER_EMBEDDER),
            (prefill_decode, builder.TfLiteModelType.PREFILL_DECODE),
        ):
            made.add_tflite_model(str(path), kind, additional_metadata=precise)
        for model_type, path in (encoder_models or {}).items():
            made.add_tflite_model(str(path), builder.TfLiteModelType(model_type), additional_metadata=precise)
        if encoder_tokens:
            made.add_generic_binary_data(str(encoder_tokens))
        whole = parts / "model.litertlm"
        with whole.open("wb") as file:
            made.build(file, validate_metadata=True)
            file.flush()
            os.fsync(file.fileno())
        _check_header(whole)
        read_litertlm(whole, config)
        os.replace(whole, out)
    return out


def llm_metadata(
    config: Gemma3nConfig,
    chat_template: str | None,
    stop_ids: Sequence[int],
    max_tokens: int,
    sampling: Sampling,
    encoders: Mapping[Modality, Encoder] | None = None,
    tokenizer: bytes = b"",
) -> bytes:
    """The serialized LlmMetadata of a Gemma 3n model.

    Args:
        tokenizer: the SentencePiece model; the tokens around images and clips are taken from it.

    Raises:
        ConfigError: the config has no bos token.
    """
    from litert_lm_builder.runtime.proto import llm_metadata_pb2, sampler_params_pb2

    if config.bos_token_id is None:
        raise ConfigError("config.json", "bos_token_id", "the id that a prompt begins with", None)
    metadata: Any = llm_metadata_pb2.LlmMetadata()
    metadata.start_token.token_ids.ids.append(config.bos_token_id)
    for stop_id in stop_ids:
        metadata.stop_tokens.add().token_ids.ids.append(stop_id)
    metadata.max_num_tokens = max_tokens
    describe_encoders(metadata, encoders or {}, _pieces(tokenizer))
    # LiteRT-LM puts the start token in front; a template's bos_token is empty there, a literal one a second.
    template = GEMMA3_TEMPLATE if chat_template is None else chat_template
    metadata.jinja_prompt_template = template.removeprefix(BOS_PIECE)
    # For sessions that do not render Jinja.
    metadata.prompt_templates.user.prefix, metadata.prompt_templates.user.suffix = USER, END_OF_TURN
    metadata.prompt_templates.model.prefix, metadata.prompt_templates.model.suffix = MODEL, END_OF_TURN
    metadata.supports_thinking = metadata.supports_function_calling = False
    parameters, kinds = metadata.sampler_params, sampler_params_pb2.SamplerParameters
    parameters.type = kinds.TOP_P if sampling.temperature else kinds.GREEDY
    if sampling.temperature:
        parameters.temperature, parameters.p = sampling.temperature, sampling.top_p
        parameters.k = sampling.top_k or config.vocab_size
    return bytes(metadata.SerializeToString(deterministic=True))


def _pieces(tokenizer: bytes) -> dict[int, str]:
    return {i: piece.piece for i, piece in enumerate(spm.ModelProto.FromString(tokenizer).pieces)}


def pad_tokenizer(source: bytes, added_tokens: Mapping[str, int], vocab_size: int) -> bytes:
    """A serialized SentencePiece model with one piece for each of `vocab_size` ids.

    LiteRT-LM aborts when it samples an id that has none. Added tokens get their text; what is left gets
    control pieces, which no text is encoded to, and which decode to nothing.

    Raises:
        TokenizerError: not a SentencePiece model, or one with more pieces than that.
    """
    from google.protobuf.message import DecodeError

    model = spm.ModelProto()
    try:
        model.ParseFromString(source)
    except DecodeError as error:
        raise TokenizerError(TOKENIZER, "file", "a SentencePiece model", error) from None
    count = len(model.pieces)
    if not 0 < count <= vocab_size:
        raise TokenizerError(TOKENIZER, "pieces", f"1 to vocab_size = {vocab_size}", count)
    taken = {piece.piece for piece in model.pieces}
    texts = {index: text for text, index in added_tokens.items() if text not in taken}
    for index in range(count, vocab_size):
        kind = Kind.USER_DEFINED if index in texts else Kind.CONTROL
        model.pieces.add(piece=texts.get(index, f"<no_piece_{index}>"), score=0.0, type=int(kind))
    model.trainer_spec.vocab_size = vocab_size
    return bytes(model.SerializeToString(deterministic=True))


def _compact(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def _check_header(path: Path) -> None:
    """LiteRT-LM reads no more than the first 16 KiB as header, which holds the config."""
    with path.open("rb") as file:
        end = int.from_bytes(file.read(32)[24:], "little")
    if end > HEADER_LIMIT:
        got = f"{end} bytes with a config of this many layers"
        raise ConfigError("config.json", "num_hidden_layers", f"a header of {HEADER_LIMIT} bytes", got)
