"""Writes a .litertlm: models, tokenizer and metadata in the file that LiteRT-LM runs.

The package `litert-lm-builder` writes the container and copies the models section by section, so that no
model is held in memory. `runtime.artifacts.litertlm_reader`, which says what LiteRT-LM expects of a Gemma 3n
file, reads the result back before it is published.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gemma_edge.runtime.artifacts.litertlm_bundle import MANIFEST_KEY, TOKENIZER
from gemma_edge.runtime.artifacts.litertlm_reader import CONFIG_KEY, HEADER_LIMIT, read_litertlm
from gemma_edge.runtime.errors import ConfigError
from gemma_edge.runtime.families.model_family import TextConfig
from gemma_edge.runtime.files.abandoned import temporary_folder

# JSON ignores the spaces around a value: the findings of the gate are written in their place.
AGREEMENT, AGREEMENT_ROOM = "agreement of the parity gate", "null".ljust(400)


@dataclass(frozen=True)
class Contents:
    """What a .litertlm holds beside its models.

    config: of the model; it is recorded in the header.
    tokenizer: a SentencePiece model with a piece for every id; see `pad_tokenizer`.
    metadata: a serialized LlmMetadata; see `llm_metadata`.
    manifest: what our runtime must know of the file; without one, only LiteRT-LM runs it.
    """

    config: TextConfig
    tokenizer: bytes
    metadata: bytes
    manifest: Mapping[str, Any] | None = None


def write_litertlm(
    out: str | Path, contents: Contents, models: Mapping[str, Path], tokens: Path | None = None
) -> Path:
    """Writes a .litertlm beside `out`, checks it, and renames it to `out`.

    Args:
        out: the file; an existing one is replaced when the new one is complete.
        models: .tflite files by model type, in the order of the sections.
        tokens: rows of the encoders' own token ids, which our runtime reads.

    Returns:
        `out`.

    Raises:
        BundleError: a model is damaged, or not of this config.
        ConfigError: the header is too long.
    """
    out = Path(out)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        whole = _build(Path(folder), contents, models, tokens)
        read_litertlm(whole, contents.config)
        os.replace(whole, out)
    return out


def check_header(contents: Contents, models: Collection[str], tokens: bool) -> None:
    """Builds the container around empty models: its header is as long as that of the file to come.

    Args:
        models: model types of the sections.
        tokens: whether the encoders' own token ids get a section.

    Raises:
        ConfigError: the header is too long.
    """
    with temporary_folder() as folder:
        empty = folder / "empty"
        empty.write_bytes(b"\0")
        _build(folder, contents, dict.fromkeys(models, empty), empty if tokens else None)


def _build(folder: Path, contents: Contents, models: Mapping[str, Path], tokens: Path | None) -> Path:
    """The container in `folder`, synced."""
    from litert_lm_builder import litertlm_builder as builder  # a plan does without it

    metadata, tokenizer, whole = (folder / name for name in ("metadata.pb", TOKENIZER, "model.litertlm"))
    metadata.write_bytes(contents.metadata)
    tokenizer.write_bytes(contents.tokenizer)
    made, text = builder.LitertLmFileBuilder(), builder.DType.STRING
    made.add_system_metadata(builder.Metadata("Authors", "gemma-edge", text))
    made.add_system_metadata(builder.Metadata(CONFIG_KEY, _compact(contents.config.to_dict()), text))
    if contents.manifest is not None:
        record = _compact({**contents.manifest, "agreement": AGREEMENT})
        record = record.replace(f'"{AGREEMENT}"', AGREEMENT_ROOM)
        made.add_system_metadata(builder.Metadata(MANIFEST_KEY, record, text))
    made.add_llm_metadata(str(metadata))
    made.add_sentencepiece_tokenizer(str(tokenizer))
    # LiteRT-LM prefers fp16 activations where a CPU has them; these models are made and verified in fp32.
    precise = [builder.Metadata("prefer_activation_type", "fp32", text)]
    for model_type, path in models.items():
        made.add_tflite_model(str(path), builder.TfLiteModelType(model_type), additional_metadata=precise)
    if tokens:
        made.add_generic_binary_data(str(tokens))
    with whole.open("wb") as file:
        made.build(file, validate_metadata=True)
        file.flush()
        os.fsync(file.fileno())
    _check_length(whole)
    return whole


def _check_length(path: Path) -> None:
    """LiteRT-LM reads no more than the first 16 KiB as header, which holds the config."""
    with path.open("rb") as file:
        end = int.from_bytes(file.read(32)[24:], "little")
    if end > HEADER_LIMIT:
        got = f"{end} bytes with a config of this many layers"
        raise ConfigError("config.json", "num_hidden_layers", f"a header of {HEADER_LIMIT} bytes", got)


def record_agreement(path: Path, agreement: Mapping[str, Any]) -> None:
    """Writes the findings of the parity gate into the manifest of a .litertlm, in the room kept for them."""
    with path.open("r+b") as file:
        head = file.read(HEADER_LIMIT)
        begin = head.index(AGREEMENT_ROOM.encode())
        text = _compact(agreement)
        if len(text) > len(AGREEMENT_ROOM):
            raise ValueError(f"{len(text)} bytes for {len(AGREEMENT_ROOM)}")
        file.seek(begin)
        file.write(text.ljust(len(AGREEMENT_ROOM)).encode())


def _compact(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))
